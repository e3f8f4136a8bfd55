"""The verbs end to end on the tiny corpus: in-process, on Ray, and as a submitted job, with the same result."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydr.config import load
from raydr.data.corpus import Corpus
from raydr.errors import ArtifactError
from raydr.evaluation.trec import read_run
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.evaluate import evaluate
from raydr.verbs.index import index
from raydr.verbs.reproduce import reproduce
from raydr.verbs.search import search
from tests.jobs import submitted

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "jobs/configs/zero_shot.yaml"


def _config(data: Path, out: Path, *overrides: str) -> RunConfig:
    return load(RunConfig, CONFIG, [f"data.path={data}", f"out={out}", *overrides])


def test_reproduce_leaves_run_and_metrics(tiny_beir, tmp_path):
    reproduce(_config(tiny_beir, tmp_path / "out", "runtime=local"))
    metrics = json.loads((tmp_path / "out/evaluate/metrics.json").read_text())
    assert {"nDCG@10", "RR@10", "R@100"} <= set(metrics)
    assert metrics["RR@10"] == 1.0, "MiniLM finds the right passage of ten for each of the three plain questions"
    assert set(read_run(tmp_path / "out/search/run.trec")) == {"q1", "q2", "q3"}


def test_what_a_query_excludes_is_found_and_is_no_answer(tiny_beir, tmp_path):
    """The run has it; every figure is made without it. An id that the corpus lacks excludes nothing."""
    file = tiny_beir / "queries.jsonl"
    first, *others = [json.loads(line) for line in file.read_text().splitlines()]
    judged = (line.split() for line in (tiny_beir / "qrels/test.tsv").read_text().splitlines())
    right = [passage_id for query_id, passage_id, _ in judged if query_id == first["_id"]]
    first["excluded_ids"], others[0]["excluded_ids"] = right, "nowhere"
    file.write_text("".join(json.dumps(row) + "\n" for row in (first, *others)))
    reproduce(_config(tiny_beir, tmp_path / "out", "runtime=local"))
    assert Corpus.open(tmp_path / "out/corpus").excluded() == {first["_id"]: right, others[0]["_id"]: ["nowhere"]}
    assert read_run(tmp_path / "out/search/run.trec")[first["_id"]][0].passage_id in right
    metrics = json.loads((tmp_path / "out/evaluate/metrics.json").read_text())
    assert metrics["RR@10"] == pytest.approx(2 / 3)
    rows = pq.read_table(tmp_path / "out/evaluate/per_query.parquet").to_pylist()
    assert [row["RR@10"] for row in rows if row["query_id"] == first["_id"]] == [0.0]


def test_a_second_run_reuses_every_step(tiny_beir, tmp_path):
    config = _config(tiny_beir, tmp_path / "out", "runtime=local")
    reproduce(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("manifest.json")}
    reproduce(config)
    assert len(before) >= 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_verbs_one_by_one_equal_reproduce(tiny_beir, tmp_path):
    reproduce(_config(tiny_beir, tmp_path / "a", "runtime=local"))
    config = _config(tiny_beir, tmp_path / "b", "runtime=local")
    for verb in (embed, index, search, evaluate):
        verb(config)
    assert read_run(tmp_path / "a/search/run.trec") == read_run(tmp_path / "b/search/run.trec")


def test_a_verb_whose_input_is_missing_says_so(tiny_beir, tmp_path):
    with pytest.raises(ArtifactError, match="corpus"):
        index(_config(tiny_beir, tmp_path / "out"))


@pytest.mark.ray
@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_ray_equals_local(tiny_beir, tmp_path, ray_cluster, mode):
    reproduce(_config(tiny_beir, tmp_path / "local", "runtime=local", f"search.mode={mode}"))
    reproduce(_config(tiny_beir, tmp_path / "ray", "runtime=ray", f"search.mode={mode}", "index.num_shards=2"))
    local, ray = (read_run(tmp_path / side / "search/run.trec") for side in ("local", "ray"))
    assert {q: [h.passage_id for h in hits] for q, hits in local.items()} == {
        q: [h.passage_id for h in hits] for q, hits in ray.items()
    }
    scores = [(a.score, b.score) for q in local for a, b in zip(local[q], ray[q], strict=True)]
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in scores)


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_fails_as_its_verb_does(tiny_beir, tmp_path, ray_cluster):
    """`ray job submit` gives the verb's exit status and message; `test_train.py` submits one that ends well."""
    settings = ["jobs/configs/zero_shot.yaml", f"data.path={tiny_beir}", f"out={tmp_path}/bad", "data.split=nope"]
    bad = submitted(ray_cluster, "jobs/reproduce.py", settings)
    assert bad.returncode != 0
    assert "nope" in bad.stdout + bad.stderr
