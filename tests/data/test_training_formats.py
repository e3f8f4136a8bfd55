"""Training files: every format survives a round trip, every bad line is named, and conversions say what they lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydr.data.training_example import TrainingExample, TrainingPassage, content_id
from raydr.data.training_formats import FORMATS, convert, detect_format, validate
from raydr.data.training_readers import Lookup
from raydr.data.training_writers import corpus_record
from raydr.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
SCORE = st.floats(allow_nan=False, allow_infinity=False)


def examples(name: str) -> st.SearchStrategy[TrainingExample]:
    """Examples with everything the format keeps, and nothing else."""
    keeps = FORMATS[name].keeps
    title = TEXT | st.just("") if name in ("tevatron", "rankllm") else st.just("")
    text = TEXT.map(lambda text: " ".join(text.split())) if name == "rank_zephyr" else TEXT

    def passages(min_size: int, max_size: int) -> st.SearchStrategy[tuple[TrainingPassage, ...]]:
        def build(scored: bool) -> st.SearchStrategy[tuple[TrainingPassage, ...]]:
            score = SCORE if scored else st.none()
            ids = TEXT if "passage ids" in keeps else st.none()
            one = st.builds(TrainingPassage, text, title, ids, score)
            unique = (lambda passage: passage.passage_id) if "passage ids" in keeps else None
            return st.lists(one, min_size=min_size, max_size=max_size, unique_by=unique).map(tuple)

        # Scored together or not at all; a row of sentence-transformers and RankLLM's requests as a whole.
        if name == "rankllm" or "scores" not in keeps:
            return build(name == "rankllm")
        return build(False) if name == "sentence_transformers" else st.booleans().flatmap(build)

    judged = FORMATS[name].is_judged
    several = "several positives in one record" in keeps
    return st.builds(
        TrainingExample,
        query=text,
        query_id=TEXT if "query ids" in keeps else st.none(),
        positives=passages(1, 3 if several else 1) if judged else st.just(()),
        negatives=passages(0, 3) if judged else st.just(()),
        candidates=st.just(()) if judged else passages(1, 4),
        prompt=st.none() | TEXT if "prompts" in keeps else st.none(),
        answers=st.lists(TEXT, max_size=2).map(tuple) if "answers" in keeps else st.just(()),
    )


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=60)
def test_round_trip(name: str, data: st.DataObject) -> None:
    example = data.draw(examples(name))
    [record], lost = FORMATS[name].write(example)
    line = json.loads(json.dumps(record, ensure_ascii=False))
    corpus = {corpus_record(p)["docid"]: p for p in example.labelled or example.candidates}
    back = FORMATS[name].read(line, Lookup(corpus.get, lambda _: None))
    assert not lost
    assert back.unread == ()
    if name == "tevatron_ids" and len(corpus) < len(example.labelled):
        return  # a positive and a negative drew the same id for different texts: `convert` refuses that
    assert back == example
    assert example.features() <= FORMATS[name].keeps


ROWS = {
    "tevatron": {
        "query_id": "q1",
        "query": "which pet",
        "positive_passages": [{"docid": "d1", "title": "Cat", "text": "It purrs."}],
        "negative_passages": [{"docid": "d2", "title": "", "text": "A star."}],
        "answers": ["cat"],
    },
    "tevatron_ids": {
        "query_id": "q1",
        "query_text": "which pet",
        "query_image": None,
        "positive_document_ids": ["d1"],
        "negative_document_ids": ["d2"],
    },
    "flagembedding": {
        "query": "which pet",
        "pos": ["It purrs."],
        "neg": ["A star."],
        "pos_scores": [0.9],
        "neg_scores": [0.1],
        "prompt": "find",
    },
    "sentence_transformers": {"anchor": "which pet", "positive": "It purrs.", "negative": "A star."},
    "ms_swift": {
        "messages": [{"role": "user", "content": "which pet"}],
        "positive_messages": [[{"role": "user", "content": "It purrs."}]],
        "negative_messages": [[{"role": "user", "content": "A star."}]],
    },
    "rankllm": {
        "query": {"text": "which pet", "qid": "q1"},
        "candidates": [
            {"docid": "d1", "score": 3.0, "doc": {"text": "It purrs."}},
            {"docid": "d2", "score": 2.0, "doc": {"contents": "A star.", "title": "Sun"}},
            {"docid": "d3", "score": 1.0, "doc": {"segment": "Never judged."}},
        ],
    },
    "orders": {"query_id": "q1", "query": "which pet", "docs": ["d1", "d2"]},
    "rank_zephyr": {
        "id": "rank_0",
        "conversations": [
            {"from": "system", "value": "You rank."},
            {
                "from": "human",
                "value": "For: which pet.\n\n[A] A star.\n[B] It purrs.\n\nSearch Query: which pet.\nRank them.",
            },
            {"from": "gpt", "value": "[B] > [A]"},
        ],
    },
}


def conversation(user: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """The text is called document_text in Tevatron's README; its loader reads text, which `convert` writes."""
    rows = {"docid": "d1", "document_text": "It purrs."}, {"docid": "d2", "document_text": "A star.", "title": "Sun"}
    return write(tmp_path / "corpus.jsonl", *rows)


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_recognised(tmp_path: Path, name: str) -> None:
    assert detect_format(write(tmp_path / "in.jsonl", ROWS[name])) == name


def test_a_corpus_is_no_training_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot tell the training format from the fields"):
        validate(write(tmp_path / "corpus.jsonl", {"_id": "d", "title": "t", "text": "x"}))


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_format_converts_into_every_other(tmp_path: Path, corpus: str, source: str, target: str) -> None:
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("q1 0 d1 2\nq1 0 d2 0\n")
    if source == "rank_zephyr":  # has no ids, so those made from the texts stand for them
        query, cat, star = (content_id(text) for text in ("which pet", "It purrs.", "A star."))
        qrels.write_text(f"{query} 0 {cat} 2\n{query} 0 {star} 0\n")
    done = convert(
        write(tmp_path / "in.jsonl", ROWS[source]),
        tmp_path / "out.jsonl",
        target,
        corpus=corpus,
        target_corpus=tmp_path / "out.corpus.jsonl",
        qrels=str(qrels),
    )
    assert (done.source_format, done.num_examples) == (source, 1)
    checked = validate(
        str(tmp_path / "out.jsonl"),
        corpus=str(tmp_path / "out.corpus.jsonl") if FORMATS[target].names_passages else None,
    )
    assert (checked.format, checked.num_examples, checked.problems) == (target, 1, [])
    [row] = read(tmp_path / "out.jsonl")
    assert "which pet" in json.dumps(row)
    texts = (tmp_path / "out.corpus.jsonl").read_text() if FORMATS[target].names_passages else json.dumps(row)
    if target == "rank_zephyr":
        [example] = [FORMATS[target].read(row, Lookup(lambda _: None, lambda _: None))]
        texts = " ".join(passage.text for passage in example.candidates)
    assert texts.index("It purrs.") < texts.index("A star."), "the positive comes first"


def test_losses_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS["tevatron"], ROWS["tevatron"] | {"answers": [], "image": "x.png"})
    done = convert(source, tmp_path / "out.jsonl", "flagembedding")
    assert done.losses == {
        "query ids": 2,
        "passage ids": 2,
        "titles (joined into the text)": 2,
        "answers": 1,
        "field 'image'": 1,
    }
    assert read(tmp_path / "out.jsonl")[0] == {"query": "which pet", "pos": ["Cat It purrs."], "neg": ["A star."]}


def test_several_positives_become_several_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"query": "q", "pos": ["a", "b"], "neg": ["x", "y"]})
    done = convert(source, tmp_path / "out.jsonl", "sentence_transformers")
    assert (done.num_examples, done.num_records) == (1, 2)
    assert done.losses == {"several positives in one record": 1}
    assert read(tmp_path / "out.jsonl") == [
        {"anchor": "q", "positive": "a", "negative_1": "x", "negative_2": "y"},
        {"anchor": "q", "positive": "b", "negative_1": "x", "negative_2": "y"},
    ]


@pytest.mark.parametrize(
    ("row", "positives", "negatives", "label"),
    [
        ({"query": "q", "answer": "a"}, [("a", None)], [], None),
        ({"sentence1": "q", "sentence2": "a", "label": 1}, [("a", None)], [], None),
        ({"sentence1": "q", "sentence2": "a", "label": 0}, [], [("a", None)], None),
        ({"sentence1": "q", "sentence2": "a", "score": 0.5}, [("a", 0.5)], [], None),
        ({"anchor": "q", "positive": "a", "negative": "x", "label": 0.3}, [("a", None)], [("x", None)], 0.3),
        ({"anchor": "q", "positive": "a", "negative": "x", "label": [2, 1]}, [("a", 2.0)], [("x", 1.0)], None),
    ],
)
def test_columns_of_sentence_transformers(row: dict, positives: list, negatives: list, label: float | None) -> None:
    example = FORMATS["sentence_transformers"].read(row, Lookup(lambda _: None, lambda _: None))
    assert [(passage.text, passage.score) for passage in example.positives] == positives
    assert [(passage.text, passage.score) for passage in example.negatives] == negatives
    assert example.label == label


BAD = [
    ("tevatron", {"positive_passages": []}, "positive_passages", "is empty"),
    ("tevatron", {"positive_passages": [{"docid": "d", "text": ""}]}, "positive_passages[0].text", "is empty"),
    ("tevatron", {"negative_passages": ["d2"]}, "negative_passages[0]", "must be an object"),
    ("tevatron", {"query": None}, "query", "is missing"),
    ("tevatron_ids", {"negative_document_ids": ["d2", None]}, "negative_document_ids[1]", "must be a string"),
    ("tevatron_ids", {"positive_document_ids": ["d9"]}, "positive_document_ids[0]", "names an unknown passage"),
    ("flagembedding", {"pos": "It purrs."}, "pos", "must be a list"),
    ("flagembedding", {"neg_scores": [0.1, 0.2]}, "neg_scores", "has another length than the passages"),
    ("flagembedding", {"pos_scores": ["high"]}, "pos_scores[0]", "must be a number"),
    ("sentence_transformers", {"negative": 3}, "negative", "must be a string"),
    ("sentence_transformers", {"label": "yes"}, "label", "must be a number"),
    ("ms_swift", {"messages": [{"role": "assistant", "content": "x"}]}, "messages", "has no user message"),
    ("ms_swift", {"positive_messages": [[{"role": "user"}]]}, "positive_messages[0][0].content", "is missing"),
    ("rankllm", {"query": "which pet"}, "query", "must be an object"),
    ("rankllm", {"candidates": [{"docid": "d1", "doc": "text"}]}, "candidates[0].doc", "must be an object"),
    ("rankllm", {"candidates": []}, "candidates", "is empty"),
    ("orders", {"docs": ["d1", "d9"]}, "docs[1]", "names an unknown passage"),
    ("orders", {"docs": ["d1", "d2", "d1"]}, "docs[2]", "stands in the order already"),
    ("orders", {"docs": "d1"}, "docs", "must be a list"),
    ("orders", {"query": None}, "query", "is missing"),
    ("rank_zephyr", {"conversations": "[A]"}, "conversations", "must be a list of turns"),
    ("rank_zephyr", conversation("[A] x\nwhich pet", "[A]"), "conversations[0].value", "has no line 'Search Query"),
    (
        "rank_zephyr",
        conversation("[A] x\n[C] y\nSearch Query: q.", "[A]"),
        "conversations[0].value",
        "must show passages",
    ),
    (
        "rank_zephyr",
        conversation("[1] x\n[2] \nSearch Query: q.", "[1] > [2]"),
        "conversations[0].value",
        "has no text",
    ),
    ("rank_zephyr", conversation("[1] x\n[2] y\nSearch Query: q.", "[2]"), "conversations[1].value", "must name each"),
]


@pytest.mark.parametrize(("name", "change", "field", "reason"), BAD)
def test_validate_names_line_and_field(
    tmp_path: Path, corpus: str, name: str, change: dict, field: str, reason: str
) -> None:
    source = write(tmp_path / "in.jsonl", ROWS[name], ROWS[name] | change, "{torn", ROWS[name])
    checked = validate(source, corpus=corpus)
    assert checked.num_examples == 2
    first, second = checked.problems
    assert (first.file, first.line, first.field) == ("in.jsonl", 2, field)
    assert reason in first.reason
    assert (second.line, second.reason.split(":")[0]) == (3, "not valid JSON")
    assert str(first).startswith(f"in.jsonl, line 2, field '{field}': ")


def test_bad_lines_stop_a_conversion_or_are_listed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS["flagembedding"], {"query": "q", "pos": []})
    target = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"in\.jsonl, line 2, field 'pos': is empty"):
        convert(source, target, "tevatron")
    assert not list(tmp_path.glob("*out*")), "a failed conversion leaves nothing behind"
    done = convert(source, target, "tevatron", rejects=tmp_path / "rejects.jsonl")
    assert (done.num_examples, done.num_rejected, len(read(target))) == (1, 1, 1)
    assert read(tmp_path / "rejects.jsonl")[0]["line"] == 2


def test_conversions_name_the_argument_they_need(tmp_path: Path, corpus: str) -> None:
    source = write(tmp_path / "rank.jsonl", ROWS["rankllm"])
    with pytest.raises(DataError, match="give qrels=FILE"):
        convert(source, tmp_path / "out.jsonl", "tevatron")
    with pytest.raises(DataError, match="give target_corpus=FILE"):
        convert(source, tmp_path / "out.jsonl", "tevatron_ids")
    with pytest.raises(DataError, match="give the corpus file"):
        convert(write(tmp_path / "ids.jsonl", ROWS["tevatron_ids"]), tmp_path / "out.jsonl", "tevatron")
    with pytest.raises(DataError, match="unknown training format"):
        convert(source, tmp_path / "out.jsonl", "jsonl")


def test_a_negative_alone_cannot_become_a_positive(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"sentence1": "q", "sentence2": "a", "label": 0})
    with pytest.raises(DataError, match="line 1, field 'positives': there is none"):
        convert(source, tmp_path / "out.jsonl", "flagembedding")


def test_one_id_for_two_texts_is_refused(tmp_path: Path) -> None:
    other = json.loads(json.dumps(ROWS["tevatron"]).replace("It purrs.", "It barks."))
    source = write(tmp_path / "in.jsonl", ROWS["tevatron"], ROWS["tevatron"], other)
    with pytest.raises(DataError, match="line 3, field 'docid': two passages with different texts"):
        convert(source, tmp_path / "out.jsonl", "tevatron_ids", target_corpus=tmp_path / "c.jsonl")
    done = convert(
        source, tmp_path / "o.jsonl", "tevatron_ids", target_corpus=tmp_path / "c.jsonl", rejects=tmp_path / "r.jsonl"
    )
    assert done.num_examples == 2
    assert read(tmp_path / "c.jsonl") == [{"docid": "d1", "text": "Cat It purrs."}, {"docid": "d2", "text": "A star."}]
