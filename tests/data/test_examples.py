"""Example sets: what is written is what is read, in blocks or at once, and nothing inconsistent is written."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raydr.artifacts import write_artifact
from raydr.data.arrow_rows import ArrowRows
from raydr.data.examples import Example, ExampleSet, ExampleWriter, passage_table, write_examples
from raydr.errors import ArtifactError, DataError
from raydr.types import Passage, Query

PASSAGES = {f"p{n}": Passage(f"p{n}", f"text {n} “ü”", title=f"title {n}" if n % 2 else "") for n in range(9)}
EXAMPLES = [
    Example(Query("q1", "first"), ["p3"], ["p1", "p8"], [0.5, 0.25], ["model", "bm25"], [0.75]),
    Example(Query("q2", "second"), ["p8", "p2"], ["p3"]),
    Example(Query("q3", "third"), ["p0"]),
]


def written(folder: Path, examples=EXAMPLES, passages=PASSAGES) -> ExampleSet:
    with write_artifact(folder, kind="examples", config={}) as writer:
        writer.counts.update(write_examples(folder, examples, passages))
    return ExampleSet.open(folder)


def ids(examples: ExampleSet, rows) -> list[str]:
    return [examples.passage_ids[row] for row in rows]


def check(examples: ExampleSet) -> None:
    assert (len(examples), examples.num_passages) == (3, 5)
    assert examples.query_ids == ["q1", "q2", "q3"]
    for row, example in enumerate(EXAMPLES):
        assert examples.query(row) == example.query
        assert ids(examples, examples.positives(row)) == example.positives
        assert ids(examples, examples.negatives(row)) == list(example.negatives)
        assert examples.positive_scores(row).tolist() == list(example.positive_scores)
        assert examples.negative_scores(row).tolist() == list(example.negative_scores)
        assert examples.negative_sources(row) == list(example.negative_sources)
        assert examples.relevant(row).tolist() == examples.positives(row).tolist()
    rows = [4, 0, 4, 2]
    assert examples.passages(rows) == [PASSAGES[id_] for id_ in ids(examples, rows)]
    assert examples.passages(np.array([1])) == [PASSAGES[examples.passage_ids[1]]]
    assert examples.passages([]) == []


def test_what_is_written_is_read(tmp_path):
    examples = written(tmp_path / "out")
    check(examples)
    assert examples.artifact.manifest.counts == {"examples": 3, "passages": 5}
    check(pickle.loads(pickle.dumps(examples)))


def test_blocks_give_the_same_set(tmp_path):
    with write_artifact(tmp_path / "out", kind="examples", config={}), ExampleWriter(tmp_path / "out") as writer:
        for example in EXAMPLES:
            new = writer.new([*example.positives, *example.negatives, *example.positives])
            writer.add([example], passage_table([PASSAGES[id_] for id_ in new]))
        assert writer.new(["p3", "p4", "p5", "p4"]) == ["p4", "p5"]
        assert writer.counts == {"examples": 3, "passages": 5}
    check(ExampleSet.open(tmp_path / "out"))


def test_passages_of_a_relevant_document_are_relevant(tmp_path):
    texts = passage_table([PASSAGES[f"p{n}"] for n in range(6)])
    texts = texts.append_column("document_id", pa.array(["b", "a", "b", "c", "a", "b"]))
    folder = tmp_path / "out"
    with write_artifact(folder, kind="examples", config={}), ExampleWriter(folder, is_split=True) as writer:
        writer.add([Example(Query("q1", "x"), ["p0"], ["p3"]), Example(Query("q2", "y"), ["p3", "p4"])], texts)
    examples = ExampleSet.open(folder)
    assert sorted(ids(examples, examples.relevant(0))) == ["p0", "p2", "p5"]
    assert sorted(ids(examples, examples.relevant(1))) == ["p1", "p3", "p4"]
    assert ids(examples, examples.positives(1)) == ["p3", "p4"]


@pytest.mark.parametrize("is_split", [False, True])
def test_copies_of_a_relevant_passage_are_relevant(tmp_path, is_split):
    """Equal title and text under another id; and, where documents were split, what belongs to the same document."""
    passages = [Passage("a", "x", "T"), Passage("b", "x", "T"), Passage("c", "x", "other"), Passage("d", "y", "T")]
    texts, folder = passage_table(passages), tmp_path / "out"
    if is_split:
        texts = texts.append_column("document_id", pa.array(["1", "2", "3", "1"]))
    with write_artifact(folder, kind="examples", config={}), ExampleWriter(folder, is_split=is_split) as writer:
        writer.add([Example(Query("q1", "x"), ["a"]), Example(Query("q2", "y"), ["c"])], texts)
    examples = ExampleSet.open(folder)
    assert ids(examples, examples.relevant(0)) == (["a", "b", "d"] if is_split else ["a", "b"])
    assert ids(examples, examples.relevant(1)) == ["c"]
    assert ids(examples, examples.positives(0)) == ["a"]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(Query("q", "x"), []), "query 'q': an example needs a positive"),
        (Example(Query("q", "x"), ["p1"], ["p2", "p1"]), "query 'q': its passage 'p1' is a positive and a negative"),
        (Example(Query("q", "x"), ["nowhere"]), "query 'q': its passage 'nowhere' is not in the corpus"),
        (Example(Query("q", "x"), ["p1"], ["nowhere"]), "query 'q': its passage 'nowhere' is not in the corpus"),
        (Example(Query("q", "x"), ["p1"], ["p2", "p3"], [0.5]), "query 'q': 1 negative_scores for 2 passages"),
        (Example(Query("q", "x"), ["p1"], ["p2"], [], ["a", "b"]), "query 'q': 2 negative_sources for 1 passages"),
        (Example(Query("q", "x"), ["p1"], [], [], [], [1.0, 2.0]), "query 'q': 2 positive_scores for 1 passages"),
    ],
)
def test_what_is_inconsistent_is_refused(tmp_path, example, message):
    with pytest.raises(DataError, match=f"^{message}$"):
        written(tmp_path / "out", [example])
    with pytest.raises(ArtifactError, match="did not finish"):
        ExampleSet.open(tmp_path / "out")


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_rows_are_taken_from_any_batch_in_any_order(tmp_path, batch):
    table = pa.table({"id": [f"r{n}" for n in range(50)], "number": range(50)})
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    rows = ArrowRows.open(tmp_path / "t.arrow")
    wanted = np.random.default_rng(0).integers(0, 50, size=120)
    assert rows.take(wanted)["number"].to_pylist() == wanted.tolist()
    assert rows.take([49, 0], ["id"]).to_pylist() == [{"id": "r49"}, {"id": "r0"}]
    assert rows.take([], ["id"]).column_names == ["id"]
