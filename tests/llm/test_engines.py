"""The engines give the same numbers: vLLM here, vLLM behind HTTP, and a transformers forward pass."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig, EngineError, build_engine
from raydr.llm.generation import GenerationReranker
from raydr.llm.prompt import ListwisePrompt, PromptConfig
from raydr.llm.vllm_engine import VllmEngine, engine_arguments
from tests.causal_lms import KINDS
from tests.servers import free_port, wait_until_ready

pytestmark = [pytest.mark.slow]

ATOL = 1e-4
"""Of a log-probability in float32; 4e-6 was seen."""


def prompts(prompt: ListwisePrompt) -> list[list[int]]:
    """Windows of several sizes, up to one passage for every letter; the longest fills the context."""
    sizes = (1, 2, 7, len(prompt.letters))
    return [prompt.encode(f"query {n}", [f"passage {k} " * (5 + 9 * n) for k in range(n)]) for n in sizes]


def expected(folder: Path) -> tuple[ListwisePrompt, list[list[int]], list[list[float]]]:
    engine = build_engine(EngineConfig(model=str(folder), backend="transformers", dtype="float32"))
    letters = 20 if folder.name == "Llama" else 40  # whose tokenizer does not tell A from a
    prompt = ListwisePrompt(
        engine.tokenizer, PromptConfig(), max_tokens=engine.max_model_tokens, num_identifiers=letters
    )
    asked = prompts(prompt)
    scores = [asyncio.run(engine.next_token_logprobs(ids, prompt.letters)) for ids in asked]
    return prompt, asked, scores


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_gives_the_scores_of_a_forward_pass(kind, causal_lm):
    folder = causal_lm(kind)
    prompt, asked, scores = expected(folder)
    reference = build_engine(EngineConfig(model=str(folder), backend="transformers", dtype="float32"))
    config = EngineConfig(model=str(folder), dtype="float32", max_model_tokens=1024)
    engine = build_engine(config)

    async def ask() -> None:
        found = await asyncio.gather(*(engine.next_token_logprobs(ids, prompt.letters) for ids in asked))
        np.testing.assert_allclose(found, scores, atol=ATOL)  # every letter's, among them improbable ones
        assert [np.argsort(row).tolist() for row in found] == [np.argsort(row).tolist() for row in scores]
        twice = await engine.next_token_logprobs(asked[0], [prompt.letters[1], prompt.letters[1]])
        assert twice[0] == twice[1]
        made = await engine.generate(asked[1], max_tokens=12)
        assert made == await reference.generate(asked[1], max_tokens=12)
        await engine.check()
        by_writing = GenerationReranker(GenerationReranker.Config(engine=config, window_size=7, stride=3))
        vars(by_writing)["engine"] = engine  # the one that runs
        ranked = await by_writing.rank_window("query", [f"passage {k}" for k in range(7)])
        assert sorted(ranked.order) == list(range(7))
        if kind == KINDS[-1]:
            await _survives(engine, prompt, asked)

    asyncio.run(ask())
    engine.close()


async def _survives(engine, prompt, asked) -> None:
    """A caller that gives up takes nobody with it; the death of the core is an error for all, not a silence."""
    task = asyncio.ensure_future(engine.generate(asked[1], max_tokens=500))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.next_token_logprobs(asked[0], prompt.letters)
    running = [asyncio.ensure_future(engine.generate(ids, max_tokens=500)) for ids in asked[:2]]
    await asyncio.sleep(0.2)
    cores = [child for child in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
    assert cores
    cores[0].send_signal(signal.SIGKILL)
    for task in running:
        with pytest.raises(EngineError, match="stopped"):
            await asyncio.wait_for(task, 60)
    with pytest.raises(EngineError):
        await engine.next_token_logprobs(asked[0], prompt.letters)
    with pytest.raises(EngineError):
        await engine.check()


def test_what_vllm_is_told(monkeypatch):
    config = EngineConfig(model="x", tensor_parallel=2, pipeline_parallel=3, max_model_tokens=512, quantization="fp8")
    arguments = engine_arguments(config)
    assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == (2, 3)
    assert (arguments["max_model_len"], arguments["quantization"]) == (512, "fp8")
    assert arguments["trust_remote_code"] is False
    assert "distributed_executor_backend" not in arguments
    monkeypatch.setattr("raydr.llm.vllm_engine._in_placement_group", lambda: True)
    assert engine_arguments(config)["distributed_executor_backend"] == "ray"
    assert "distributed_executor_backend" not in engine_arguments(EngineConfig(model="x"))


def test_a_score_that_vllm_leaves_out_is_an_error():
    class Leaving(VllmEngine):
        def __init__(self) -> None:
            pass

        async def _run(self, prompt, settings, pictures):
            return SimpleNamespace(logprobs=[{7: SimpleNamespace(logprob=-1.0), 8: SimpleNamespace(logprob=-2.0)}])

    assert asyncio.run(Leaving().next_token_logprobs([1], [8, 7])) == [-2.0, -1.0]
    with pytest.raises(EngineError, match=r"no log-probability for token ids \[9\]"):
        asyncio.run(Leaving().next_token_logprobs([1], [8, 9]))


@pytest.fixture(scope="module")
def vllm_server(causal_lm, tmp_path_factory):
    """A vLLM server of its own over the small Llama."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(causal_lm("Llama"))]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"]
    process = subprocess.Popen(
        [*command, *options, "--enforce-eager"],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_until_ready(f"http://127.0.0.1:{port}/health", process, log, timeout_s=400)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)


def test_a_server_elsewhere_gives_the_same_scores(causal_lm, vllm_server):
    folder = causal_lm("Llama")
    prompt, asked, scores = expected(folder)
    engine = build_engine(EngineConfig(model=str(folder), backend="remote", url=vllm_server))
    assert engine.max_model_tokens == 1024
    reference = build_engine(EngineConfig(model=str(folder), backend="transformers", dtype="float32"))

    async def ask() -> None:
        found = await asyncio.gather(*(engine.next_token_logprobs(ids, prompt.letters) for ids in asked))
        np.testing.assert_allclose(found, scores, atol=ATOL)
        assert await engine.generate(asked[1], max_tokens=12) == await reference.generate(asked[1], max_tokens=12)
        await engine.check()

    asyncio.run(ask())


@pytest.fixture
def other_server():
    """An OpenAI-compatible server that gives its own best tokens, whatever ids are asked for."""
    import json
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        status = 200
        top = {"a": -0.5}

        def _send(self, body: object) -> None:
            text = json.dumps(body).encode()
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self._send({"data": [{"id": "other"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send({"choices": [{"text": "a", "logprobs": {"top_logprobs": [self.top]}}]})

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()


def test_a_server_that_cannot_answer_for_given_ids_is_refused(causal_lm, other_server):
    """At the start, before anybody has asked."""
    url, handler = other_server
    config = EngineConfig(model=str(causal_lm("Llama")), backend="remote", url=url)
    with pytest.raises(ConfigError, match="logprob_token_ids.*vLLM server"):
        build_engine(config)
    handler.top = {f"token_id:{token}": -1.0 - token for token in range(5)}
    engine = build_engine(config)
    assert asyncio.run(engine.next_token_logprobs([1, 2], [3, 4])) == [-4.0, -5.0]
    with pytest.raises(ConfigError, match="logprob_token_ids.*vLLM server"):
        asyncio.run(engine.next_token_logprobs([1, 2], [3, 9]))
    handler.status = 503
    with pytest.raises(EngineError, match="503"):
        asyncio.run(engine.check())


def test_nobody_there_is_named(causal_lm):
    with pytest.raises(ConfigError, match="no OpenAI-compatible server answers there"):
        build_engine(EngineConfig(model=str(causal_lm("Llama")), backend="remote", url="http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="backend: remote and url belong together"):
        EngineConfig(model="x", url="http://127.0.0.1:9")
