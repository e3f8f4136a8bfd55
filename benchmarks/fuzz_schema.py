"""Schemathesis against the OpenAPI document of a running server: what it makes of the schema, right and wrong.

Notable: its own engine runs its phases (examples, boundary values, random data) with every check it has: no 5xx but
those that are documented, statuses, types and bodies as the schema says, wrong data refused and right data taken,
methods and content types that are not there. What the operator's limits, the model's vocabulary, what the encoder reads
and the index's columns forbid is no matter of the schema, nor can it compare two lists, so right data may be refused if
the answer says that it is this (ELSEWHERE). The server is uvicorn on a free port with the whole application behind it;
the tool is no dependency of raydr's. The document says `string` of a picture; where the server reads them, real ones of
every form are sent.

    pip install schemathesis
    python benchmarks/fuzz_schema.py --examples 1000 --seed 0
    python benchmarks/fuzz_schema.py --examples 1000 --pictures       an index of pictures, an encoder that reads them
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import re
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import schemathesis
import uvicorn
from fuzz_http import build_app
from hostile.pictures import FORMS, valid
from hypothesis import strategies
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema

from tests.servers import free_port

ELSEWHERE = re.compile(
    r"limit_exceeded|invalid_filter|.*: (dimensions: at most|input: token ids are below|input: this model takes texts"
    r"|\S+: the encoder of this index reads |\d+ images for \d+ queries|query number \d+ has neither"
    r"|explain: the live index's embeddings are dense|prf.method: nothing here has learned)"
)
"""What the answer to right data may say: its code and its message."""
WITH_PICTURES = ("SearchRequest", "EmbeddingInput")
"""The shapes of the document that have any."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="per operation, of random data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", action="store_true", help="serve an index of pictures, not of texts")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        app, searcher, index = build_app(Path(folder), pictures=arguments.pictures)
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))

        async def serve() -> None:
            await searcher.use(index)
            await server.serve()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.1)
        try:
            address = f"http://127.0.0.1:{port}"
            return check(address, arguments.examples, arguments.seed, pictures=arguments.pictures)
        finally:
            server.should_exit = True
            thread.join(10)


def check(address: str, examples: int, seed: int, *, pictures: bool) -> int:
    document = httpx.get(f"{address}/openapi.json", timeout=60).json()
    if pictures:
        files = [base64.b64encode(valid(form)).decode() for form in FORMS]
        urls = [f"data:image/{form.lower()};base64,{file}" for form, file in zip(FORMS, files, strict=True)]
        schemathesis.openapi.format("picture", strategies.sampled_from(files + urls))
        for name in WITH_PICTURES:
            _name_pictures(document["components"]["schemas"][name]["properties"])
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=address, continue_on_failure=True, request_timeout=60)
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


def _name_pictures(properties: dict[str, Any]) -> None:
    """Gives the strings of a shape that are pictures a format, by which they are made."""
    ends = [end for name in ("image", "images") for end in properties.get(name, {}).get("anyOf", ())]
    for end in ends:
        ends.extend(end.get("items", {}).get("anyOf", ()))
        if end["type"] == "string":
            end["format"] = "picture"


def _error(response: Response) -> tuple[str, str]:
    """The code and the message of an error; nothing where it is none."""
    try:
        error = json.loads(response.content)["error"]
        return error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return "", ""


if __name__ == "__main__":
    raise SystemExit(main())
