"""OpenTelemetry traces of a query through its deployments: spans of raydr's stages inside those of Ray Serve.

Notable: the tracing is Ray Serve's own, which follows a request from replica to replica; this adds where spans go and
what happens between two hops. It is off unless Serve is started with an exporter, and then costs a look at the current
context per stage; only requests that Serve samples are followed.

    RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=raydr.serve.tracing:exporter      when Ray's processes start, or
    tracing_config: {exporter_import_path: "raydr.serve.tracing:exporter", sampling_ratio: 0.01}      in a Serve config

With `OTEL_EXPORTER_OTLP_ENDPOINT` set they go there over HTTP (`pip install "raydr[tracing]"`), else to JSON lines, one
file for each process, in the folder that `RAYDR_TRACES` names; without it, in `traces` beside Serve's logs.
"""

from __future__ import annotations

import os
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

from raydr.errors import ConfigError

FOLDER_VARIABLE = "RAYDR_TRACES"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_WRITTEN_EVERY_MS = 1000.0
_NOTHING = nullcontext()
_tracer = trace.get_tracer("raydr")


def span(name: str, **attributes: str | int) -> AbstractContextManager[Any]:
    """A span of the block inside the current one; nothing where no request is followed."""
    if not trace.get_current_span().is_recording():
        return _NOTHING
    return _tracer.start_as_current_span(name, attributes=attributes)


def exporter() -> list[SpanProcessor]:
    """What Ray Serve calls in each of its processes. Raises `ConfigError` where the OTLP exporter is not installed."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return [BatchSpanProcessor(_to_file(_folder()), schedule_delay_millis=_WRITTEN_EVERY_MS)]
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but its exporter cannot be imported ({error}); "
            'pip install "raydr[tracing]" on every node, or unset it and read the traces from files'
        ) from error
    return [BatchSpanProcessor(OTLPSpanExporter())]


def _folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    import ray

    # Where Ray's log collectors and its dashboard look; Ray says it nowhere in public.
    node: Any = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) / "serve" / "traces"


def _to_file(folder: Path) -> ConsoleSpanExporter:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{socket.gethostname()}-{os.getpid()}.jsonl").open("a", encoding="utf-8")
    return ConsoleSpanExporter(out=file, formatter=_line)


def _line(ended: ReadableSpan) -> str:
    return ended.to_json(indent=None) + "\n"
