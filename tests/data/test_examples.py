"""Example sets: what is written is what is read, in blocks or at once, and nothing inconsistent is written."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raydr.artifacts import write_artifact
from raydr.data.arrow_rows import ArrowRows
from raydr.data.examples import Example, ExampleSet, ExampleWriter, QueryLabels, write_examples
from raydr.data.passages import passage_table
from raydr.errors import ArtifactError, DataError
from raydr.types import Passage, Query
from tests import pictures

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


PICTURES = {p.passage_id: p for p in pictures.PASSAGES}
LABELS = QueryLabels(
    has_pictures=True,
    instructions={"q1": ["Find a picture.", "Which picture is it?"]},
    tasks={"q1": "text to image", "q2": "image to text"},
    copies={"q2": 3},
)


def with_pictures(folder: Path) -> ExampleSet:
    examples = [
        Example(Query("q1", "rose", None, "Find a picture."), ["p-red"], ["p-blue", "rose", "p-red-again"]),
        Example(Query("q2", "", pictures.picture("blue")), ["sea"], ["p-green"]),
    ]
    with write_artifact(folder, kind="examples", config={}) as writer:
        writer.counts.update(write_examples(folder, examples, PICTURES, labels=LABELS))
    return ExampleSet.open(folder)


def test_pictures_and_labels_are_read_as_they_were_written(tmp_path):
    examples = with_pictures(tmp_path / "out")
    assert examples.query(0) == Query("q1", "rose", None, "Find a picture.")
    assert examples.query(1) == Query("q2", "", pictures.picture("blue"), "")
    assert examples.has_instructions
    assert [examples.instructions(row) for row in (0, 1)] == [["Find a picture.", "Which picture is it?"], []]
    assert [examples.task(row) for row in (0, 1)] == ["text to image", "image to text"]
    assert [examples.copies(row) for row in (0, 1)] == [1, 3]
    assert examples.passages(range(examples.num_passages)) == [PICTURES[id_] for id_ in examples.passage_ids]
    check_is_plain(written(tmp_path / "texts"))


def check_is_plain(examples: ExampleSet) -> None:
    """A set of texts has the columns that it had before there were pictures."""
    lists = ["positives", "negatives", "positive_scores", "negative_scores", "negative_sources"]
    assert examples._queries.column_names == ["query_id", "text", *lists]
    assert examples._passages.table.column_names == ["passage_id", "title", "text"]
    assert not examples.has_instructions
    assert (examples.instructions(0), examples.task(0), examples.copies(0)) == ([], None, 1)


def test_only_equal_pictures_are_copies(tmp_path, monkeypatch):
    """All pictures have the same empty text; and no picture has to be read to find out."""
    examples = with_pictures(tmp_path / "out")
    monkeypatch.setattr(ArrowRows, "take", None)
    assert sorted(ids(examples, examples.relevant(0))) == ["p-red", "p-red-again"]
    assert ids(examples, examples.relevant(1)) == ["sea"]


def test_blocks_may_have_no_picture(tmp_path):
    folder = tmp_path / "out"
    with write_artifact(folder, kind="examples", config={}), ExampleWriter(folder, has_pictures=True) as writer:
        for id_ in ("rose", "p-red", "meadow"):
            writer.add([Example(Query(f"to {id_}", "x"), [id_])], passage_table([PICTURES[id_]]))
    examples = ExampleSet.open(folder)
    assert examples.passages([0, 1, 2]) == [PICTURES[id_] for id_ in ("rose", "p-red", "meadow")]
    assert examples.query(0).image is None
