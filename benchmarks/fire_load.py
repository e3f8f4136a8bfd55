"""Bounded load on a served index whose answers are known: closed and open loops, and what became of each request.

Notable: only loopback addresses are asked, for at most a given time. An answer is right where ids and scores are those
of the bare index under the version the answer names; a partial one, those of the shards it has. Any other 200 is
wrong. A client asks again at once, without the pause that a `Retry-After` asks for, except after a refusal (0.1 s), so
what is counted is worse than what a polite client sees.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from raydr.encoders.factory import EncoderFactory
from raydr.index.reader import IndexReader
from raydr.types import Query

K = 10
TOLERANCE = 1e-3
"""Batches of other sizes round an embedding's last digits otherwise, which moves scores by less than this."""


class Truth:
    """What the bare index at each of `indexes` gives for `texts`, by index version."""

    def __init__(self, indexes: list[Path], texts: list[str]) -> None:
        self.texts = texts
        self._of: dict[str, dict[str, list[tuple[str, float, int]]]] = {}
        for path in indexes:
            reader = IndexReader.open(path, num_threads=1)
            embeddings = EncoderFactory(reader.method)().encode_queries([Query("", text) for text in texts])
            top = reader.search(embeddings, min(30 * K, reader.num_passages))
            shards = np.searchsorted(reader.first_rows, top.rows, side="right") - 1
            self._of[reader.version] = {
                text: [
                    (reader.passage_ids[row], score, shard)
                    for row, score, shard in zip(*(line.tolist() for line in lines), strict=True)
                ]
                for text, *lines in zip(texts, top.rows, top.scores, shards, strict=True)
            }

    def judge(self, text: str, answer: dict[str, Any]) -> str:
        """`right`, `partial` (and right as far as it goes) or `wrong`."""
        missing = {shard["shard"] for shard in answer.get("missing_shards", ())}
        expected = [hit for hit in self._of[answer["index_version"]][text] if hit[2] not in missing]
        scores = {id_: score for id_, score, _ in expected}
        found = [(hit["id"], hit["score"]) for hit in answer["hits"]]
        good = len(found) == K and all(
            abs(score - best) < TOLERANCE and abs(score - scores.get(id_, np.inf)) < TOLERANCE
            for (id_, score), (_, best, _) in zip(found, expected, strict=False)
        )
        return ("partial" if missing else "right") if good else "wrong"


@dataclass
class Answer:
    """One request: when it was sent and answered (seconds, monotonic), what came, and for which version."""

    sent: float
    done: float
    outcome: str
    version: str = ""

    @property
    def took_s(self) -> float:
        return self.done - self.sent

    @property
    def good(self) -> bool:
        return self.outcome in ("right", "partial")

    @property
    def is_clear(self) -> bool:
        """An error in raydr's shape, with a status that says: later."""
        says_later = self.outcome.startswith(("429 ", "503 ", "504 "))
        return self.good or (says_later and not self.outcome.endswith(("(no JSON)", "without Retry-After")))


@dataclass
class Load:
    """Asks `address`; `answers` grows while it does."""

    address: str
    truth: Truth
    body: dict[str, Any] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    check: Callable[[dict[str, Any]], str] | None = None

    def __post_init__(self) -> None:
        if urlsplit(self.address).hostname != "127.0.0.1":
            raise SystemExit(f"{self.address}: load goes to 127.0.0.1 only")

    async def ask(self, http: aiohttp.ClientSession, number: int) -> Answer:
        text = self.truth.texts[number % len(self.truth.texts)]
        sent, version = time.monotonic(), ""
        try:
            body = {"query": text, "k": K, "fields": ["title"], **self.body}
            async with http.post(f"{self.address}/v1/search", json=body) as response:
                content = await response.read()
                outcome, version = self._outcome(text, response, content)
        except aiohttp.ClientConnectorError:
            outcome = "connection refused"
        except (aiohttp.ClientError, ConnectionError):
            outcome = "connection reset"
        except TimeoutError:
            outcome = "no answer"
        answer = Answer(sent, time.monotonic(), outcome, version)
        self.answers.append(answer)
        return answer

    def _outcome(self, text: str, response: aiohttp.ClientResponse, content: bytes) -> tuple[str, str]:
        try:
            answer = json.loads(content)
        except ValueError:
            return f"{response.status} (no JSON)", ""
        if response.status != 200:
            unspoken = response.status in (429, 503, 504) and "Retry-After" not in response.headers
            return f"{response.status} {answer['error']['code']}" + (" without Retry-After" if unspoken else ""), ""
        verdict = self.truth.judge(text, answer) if self.check is None else self.check(answer)
        return verdict, answer["index_version"]

    async def closed(self, clients: int, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """`clients` ask again as soon as they are answered, for `seconds` at most, or until `until()`."""
        end = time.monotonic() + seconds
        async with session(clients) as http:

            async def client(number: int) -> None:
                while time.monotonic() < end and not until():
                    number += clients
                    if not (await self.ask(http, number)).good:
                        await asyncio.sleep(0.1)

            await asyncio.gather(*(client(number) for number in range(clients)))

    async def open(self, rate_per_s: float, seconds: float, most: int = 4000) -> None:
        """Requests at random times, however long answers take; `most` of them at the most."""
        rng, tasks, due = random.Random(0), [], 0.0
        async with session(0) as http:
            started = time.monotonic()
            while due < seconds and len(tasks) < most:
                due += rng.expovariate(rate_per_s)
                await asyncio.sleep(max(0.0, started + due - time.monotonic()))
                tasks.append(asyncio.create_task(self.ask(http, len(tasks))))
            await asyncio.gather(*tasks)


class Running:
    """A closed loop in a thread of its own, until the block ends or `seconds` are over."""

    def __init__(self, load: Load, *, clients: int = 4, seconds: float = 300) -> None:
        self.load = load
        self._stop = threading.Event()
        loop = load.closed(clients, seconds, self._stop.is_set)
        self._thread = threading.Thread(target=asyncio.run, args=(loop,))

    def __enter__(self) -> Load:
        self._thread.start()
        return self.load

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def session(connections: int) -> aiohttp.ClientSession:
    """No limit of time below the server's own, and none of the connections for 0."""
    connector = aiohttp.TCPConnector(limit=connections)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60))


def outcomes(answers: list[Answer]) -> dict[str, int]:
    return dict(Counter(answer.outcome for answer in answers).most_common())


def latency_ms(answers: list[Answer], share: float) -> float:
    """Of the good answers."""
    times = [1000 * answer.took_s for answer in answers if answer.good]
    return float(np.quantile(times, share)) if times else float("nan")


def recovery(answers: list[Answer], killed: float, slow_s: float = 2.0) -> dict[str, float]:
    """Seconds from the kill to the end of the last request that failed or took longer than `slow_s` (0: none did), and
    the longest time without a good answer.
    """
    after = [answer for answer in answers if answer.done >= killed]
    bad = [answer.done for answer in after if not answer.good or answer.took_s > slow_s]
    marks = [killed, *sorted(answer.done for answer in after if answer.good)]
    gaps = [later - earlier for earlier, later in zip(marks, marks[1:])]
    return {"recovered_s": max(bad) - killed if bad else 0.0, "gap_s": max(gaps, default=float("inf"))}


def told(load: Load, since: float) -> dict[str, Any]:
    after = [answer for answer in load.answers if answer.done >= since]
    unclear = sum(not answer.is_clear for answer in after)
    return {
        "outcomes": outcomes(after),
        "unclear": unclear,
        "slowest_s": max((answer.took_s for answer in after), default=float("nan")),
        **recovery(load.answers, since),
    }
