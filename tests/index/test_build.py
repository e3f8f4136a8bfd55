"""Building: rows in corpus order whatever the files' order, resuming, refusing what does not fit, the recall report."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import open_artifact, write_artifact
from raydr.errors import ArtifactError, ConfigError
from raydr.index.build import build_index
from raydr.index.config import BM25Config, IndexConfig, RecallProbe, SearchParameters
from raydr.index.reader import IndexReader
from tests.corpora import METHOD, STAMP, as_pairs, brute_force, embedded_corpus, integers

NUM_PASSAGES = 60
IDS = [f"p{number}" for number in np.random.default_rng(5).permutation(NUM_PASSAGES)]
EMBEDDINGS = integers(NUM_PASSAGES, 6, seed=1)
QUERIES = integers(25, 6, seed=2)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    passages = {id_: {"title": f"Title {id_}", "text": f"text of {id_}", "year": 1960 + n} for n, id_ in enumerate(IDS)}
    return embedded_corpus(tmp_path_factory.mktemp("corpus"), passages, EMBEDDINGS)


@pytest.mark.parametrize("num_shards", [1, 2, 7, 60, 100])
def test_many_shards_are_one_shard_are_brute_force(embedded, tmp_path, num_shards):
    build_index(*embedded, IndexConfig(num_shards=num_shards, bm25=None), tmp_path / "index", use_ray=False)
    reader = IndexReader.open(tmp_path / "index")
    assert reader.num_shards == min(num_shards, NUM_PASSAGES)
    assert list(reader.passage_ids) == IDS
    for allowed in (None, reader.select({"year": {"gte": 1980}})):
        for k in (1, 9, 80):
            top = reader.search(QUERIES, k, allowed=allowed)
            assert as_pairs(top, IDS) == brute_force(IDS, EMBEDDINGS, QUERIES, k, allowed)


def test_many_shards_are_one_shard_for_real_numbers_too(tmp_path):
    """Sums of floats may differ in the last bit with the shape of a block; ranking and scores to 1e-6 may not."""
    rng = np.random.default_rng(4)
    embeddings, queries = (rng.standard_normal((n, 48)).astype(np.float32) for n in (500, 40))
    embedded = embedded_corpus(tmp_path / "c", {f"p{n}": "text" for n in range(500)}, embeddings)
    tops = []
    for num_shards in (1, 4):
        config = IndexConfig(num_shards=num_shards, bm25=None)
        build_index(*embedded, config, tmp_path / str(num_shards), use_ray=False)
        tops.append(IndexReader.open(tmp_path / str(num_shards)).search(queries, 20))
    np.testing.assert_array_equal(tops[0].rows, tops[1].rows)
    np.testing.assert_allclose(tops[0].scores, tops[1].scores, rtol=1e-6)
    np.testing.assert_array_equal(tops[0].rows, np.argsort(-(queries @ embeddings.T), axis=1)[:, :20])


def test_what_an_index_says_about_itself(embedded, tmp_path):
    artifact = build_index(*embedded, IndexConfig(num_shards=3), tmp_path / "index", use_ray=False)
    artifact.verify()
    reader = IndexReader.open(tmp_path / "index")
    assert (reader.encoder_version, reader.dim, reader.num_passages) == (STAMP, 6, NUM_PASSAGES)
    assert reader.method.model_dump() == METHOD
    assert artifact.manifest.counts == {"passages": NUM_PASSAGES, "shards": 3}
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [".lock", "bm25", "manifest.json", "shards"]
    assert reader.passages([59, 0])[0] == {
        "passage_id": IDS[59], "title": f"Title {IDS[59]}", "text": f"text of {IDS[59]}", "year": 2019
    }  # fmt: skip
    again = build_index(*embedded, IndexConfig(num_shards=3), tmp_path / "again", use_ray=False)
    assert again.manifest.details == artifact.manifest.details, "the same content has the same version"
    for number, config in enumerate([IndexConfig(num_shards=2), IndexConfig(num_shards=3, bm25=BM25Config(k1=0.9))]):
        other = build_index(*embedded, config, tmp_path / f"other{number}", use_ray=False)
        assert other.manifest.details["version"] != artifact.manifest.details["version"]


def test_a_moved_index_still_opens(embedded, tmp_path):
    build_index(*embedded, IndexConfig(num_shards=2), tmp_path / "index", use_ray=False)
    before = as_pairs(IndexReader.open(tmp_path / "index").search(QUERIES, 5), IDS)
    shutil.move(tmp_path / "index", tmp_path / "moved")
    assert as_pairs(IndexReader.open(tmp_path / "moved").search(QUERIES, 5), IDS) == before


def test_finished_shards_survive_an_interruption(embedded, tmp_path, monkeypatch):
    """The build dies after two of three shards; the next one keeps these two, and rebuilds a damaged one."""
    built = []
    from raydr.index import build

    real = build.build_shard

    def dying(plan):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(plan.path.name)
        return real(plan)

    monkeypatch.setattr(build, "build_shard", dying)
    config = IndexConfig(factory="IVF2,Flat", num_shards=3, recall=None)
    with pytest.raises(KeyboardInterrupt):
        build_index(*embedded, config, tmp_path / "index", use_ray=False)
    monkeypatch.undo()
    assert built == ["00000", "00001"]
    kept = tmp_path / "index" / "shards" / "00000" / "vectors.faiss"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "index" / "shards" / "00001" / "vectors.faiss").write_bytes(b"damaged")
    build_index(*embedded, config, tmp_path / "index", use_ray=False).verify()
    assert kept.stat().st_mtime_ns == stamp
    reader = IndexReader.open(tmp_path / "index")
    thorough = SearchParameters(nprobe=2)
    expected = brute_force(IDS, EMBEDDINGS, QUERIES, 5)
    found = as_pairs(reader.search(QUERIES, 5, parameters=thorough), IDS)
    assert [[score for _, score in hits] for hits in found] == [[score for _, score in hits] for hits in expected]


def test_a_finished_index_is_not_built_again(embedded, tmp_path):
    build_index(*embedded, IndexConfig(), tmp_path / "index", use_ray=False)
    stamp = (tmp_path / "index" / "manifest.json").stat().st_mtime_ns
    build_index(*embedded, IndexConfig(), tmp_path / "index", use_ray=False)
    assert (tmp_path / "index" / "manifest.json").stat().st_mtime_ns == stamp


def test_the_recall_report(tmp_path, capsys):
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((900, 8)).astype(np.float32)
    embedded = embedded_corpus(tmp_path / "c", {f"p{n}": "text" for n in range(900)}, embeddings)
    probe = RecallProbe(num_queries=50, at=(5, 20, 5000))
    recalls = {}
    for nprobe in (1, 16):
        config = IndexConfig(
            factory="IVF16,Flat", num_shards=2, recall=probe, bm25=None, search=SearchParameters(nprobe=nprobe)
        )
        artifact = build_index(*embedded, config, tmp_path / str(nprobe), use_ray=False)
        recalls[nprobe] = artifact.manifest.details["recall"]
    assert recalls[16] == {"recall@5": 1.0, "recall@20": 1.0}, "all lists visited: exact"
    assert 0.05 < recalls[1]["recall@20"] < 0.95
    assert "recall of IVF16,Flat against exact search: recall@5" in capsys.readouterr().err


def broken(embedded, tmp_path, change):
    """The embeddings with `change` made to their table."""
    corpus, embeddings = embedded
    table = pa.concat_tables(pq.read_table(file) for file in sorted(embeddings.path.glob("*.parquet")))
    with write_artifact(tmp_path / "broken", kind="embeddings", config={}) as writer:
        writer.details.update(embeddings.manifest.details)
        pq.write_table(change(table), writer.path / "part-0.parquet")
    return corpus, open_artifact(tmp_path / "broken")


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values, type=table.schema.field(name).type))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), "59 embeddings for 60 passages"),
        (lambda t: with_column(t, "position", [0, 0, *range(2, 60)]), "no embedding of position 1"),
        (
            lambda t: with_column(t, "passage_id", reversed(t["passage_id"].to_pylist())),
            "passage ids of the embeddings",
        ),
        (lambda t: with_column(t, "embedding", [[np.inf] * 6, *t["embedding"].to_pylist()[1:]]), "is not finite"),
    ],
)
def test_embeddings_that_do_not_fit_their_corpus(embedded, tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message):
        build_index(*broken(embedded, tmp_path, change), IndexConfig(bm25=None), tmp_path / "index", use_ray=False)


def test_a_factory_that_needs_more_passages(embedded, tmp_path):
    with pytest.raises(ConfigError, match="100 IVF lists cannot be trained on 60 embeddings; use at most IVF1"):
        build_index(*embedded, IndexConfig(factory="IVF100,Flat"), tmp_path / "index", use_ray=False)


def test_the_manifest_is_plain_json_without_paths_of_this_machine(embedded, tmp_path):
    build_index(*embedded, IndexConfig(), tmp_path / "index", use_ray=False)
    text = (tmp_path / "index" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["kind"] == "index"


@pytest.mark.ray
def test_ray_tasks_build_the_same_index(embedded, tmp_path, ray_cluster):
    config = IndexConfig(num_shards=3)
    local = build_index(*embedded, config, tmp_path / "local", use_ray=False)
    remote = build_index(*embedded, config, tmp_path / "ray", use_ray=True)
    assert remote.manifest.details == local.manifest.details
    assert remote.manifest.files == local.manifest.files


@pytest.mark.ray
@pytest.mark.timeout(60)
def test_shards_are_built_beside_what_holds_a_cpu_for_good(embedded, tmp_path, ray_cluster):
    import ray

    @ray.remote(num_cpus=1)
    class Served:
        def is_up(self):
            return True

    served = Served.remote()
    try:
        assert ray.get(served.is_up.remote())
        assert build_index(*embedded, IndexConfig(num_shards=1), tmp_path / "index", use_ray=True).manifest.counts
    finally:
        ray.kill(served)  # the cluster is the whole session's
