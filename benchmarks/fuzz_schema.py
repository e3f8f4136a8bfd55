"""Schemathesis against the OpenAPI document of a running server: what it makes of the schema, right and wrong.

Notable: its own engine runs its phases (examples, boundary values, random data) with every check it has: no 5xx but
those that are documented, statuses, types and bodies as the schema says, wrong data refused and right data taken,
methods and content types that are not there. What the operator's limits, the model's vocabulary and the index's columns
forbid is no matter of the schema, so right data may be refused if the answer says that it is this (ELSEWHERE). The
server is uvicorn on a free port with the whole application behind it; the tool is no dependency of raydr's.

    pip install schemathesis
    python benchmarks/fuzz_schema.py --examples 1000 --seed 0
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import schemathesis
import uvicorn
from fuzz_http import build_app
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema

from tests.servers import free_port

ELSEWHERE = re.compile(r"limit_exceeded|invalid_filter|.*: (dimensions: at most|input: token ids are below) ")
"""What the answer to right data may say: its code and its message."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="per operation, of random data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        app, searcher, index = build_app(Path(folder))
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))

        async def serve() -> None:
            await searcher.use(index)
            await server.serve()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.1)
        try:
            return check(f"http://127.0.0.1:{port}", arguments.examples, arguments.seed)
        finally:
            server.should_exit = True
            thread.join(10)


def check(address: str, examples: int, seed: int) -> int:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    schema.config.update(continue_on_failure=True, request_timeout=60)
    schema.config.generation.update(max_examples=examples, no_shrink=True, database="none")
    schema.config.seed = seed
    statuses: Counter[int] = Counter()
    codes: Counter[str] = Counter()
    found: dict[str, str] = {}
    started = time.monotonic()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found.setdefault(f"{getattr(event, 'label', '')}: {event}", "")
        if not isinstance(event, events.ScenarioFinished):
            continue
        for case_id, interaction in event.recorder.interactions.items():
            if interaction.response is None:
                found.setdefault(f"{event.recorder.label}: no answer", str(interaction.request))
                continue
            statuses[interaction.response.status_code] += 1
            code, message = _error(interaction.response)
            codes[code] += 1
            for node in event.recorder.checks.get(case_id, ()):
                if node.failure_info is None:
                    continue
                failure = node.failure_info.failure
                if node.name == "positive_data_acceptance" and ELSEWHERE.match(f"{code}: {message}"):
                    continue
                case = event.recorder.cases[case_id].value
                key = f"{event.recorder.label}: {failure.title}: {failure.message[:160]!r} {code} {message[:100]}"
                found.setdefault(key, f"{interaction.response.status_code} for {case.method} {str(case.body)[:300]}")
    print(f"{sum(statuses.values())} requests in {time.monotonic() - started:.0f} s: {dict(sorted(statuses.items()))}")
    print(dict(codes))
    for key, example in found.items():
        print(f"  {key} ({example})")
    print(f"{len(found)} kinds of findings")
    return 1 if found else 0


def _error(response: Response) -> tuple[str, str]:
    """The code and the message of an error; nothing where it is none."""
    try:
        error = json.loads(response.content)["error"]
        return error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return "", ""


if __name__ == "__main__":
    raise SystemExit(main())
