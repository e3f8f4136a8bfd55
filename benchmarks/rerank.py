"""FIRST on vLLM: against writing the whole order, against a transformers batch, and served.

    python benchmarks/rerank.py windows --data DIR --model MODEL --rounds 5 --out results/rerank-windows
    python benchmarks/rerank.py batch   --data DIR --model MODEL --rounds 5 --out results/rerank-batch
    python benchmarks/rerank.py lists   --data DIR --model MODEL --rounds 5 --out results/rerank-lists
    python benchmarks/rerank.py served  --data DIR --model MODEL --out results/rerank-served
    python benchmarks/rerank.py rank_llm --data DIR --rank-llm FOLDER --rounds 5 --out results/rerank-rank_llm

MODEL is a causal language model with a tokenizer (`raydr train jobs/configs/first_small.yaml` leaves one in
`OUT/train/model`); without it one is made of MiniLM, whose orders mean nothing and whose times are the same. `--shape`
makes an untrained one of a published shape in the folder MODEL, with MiniLM's tokenizer. Passages are
the collection's, joined and cut so that every one has as many tokens as asked for.

windows: one window at a time, FIRST and generation with the same engine, prompt and passages; generation writes all its
    tokens, since a model that stops early saves time only by ranking less
batch: many windows at once, raydr's engine and a padded batch through transformers
lists: lists of 100 by sliding windows of 20, one list and eight at a time
served: `/v1/rerank` on Ray Serve, 1, 4 and 16 callers, windows of 20
rank_llm: its FIRST path (installed in FOLDER, as benchmarks/peers/rank_llm_first.py says) over the same lists of 100
    passages, with the same prompts, both compiled in float32, and a model that answers (benchmarks/answering_lm.py)

Before a time counts, FIRST's scores must equal a transformers forward pass to 1e-3 (bfloat16: 0.25) and order the
window as it does, but for scores that lie nearer than that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from answering_lm import answering_lm
from interleaved import markdown, quantile, rounds, spread, write

from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.ingest import ingest
from raydr.encoders.checkpoint import locate
from raydr.llm.engine import EngineConfig
from raydr.llm.generation import GenerationReranker
from raydr.llm.listwise import ListwiseConfig, ListwiseReranker, RankedWindow
from raydr.llm.prompt import PromptConfig
from raydr.llm.small import causal_from_encoder
from raydr.methods.first import FirstReranker
from raydr.types import Hit, Passage, Query

ATOL = {"float32": 1e-3, "bfloat16": 0.25}
SHAPES = {"qwen2.5-0.5b": (896, 4864, 24, 14, 2), "mistral-7b": (4096, 14336, 32, 32, 8)}
"""Hidden size, inner size, layers, heads, heads of keys and values."""
PROMPT = PromptConfig(max_passage_words=100_000)


class Texts:
    """Windows of real passages of a given number of tokens, the same for every contender."""

    def __init__(self, data: Path, folder: Path, tokenizer: Any) -> None:
        corpus = ingest(DataConfig(path=str(data), split="test"), folder / "corpus")
        self._words = " ".join(
            text for table in Corpus.open(corpus.path).passages(["text"]) for text in table["text"].to_pylist()
        )[: 4 << 20]
        encoded = tokenizer(self._words, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self._ends = [end for _, end in encoded["offset_mapping"]]
        self.queries = [query.text for query in corpus.queries()]

    def window(self, size: int, num_tokens: int, number: int) -> tuple[str, list[str]]:
        """A query and `size` passages."""
        starts = np.random.default_rng(number).integers(1, len(self._ends) - num_tokens, size=size)
        passages = [self._words[self._ends[s - 1] : self._ends[s + num_tokens - 1]].strip() for s in starts]
        return self.queries[number % len(self.queries)], passages


class WholeOrder(GenerationReranker):
    """Generation that is never let off: the answer's tokens are counted."""

    tokens = 0

    async def rank_window(self, query: str, passages: Sequence[str]) -> Any:
        length = len(self.prompt.answer(range(len(passages))))
        prompt = self.prompt.encode(query, passages, reserve=length + 1)
        made = await _generate_all(self.engine, prompt, length)
        self.tokens += len(made)
        order = self.prompt.places(made, len(passages))
        return RankedWindow(order, [-float(order.index(place)) for place in range(len(passages))])


async def _generate_all(engine: Any, prompt: Sequence[int], length: int) -> list[int]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
    return list((await engine._run(prompt, settings)).token_ids)


def reranker(
    kind: type[ListwiseReranker], model: str, backend: str, *, dtype: str, max_tokens: int, window: int, stride: int
) -> Any:
    share = 0.5  # the engine it is checked against lies on the same GPU
    settings = {"model": model, "backend": backend, "dtype": dtype, "gpu_memory_share": share}
    engine = EngineConfig.model_validate({**settings, "max_model_tokens": max_tokens})
    return kind(ListwiseConfig(engine=engine, prompt=PROMPT, window_size=window, stride=stride))


class Contenders:
    """FIRST and generation over one vLLM engine, and the transformers engine that FIRST is checked against."""

    def __init__(self, model: str, dtype: str, max_tokens: int, window: int, stride: int) -> None:
        self._atol = ATOL[dtype]
        shape: dict[str, Any] = {"dtype": dtype, "max_tokens": max_tokens, "window": window, "stride": stride}
        self.first = reranker(FirstReranker, model, "vllm", **shape)
        self.generation = reranker(WholeOrder, model, "vllm", **shape)
        vars(self.generation)["engine"] = self.first.engine
        vars(self.generation)["_loop"] = self.first._loop
        self.reference = reranker(FirstReranker, model, "transformers", **shape)

    def run(self, work: Any) -> Any:
        return self.first._wait(work)

    def check(self, query: str, passages: Sequence[str]) -> float:
        """The largest difference of a score to transformers'. Ends the program where it is too large."""
        found = self.run(self.first.rank_window(query, passages))
        expected = asyncio.run(self.reference.rank_window(query, passages))
        distance = float(np.abs(np.subtract(found.scores, expected.scores)).max())
        close = np.abs(np.diff(np.sort(expected.scores))).min() < 2 * self._atol  # two that near may change places
        if distance > self._atol or (found.order != expected.order and not close):
            raise SystemExit(
                f"FIRST does not give transformers' scores: {distance} apart, {found.order} {expected.order}"
            )
        return distance


def windows(options: argparse.Namespace, folder: Path, model: str) -> None:
    shapes = [(20, tokens) for tokens in options.tokens] + [(size, 100) for size in options.sizes if size != 20]
    longest = max(size * tokens for size, tokens in shapes)
    contenders = Contenders(model, options.dtype, longest + 1024, max(size for size, _ in shapes), 1)
    texts = Texts(options.data, folder, contenders.first.engine.tokenizer)
    rows, results = [], []
    for size, tokens in shapes:
        query, passages = texts.window(size, tokens, 0)
        distance = contenders.check(query, passages)
        prompt = len(contenders.first.prompt.encode(query, passages))
        numbers = {"FIRST": iter(range(1, 10**6)), "generation": iter(range(10**6, 10**9))}  # one engine, one cache

        def ask(name: str, kind: Any, size: int = size, tokens: int = tokens, numbers: Any = numbers) -> None:
            own_query, own = texts.window(size, tokens, next(numbers[name]))  # never a prompt seen before
            contenders.run(kind.rank_window(own_query, own))

        contenders.generation.tokens = 0
        times = rounds(
            {
                "FIRST": lambda ask=ask: ask("FIRST", contenders.first),
                "generation": lambda ask=ask: ask("generation", contenders.generation),
            },
            options.rounds,
        )
        written = contenders.generation.tokens / (options.rounds + 1)
        ratio = statistics.median(times["generation"]) / statistics.median(times["FIRST"])
        rows.append(
            [str(size), str(tokens), str(prompt), f"{distance:.0e}"]
            + [spread(times[name], 1000) for name in ("FIRST", "generation")]
            + [f"{written:.0f}", f"{ratio:.1f}"]
        )
        results.append({"window": size, "tokens": tokens, "prompt": prompt, "times": times, "ratio": ratio})
    columns = ["passages", "tokens each", "prompt", "distance to transformers"]
    columns += ["FIRST, ms", "generation, ms", "tokens written", "generation / FIRST"]
    contenders.first.close()
    write(
        options.out, "One window: FIRST and generation, same model, prompt and engine", markdown(columns, rows), results
    )


def batch(options: argparse.Namespace, folder: Path, model: str) -> None:
    import torch

    contenders = Contenders(model, options.dtype, 20 * max(options.tokens) + 1024, 20, 10)
    texts = Texts(options.data, folder, contenders.first.engine.tokenizer)
    network = contenders.reference.engine._network
    device = network.device
    letters = torch.tensor(contenders.first.prompt.letters[:20], device=device)
    rows, results = [], []
    for tokens in options.tokens:
        distance = contenders.check(*texts.window(20, tokens, 0))
        seen = {"vLLM": 0, "transformers": 0}

        def prompts(name: str, tokens: int = tokens, seen: dict[str, int] = seen) -> list[list[int]]:
            seen[name] += 1
            numbers = range(options.num * seen[name], options.num * (seen[name] + 1))
            return [contenders.first.prompt.encode(*texts.window(20, tokens, number)) for number in numbers]

        def by_vllm() -> None:
            async def all_of() -> Any:
                engine = contenders.first.engine
                return await asyncio.gather(
                    *(engine.next_token_logprobs(ids, letters.tolist()) for ids in prompts("vLLM"))
                )

            contenders.run(all_of())

        def by_transformers() -> None:
            asked = prompts("transformers")
            for start in range(0, len(asked), options.batch):
                part = asked[start : start + options.batch]
                width = max(map(len, part))
                ids = torch.tensor([[0] * (width - len(own)) + own for own in part])
                mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in part])
                with torch.inference_mode():
                    logits = network(ids.to(device), attention_mask=mask.to(device), logits_to_keep=1).logits[:, -1]
                logits.log_softmax(dim=1)[:, letters].tolist()

        times = rounds({"vLLM": by_vllm, "transformers": by_transformers}, options.rounds)
        speed = {name: options.num / statistics.median(own) for name, own in times.items()}
        rows.append(
            [str(tokens), f"{distance:.0e}"]
            + [f"{speed[name]:.2f}" for name in times]
            + [f"{speed['vLLM'] / speed['transformers']:.2f}"]
        )
        results.append({"tokens": tokens, "times": times, "windows": options.num})
    columns = ["tokens each", "distance", "vLLM, windows/s", f"transformers, batches of {options.batch}", "ratio"]
    contenders.first.close()
    write(options.out, f"{options.num} windows of 20 at once", markdown(columns, rows), results)


def lists(options: argparse.Namespace, folder: Path, model: str) -> None:
    contenders = Contenders(model, options.dtype, 20 * 100 + 1024, 20, 10)
    texts = Texts(options.data, folder, contenders.first.engine.tokenizer)
    contenders.check(*texts.window(20, 100, 0))
    rows, results = [], []
    for at_once in (1, 8):
        seen = {"FIRST": 0, "generation": 10**6}

        def ask(name: str, kind: Any, at_once: int = at_once, seen: dict[str, int] = seen) -> None:
            seen[name] += at_once
            asked, passages = [], {}
            for number in range(seen[name], seen[name] + at_once):
                query, own = texts.window(100, 100, number)
                ids = [f"{number}-{place}" for place in range(100)]
                passages |= {id_: Passage(id_, text) for id_, text in zip(ids, own, strict=True)}
                asked.append((Query(str(number), query), [Hit(id_, 0.0) for id_ in ids]))
            kind.rerank_many(asked, passages)

        times = rounds(
            {
                "FIRST": lambda ask=ask: ask("FIRST", contenders.first),
                "generation": lambda ask=ask: ask("generation", contenders.generation),
            },
            options.rounds,
        )
        ratio = statistics.median(times["generation"]) / statistics.median(times["FIRST"])
        rows.append([str(at_once), *(spread(times[name]) for name in times), f"{ratio:.1f}"])
        results.append({"lists": at_once, "times": times})
    columns = ["lists at once", "FIRST, s", "generation, s", "generation / FIRST"]
    contenders.first.close()
    write(options.out, "Lists of 100, nine windows of 20 each, 100 tokens a passage", markdown(columns, rows), results)


def served(options: argparse.Namespace, folder: Path, model: str) -> None:
    """Closed loops: every caller asks again as soon as it is answered."""
    import httpx
    from transformers import AutoTokenizer

    from raydr.verbs import embed, index
    from raydr.verbs.config import RunConfig
    from raydr.verbs.serve import serving

    texts = Texts(options.data, folder, AutoTokenizer.from_pretrained(model, local_files_only=True))
    (folder / "few").mkdir()
    (folder / "few/corpus.jsonl").write_text('{"_id": "a", "title": "", "text": "an index has to be there"}\n')
    run = RunConfig.model_validate({"out": folder / "run", "runtime": "local", "data": {"path": str(folder / "few")}})
    embed.embed(run)
    engine = {"model": model, "dtype": options.dtype, "max_model_tokens": 20 * 100 + 1024}
    args = {"engine": engine, "prompt": PROMPT.model_dump()}
    rerankers = {"first": Component(import_path="raydr.methods.first:First", args=args)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rows, results = [], []
    with serving(index.index(run).path, host="127.0.0.1", port=port, rerankers=rerankers) as address:
        for callers in (1, 4, 16):
            seconds, latencies = asyncio.run(_closed_loop(httpx, address, texts, callers, options.requests))
            rate = options.requests / seconds
            rows.append(
                [str(callers), f"{rate:.2f}", *(f"{1000 * quantile(latencies, share):.0f}" for share in (0.5, 0.99))]
            )
            results.append({"callers": callers, "latencies": latencies, "seconds": seconds})
    columns = ["callers", "windows/s", "p50, ms", "p99, ms"]
    write(options.out, "Served: /v1/rerank, 20 documents of 100 tokens", markdown(columns, rows), results)


async def _closed_loop(
    httpx: Any, address: str, texts: Texts, callers: int, requests: int
) -> tuple[float, list[float]]:
    numbers, latencies = iter(range(callers * 10_000, callers * 10_000 + requests)), []

    async def caller(http: Any) -> None:
        for number in numbers:
            query, documents = texts.window(20, 100, number)
            started = time.perf_counter()
            (await http.post("/v1/rerank", json={"query": query, "documents": documents})).raise_for_status()
            latencies.append(time.perf_counter() - started)

    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        started = time.perf_counter()
        await asyncio.gather(*(caller(http) for _ in range(callers)))
        return time.perf_counter() - started, latencies


def rank_llm(options: argparse.Namespace, folder: Path, _: str) -> None:
    """Eight lists of 100 at a time, each engine in a process of its own."""
    template = options.rank_llm / "rank_llm/rerank/prompt_templates/rank_zephyr_alpha_template.yaml"
    corpus = ingest(DataConfig(path=str(options.data), split="test"), folder / "texts")
    passages = [text for table in Corpus.open(corpus.path).passages(["text"]) for text in table["text"].to_pylist()]
    model = str(answering_lm(passages[:2000], folder / "answering", template=str(template)))
    engine = EngineConfig(model=model, backend="vllm", dtype="float32", max_model_tokens=4096, compile=True)
    prompt = PromptConfig(template=str(template))
    own = FirstReranker(ListwiseConfig(engine=engine, prompt=prompt, window_size=20, stride=10))
    own.start()
    texts = Texts(options.data, folder, own.engine.tokenizer)
    numbers = iter(range(10**6))
    asked = [[_ascii(*texts.window(100, 100, next(numbers))) for _ in range(8)] for _ in range(options.rounds + 1)]
    file = folder / "lists.json"
    file.write_text(json.dumps([[{"query": q, "passages": own} for q, own in lists] for lists in asked]))
    peer = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "peers/rank_llm_first.py"), model, str(file), "100"],
        env={**os.environ, "PYTHONPATH": str(options.rank_llm), "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert peer.stdin is not None
    assert peer.stdout is not None
    theirs = json.loads(peer.stdout.readline())["prompt"]
    query, window = asked[0][0]
    ours = own.engine.tokenizer.decode(own.prompt.encode(query, window[:20])[:-1])
    if theirs != ours:
        raise SystemExit(f"the prompts differ:\n{ours}\n----\n{theirs}")
    times: dict[str, list[float]] = {"raydr": [], "rank_llm": []}
    equal = []
    for number, lists in enumerate(asked):
        orders = {}
        for name in ("raydr", "rank_llm") if number % 2 else ("rank_llm", "raydr"):
            if name == "raydr":
                started = time.perf_counter()
                known = {
                    f"{n}-{p}": Passage("", text) for n, (_, own_) in enumerate(lists) for p, text in enumerate(own_)
                }
                hits = [
                    (Query(str(n), q), [Hit(f"{n}-{p}", 0.0) for p in range(100)]) for n, (q, _) in enumerate(lists)
                ]
                ranked = own.rerank_many(hits, known)
                seconds = time.perf_counter() - started
                orders[name] = [[int(hit.passage_id.partition("-")[2]) for hit in line] for line in ranked]
            else:
                peer.stdin.write("\n")
                peer.stdin.flush()
                answer = json.loads(peer.stdout.readline())
                seconds, orders[name] = answer["seconds"], answer["orders"]
            if number:  # the first round warms up
                times[name].append(seconds)
        pairs = zip(orders["raydr"], orders["rank_llm"], strict=True)
        equal += [float(np.mean(np.equal(mine[:10], other[:10]))) for mine, other in pairs]
    peer.stdin.close()
    peer.wait()
    own.close()
    ratio = statistics.median(times["rank_llm"]) / statistics.median(times["raydr"])
    row = [*(spread(times[name]) for name in times), f"{ratio:.2f}", f"{np.mean(equal):.3f}"]
    columns = ["raydr, s", "rank_llm, s", "rank_llm / raydr", "same passage at a place of the first ten"]
    write(
        options.out,
        "Eight lists of 100 at once beside rank_llm",
        markdown(columns, [row]),
        {"times": times, "equal": equal},
    )


def _ascii(query: str, passages: list[str]) -> tuple[str, list[str]]:
    """Without what rank_llm's ftfy would write in another way."""
    return _plain(query), [_plain(passage) for passage in passages]


def _plain(text: str) -> str:
    return text.encode("ascii", "ignore").decode()


def made_of_minilm(folder: Path) -> Path:
    """Untrained, and long enough for every window."""
    folder.mkdir()
    causal_from_encoder("minilm", folder, max_positions=8192)
    return folder


def made_of_shape(folder: Path, shape: str) -> None:
    """An untrained Mistral in bfloat16; one that is there stays."""
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        sliding_window=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network: Any = MistralForCausalLM._from_config(config, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(locate("minilm"), local_files_only=True)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    network.save_pretrained(folder)
    del network
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["windows", "batch", "lists", "served", "rank_llm"])
    parser.add_argument("--data", type=Path, required=True, help="a BEIR folder, for its texts")
    parser.add_argument("--model", help="a causal language model (default: one made of MiniLM)")
    parser.add_argument("--shape", choices=SHAPES, help="make MODEL where it is not there, untrained")
    parser.add_argument("--dtype", choices=ATOL, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[25, 50, 100, 200], help="of a passage")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 10, 20], help="windows: passages in one")
    parser.add_argument("--num", type=int, default=16, help="batch: windows at once")
    parser.add_argument("--batch", type=int, default=4, help="batch: windows per forward pass of transformers")
    parser.add_argument("--requests", type=int, default=96, help="served: requests per number of callers")
    parser.add_argument("--rank-llm", type=Path, help="rank_llm: folder that it is installed in")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.md and OUT.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.shape:
            made_of_shape(Path(options.model), options.shape)
        model = options.model or str(made_of_minilm(folder / "small"))
        workloads = {"windows": windows, "batch": batch, "lists": lists, "served": served, "rank_llm": rank_llm}
        workloads[options.what](options, folder, model)


if __name__ == "__main__":
    main()
