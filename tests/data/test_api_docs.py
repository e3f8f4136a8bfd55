"""The demo corpus: names followed through a small package tree, docstrings split, and properties on real packages."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from raydr.data.api_docs import build_api_docs, split_docstring
from raydr.data.api_objects import ApiObject, read_objects
from raydr.data.api_sources import find_files
from raydr.errors import ArtifactError, DataError

LONG = "It walks over every element once, keeps a running total in double precision and divides at the end."

FILES = {
    "fake/__init__.py": """
        from ._core import mean, Base as _Base
        from .shapes import *
        from .shapes import Square as Quadrat
        from os import path
        if True:
            from .lazy import late
        raise RuntimeError("reading must not import")
    """,
    "fake/_core.py": f'''
        def mean(values: list[float], axis: int = 0, *, keep: bool = False) -> float:
            """Compute the arithmetic mean of the values. More in the same paragraph.

            {LONG}
            """

        def hidden(a):
            """Compute something that nobody outside ever sees.

            {LONG}
            """

        class Base:
            def area(self, scale=1):
                """Measure the surface that the shape covers.

                The surface is the integral of one over the inside of the shape, in square units of length.
                """
    ''',
    "fake/shapes.py": f'''
        __all__ = ["Square", "Circle", "copy_of_mean"]
        from ._core import Base
        from ._docs import add_newdoc

        class Square(Base):
            """Represent a square by the length of its side.

            All four sides are equally long and all four angles are right ones, as the ancient Greeks knew.
            """

            def __init__(self, side, name="square"):
                pass

            @property
            def side(self):
                """Tell how long each of the sides is.

                The length is a positive number in the unit that was chosen when the square was made by its maker.
                """

            @staticmethod
            def unit(system):
                """Make the square of side one.

                The unit square is the one from which every other square comes by scaling it with a positive number.
                """

            def _private(self):
                """Nobody should ever find this one here.

                {LONG}
                """

        class Circle(Base):
            """Short one."""

        def copy_of_mean(values, axis=0, *, keep=False):
            """Compute the arithmetic mean of the values. More in the same paragraph.

            {LONG}
            """

        def not_exported():
            """Compute a thing that the module does not list in its exports.

            The list of exports of this module names two classes and one function, and this function is not among them.
            """
    ''',
    "fake/lazy.py": '''
        def late(x):
            """Repeat the argument a few times more.

            To repeat the argument a few times more is what this does, and the summary is thereby given away to all.
            """
    ''',
    "fake/_docs.py": '''
        add_newdoc("fake._native", "fast", """
            fast(a, /, b=(1, 2),
                 out=None) -> array

            Do the same in machine code without the interpreter.

            The loop is unrolled eight times and uses the vector registers of the processor where there are any.
            """)
    ''',
    "fake/broken.py": "def template({{ name }}):\n",
    "fake/tests/test_mean.py": f'''
        def test_mean():
            """Check that the tests of a package stay outside.

            {LONG}
            """
    ''',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(content))
    return tmp_path / "site"


def read(tree: Path) -> dict[str, ApiObject]:
    return {item.name: item for item in read_objects("fake", find_files("fake", [tree]))}


def test_names_are_the_shortest_public_ones(tree):
    assert set(read(tree)) == {
        "fake.mean",  # written in a private module, re-exported
        "fake.Square.side",
        "fake.Square.unit",
        "fake.Square",
        "fake.Circle",
        "fake.Circle.area",  # inherited from a private base: under the shortest heir's name, once
        "fake.copy_of_mean",
        "fake.late",
        "fake.fast",
    }  # fake.Square, not its other name fake.Quadrat


def test_signatures_are_without_annotations_and_self(tree):
    items = read(tree)
    assert items["fake.mean"].signature == "fake.mean(values, axis=0, *, keep=False)"
    assert items["fake.Square"].signature == "fake.Square(side, name='square')"
    assert items["fake.Circle.area"].signature == "fake.Circle.area(scale=1)"
    assert items["fake.Square.unit"].signature == "fake.Square.unit(system)"
    assert items["fake.Square.side"].signature == "fake.Square.side"
    assert items["fake.fast"].signature == "fake.fast(a, /, b=(1, 2), out=None)"


def test_kind_module_and_source_say_where_it_is(tree):
    item = read(tree)["fake.Square.side"]
    assert (item.kind, item.module) == ("property", "fake.shapes")
    file, _, line = item.source.partition(":")
    assert "def side" in "".join((tree / file).read_text().splitlines()[int(line) - 1 : int(line) + 1])


def test_nothing_is_imported(tree):
    read(tree)
    assert not [name for name in sys.modules if name.split(".")[0] == "fake"]


@pytest.mark.parametrize(
    ("doc", "summary", "text"),
    [
        ("Do it.", "Do it.", ""),
        ("Do it\nin two lines.\n\nThe rest.", "Do it in two lines.", "The rest."),
        ("First. Second stays.\n\nThe rest.", "First.", "Second stays.\n\nThe rest."),
        ("See e.g. Knuth for it.\n\nRest.", "See e.g. Knuth for it.", "Rest."),
        ("Like :func:`~numpy.mean` of ``x``.\n\nRest.", "Like numpy.mean of x.", "Rest."),
        (".. deprecated:: 2.0\n   gone\n\nDo it.\n\nRest.", "Do it.", "Rest."),
        ("Parameters\n----------\nx : int", "", "Parameters\nx : int"),
        ("Args:\n    x: an int", "", "Args:\nx: an int"),
        ("Do it:\n- one\n- two", "Do it:", "- one\n- two"),
        ("", "", ""),
    ],
)
def test_a_docstring_is_split_into_summary_and_the_rest(doc, summary, text):
    assert split_docstring(doc) == (summary, text)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def qrels(folder: Path) -> dict[str, set[str]]:
    judged: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        header, *lines = (folder / "qrels" / f"{split}.tsv").read_text().splitlines()
        assert header == "query-id\tcorpus-id\tscore"
        for line in lines:
            query_id, passage_id, grade = line.split("\t")
            assert grade == "1"
            judged.setdefault(query_id, set()).add(passage_id)
    return judged


def test_the_corpus_of_a_small_package(tree, tmp_path):
    report = build_api_docs(tmp_path / "out", packages=["fake"], search_path=[tree])
    passages = {row["_id"]: row for row in rows(report.path / "corpus.jsonl")}
    queries = {row["text"]: row["_id"] for row in rows(report.path / "queries.jsonl")}
    # Circle has no text; copy_of_mean says what mean says and is collapsed into it.
    assert "fake.Circle" not in passages
    assert "fake.copy_of_mean" not in passages
    assert passages["fake.mean"]["text"] == f"More in the same paragraph.\n\n{LONG}"
    assert passages["fake.mean"]["title"] == "fake.mean(values, axis=0, *, keep=False)"
    assert passages["fake.mean"]["package"] == "fake"
    mean_query = queries["Compute the arithmetic mean of the values."]
    assert qrels(report.path)[mean_query] == {"fake.mean"}
    # `late` repeats its summary in its text: the passage stays, the query does not.
    assert "fake.late" in passages
    assert "Repeat the argument a few times more." not in queries
    assert report.left_out["summary repeated in its own passage"] == 1
    assert report.left_out["same or nearly the same documentation"] == 1
    assert report.passages == {"fake": len(passages)}


def test_a_shared_summary_has_all_its_objects_as_relevant(tmp_path):
    body = "def {name}():\n    '''Close the thing that was opened before.\n\n    {text}\n    '''\n"
    texts = {
        "one": "Files are flushed first and the descriptor goes back to the operating system, which may reuse it soon.",
        "two": "Sockets tell their peer that nothing more will come, wait for its answer, and only then free the port.",
    }
    (tmp_path / "pair.py").write_text("".join(body.format(name=n, text=t) for n, t in texts.items()))
    report = build_api_docs(tmp_path / "out", packages=["pair"], search_path=[tmp_path])
    assert list(qrels(report.path).values()) == [{"pair.one", "pair.two"}]


def test_an_existing_corpus_is_reused_and_other_settings_replace_it(tree, tmp_path):
    out = tmp_path / "out"
    first = build_api_docs(out, packages=["fake"], search_path=[tree])
    written = (out / "corpus.jsonl").stat().st_mtime_ns
    assert build_api_docs(out, packages=["fake"], search_path=[tree]) == first
    assert (out / "corpus.jsonl").stat().st_mtime_ns == written
    build_api_docs(out, packages=["fake"], search_path=[tree], size=2)
    assert len(rows(out / "corpus.jsonl")) == 2


def test_a_folder_of_somebody_else_is_refused(tree, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="did not make"):
        build_api_docs(tmp_path / "out", packages=["fake"], search_path=[tree])


def test_no_such_package_says_so(tmp_path):
    with pytest.raises(DataError, match="no documented Python packages among nowhere"):
        build_api_docs(tmp_path / "out", packages=["nowhere"], search_path=[tmp_path])


def test_the_size_is_checked(tmp_path):
    with pytest.raises(DataError, match="size"):
        build_api_docs(tmp_path / "out", size=0)


REAL = ["numpy", "pydantic", "requests", "httpx"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_api_docs(tmp_path_factory.mktemp("api") / "out", size=600, packages=REAL).path


def test_real_packages_are_balanced(real):
    counts: dict[str, int] = {}
    for row in rows(real / "corpus.jsonl"):
        counts[row["package"]] = counts.get(row["package"], 0) + 1
    assert sum(counts.values()) == 600
    assert set(counts) == set(REAL)
    # Nobody has more than one more than another, except where a smaller one gave all it had.
    assert max(counts.values()) - sorted(counts.values())[-2] <= 1


def test_real_queries_are_held_out_of_their_passages(real):
    passages = {row["_id"]: row for row in rows(real / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in rows(real / "queries.jsonl")}
    judged = qrels(real)
    assert set(judged) == set(queries)
    assert len(queries) > 300
    for query_id, relevant in judged.items():
        for passage_id in relevant:
            text = " ".join(passages[passage_id]["text"].split())
            assert queries[query_id] not in text
            assert 1 <= len(relevant) <= 4
    assert "numpy.mean" in passages
    assert queries["summary:numpy.mean"] == "Compute the arithmetic mean along the specified axis."


def test_real_splits_are_apart_and_of_the_promised_size(real):
    parts = {s: {line.split("\t")[0] for line in (real / "qrels" / f"{s}.tsv").read_text().splitlines()[1:]}
             for s in ("train", "dev", "test")}  # fmt: skip
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["dev"]
    assert not parts["dev"] & parts["test"]
    total = sum(map(len, parts.values()))
    assert 0.05 < len(parts["test"]) / total < 0.16


def test_the_same_environment_gives_the_same_bytes(real, tmp_path):
    again = build_api_docs(tmp_path / "again", size=600, packages=REAL).path
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv", "qrels/test.tsv"):
        assert (again / name).read_bytes() == (real / name).read_bytes()


def test_another_seed_gives_another_sample(real, tmp_path):
    other = build_api_docs(tmp_path / "other", size=600, packages=REAL, seed=1).path
    assert (other / "corpus.jsonl").read_bytes() != (real / "corpus.jsonl").read_bytes()
