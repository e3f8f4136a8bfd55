"""`raydr plan`: hand-worked figures, how they move with what is asked, errors that name the field, text and JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raydr.cli import main
from raydr.config import load
from raydr.errors import ConfigError
from raydr.planning.config import PlanConfig
from raydr.planning.plan import Plan, as_json, as_text, make_plan
from raydr.planning.sheet import Sheet, evaluate, readable, slowest
from raydr.planning.units import measured

ROUND = {
    "cpu_embed_flops": 1e11,
    "flat_scan_bytes_per_s": 1e10,
    "index_io_bytes_per_s": 1e8,
    "query_encode_ms": 1,
    "serve_overhead_ms": 5,
    "serve_core_ms": 5,
    "serve_call_ms": 1,
    "tail_ratio": 2,
    "serve_node_bytes": 1e9,
    "embed_worker_bytes": 1e9,
    "embedding_file_ratio": 1,
    "shard_read_bytes": 1e8,
    "checksum_bytes_per_s": 1e9,
}
"""Figures that can be reckoned with by hand."""


def planned(*overrides: str) -> Plan:
    units = [f"units.{name}={value}" for name, value in ROUND.items()]
    return make_plan(load(PlanConfig, None, [*units, *overrides]))


def lines(plan: Plan, stage: str) -> dict[str, float | None]:
    return {line.name: line.value for line in plan[stage].lines}


# ---- the sheet --------------------------------------------------------------------------------------------------


def test_a_line_keeps_its_formula_with_the_numbers_it_was_computed_from():
    sheet = Sheet({"passages": 1e6, "dim": 384.0, "unmeasured": None})
    assert sheet.line("size", "passages * dim * 4", "bytes") == 1.536e9
    assert sheet.line("half", "ceil(size / 2 ** 1)", "bytes") == 7.68e8
    assert [line.numbers for line in sheet.lines] == ["1e6 * 384 * 4", "ceil(1.54e9 / 2 ** 1)"]
    assert sheet.line("unknown", "size * unmeasured", "") is None
    assert sheet.lines[-1].numbers == "1.54e9 * ?"
    assert sheet.line("further", "unknown + 1", "") is None
    assert sheet.used == {"passages", "dim", "size", "unmeasured", "unknown"}


def test_a_formula_is_arithmetic_and_nothing_else():
    assert evaluate("max(1, log2(x)) + min(2, 3) - 2 ** 3", {"x": 8.0}) == -3
    for wrong in ("__import__('os')", "x.real", "[1][0]", "'a'", "x if x else 1"):
        with pytest.raises(ValueError, match="not arithmetic"):
            evaluate(wrong, {"x": 1.0})
    with pytest.raises(KeyError):
        Sheet({}).line("a", "nothing", "")


def test_numbers_for_a_person():
    found = [readable(v) for v in (None, 0, 3, 349525, 1e7, 0.00259, 1234.5, 12.34, 3.36e11, 1e-5)]
    assert found == ["?", "0", "3", "349,525", "1e7", "0.00259", "1,234", "12.3", "3.36e11", "1e-5"]
    assert [readable(v, "bytes") for v in (5, 1536, 1.5 * 2**40, 1e24)] == [
        "5 bytes",
        "1.5 KiB",
        "1.5 TiB",
        "867,362 EiB",
    ]


def test_the_slowest_of_many():
    assert slowest(1.63, 1) == pytest.approx(1.63)
    # For log-normal times, P(all of 100 below t) = 0.99 where each is below with 0.99^(1/100) = 0.9999; z = 3.718.
    assert slowest(2.0, 100) == pytest.approx(math.exp(math.log(2) / 2.3263 * 3.718), rel=1e-3)


# ---- by hand ----------------------------------------------------------------------------------------------------


def test_embedding_by_hand():
    plan = planned(
        "corpus.passages=1e9", "corpus.tokens_per_passage=100", "encoder.parameters=1e8", "encoder.layers=1",
        "encoder.hidden=1", "encoder.dim=100", "corpus.id_bytes=12", "corpus.text_bytes=480", "node.cores=10",
        "working_share=0.5", "within_hours=100", "node.price_per_hour=2",
    )  # fmt: skip
    found, stage = lines(plan, "embed"), plan["embed"]
    # 1e11 tokens of 2e8 operations (and 400 of attention) are 2e19; ten cores do 1e12 a second: 5,556 h, twice that
    # where half the time is lost, 112 nodes.
    assert found["tokens"] == 1e11 and found["flops_per_token"] == 2e8 + 400
    assert found["node_hours"] == pytest.approx(2e19 / 1e12 / 0.5 / 3600, rel=1e-5)
    # 500 GB of corpus are compared first, and 420 GB of embeddings read once more at the end, by one process: 920 s,
    # while the nodes wait.
    assert stage.nodes == 112 and stage.hours == pytest.approx(11111.1 / 112 + 920 / 3600, rel=1e-4)
    assert stage.core_hours == pytest.approx(111_111 + 1120 * 920 / 3600, rel=1e-4)
    assert stage.cost == pytest.approx(stage.core_hours / 10 * 2)
    assert stage.disk_bytes == 1e9 * (400 + 12 + 8)
    assert stage.gpu_hours == 0


def test_embedding_on_gpus_by_hand():
    given = ["corpus.passages=1e9", "corpus.tokens_per_passage=100", "encoder.parameters=1e8", "gpu_node.gpus=8",
             "gpu_node.peak_flops=1e15", "working_share=1", "units.checksum_bytes_per_s=1e15",
             "gpu_node.price_per_hour=10", "stages=[embed]"]  # fmt: skip
    unknown = planned(*given)["embed"]
    assert (unknown.nodes, unknown.gpu_hours, unknown.cost) == (None, None, None)
    known = planned(*given, "units.gpu_embed_share=0.25")["embed"]
    # 2e19 operations (and 9.2e5 a token of attention) at 2.5e14 a GPU: 80,000 s and 0.05 %.
    assert known.gpu_hours == pytest.approx(80_000 / 3600, rel=6e-3)
    assert known.cost == pytest.approx(known.gpu_hours / 8 * 10)
    assert known.core_hours is None


def test_an_exact_index_by_hand():
    plan = planned("corpus.passages=1e6", "corpus.text_bytes=476", "corpus.id_bytes=16", "index.num_shards=4",
                   "node.cores=2", "working_share=1", "encoder.dim=250", "index.bm25=null")  # fmt: skip
    found, stage = lines(plan, "index"), plan["index"]
    assert (found["num_shards"], found["rows_per_shard"], found["row_bytes"]) == (4, 250_000, 1000)
    assert stage.disk_bytes == 1e6 * (1000 + 476 + 16 + 8)
    assert found["io_s"] == pytest.approx((1e9 + 1.5e9) / 1e8)
    # Two shards at a time, each with its embeddings, its index, its ids, and 0.1 GB read ahead.
    assert stage.memory_bytes == 2 * (250_000 * (1000 + 1000 + 16 + 8) + 1e8)
    # Before it, 1.024 GB of embeddings and 0.5 GB of corpus are compared with checksums; after it, 1.5 GB are read.
    assert found["compare_h"] == pytest.approx(1.524 / 3600) and "recall_h" not in found
    assert stage.nodes == 1 and stage.hours == pytest.approx((1.524 + 25 / 2 + 1.5) / 3600)


def test_the_recall_of_an_approximate_index_is_measured_by_one_process_while_the_others_wait():
    given = ["corpus.passages=1e6", "encoder.dim=250", "index.num_shards=4", "node.cores=2", "index.bm25=null",
             "index.factory=SQ8", "units.gemm_flops=1e10"]  # fmt: skip
    without, plan = planned(*given, "index.recall=null"), planned(*given, "index.recall.num_queries=300")
    # 1 GB of embeddings is read to draw the queries and again for the truth; 150 GFLOP on two cores are 7.5 s; 0.25 GB
    # of codes are compared with their checksums.
    codes = (250e6 + 4 * 8 * 250) / 1e9
    assert lines(plan, "index")["recall_h"] == pytest.approx((20 + 7.5 + codes) / 3600)
    assert plan["index"].hours == pytest.approx(without["index"].hours + lines(plan, "index")["recall_h"])
    assert "recall_h" not in lines(without, "index")


def test_the_word_side_is_built_by_one_process_while_the_others_wait():
    given = ["corpus.passages=1e6", "corpus.text_bytes=720", "units.bm25_build_bytes_per_s=1e5", "node.cores=2"]
    without, with_words = planned(*given, "index.bm25=null")["index"], planned(*given)["index"]
    assert with_words.hours == pytest.approx(without.hours + 2 + 0.72 / 3600)  # compared first
    assert with_words.core_hours == pytest.approx(without.core_hours + 4 + 1.44 / 3600)


def test_serving_by_hand():
    plan = planned("corpus.passages=1e6", "encoder.dim=250", "search.qps=10", "search.busy_share=0.5", "node.cores=4",
                   "search.p99_ms=500", "search.replicas=2")  # fmt: skip
    found, stage = lines(plan, "search"), plan["search"]
    # 1 GB at 10 GB/s is 100 ms of one core; everything fits a node, in one replica: (5 + 1 + 100) x 2 / (1 - 0.5).
    assert found["query_ms"] == pytest.approx(100) and found["p99"] == pytest.approx(424)
    assert found["cores_needed"] == pytest.approx(10 * 0.106 / 0.5)
    assert stage.nodes == 2
    assert stage.memory_bytes == 1e9 + 1e6 * (1000 + 16 + 8)
    # Less time: of 8 shards, 3 deployments take (5 + 1 + 4 + 33) x slowest(2, 3) / 0.5 = 194 ms, 4 take 166.
    split = planned("corpus.passages=1e6", "encoder.dim=250", "search.busy_share=0.5", "search.p99_ms=180",
                    "index.num_shards=8")  # fmt: skip
    assert lines(split, "search")["calls"] == 5
    assert lines(split, "search")["p99"] == pytest.approx(36 * slowest(2, 4) / 0.5)


def test_reranking_windows_by_hand():
    plan = planned("corpus.passages=1e6", "rerank.network.parameters=1e9", "rerank.network.layers=1", "search.qps=2",
                   "rerank.network.hidden=1", "rerank.kind=listwise", "corpus.tokens_per_passage=100",
                   "rerank.prompt_tokens=0", "gpu_node.peak_flops=1e15", "units.gpu_rerank_share=0.2")  # fmt: skip
    found = lines(plan, "rerank")
    # 100 passages in windows of 20 that go up by 10: nine; each of 2,000 tokens of 2e9 operations.
    assert found["passes"] == 9 and found["pass_tokens"] == 2000
    assert found["seconds_alone"] == pytest.approx(9 * 2000 * 2e9 / 2e14, rel=1e-4)


def test_training_by_hand():
    plan = planned("corpus.passages=1e6", "train.queries=6400", "train.batch_size=64", "train.passages_per_query=4",
                   "corpus.tokens_per_passage=100", "search.query_tokens=20", "encoder.parameters=1e8",
                   "encoder.all_parameters=1.5e8", "encoder.layers=1", "encoder.hidden=1", "train.zero_stage=0",
                   "units.cpu_train_flops=1e11", "stages=[train]")  # fmt: skip
    found = lines(plan, "train")
    assert (found["steps"], found["step_tokens"]) == (100, 64 * 420)
    assert found["work"] == pytest.approx(100 * 64 * 420 * 6e8, rel=1e-4)
    assert plan["train"].memory_bytes == 1.5e8 * 16


# ---- how figures move -------------------------------------------------------------------------------------------

COUNTS = st.integers(10_000, 10**11)


@settings(max_examples=40)
@given(COUNTS, st.sampled_from(["Flat", "SQ8", "HNSW32", "IVF1024,SQ8", "IVF4096,PQ48"]), st.integers(2, 50))
def test_more_passages_never_need_less(passages, factory, times):
    few, many = (
        planned(
            f"corpus.passages={number}",
            f"index.factory='{factory}'",
            "index.shard_bytes=100000000000",
            "index.bm25=null",
        )
        for number in (passages, passages * times)
    )
    for name in ("embed", "index", "search"):
        for figure in ("nodes", "disk_bytes", "core_hours"):
            assert getattr(many[name], figure) >= getattr(few[name], figure) * 0.999, (name, figure)


@settings(max_examples=40)
@given(st.integers(10_000, 10**9), st.floats(0.1, 1e4), st.floats(1.01, 100))
def test_more_queries_and_less_time_never_need_fewer_nodes(passages, qps, times):
    base = planned(f"corpus.passages={passages}", f"search.qps={qps}", "stages=[search]")
    busier = planned(f"corpus.passages={passages}", f"search.qps={qps * times}", "stages=[search]")
    assert busier["search"].nodes >= base["search"].nodes


@settings(max_examples=30)
@given(st.integers(1000, 10**9), st.floats(20, 5000))
def test_the_latency_planned_is_kept_or_a_warning_says_what_can_be_had(passages, p99_ms):
    plan = planned(f"corpus.passages={passages}", f"search.p99_ms={p99_ms}", "stages=[search]")
    kept = (lines(plan, "search")["p99"] or 0) <= p99_ms * (1 + 1e-9)
    assert kept != any("search.p99_ms" in warning for warning in plan["search"].warnings)


# ---- what does not fit, and what is wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "overrides", "words"),
    [
        ("index", ["index.num_shards=1", "corpus.passages=1e9"], ["a shard is built in memory", "index.shard_bytes"]),
        ("index", ["corpus.passages=1e9"], ["index.bm25=null"]),
        ("index", ["corpus.passages=1e6", "index.factory=IVF65536,PQ48"], ["39 embeddings a list", "2,555,904"]),
        ("index", ["corpus.passages=1e6", "index.factory=IVF262144,PQ48"], ["cannot be trained", "index.train_sample"]),
        ("index", ["corpus.passages=1e6", "index.factory=IVF65536,PQ48"], ["every shard has all 65,536 lists"]),
        ("index", ["corpus.passages=1e6", "index.factory=IVF1024,PQ48"], ["recall is not planned"]),
        ("index", ["corpus.passages=1e11", "index.factory=HNSW32", "index.num_shards=10"], ["32 bits"]),
        ("embed", ["corpus.passages=1e11"], ["driver", "embed the corpus in parts"]),
        ("embed", ["corpus.passages=1e11"], ["files", "embed.passages_per_block"]),
        ("embed", ["corpus.passages=1e11"], ["checksum"]),
        ("index", ["corpus.passages=1e11"], ["shared storage", "one path"]),
        ("search", ["corpus.passages=1e8", "search.p99_ms=50"], ["search.p99_ms", "cannot be had"]),
        ("search", ["corpus.passages=1e11"], ["every passage id"]),
        ("search", ["corpus.passages=1e6", "node.memory_gib=1"], ["node.memory_gib"]),
        ("search", ["corpus.passages=1e8", "index.factory=HNSW32", "index.num_shards=10"], ["50,000 rows"]),
        ("rerank", ["corpus.passages=1e6", "rerank.network.parameters=7e10", "rerank.network.all_parameters=7e10",
                    "gpu_node.gpus=8"], ["tensor_parallel"]),
        ("train", ["corpus.passages=1e6", "train.queries=1000", "encoder.all_parameters=7e9", "train.zero_stage=0",
                   "gpu_node.gpus=8", "units.gpu_train_share=0.3"], ["train.zero_stage"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(stage, overrides, words):
    warnings = " ".join(planned(*overrides)[stage].warnings)
    assert all(word in warnings for word in words), warnings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["corpus"]),
        (["corpus.passages=0"], ["corpus.passages", "greater than or equal to 1"]),
        (["corpus.passages=many"], ["corpus.passages", "many"]),
        (["corpus.passages=1e6", "corpus.passage=3"], ["corpus.passage", "did you mean 'passages'"]),
        (["corpus.passages=1e6", "index.factory=PQ48"], ["index.factory", "PQ48"]),
        (["corpus.passages=1e6", "units.flat_scan=1"], ["units.flat_scan", "flat_scan_bytes_per_s"]),
        (["corpus.passages=1e6", "units.tail_ratio=-1"], ["units.tail_ratio", "greater than 0"]),
        (["corpus.passages=1e6", "search.busy_share=1"], ["search.busy_share", "less than 1"]),
        (["corpus.passages=1e6", "stages=[serve]"], ["stages", "'search'"]),
        (["nowhere.yaml"], ["nowhere.yaml", "no such config"]),
        (["--measure", "corpus.passages=1e6"], ["--measure takes no config"]),
    ],
)
def test_a_mistake_names_the_field(overrides, words, capsys):
    assert main(["plan", *overrides]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message, message


def test_there_is_no_plan_without_a_corpus():
    with pytest.raises(ConfigError, match=r"corpus: Field required"):
        load(PlanConfig, None)


# ---- what is printed --------------------------------------------------------------------------------------------


def test_the_text_has_table_formulas_and_sources(capsys):
    assert main(["plan", "corpus.passages=1e7", "gpu_node.gpus=1", "node.price_per_hour=1"]) == 0
    printed = capsys.readouterr().out
    assert "query_ms        = 1000 * (passages * code_bytes / flat_scan_bytes_per_s)" in printed
    assert "! embed: nobody has measured gpu_embed_share" in printed and "units.gpu_embed_share=..." in printed
    assert "flat_scan_bytes_per_s = 2.63e10" in printed and "commit 9b58ef5" in printed
    assert max(map(len, printed.splitlines())) < 200
    assert main(["plan", "corpus.passages=1e7", "--brief"]) == 0
    assert "rests on" not in capsys.readouterr().out


def test_the_json_is_the_plan(capsys):
    assert main(["plan", "corpus.passages=1e7", "--output", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in content["stages"]] == ["embed", "index", "search"]
    plan = make_plan(load(PlanConfig, None, ["corpus.passages=1e7"]))
    assert content == json.loads(as_json(plan))
    assert content["stages"][0]["nodes"] == plan["embed"].nodes and content["stages"][0]["cost"] is None
    assert "commit" in content["figures"]["flat_scan_bytes_per_s"]["source"]


def test_a_resolved_config_is_a_config(capsys, tmp_path):
    given = ["corpus.passages=1e7", "index.search.nprobe=8", "train.queries=1e4", "units.tail_ratio=2"]
    assert main(["plan", *given, "--dry-run"]) == 0
    file = tmp_path / "plan.yaml"
    file.write_text(capsys.readouterr().out)
    assert load(PlanConfig, file) == load(PlanConfig, None, given)


def test_figures_that_were_measured_here_are_a_config(tmp_path):
    units = {"flat_scan_bytes_per_s": {"value": 1e9, "source": "raydr plan --measure, here"}}
    file = tmp_path / "here.yaml"
    file.write_text(yaml.safe_dump({"units": units}))
    plan = make_plan(load(PlanConfig, file, ["corpus.passages=1e6"]))
    assert lines(plan, "search")["query_ms"] == pytest.approx(1536)
    assert "1e9 bytes/s of one core: raydr plan --measure, here" in as_text(plan)


def test_every_figure_says_where_it_comes_from():
    for name, figure in measured().items():
        assert ("commit" in figure.source) == (figure.value is not None), name


def test_a_plan_imports_nothing_heavy():
    code = "import sys, raydr.planning.plan; print([m for m in HEAVY if m in sys.modules])"
    heavy = "HEAVY = ['ray', 'torch', 'faiss', 'transformers', 'numpy', 'pandas', 'pyarrow']; "
    printed = subprocess.run([sys.executable, "-c", heavy + code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
