"""M-BEIR's layout, on a folder written by hand as UniIR's files are: pools, splits, instructions, copies, positives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.files import Folder
from raydr.data.images import ImageConfig, prepare_image
from raydr.data.ingest import ingest, ingest_queries
from raydr.data.mbeir import dataset_name, modality_word, read_instructions
from raydr.data.passages import passages_of
from raydr.data.positives import positive_examples
from raydr.data.sources import open_source
from raydr.errors import DataError
from raydr.stages.config import MineConfig
from raydr.stages.mine import training_data
from raydr.types import Passage, Query
from tests.pictures import COLOURS, picture

IMAGES = ImageConfig(size=16)
STORED = {colour: prepare_image(picture(colour), IMAGES) for colour in COLOURS}
INSTRUCTIONS = """query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3
text\timage\tMSCOCO\t9\tFind the picture. \tWhich picture is it?\t
image\ttext\tMSCOCO\t9\tFind a caption.\t\t
image,text\ttext\tOVEN\t5\tFind a paragraph.\t\t
image,text\timage,text\tOVEN\t5\tFind a paragraph with its picture.\t\t
text\ttext\tWebQA\t2\tFind the answer.\t\t
"""


def candidate(did: str, text: str | None = None, colour: str | None = None, modality: str | None = None) -> dict:
    path = None if colour is None else f"mbeir_images/{colour}.png"
    declared = modality or ",".join(name for name, value in (("image", colour), ("text", text)) if value)
    return {"did": did, "txt": text, "img_path": path, "modality": declared, "src_content": None}


def query(qid: str, positives: list, text: str | None = None, colour: str | None = None, modality="") -> dict:
    path = None if colour is None else f"mbeir_images/{colour}.png"
    declared = modality or ",".join(name for name, value in (("image", colour), ("text", text)) if value)
    return {
        "qid": qid,
        "query_txt": text,
        "query_img_path": path,
        "query_modality": declared,
        "query_src_content": None,
        "pos_cand_list": positives,
        "neg_cand_list": [],
    }


TEST_POOL = [
    candidate("2:1", "An answer"),
    candidate("5:1", "About red things"),
    candidate("5:2", "A red thing", "red"),
    candidate("6:1", "From another dataset", "green"),
    candidate("9:1", None, "red"),
    candidate("9:2", "a blue square"),
    candidate("9:3", None, "blue"),
]
TRAIN_POOL = [TEST_POOL[3], candidate("9:11", None, "yellow"), candidate("5:11", "About yellow"), TEST_POOL[1]]
COCO = [query("9:100", ["9:1"], "a red square"), query("9:101", ["9:2"], None, "blue")]
OVEN = [query("5:100", ["6:1", "5:2", "5:1", "5:2"], "what is this", "red", "text,image")]
UNION = [
    query("9:200", ["9:11"], "a yellow square"),
    query("5:200", ["6:1", "5:11"], "what is it", "yellow"),
    query("9:200", ["9:11"], "a yellow square"),
    query("9:200", ["9:11"], "a yellow square"),
]


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "M-BEIR"
    (root / "mbeir_images").mkdir(parents=True)
    for colour in COLOURS:
        (root / f"mbeir_images/{colour}.png").write_bytes(picture(colour))
    lines(root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl", TEST_POOL)
    lines(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", TRAIN_POOL)
    lines(root / "cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl", [TEST_POOL[4], TEST_POOL[6]])
    lines(root / "query/test/mbeir_mscoco_task0_test.jsonl", COCO)
    lines(root / "query/test/mbeir_oven_task6_test.jsonl", OVEN)
    lines(root / "query/union_train/mbeir_union_up_train.jsonl", UNION)
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(INSTRUCTIONS)
    return root


def ingested(folder: Path, out: Path, **settings) -> Corpus:
    return ingest(DataConfig(path=str(folder), images=IMAGES, **settings), out)


def test_the_test_split_over_the_global_pool(folder, tmp_path):
    corpus = ingested(folder, tmp_path / "out")
    (table,) = corpus.passages()
    assert passages_of(table) == [
        Passage("2:1", "An answer"),
        Passage("5:1", "About red things"),
        Passage("5:2", "A red thing", "", STORED["red"]),
        Passage("6:1", "From another dataset", "", STORED["green"]),
        Passage("9:1", "", "", STORED["red"]),
        Passage("9:2", "a blue square"),
        Passage("9:3", "", "", STORED["blue"]),
    ]
    assert corpus.metadata_columns == ["modality", "src_content", "dataset"]
    assert table["dataset"].to_pylist() == ["webqa", "oven", "oven", "infoseek", *["mscoco"] * 3]
    assert corpus.queries() == [
        Query("9:100", "a red square", None, "Find the picture."),
        Query("9:101", "", STORED["blue"], "Find a caption."),
        Query("5:100", "what is this", STORED["red"], "Find a paragraph with its picture."),
    ]
    assert corpus.instructions()["9:100"] == ["Find the picture.", "Which picture is it?"]
    assert corpus.tasks() == {
        "9:100": "mscoco: text to image",
        "9:101": "mscoco: image to text",
        "5:100": "oven: image,text to image,text",
    }
    assert corpus.copies() == {}
    assert corpus.qrels() == {"9:100": {"9:1": 1}, "9:101": {"9:2": 1}, "5:100": {"5:2": 1, "5:1": 1}}
    counts = corpus.artifact.manifest.counts
    assert counts["queries_with_positives_of_several_modalities"] == 1
    assert counts["queries_with_positives_of_other_datasets_left_out"] == 1
    assert counts["queries_without_instruction"] == 0
    assert (counts["passage_images"], counts["query_images"], counts["rejected"]) == (4, 2, 0)


def test_a_local_pool_and_one_task(folder, tmp_path):
    corpus = ingested(
        folder,
        tmp_path / "out",
        passages="cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl",
        queries="query/test/mbeir_mscoco_task0_test.jsonl",
        on_error="skip",
    )
    assert corpus.num_passages == 2
    assert corpus.qrels() == {"9:100": {"9:1": 1}}
    (reject,) = [json.loads(line) for line in (corpus.path / "rejects.jsonl").read_text().splitlines()]
    assert reject["file"] == "query/test/mbeir_mscoco_task0_test.jsonl"
    assert (reject["line"], reject["field"]) == (2, "pos_cand_list")
    assert reject["reason"] == "names an unknown passage: '9:2'"


def test_the_training_union_says_how_often_a_query_is_shown(folder, tmp_path):
    corpus = ingested(folder, tmp_path / "out", split="union_train")
    assert [passage.passage_id for table in corpus.passages() for passage in passages_of(table)] == [
        row["did"] for row in TRAIN_POOL
    ]
    assert corpus.copies() == {"9:200": 3, "5:200": 1}
    assert corpus.qrels() == {"9:200": {"9:11": 1}, "5:200": {"6:1": 1, "5:11": 1}}, "foreign positives train"
    assert corpus.tasks()["5:200"] == "oven: image,text to image,text", "by the first positive"
    examples = positive_examples(corpus, corpus, tmp_path / "examples")
    assert [examples.copies(row) for row in range(2)] == [3, 1]
    assert examples.query(1).image == STORED["yellow"]


def test_training_queries_over_all_pools(folder, tmp_path):
    """What two pools have is one passage; a corpus of all of them serves training and measuring."""
    corpus = ingested(folder, tmp_path / "out", passages="cand_pool/global")
    assert corpus.num_passages == len({row["did"] for row in (*TEST_POOL, *TRAIN_POOL)}) == 9
    data = DataConfig(path=str(folder), images=IMAGES, passages="cand_pool/global", split="test")
    config = training_data(data, MineConfig(split="union_train"))
    queries = ingest_queries(config, corpus, tmp_path / "queries")
    assert queries.copies() == {"9:200": 3, "5:200": 1}
    assert queries.instructions()["9:200"] == ["Find the picture.", "Which picture is it?"]


def test_named_queries_say_their_split(folder, tmp_path):
    """Judgements are in the queries, so a name that does not fit the split would train on the test queries."""
    test, train = "query/test/mbeir_oven_task6_test.jsonl", "query/union_train/mbeir_union_up_train.jsonl"
    assert ingested(folder, tmp_path / "a", queries=test).qrels() == {"5:100": {"5:2": 1, "5:1": 1}}
    corpus = ingested(folder, tmp_path / "b", queries=train)
    assert corpus.qrels()["5:200"] == {"6:1": 1, "5:11": 1}
    assert corpus.num_passages == len(TRAIN_POOL)
    data = DataConfig(path=str(folder), images=IMAGES, passages="cand_pool/global", split="test", queries=test)
    with pytest.raises(DataError, match=r"are those of the split 'test', not of 'train'; .* mine\.queries"):
        open_source(training_data(data, MineConfig(split="train")))
    source = open_source(training_data(data, MineConfig(split="train", queries=train)))
    assert [table.name for table in source.queries] == [train]


def test_other_records_of_the_same_id_are_told(folder, tmp_path):
    lines(folder / "query/union_train/mbeir_union_up_train.jsonl", [*UNION, query("9:200", ["9:11"], "something else")])
    with pytest.raises(DataError, match=r"line 5, field 'qid': another record has this id: '9:200', in .*, line 1"):
        ingested(folder, tmp_path / "a", split="union_train")
    lines(folder / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", [candidate("9:1", None, "green")])
    with pytest.raises(DataError, match=r"train_cand_pool.jsonl, line 1, field 'did': another record has this id"):
        ingested(folder, tmp_path / "b", passages="cand_pool/global")


@pytest.mark.parametrize(
    ("positives", "reason"),
    [("9:1", "must be a list: got str"), ([5], "must be a list of ids: it has '5'"), ([None], "must be a list of ids")],
)
def test_positives_that_are_none(folder, tmp_path, positives, reason):
    lines(folder / "query/test/more.jsonl", [query("2:100", positives, "why")])
    with pytest.raises(DataError, match=rf"query/test/more.jsonl, line 1, field 'pos_cand_list': {reason}"):
        ingested(folder, tmp_path / "out")


def test_positives_may_be_objects_and_instructions_missing(folder, tmp_path):
    lines(folder / "query/test/more.jsonl", [query("2:100", [{"did": "2:1"}], "why"), query("77:1", ["77:1"], "x")])
    lines(folder / "cand_pool/global/mbeir_union_test_cand_pool.jsonl", [*TEST_POOL, candidate("77:1", "y")])
    corpus = ingested(folder, tmp_path / "out")
    assert corpus.qrels()["2:100"] == {"2:1": 1}
    assert corpus.instructions()["2:100"] == ["Find the answer."]
    assert "77:1" not in corpus.instructions()
    assert corpus.tasks()["77:1"] == "dataset 77: text to text"
    assert corpus.artifact.manifest.counts["queries_without_instruction"] == 1


def test_what_is_missing_is_named(folder, tmp_path):
    for settings, match in (
        ({"split": "val"}, r"no queries of the split 'val'; there are: union_train, test"),
        ({"qrels": "qrels/x.txt"}, r"leave qrels out"),
        ({"queries": "mbeir_images"}, r"mbeir_images has no \.jsonl file"),
    ):
        with pytest.raises(DataError, match=match):
            ingested(folder, tmp_path / "out", **settings)
    with pytest.raises(DataError, match=r"data\.images=\{\}"):
        ingest(DataConfig(path=str(folder)), tmp_path / "out")
    lines(folder / "query/union_val/mbeir_union_val.jsonl", COCO)
    with pytest.raises(DataError, match=r"no cand_pool/global/mbeir_union_val_cand_pool\.jsonl"):
        ingested(folder, tmp_path / "out", split="union_val")
    (folder / "cand_pool/global/mbeir_union_test_cand_pool.jsonl").unlink()
    with pytest.raises(DataError, match=r"data\.passages=cand_pool/local/FILE\.jsonl"):
        ingested(folder, tmp_path / "out")


def test_a_changed_table_makes_the_corpus_again(folder, tmp_path, capsys):
    ingested(folder, tmp_path / "out")
    ingested(folder, tmp_path / "out")
    assert "reused" in capsys.readouterr().err
    (folder / "instructions/query_instructions.tsv").write_text(INSTRUCTIONS.replace("caption", "sentence"))
    assert ingested(folder, tmp_path / "out").instructions()["9:101"] == ["Find a sentence."]


def test_instructions_of_a_bad_line(folder):
    (folder / "instructions/query_instructions.tsv").write_text(INSTRUCTIONS + "text\timage\tMSCOCO\n")
    file = Folder.open(str(folder)).find("instructions/query_instructions.tsv")
    with pytest.raises(DataError, match=r"query_instructions.tsv, line 7: 3 columns"):
        read_instructions(file)


def test_words_and_names():
    assert modality_word("text,image", None, None) == modality_word("image, text", None, None) == "image,text"
    assert modality_word(None, "words", None) == modality_word("sound", "words", None) == "text"
    assert modality_word("", "", "a.png") == "image"
    assert modality_word(None, None, None) == "text"
    assert [dataset_name(number) for number in ("0", "9", "10", "x")] == [
        *("visualnews", "mscoco", "dataset 10", "dataset x")
    ]
