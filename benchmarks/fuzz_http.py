"""Hostile requests: thousands of changed bodies, headers, paths and methods on every route, over a real searcher.

Notable: the application runs in this process without a socket (plain ASGI), so what is seen is raydr's own
answer; what the socket's parser refuses before is uvicorn's and HAProxy's. A finding is an answer of another status
than those that the HTTP API names, one that is not JSON where JSON is due, more than SECONDS, or more than MEMORY.

    python benchmarks/fuzz_http.py --cases 5000 --seed 0
    python benchmarks/fuzz_http.py --cases 5000 --pictures                   an index of pictures, and pictures sent
    python benchmarks/fuzz_http.py --cases 1 --first 4711 --show
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import unquote

from hostile.mutations import mutate
from hostile.pictures import hostile_text, valid

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "serve")]  # tiny_serving

SECONDS = 10.0
MEMORY_MIB = 1024
"""Beyond what the process has when it starts."""
EXPECTED = {200, 206, 304, 307, 416, 400, 401, 403, 404, 405, 413, 415, 421, 422, 429, 501, 503, 504}

VALID: list[tuple[str, str, Any]] = [
    ("POST", "/v1/search", {"query": "who hunts mice", "k": 3, "mode": "dense"}),
    (
        *("POST", "/v1/search"),
        {
            "queries": ["who hunts mice", "sea"],
            "k": 4,
            "mode": "hybrid",
            "fields": ["title", "highlights"],
            "filters": {"kind": ["pet", "wild"], "year": {"gte": 1990, "lt": 2020.5}, "title": {"not": None}},
            "allow_ids": ["cat", "dog", "owl"],
            "exclude_ids": ["dog"],
        },
    ),
    (
        *("POST", "/v1/search"),
        {
            "query": "animal",
            "mode": "bm25",
            "rerank": True,
            "reranker": "lexical",
            "rerank_depth": 4,
            "on_rerank_failure": "keep_order",
        },
    ),
    ("POST", "/v1/search", {"query": "animal", "feedback": {"scores": "lexical", "order": "lexical", "depth": 3}}),
    ("POST", "/v1/search", {"queries": ["animal", "night"], "prf": {"method": "rocchio", "k": 2}, "mode": "hybrid"}),
    ("POST", "/v1/embeddings", {"input": ["first", "second"], "encoding_format": "base64", "dimensions": 64}),
    ("POST", "/v1/embeddings", {"input": [[101, 2000, 102], [7]], "input_type": "search_query", "model": "minilm"}),
    ("POST", "/v1/rerank", {"query": "a cat", "documents": ["a dog", {"text": "a cat"}], "top_n": 1}),
    ("POST", "/v2/rerank", {"query": "a cat", "documents": ["x"], "return_documents": True, "model": "lexical"}),
    ("POST", "/rerank", {"query": "a cat", "texts": ["a dog", "a cat"], "return_text": True}),
    ("GET", "/v1/models", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/ui/../../config.py", None),
]
PIXELS = base64.b64encode(valid("PNG")).decode()
WITH_PICTURES: list[tuple[str, str, Any]] = [
    ("POST", "/v1/search", {"image": PIXELS, "k": 3, "fields": ["title", "image", "metadata"]}),
    ("POST", "/v1/search", {"image": PIXELS, "query": "in blue", "instruction": "Find a picture.", "mode": "hybrid"}),
    ("POST", "/v1/search", {"queries": ["red", None], "images": [None, PIXELS], "filters": {"image": {"not": None}}}),
    ("POST", "/v1/search", {"image": PIXELS, "rerank": True, "reranker": "colour", "feedback": {"order": "colour"}}),
    ("POST", "/v1/search", {"image": PIXELS, "query": "red", "rerank": True, "reranker": "word"}),
    ("POST", "/v1/embeddings", {"input": [{"image": PIXELS}, "text", {"text": "red", "image": PIXELS}]}),
    ("POST", "/v1/embeddings", {"input": {"image": PIXELS}, "input_type": "query", "instruction": "Find words."}),
]
FIELDS = ("query", "queries", "k", "mode", "filters", "allow_ids", "exclude_ids", "rerank_depth", "feedback", "prf",
          "fields",
          "input", "dimensions", "documents", "texts", "top_n", "model", "input_type", "encoding_format")  # fmt: skip
PATHS = ("/ui/%2e%2e/%2e%2e/auth.py", "/ui//etc/passwd", "/ui/..%2fhttp.py", "/ui/%00", "/v1/%0d%0aX: y", "//",
         "/v1//search", "/v1/search/", "/ui/" + "a/" * 400, "/" + "x" * 8000, "/ui/\u202e", "/v1/search?k=1",
         "/docs/", "/openapi.json/x", "/ui/%f0%28%8c%28", "/ui/index.html%00.js", "/ui/~root", "/-/routes")  # fmt: skip
HEADERS: tuple[tuple[str, bytes], ...] = (
    *(
        ("content-type", value)
        for value in (b"text/plain", b"", b"application/json; charset=utf-7", b"\xff\xfe", b"a" * 9000)
    ),
    *(("content-length", value) for value in (b"-1", b"9" * 5000, b"1e9", b"0", b"\xb2", b"99999999999999999999")),
    *(("content-encoding", value) for value in (b"gzip", b"br", b"deflate, gzip", b"x")),
    *(("x-request-id", value) for value in (b"", b"a b", b"x" * 200, b"\x00", b"\xff", b"${jndi:ldap://x}")),
    *(("authorization", value) for value in (b"Bearer ", b"Bearer \xff", b"bearer x y", b"Basic Og==", b"B" * 20_000)),
    *(
        ("host", value)
        for value in (b"", b"evil", b"[::1", b"127.0.0.1:x", b"\xff", b"localhost:99999999", b"a" * 5000)
    ),
    *(
        ("accept", b"text/html"),
        ("transfer-encoding", b"chunked"),
        ("expect", b"100-continue"),
        ("range", b"bytes=0-" * 500),
    ),
    *(("range", b"bytes=5-1"), ("if-modified-since", b"\xff" * 20), ("cookie", b"x" * 9000), ("te", b"trailers")),
    *(("x-forwarded-host", b"evil"), ("x-http-method-override", b"DELETE"), ("upgrade", b"websocket")),
)
CHARACTERS = (0, 9, 10, 0x7F, 0xAD, 0x301, 0x200B, 0x202E, 0xFEFF, 0xFFFF, 0x1F468, 0x10FFFF)
METHODS = ("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT", "BREW", "POST")


def request_of(rng: Random, *, pictures: bool) -> tuple[str, str, list[tuple[str, bytes]], bytes]:
    """Method, path, headers, body of a case."""
    method, path, body = rng.choice(WITH_PICTURES if pictures else VALID)
    if body is not None:
        body = _restructured(_with_hostile_pictures(body, rng) if pictures else body, rng)
    content = b"" if body is None else json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
    if rng.random() < (0.1 if pictures else 0.6):
        content = mutate(content, rng, text=True)
    headers: list[tuple[str, bytes]] = [("content-type", b"application/json"), ("host", b"127.0.0.1")]
    if rng.random() < 0.15:
        name, value = rng.choice(HEADERS)
        headers = [pair for pair in headers if pair[0] != name or rng.random() < 0.2] + [(name, value)]
    if rng.random() < 0.05:
        path = rng.choice(PATHS)
    if rng.random() < 0.05:
        method = rng.choice(METHODS)
    return method, path, headers, content


def _with_hostile_pictures(value: Any, rng: Random) -> Any:
    """Most pictures of a body in exchange for others."""
    if isinstance(value, dict):
        return {name: _with_hostile_pictures(inner, rng) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_hostile_pictures(inner, rng) for inner in value]
    return hostile_text(rng) if value == PIXELS and rng.random() < 0.8 else value


def _restructured(body: dict[str, Any], rng: Random) -> Any:
    """A body whose JSON is valid and whose meaning is not, half of the time."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = rng.choice((*body, *FIELDS))
        body[name] = _value(rng)
        if rng.random() < 0.3 and isinstance(body.get("filters"), dict):
            body["filters"][rng.choice(("kind", "year", "title", "text", "passage_id", "\u0000", "x" * 5000))] = _value(
                rng
            )
    return body if rng.random() < 0.97 else rng.choice(([body], None, "x", 7, {"": body}))


def _value(rng: Random) -> Any:
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice((0, -1, 1, 2, 1000, 1001, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, True, None))
    if kind == 1:
        return "".join(chr(rng.choice(CHARACTERS)) for _ in range(rng.choice((1, 5, 2000))))
    if kind == 2:
        return "word " * rng.choice((0, 1, 2000, 50_000))
    if kind == 3:
        return [_value(rng) for _ in range(rng.choice((0, 1, 3)))]
    if kind == 4:
        return {rng.choice(("gte", "lt", "not", "in", "$where", "", "scores", "text")): _value(rng) for _ in range(2)}
    if kind == 5:
        return [rng.randrange(-1, 40_000) for _ in range(rng.choice((1, 10, 300)))]
    if kind == 6:
        return [str(n) for n in range(rng.choice((10, 1001, 20_000)))]
    if kind == 7:
        value: Any = 1
        for _ in range(rng.choice((20, 120, 260, 480, 900))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(("dense", "bm25", "lexical", "minilm", "float", "query", "cat", "' OR 1=1 --", "../etc",
                       "<script>alert(1)</script>", "{{7*7}}", "%s%n", "[A] > [B]", '"'))  # fmt: skip


def build_app(folder: Path, *, pictures: bool = False) -> Any:
    """The whole application over six animals, or over pictures, with rerankers."""
    from tiny_pictures import build_pictures
    from tiny_serving import ANIMALS, build_run

    from raydr.config import Component
    from raydr.serve.colocated import colocated_searcher
    from raydr.serve.config import AppArgs
    from raydr.serve.http import build_http

    if pictures:
        index = build_pictures(folder / "pictures", Component(import_path="tiny_pictures:Colours"))
        rerankers = {"colour": "tiny_pictures:ColourReranker", "word": "tiny_pictures:WordReranker"}
    else:
        index = build_run(folder / "animals", ANIMALS, num_shards=2)
        rerankers = {"lexical": "tiny_serving:LexicalReranker"}
    args = AppArgs(index=index, rerankers={name: Component(import_path=path) for name, path in rerankers.items()})
    searcher = colocated_searcher(args, num_shard_deployments=2)
    return build_http(searcher, args), searcher, str(index)


class Answer(NamedTuple):
    """What the application sent."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


async def ask(app: Any, method: str, target: str, headers: list[tuple[str, bytes]], content: bytes) -> Answer:
    """One request as an ASGI server hands it on: any bytes in headers, no help from a client library."""
    path, _, query = target.partition("?")
    if not any(name == "content-length" for name, _ in headers):
        headers = [*headers, ("content-length", str(len(content)).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "state": {},
        "server": ("127.0.0.1", 8000),
    }
    sent: list[Any] = []
    received = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> Any:
        return next(received, None) or await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(sent[0]["status"], dict(sent[0]["headers"]), body)


async def run(
    app: Any, seed: int, first: int, last: int, *, pictures: bool = False, show: bool = False
) -> tuple[Counter, list[str]]:
    """Statuses, and what was found."""
    statuses: Counter[int] = Counter()
    findings: list[str] = []
    slowest = 0.0
    for case in range(first, last):
        method, path, headers, content = request_of(Random(f"http:{seed}:{case}"), pictures=pictures)
        what = f"case {case}: {method} {path[:60]} {content[:120]!r}"
        started = time.monotonic()
        try:
            answer = await asyncio.wait_for(ask(app, method, path, headers, content), SECONDS + 30)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what is looked for)
            findings.append(f"{what}: {error!r:.200}")
            continue
        seconds = time.monotonic() - started
        slowest = max(slowest, seconds)
        statuses[answer.status] += 1
        if show:
            print(f"{what}: {answer.status} {answer.body[:300]!r}")
        if (wrong := _wrong(method, path, answer, seconds)) is not None:
            findings.append(f"{what}: {answer.status}: {wrong}")
    print(f"the slowest request took {slowest:.2f} s")
    return statuses, findings


def _wrong(method: str, path: str, answer: Answer, seconds: float) -> str | None:
    shown = answer.body[:200]
    if answer.status not in EXPECTED:
        return f"an unexpected status: {shown!r}"
    if seconds > SECONDS:
        return f"took {seconds:.1f} s"
    pages = path.startswith(("/ui", "/docs")) or path in ("/", "//")
    if method == "HEAD" or answer.status == 307 or (pages and answer.status < 400):
        return None
    try:
        content = json.loads(answer.body)
    except ValueError:
        return f"no JSON: {shown!r}"
    if b"Traceback" in answer.body:
        return "a traceback"
    error = content.get("error") if isinstance(content, dict) else None
    if answer.status >= 400 and path != "/ready" and set(error or ()) != {"message", "type", "param", "code"}:
        return f"not the one shape of errors: {shown!r}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", action="store_true", help="search an index of pictures with pictures")
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    started = time.monotonic()

    async def all_cases() -> tuple[Counter, list[str], int]:
        with tempfile.TemporaryDirectory() as folder:
            app, searcher, index = build_app(Path(folder), pictures=arguments.pictures)
            await searcher.use(index)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            last = arguments.first + arguments.cases
            how = {"pictures": arguments.pictures, "show": arguments.show}
            statuses, findings = await run(app, arguments.seed, arguments.first, last, **how)
            return statuses, findings, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - before

    statuses, findings, grown = asyncio.run(all_cases())
    findings.extend([f"the process grew by {grown} MiB"] if grown > MEMORY_MIB else [])
    shown = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"{arguments.cases} requests in {time.monotonic() - started:.0f} s: {shown}; the process grew by {grown} MiB")
    print("\n".join(findings[:40]))
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
