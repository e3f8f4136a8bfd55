"""The verb `mine` on the tiny corpus with MiniLM: from the command line, in-process and on Ray, and from a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raydr.cli import main
from raydr.config import load
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.steps import Steps
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.mine import mine

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "jobs/configs/zero_shot.yaml"


@pytest.fixture
def source(tiny_beir: Path) -> Path:
    """The tiny corpus with a training split: one query of its own, and one shared with the test split."""
    with (tiny_beir / "queries.jsonl").open("a") as stream:
        stream.write(json.dumps({"_id": "t1", "text": "instrument with a keyboard"}) + "\n")
    lines = ["query-id\tcorpus-id\tscore", "t1\tpiano\t1", "q1\tcat\t2", "q1\tdog\t1", "q1\tsun\t0"]
    (tiny_beir / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    return tiny_beir


def config(source: Path, out: Path, *overrides: str) -> RunConfig:
    return load(RunConfig, CONFIG, [f"data.path={source}", f"out={out}", "runtime=local", *overrides])


def indexed(source: Path, out: Path, *overrides: str) -> RunConfig:
    run = config(source, out, *overrides)
    embed(run)
    index(run)
    return run


def negatives(examples: ExampleSet) -> dict[str, list[str]]:
    rows = {query_id: examples.negatives(row) for row, query_id in enumerate(examples.query_ids)}
    return {query_id: [examples.passage_ids[row] for row in found] for query_id, found in rows.items()}


def test_the_corpus_is_not_written_again(source, tmp_path):
    run = indexed(source, tmp_path / "out", "mine.num_negatives=3", "mine.fraction=0.95")
    before = (tmp_path / "out/corpus/manifest.json").stat().st_mtime_ns
    examples = ExampleSet(mine(run))
    assert examples.artifact.path == tmp_path / "out/examples"
    assert (tmp_path / "out/corpus/manifest.json").stat().st_mtime_ns == before
    assert {path.name for path in (tmp_path / "out/queries_train").iterdir() if path.suffix == ".parquet"} == {
        "queries.parquet",
        "qrels.parquet",
    }
    found = negatives(examples)
    assert set(found) == {"t1", "q1"}
    assert all(len(ids) == 3 for ids in found.values())
    assert not {"cat", "dog"} & set(found["q1"])
    assert [examples.passage_ids[row] for row in examples.positives(1)] == ["cat", "dog"]
    for row in range(2):
        assert examples.negative_scores(row).max() < 0.95 * examples.positive_scores(row).min()


def test_from_the_command_line(source, tmp_path, capsys):
    run = indexed(source, tmp_path / "out")
    words = ["mine", str(CONFIG), f"data.path={source}", f"out={run.out}", "mine.sources=[bm25, random]", "--output"]
    assert main([*words, "json", "runtime=local"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kind"] == "examples"
    assert printed["counts"]["examples"] == 2


def test_a_file_of_examples_needs_no_index(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"query": "pet", "pos": ["The cat purrs."], "neg": ["Sun."]}))
    run = config(tmp_path, tmp_path / "out", f"mine.source_file={tmp_path / 'train.jsonl'}")
    examples = ExampleSet(mine(run))
    assert (len(examples), examples.num_passages) == (1, 2)


def test_a_training_on_a_file_makes_no_index(source, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"query": "pet", "pos": ["The cat purrs."], "neg": ["Sun."]}))
    run = config(source, tmp_path / "out", f"mine.source_file={tmp_path / 'train.jsonl'}")
    steps = Steps(run, ingest(run.data, run.out / "corpus"), use_ray=False)
    examples, dev = steps.examples(run.method)
    assert (len(examples), dev) == (1, None)
    assert {path.name for path in run.out.iterdir()} == {"corpus", "examples"}
    run = config(source, tmp_path / "out", f"mine.source_file={tmp_path / 'train.jsonl'}", "mine.dev_split=train")
    examples, dev = Steps(run, steps.corpus, use_ray=False).examples(run.method)
    assert (len(examples), len(dev)) == (1, 2)  # dev examples are mined, so there is an index


def test_what_is_missing_is_named(source, tmp_path):
    with pytest.raises(ArtifactError, match="corpus: no artifact here"):
        mine(config(source, tmp_path / "out"))
    run = config(source, tmp_path / "out")
    embed(run)
    with pytest.raises(ArtifactError, match="index: no artifact here"):
        mine(run)
    with pytest.raises(DataError, match="no judgements for the split 'dev'; there are: test, train"):
        mine(config(source, tmp_path / "out", "mine.split=dev"))
    with pytest.raises(ConfigError, match=r"data\.qrels names the file .*mine\.qrels=FILE"):
        mine(config(source, tmp_path / "out", f"data.qrels={source}/qrels/test.tsv"))


def test_as_a_script(source, tmp_path):
    run = indexed(source, tmp_path / "out")
    settings = [f"data.path={source}", f"out={tmp_path}/out", "runtime=local", "mine.num_negatives=3"]
    command = [sys.executable, "jobs/mine.py", str(CONFIG), *settings]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert set(negatives(ExampleSet.open(run.out / "examples"))) == {"q1", "t1"}
    done = subprocess.run([*command, "mine.split=dev"], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "no judgements for the split 'dev'" in done.stderr
    assert "Traceback" not in done.stderr


def test_files_of_judgements_for_every_part(source, tmp_path):
    """`data.qrels` says nothing of training and dev queries: each has a file of its own."""
    files = [f"data.qrels={source}/qrels/test.tsv", f"mine.qrels={source}/qrels/train.tsv", "mine.dev_split=dev"]
    run = config(source, tmp_path / "out", *files)
    steps = Steps(run, ingest(run.data, run.out / "corpus"), use_ray=False)
    with pytest.raises(ConfigError, match=r"data\.qrels names the file .*mine\.dev_qrels=FILE"):
        steps.examples(run.method)
    named = config(source, tmp_path / "out", *files, f"mine.dev_qrels={source}/qrels/test.tsv")
    examples, dev = Steps(named, steps.corpus, use_ray=False).examples(named.method)
    assert sorted(examples.query_ids) == ["q1", "t1"]
    assert dev is not None and "t1" not in dev.query_ids


def test_dev_examples_are_asked_for_where_training_measures_itself(source, tmp_path):
    settings = ["train.evaluate_every=5", "train.max_steps=10"]
    with pytest.raises(ConfigError, match=r"train\.evaluate_every: there are no dev examples.*mine\.dev_split"):
        config(source, tmp_path / "out", *settings)
    assert config(source, tmp_path / "out", *settings, "mine.dev_split=dev").mine.dev_split == "dev"
    with pytest.raises(ConfigError, match="dev_qrels: give the dev queries a name"):
        config(source, tmp_path / "out", "mine.dev_qrels=dev.tsv")


@pytest.mark.ray
def test_ray_equals_local(source, tmp_path, ray_cluster):
    overrides = ["mine.sources=[model, bm25, random]", "mine.num_negatives=6", "index.num_shards=2"]
    run = indexed(source, tmp_path / "out", *overrides)
    local = negatives(ExampleSet(mine(run)))
    (tmp_path / "out/examples").rename(tmp_path / "out/local")
    remote = negatives(ExampleSet(mine(run.model_copy(update={"runtime": "ray"}))))
    assert remote == local
