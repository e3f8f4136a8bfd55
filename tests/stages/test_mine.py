"""Mining: equal to brute force, to sentence-transformers' miner, and to itself in blocks and on Ray."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import open_artifact, write_artifact
from raydr.config import Component
from raydr.data.config import DataConfig, SplitDocuments
from raydr.data.corpus import Corpus
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest, ingest_queries
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.reader import IndexReader
from raydr.stages.config import MineConfig, SearchConfig
from raydr.stages.mine import mine_negatives, training_data
from raydr.types import Query
from tests.corpora import METHOD, WordCounts

RNG = np.random.default_rng(3)
TEXTS = {f"p{n:02d}": " ".join(RNG.choice(WordCounts.VOCABULARY, size=RNG.integers(1, 9))) for n in RNG.permutation(80)}
QUERIES = {f"q{n}": " ".join(RNG.choice(WordCounts.VOCABULARY, size=3)) for n in range(25)}
QRELS = {
    query_id: {id_: int(RNG.integers(0, 3)) for id_ in RNG.choice(list(TEXTS), size=RNG.integers(1, 5), replace=False)}
    for query_id in QUERIES
}
ENCODER = EncoderFactory(Component.model_validate(METHOD))
EMBEDDINGS = dict(zip(TEXTS, WordCounts().count(list(TEXTS.values())), strict=True))
POSITIVES = {query_id: [id_ for id_, grade in grades.items() if grade >= 1] for query_id, grades in QRELS.items()}


def write_source(folder: Path, texts=TEXTS, queries=QUERIES, qrels=QRELS) -> Path:
    """A BEIR folder with a split `train`."""
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", texts), ("queries", queries)):
        lines = [json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in rows.items()]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    lines = [f"{q}\t{p}\t{grade}\n" for q, grades in qrels.items() for p, grade in grades.items()]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def build(folder: Path, source: Path, *, split: SplitDocuments | None = None, **index):
    """Corpus, index and training queries of a source, embedded by counting words."""
    data = DataConfig(path=str(source), split="train", split_documents=split)
    corpus = ingest(data, folder / "corpus")
    with write_artifact(folder / "embed", kind="embeddings", config={}, inputs={"corpus": corpus.artifact}) as writer:
        table = pa.concat_tables(corpus.passages(["passage_id", "position", "text"]))
        counts = WordCounts().count(table["text"].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(counts.ravel()), WordCounts.dim)
        pq.write_table(table.drop_columns(["text"]).append_column("embedding", column), writer.path / "part.parquet")
        writer.details.update({"encoder_version": WordCounts.version, "dim": WordCounts.dim, "method": METHOD})
    config = IndexConfig(num_shards=3, **index)
    build_index(corpus, open_artifact(folder / "embed"), config, folder / "index", use_ray=False)
    return corpus, folder / "index", ingest_queries(data, corpus, folder / "queries")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    return build(folder, write_source(folder / "source"))


def mined(built, out, config=None, *, encoder=ENCODER, use_ray=False, **search) -> ExampleSet:
    _, index, queries = built
    settings = SearchConfig(**search)
    return ExampleSet(
        mine_negatives(index, queries, encoder, config or MineConfig(), out, use_ray=use_ray, search=settings)
    )


def as_dict(examples: ExampleSet, what: str = "negatives") -> dict[str, list[str]]:
    ids = np.array(examples.passage_ids, dtype=object)
    return {id_: ids[getattr(examples, what)(row)].tolist() for row, id_ in enumerate(examples.query_ids)}


def score(query_id: str, passage_id: str) -> float:
    return float(EMBEDDINGS[passage_id] @ WordCounts().count([QUERIES[query_id]])[0])


def ranking(query_id: str) -> list[str]:
    return sorted(TEXTS, key=lambda id_: (-score(query_id, id_), id_))


def words(index, query_id: str) -> list[str]:
    """The passages that BM25 finds, best first."""
    reader = IndexReader.open(index)
    rows = reader.search_bm25([QUERIES[query_id]], len(TEXTS)).rows[0]
    return [reader.passage_ids[row] for row in rows if row >= 0]


@pytest.mark.parametrize(("first", "last"), [(1, 80), (1, 12), (6, 30), (7, 7), (60, 200)])
def test_hits_of_the_model_within_the_ranks(built, tmp_path, first, last):
    config = MineConfig(first_rank=first, last_rank=last, num_negatives=8, fill_random=False)
    examples = mined(built, tmp_path / "out", config)
    expected = {
        query_id: [id_ for id_ in ranking(query_id)[first - 1 : last] if id_ not in own][:8]
        for query_id, own in POSITIVES.items()
        if own
    }
    assert as_dict(examples) == expected
    for row, query_id in enumerate(examples.query_ids):
        assert examples.query(row) == Query(query_id, QUERIES[query_id])
        for what, scores in (
            ("positives", examples.positive_scores(row)),
            ("negatives", examples.negative_scores(row)),
        ):
            assert scores.tolist() == [score(query_id, id_) for id_ in as_dict(examples, what)[query_id]]
        assert examples.negative_sources(row) == ["model"] * len(expected[query_id])
    assert as_dict(examples, "positives") == {query_id: own for query_id, own in POSITIVES.items() if own}
    texts = {passage.passage_id: passage.text for passage in examples.passages(range(examples.num_passages))}
    assert texts == {id_: TEXTS[id_] for id_ in texts}


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"fraction": 0.7}, lambda positive: 0.7 * positive),
        ({"margin": 2}, lambda positive: positive - 2),
        ({"max_score": 4}, lambda positive: 4),
        ({"fraction": 0.9, "margin": 1, "max_score": 6}, lambda positive: min(0.9 * positive, positive - 1, 6)),
    ],
)
def test_filters_against_false_negatives(built, tmp_path, settings, limit):
    config = MineConfig(last_rank=80, num_negatives=10, fill_random=False, **settings)
    examples = mined(built, tmp_path / "out", config)
    expected, passed = {}, 0
    for query_id, own in POSITIVES.items():
        if own:
            highest = limit(min(score(query_id, id_) for id_ in own))
            left = [id_ for id_ in ranking(query_id) if id_ not in own and score(query_id, id_) < highest]
            expected[query_id], passed = left[:10], passed + len(left)
    assert as_dict(examples) == expected
    counts = examples.artifact.manifest.counts
    removed = {name.removeprefix("removed_"): count for name, count in counts.items() if name.startswith("removed_")}
    assert set(removed) == {"relevant", "duplicate", *settings}
    assert counts["candidates"] == 80 * len(expected) == passed + sum(removed.values())
    assert removed["relevant"] == sum(map(len, POSITIVES.values()))
    assert counts["negatives"] == sum(map(len, expected.values()))
    assert counts["without_negatives"] == sum(not own for own in expected.values())
    assert counts["without_positives"] == sum(not own for own in POSITIVES.values()) > 0
    assert counts["examples"] == len(expected)


def test_bm25_needs_no_encoder(built, tmp_path):
    def no_encoder():
        raise AssertionError("words are not encoded")

    config = MineConfig(sources=["bm25"], first_rank=2, last_rank=20, num_negatives=5)
    examples = mined(built, tmp_path / "out", config, encoder=no_encoder)
    _, index, _ = built
    assert as_dict(examples) == {
        query_id: [id_ for id_ in words(index, query_id)[1:20] if id_ not in own][:5]
        for query_id, own in POSITIVES.items()
        if own
    }
    assert len(examples.negative_scores(0)) == len(examples.positive_scores(0)) == 0
    assert examples.artifact.manifest.details["encoder_version"] is None


def test_bm25_hits_are_filtered_by_the_encoders_scores(built, tmp_path):
    config = MineConfig(sources=["bm25"], last_rank=80, num_negatives=80, fraction=0.6, fill_random=False)
    examples = mined(built, tmp_path / "out", config)
    _, index, _ = built
    for query_id, found in as_dict(examples).items():
        highest = 0.6 * min(score(query_id, id_) for id_ in POSITIVES[query_id])
        left = {id_ for id_ in words(index, query_id) if score(query_id, id_) < highest} - set(POSITIVES[query_id])
        assert found == [id_ for id_ in ranking(query_id) if id_ in left]


def test_random_ones_are_uniform_and_depend_on_seed_and_query_alone(built, tmp_path):
    config = MineConfig(sources=["random"], num_negatives=7)
    found = as_dict(mined(built, tmp_path / "a", config))
    assert all(len(set(ids)) == 7 and not set(ids) & set(POSITIVES[query_id]) for query_id, ids in found.items())
    assert as_dict(mined(built, tmp_path / "b", config, query_batch=3)) == found
    others = [as_dict(mined(built, tmp_path / f"{n}", config.model_copy(update={"seed": n}))) for n in range(1, 60)]
    assert all(other != found for other in others)
    drawn = Counter(id_ for other in others for ids in other.values() for id_ in ids)
    for passage_id in TEXTS:
        shares = [7 / (80 - len(POSITIVES[q])) for q in found if passage_id not in POSITIVES[q]]
        expected = len(others) * sum(shares)
        assert abs(drawn[passage_id] - expected) < 4.5 * expected**0.5


def test_sources_take_turns(built, tmp_path):
    config = MineConfig(sources=["random", "model", "bm25"], last_rank=10, num_negatives=9)
    examples = mined(built, tmp_path / "out", config)
    for row, query_id in enumerate(examples.query_ids):
        sources, ids = examples.negative_sources(row), as_dict(examples)[query_id]
        assert len(set(ids)) == len(ids) == 9
        assert Counter(sources)["model"] >= 3
        assert Counter(sources)["random"] >= 3
        # A passage that both searches find counts as the model's, so words may have less to give.
        assert set(sources) <= {"model", "bm25", "random"}
        scores = examples.negative_scores(row).tolist()
        assert scores == sorted(scores, reverse=True) == [score(query_id, id_) for id_ in ids]


def test_queries_with_nothing_left_get_random_ones(built, tmp_path):
    config = MineConfig(first_rank=1, last_rank=3, fraction=0.5, num_negatives=4, fill_random=False)
    bare = mined(built, tmp_path / "bare", config)
    filled = mined(built, tmp_path / "filled", config.model_copy(update={"fill_random": True}))
    empty = [query_id for query_id, ids in as_dict(bare).items() if not ids]
    assert len(empty) == bare.artifact.manifest.counts["without_negatives"] > 0
    assert filled.artifact.manifest.counts["without_negatives"] == len(empty)
    got = 0
    for row, (query_id, ids) in enumerate(as_dict(filled).items()):
        if query_id not in empty:
            assert ids == as_dict(bare)[query_id]
            continue
        highest = 0.5 * min(score(query_id, id_) for id_ in POSITIVES[query_id])
        assert all(score(query_id, id_) < highest for id_ in ids), "random ones are filtered as well"
        assert set(filled.negative_sources(row)) <= {"random"}
        got += bool(ids)
    assert filled.artifact.manifest.counts["filled"] == got > 0


@pytest.mark.parametrize("query_batch", [1, 7])
def test_blocks_change_nothing(built, tmp_path, query_batch):
    config = MineConfig(sources=["model", "bm25", "random"], fraction=0.9, last_rank=20)
    whole = mined(built, tmp_path / "whole", config)
    parts = mined(built, tmp_path / "parts", config, query_batch=query_batch)
    assert parts.artifact.manifest.counts == whole.artifact.manifest.counts
    for what in ("positives", "negatives"):
        assert as_dict(parts, what) == as_dict(whole, what)


@pytest.mark.ray
def test_on_ray_the_files_are_the_same(built, tmp_path, ray_cluster):
    config = MineConfig(sources=["model", "bm25", "random"], fraction=0.9, last_rank=20)
    local = mined(built, tmp_path / "local", config)
    remote = mined(built, tmp_path / "ray", config, use_ray=True)
    assert remote.artifact.manifest.files == local.artifact.manifest.files
    assert remote.artifact.manifest.counts == local.artifact.manifest.counts


@pytest.mark.parametrize("factory", ["HNSW16", "IVF4,Flat", "SQ8,RFlat"])
def test_scores_are_those_of_the_index_whatever_its_kind(tmp_path, factory):
    built = build(tmp_path, write_source(tmp_path / "source"), factory=factory)
    examples = mined(built, tmp_path / "out", parameters={"ef_search": 100, "nprobe": 4, "rescore_factor": 8})
    for query_id, found in as_dict(examples).items():
        assert found == [id_ for id_ in ranking(query_id) if id_ not in POSITIVES[query_id]][:16]


def test_finished_examples_stay_until_something_changes(built, tmp_path):
    first = mined(built, tmp_path / "out")
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    mined(built, tmp_path / "out", query_batch=5)
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    again = mined(built, tmp_path / "out", MineConfig(seed=1))
    assert again.artifact.fingerprint != first.artifact.fingerprint


def test_deleted_passages_are_no_negatives_and_a_deleted_positive_is_an_error(tmp_path):
    built = build(tmp_path, write_source(tmp_path / "source"))
    index = built[1]
    relevant = {id_ for ids in POSITIVES.values() for id_ in ids}
    gone = [id_ for id_ in TEXTS if id_ not in relevant][:10]
    store.delete(index, gone)
    everything = MineConfig(sources=["model", "bm25", "random"], num_negatives=80, last_rank=80)
    found = as_dict(mined(built, tmp_path / "out", everything))
    for query_id, ids in found.items():
        assert set(ids) == set(TEXTS) - set(gone) - set(POSITIVES[query_id])
    query_id, ids = next((query_id, ids) for query_id, ids in POSITIVES.items() if ids)
    store.delete(index, ids[:1])
    with pytest.raises(DataError, match=f"index: lacks '{ids[0]}', which is relevant to query '.+'; it was deleted"):
        mined(built, tmp_path / "out")


@pytest.fixture(scope="module")
def built_split(tmp_path_factory):
    """Documents of one to fifty passages, and judgements that name documents."""
    folder = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(5)
    lengths = (3, 9, 20, 40, 100, 300)
    texts = {f"d{n}": " ".join(rng.choice(WordCounts.VOCABULARY, size=length)) for n, length in enumerate(lengths)}
    qrels = {"q0": {"d3": 1, "d1": 2}, "q1": {"d4": 1}, "q2": {"d4": 1, "d0": 0}}
    source = write_source(folder / "source", texts, {q: QUERIES[q] for q in qrels}, qrels)
    return build(folder, source, split=SplitDocuments(max_tokens=12, overlap_tokens=2)), qrels


def test_of_a_relevant_document_the_best_passage_is_the_positive_and_none_a_negative(built_split, tmp_path):
    built, qrels = built_split
    rows = [row for table in built[0].passages(["passage_id", "document_id", "text"]) for row in table.to_pylist()]
    document_of = {row["passage_id"]: row["document_id"] for row in rows}
    texts = {row["passage_id"]: row["text"] for row in rows}
    examples = mined(built, tmp_path / "out", MineConfig(num_negatives=5, last_rank=len(rows)))
    for row, (query_id, positives) in enumerate(as_dict(examples, "positives").items()):
        query = WordCounts().count([QUERIES[query_id]])[0]
        scores = {id_: float(WordCounts().count([text])[0] @ query) for id_, text in texts.items()}
        relevant = [document for document, grade in qrels[query_id].items() if grade >= 1]
        assert [document_of[id_] for id_ in positives] == relevant
        for passage_id, document in zip(positives, relevant, strict=True):
            assert scores[passage_id] == max(scores[id_] for id_ in texts if document_of[id_] == document)
        others = [id_ for id_ in texts if document_of[id_] not in relevant]
        assert as_dict(examples)[query_id] == sorted(others, key=lambda id_: (-scores[id_], id_))[:5]
        never = {examples.passage_ids[place] for place in examples.relevant(row)}
        assert never == {id_ for id_ in examples.passage_ids if document_of[id_] in relevant}
        assert never >= set(positives)


def test_without_scores_the_first_passage_is_the_positive(built_split, tmp_path):
    built, qrels = built_split
    examples = mined(built, tmp_path / "out", MineConfig(sources=["random"], num_negatives=60))
    relevant = {q: [document for document, grade in grades.items() if grade >= 1] for q, grades in qrels.items()}
    assert as_dict(examples, "positives") == {q: [f"{document}#0" for document in ids] for q, ids in relevant.items()}
    for query_id, ids in as_dict(examples).items():
        assert not {id_.rpartition("#")[0] for id_ in ids} & set(relevant[query_id])


def test_what_cannot_be_mined_says_why(built, built_split, tmp_path):
    _, index, queries = built
    with pytest.raises(ArtifactError, match=r"index: not an index of the corpus of .*queries; build the index again"):
        mine_negatives(index, built_split[0][2], ENCODER, MineConfig(), tmp_path / "out", use_ray=False)

    class Other(WordCounts):
        version = "other-2"

    with pytest.raises(ArtifactError, match="made by encoder word-count-1, but these queries' encoder is other-2"):
        mine_negatives(index, queries, Other, MineConfig(), tmp_path / "out", use_ray=False)
    source = write_source(tmp_path / "source", qrels={"q0": {"p00": 0}, "q1": {"p01": -1}})
    without_words = build(tmp_path, source, bm25=None)
    with pytest.raises(DataError, match="no query has a passage of relevance 1 or more"):
        mined(without_words, tmp_path / "out")
    with pytest.raises(
        ArtifactError, match=r"built without BM25, which mine.sources names; build it with index.bm25=\{"
    ):
        mined(without_words, tmp_path / "out", MineConfig(sources=["bm25"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "name at least one of model, bm25, random"),
        ({"sources": ["bm25", "bm25"]}, r"each may be named once, got \['bm25', 'bm25'\]"),
        ({"first_rank": 5, "last_rank": 4}, r"first_rank \(5\) must not be greater than last_rank \(4\)"),
        ({"fraction": 1.1}, "less than or equal to 1"),
        ({"margin": -0.1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_find_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MineConfig(**settings)


def test_judgements_of_the_wrong_split_are_not_trained_on():
    data = DataConfig(path="somewhere", qrels="test.txt", queries="all.jsonl")
    with pytest.raises(
        ConfigError, match=r"data\.qrels names the file 'test\.txt' whatever the split is.*mine\.qrels="
    ):
        training_data(data, MineConfig())
    named = training_data(data, MineConfig(qrels="train.txt"))
    assert (named.qrels, named.queries, named.split) == ("train.txt", "all.jsonl", "train")
    assert training_data(DataConfig(path="somewhere", split="test"), MineConfig(split="dev")).split == "dev"


def test_equals_the_miner_of_sentence_transformers(tmp_path, tiny_beir):
    """MiniLM and its own miner: every rank, so that its order of filtering and ranking does not matter."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    from raydr.encoders.checkpoint import locate
    from raydr.stages.config import EmbedConfig
    from raydr.stages.embed import embed_corpus

    zero_shot = Component(import_path="raydr.methods.zero_shot:ZeroShot", args={"precision": "float32"})
    minilm = EncoderFactory(zero_shot)  # bfloat16, where it is fast, would swap near ties
    data = DataConfig(path=str(tiny_beir), split="test")
    corpus: Corpus = ingest(data, tmp_path / "corpus")
    embed = embed_corpus(corpus, minilm, EmbedConfig(), tmp_path / "embed", use_ray=False, method=minilm.method)
    build_index(corpus, embed, IndexConfig(), tmp_path / "index", use_ray=False)
    queries = ingest_queries(data, corpus, tmp_path / "queries")
    examples = ExampleSet(
        mine_negatives(
            tmp_path / "index",
            queries,
            minilm,
            MineConfig(last_rank=10, num_negatives=4, fraction=0.6, margin=0.1),
            tmp_path / "out",
            use_ray=False,
        )
    )
    texts = {
        row["passage_id"]: f"{row['title']} {row['text']}".strip()
        for table in corpus.passages()
        for row in table.to_pylist()
    }
    pairs = [
        {"query": query.text, "answer": texts[id_]}
        for query in queries.queries()
        for id_ in queries.qrels()[query.query_id]
    ]
    theirs = mine_hard_negatives(
        Dataset.from_list(pairs),
        SentenceTransformer(str(locate("minilm")), device="cpu"),
        corpus=list(texts.values()),
        num_negatives=4,
        range_max=10,
        relative_margin=0.4,
        absolute_margin=0.1,
        output_format="triplet",
        verbose=False,
    )
    expected: dict[str, list[str]] = {}
    for row in theirs:
        found = expected.setdefault(row["query"], [])
        found += [row["negative"]] if row["negative"] not in found else []
    ours = {examples.query(row).text: [texts[id_] for id_ in ids] for row, ids in enumerate(as_dict(examples).values())}
    assert ours == expected
    assert any(ours.values())
