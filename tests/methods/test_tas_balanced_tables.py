"""TAS-Balanced: the tables it reads, the clusters of queries, and the method that puts them together."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import write_artifact
from raydr.config import Component, validate
from raydr.data.examples import KIND, Example, ExampleSet, write_examples
from raydr.encoders.colbert import load_colbert
from raydr.errors import ConfigError, DataError
from raydr.methods.base import build_method
from raydr.methods.tas_balanced import CLUSTERS, cluster_queries
from raydr.stages.score import open_scores
from raydr.stages.supervision import read_clusters, read_pairs, write_clusters
from raydr.train.trainer import read_metrics
from raydr.types import Passage, Query
from raydr.verbs.config import RunConfig
from raydr.verbs.train import train
from tests.train.tiny import tiny_checkpoint


@pytest.fixture
def examples(tmp_path):
    """Three queries, each with a positive of its own, and six passages that are no positives."""
    made = [Example(Query(f"q{n}", f"question {n}"), [f"p{n}"], [f"n{m}" for m in range(6)]) for n in range(3)]
    ids = [f"p{n}" for n in range(3)] + [f"n{m}" for m in range(6)]
    with write_artifact(tmp_path / "examples", kind=KIND, config={}) as writer:
        write_examples(writer.path, made, {id_: Passage(id_, f"text of {id_}") for id_ in ids})
    return ExampleSet.open(tmp_path / "examples")


def pair_columns():
    return {
        "query_id": ["q2", "q0", "q2", "q0"],
        "positive_id": ["p2", "p0", "p2", "p0"],
        "negative_id": ["n5", "n0", "n1", "p1"],
        "positive_score": [9.0, 8.0, 9.0, 8.0],
        "negative_score": [1.0, -3.5, 4.0, 2.0],
        "note": ["further columns", "are", "left", "alone"],
    }


def written(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


class TestTables:
    def test_pairs_are_read_as_rows_of_the_examples(self, examples, tmp_path):
        pairs = read_pairs(written(tmp_path / "pairs.parquet", pair_columns()), examples)
        assert [examples.query_ids[row] for row in pairs.queries] == ["q2", "q0", "q2", "q0"]
        assert [examples.passage_ids[row] for row in pairs.positives] == ["p2", "p0", "p2", "p0"]
        assert [examples.passage_ids[row] for row in pairs.negatives] == ["n5", "n0", "n1", "p1"]
        assert pairs.positive_scores.tolist() == [9, 8, 9, 8]
        assert pairs.negative_scores.tolist() == [1, -3.5, 4, 2]

    def test_a_folder_of_parts_and_other_types_are_read(self, examples, tmp_path):
        (tmp_path / "pairs").mkdir()
        table = pa.table(pair_columns())
        table = table.set_column(3, "positive_score", table["positive_score"].cast(pa.float32()))
        table = table.set_column(0, "query_id", table["query_id"].dictionary_encode())
        pq.write_table(table[:3], tmp_path / "pairs" / "0.parquet")
        pq.write_table(table[3:], tmp_path / "pairs" / "1.parquet")
        whole = read_pairs(written(tmp_path / "pairs.parquet", pair_columns()), examples)
        for part, expected in zip(read_pairs(tmp_path / "pairs", examples), whole, strict=True):
            assert (part == expected).all()

    @pytest.mark.parametrize(
        ("column", "row", "value", "message"),
        [
            ("query_id", 1, "q9", r"row 2: query_id 'q9' is not in the examples"),
            ("negative_id", 3, "n9", r"row 4: negative_id 'n9' is not in the examples"),
            ("positive_id", 0, None, r"row 1: positive_id None is not in the examples"),
            ("positive_id", 0, "n0", r"row 1: positive_id 'n0' is not a positive of its query"),
            ("negative_score", 2, float("nan"), r"row 3: negative_score nan is no finite number"),
            ("positive_score", 2, None, r"row 3: positive_score None is no finite number"),
            ("positive_score", 0, float("inf"), r"row 1: positive_score inf is no finite number"),
        ],
    )
    def test_what_cannot_be_used_is_refused_with_its_row(self, examples, tmp_path, column, row, value, message):
        columns = pair_columns()
        columns[column][row] = value
        with pytest.raises(DataError, match=message):
            read_pairs(written(tmp_path / "pairs.parquet", columns), examples)

    def test_missing_columns_and_files_are_named(self, examples, tmp_path):
        columns = {name: values for name, values in pair_columns().items() if name != "negative_score"}
        with pytest.raises(DataError, match=r"pairs\.parquet: has no column negative_score; it has query_id"):
            read_pairs(written(tmp_path / "pairs.parquet", columns), examples)
        with pytest.raises(DataError, match=r"none\.parquet: cannot be read"):
            read_pairs(tmp_path / "none.parquet", examples)
        with pytest.raises(DataError, match=r"pairs\.parquet: cannot be read"):
            read_pairs(written(tmp_path / "pairs.parquet", {**pair_columns(), "negative_score": ["a"] * 4}), examples)
        (tmp_path / "text.parquet").write_text("not a table")
        with pytest.raises(DataError, match=r"text\.parquet: cannot be read"):
            read_clusters(tmp_path / "text.parquet", examples)

    def test_clusters_go_by_id(self, examples, tmp_path):
        write_clusters(tmp_path / "clusters.parquet", ["other", "q2", "q0"], np.array([4, 7, 5]))
        assert read_clusters(tmp_path / "clusters.parquet", examples).tolist() == [5, -1, 7]


class TestClustering:
    @pytest.fixture
    def faiss(self):
        return pytest.importorskip("faiss")

    @pytest.mark.parametrize("spherical", [True, False])
    def test_every_query_is_in_the_cluster_of_its_nearest_centroid(self, faiss, spherical):
        rng = np.random.default_rng(0)
        centres = 3 * rng.normal(size=(20, 16))
        embeddings = (centres[np.arange(1000) % 20] + rng.normal(size=(1000, 16))).astype(np.float32)
        clusters = cluster_queries(embeddings, num_clusters=20, spherical=spherical, seed=3)
        assert (clusters == cluster_queries(embeddings, num_clusters=20, spherical=spherical, seed=3)).all()
        assert set(clusters) == set(range(20))
        centroids = np.stack([embeddings[clusters == label].mean(axis=0) for label in range(20)])
        if spherical:
            nearest = (embeddings @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T).argmax(axis=1)
        else:
            nearest = np.linalg.norm(embeddings[:, None] - centroids, axis=2).argmin(axis=1)
        assert (nearest == clusters).mean() > 0.98

    def test_spherical_goes_by_direction_and_euclidean_by_place(self, faiss):
        rng = np.random.default_rng(0)
        is_long, is_left = np.repeat([0, 0, 1, 1], 20), np.repeat([0, 1, 0, 1], 20)
        vectors = np.where(is_long, 100, 1)[:, None] * np.stack([np.ones(80), 0.2 - 0.4 * is_left], axis=1)
        embeddings = (vectors + 0.001 * rng.normal(size=vectors.shape)).astype(np.float32)
        by_direction, by_place = (cluster_queries(embeddings, num_clusters=2, spherical=s) for s in (True, False))
        assert len({*zip(by_direction, is_left, strict=True)}) == 2
        assert len({*zip(by_place, is_long, strict=True)}) == 2

    def test_more_clusters_than_queries_are_refused(self):
        with pytest.raises(ConfigError, match="num_clusters: 3 clusters of 2 queries"):
            cluster_queries(np.eye(2, dtype=np.float32), num_clusters=3)


def method(**args):
    return build_method(Component(import_path="raydr.methods.tas_balanced:TasBalanced", args=args))


class TestMethod:
    def test_has_the_papers_settings(self):
        config = method().config
        assert (config.pooling, config.normalize) == ("cls", False)
        assert (config.max_query_tokens, config.max_passage_tokens) == (30, 200)
        assert (config.clusters_per_batch, config.num_bins, config.in_batch_weight) == (1, 10, 0.75)
        assert config.spherical
        assert method(in_batch_weight=0).build_objective().gather
        assert not method(in_batch_weight=0, gather=False).build_objective().gather
        with pytest.raises(ConfigError, match="colbert: name the folder of a trained ColBERT"):
            method().build_objective()

    def test_batches_from_the_tables(self, examples, tmp_path):
        tables = {
            "pairs": str(written(tmp_path / "pairs.parquet", pair_columns())),
            "clusters": str(tmp_path / "clusters.parquet"),
        }
        write_clusters(tables["clusters"], ["q0", "q2"], np.array([3, 3]))
        for sampling, label in (("tas_balanced", 3), ("tas", 3), ("random", -1)):
            sampler = method(**tables, sampling=sampling).build_batches(examples, batch_size=2, seed=0)
            for batch in islice(sampler, 10):
                assert {group.query for group in batch} == {0, 2}
                assert {group.cluster for group in batch} == {label}
                for query, (positive, negative), scores, *_ in batch:
                    ids = (examples.query_ids[query], examples.passage_ids[positive], examples.passage_ids[negative])
                    columns = pair_columns()
                    row = [
                        *zip(columns["query_id"], columns["positive_id"], columns["negative_id"], strict=True)
                    ].index(ids)
                    assert scores == (columns["positive_score"][row], columns["negative_score"][row])

    def test_tables_have_to_be_named(self, examples, tmp_path):
        with pytest.raises(ConfigError, match="pairs: "):
            method().build_batches(examples, batch_size=2, seed=0)
        pairs = str(written(tmp_path / "pairs.parquet", pair_columns()))
        with pytest.raises(ConfigError, match="clusters: "):
            method(pairs=pairs).build_batches(examples, batch_size=2, seed=0)


def run_config(tmp_path, tiny_beir) -> dict:
    model = tiny_checkpoint(tmp_path / "model")
    (tiny_beir / "qrels/train.tsv").write_text((tiny_beir / "qrels/test.tsv").read_text())
    return {
        "out": str(tmp_path / "out"),
        "runtime": "local",
        "data": {"path": str(tiny_beir), "split": "test"},
        "method": {
            "import_path": "raydr.methods.tas_balanced:TasBalanced",
            "args": {
                "model": str(model),
                "precision": "float32",
                "backend": "torch",
                "num_threads": 1,
                "num_clusters": 2,
                "max_passage_tokens": 48,
                "cross_encoder": {
                    "import_path": "raydr.methods.cross_encoder:CrossEncoderRanker",
                    "args": {"model": str(model), "max_pair_tokens": 48, "num_negatives": 2},
                },
                "cross_encoder_steps": 2,
                "colbert_steps": 2,
            },
        },
        "index": {"factory": "Flat", "bm25": None},
        "mine": {"num_negatives": 6},
        "train": {"batch_size": 2, "worker_cpus": 0.5, "max_steps": 3, "learning_rate": 1e-3},
    }


def test_what_a_setting_changes_is_made_again_and_nothing_else(tmp_path, tiny_beir, instant_training, made):
    settings = run_config(tmp_path, tiny_beir)
    args = settings["method"]["args"]

    def fitted() -> set[str]:
        config = validate(RunConfig, settings, where="test")
        train(config)
        return made(config.out)

    start = {"corpus", "queries_train", "base/embed", "base/index", "examples"}
    taught = {"colbert", "train", "method"}
    assert fitted() == start | {"cross-encoder", "scores", "clusters"} | taught
    assert fitted() == set()
    for section, change, remade in (
        (args, {"cross_encoder_steps": 3}, {"cross-encoder", "scores"} | taught),
        (args, {"colbert_steps": 3}, taught),
        (args, {"spherical": False}, {"clusters", "train", "method"}),
        (settings["train"], {"weight_decay": 0.1}, {"cross-encoder", "scores"} | taught),
    ):
        section.update(change)
        assert fitted() == remade, change


@pytest.mark.ray
@pytest.mark.slow
def test_the_whole_training_is_one_run(ray_cluster, tmp_path, tiny_beir):
    """Cross-encoder, scores, ColBERT, clusters, student; run again, everything is there already."""
    config = validate(RunConfig, run_config(tmp_path, tiny_beir), where="test")
    artifact = train(config)
    method = Component.model_validate(artifact.manifest.details["method"])
    assert method.build().encoder().dim == 48
    records = read_metrics(config.out / "train/metrics.jsonl")
    assert records[-1]["step"] == 3
    assert {"pairwise", "in_batch"} <= records[-1].keys()
    examples = ExampleSet.open(config.out / "examples")
    clusters = read_clusters(config.out / "clusters" / CLUSTERS, examples)
    assert set(clusters) == {0, 1}
    pairs, scores = read_pairs(config.out / "scores", examples), open_scores(config.out / "scores", examples)
    for query, positive, negative, positive_score, negative_score in zip(
        *(column.tolist() for column in pairs), strict=True
    ):
        place = examples.positives(query).tolist().index(positive)
        assert positive_score == scores[query][place]
        place = len(examples.positives(query)) + examples.negatives(query).tolist().index(negative)
        assert negative_score == scores[query][place]
    assert load_colbert(str(config.out / "colbert/model")).linear.weight.shape == (48, 48)
    assert train(config).manifest.created_at == artifact.manifest.created_at
