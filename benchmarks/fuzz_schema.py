"""Schemathesis against the OpenAPI document of a running server: what it makes of the schema, right and wrong.

Notable: every check that schemathesis has is made: no 5xx but those that are documented, answers as the schema says,
wrong data refused, methods and content types that are not there. The server is uvicorn on a free port with the whole
application behind it; the tool is no dependency of raydr's.

    pip install schemathesis
    python benchmarks/fuzz_schema.py --examples 100
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import schemathesis
import uvicorn
from fuzz_http import build_app
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import FailureGroup

from tests.servers import free_port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="per operation and kind of data")
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
            return check(f"http://127.0.0.1:{port}", arguments.examples)
        finally:
            server.should_exit = True
            thread.join(10)


def check(address: str, examples: int) -> int:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    statuses: Counter[int] = Counter()
    found: dict[str, str] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except Exception as error:  # noqa: BLE001 (an operation without a body has no wrong bodies)
                print(f"{operation.label}, {mode.value}: {error}")
                continue

            @given(case=strategy)
            @settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def every(case: schemathesis.Case) -> None:
                response = case.call(timeout=60)
                statuses[response.status_code] += 1
                try:
                    case.validate_response(response)
                except FailureGroup as failures:
                    for failure in failures.exceptions:
                        key = f"{case.operation.label}: {type(failure).__name__}: {str(failure)[:160]}"
                        found.setdefault(key, f"{response.status_code} for {str(case.body)[:200]}")

            try:
                every()
            except Exception as error:  # noqa: BLE001 (hypothesis has nothing to generate for it)
                print(f"{operation.label}, {mode.value}: {type(error).__name__}: {str(error)[:120]}")
    print(f"{sum(statuses.values())} requests: {dict(sorted(statuses.items()))}")
    for key, example in found.items():
        print(f"  {key} ({example})")
    print(f"{len(found)} kinds of findings")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
