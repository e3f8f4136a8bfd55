"""What stands between the socket and the routes: one ASGI layer that every request passes, cheapest check first.

Notable: in this order a request meets its request id, the host check, the API key and its rate, the size of its body
(counted while it arrives, so a chunked body without a length is bounded as well), the number of requests in work, and
its deadline. Everything that goes wrong, an unexpected exception included, is answered as JSON.
A handler that is cancelled (deadline, client gone) cancels the calls it has under way.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raydr.serve.auth import Gate
from raydr.serve.config import Limits, Route
from raydr.serve.errors import ApiError, internal_error
from raydr.serve.metrics import HttpMetrics

logger = logging.getLogger("ray.serve")

REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_PROBES = ("/health", "/ready")
_OPEN = (*_PROBES, "/", "/docs", "/openapi.json")
"""What needs no key, beside the files of the page: everything else does, also what does not exist."""
_ROUTES: dict[str, Route] = {
    "/v1/search": "search",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/models": "models",
}
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Door:
    """Wraps an ASGI application. `allowed_hosts` are the names it may be called by; None: any."""

    def __init__(
        self, app: ASGIApp, *, gate: Gate, limits: Limits, allowed_hosts: Sequence[str] | None, metrics: HttpMetrics
    ) -> None:
        self._app = app
        self._gate = gate
        self._limits = limits
        self._allowed_hosts = allowed_hosts
        self._metrics = metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        response = _Response(send)
        state: dict[str, Any] = {
            **scope.get("state", {}),
            "request_id": str(uuid.uuid4()),
            "caller": None,
            "required": {},
        }
        scope["state"] = state
        status = 499  # nginx's word for a client that went away; stays only if the handler is cancelled
        try:
            try:
                await self._pass(scope, receive, response.send, state)
            except ApiError as error:
                await response.answer(error, scope, receive)
            except TimeoutError:
                message = f"no answer within {self._limits.request_timeout_s:g} s"
                timeout = ApiError(504, "timeout", message, retry_after_s=1.0)
                await response.answer(timeout, scope, receive)
            except Exception as error:  # noqa: BLE001 (the last line of defence: logged, and answered without details)
                failure = internal_error(error, state["request_id"])
                if not response.started:
                    await failure(scope, receive, response.send)
            status = response.status
        finally:
            self._record(scope, state, status, time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, state: dict) -> None:
        headers = Headers(scope=scope)
        sent_id = headers.get(REQUEST_ID_HEADER)
        if sent_id is not None:
            if not _REQUEST_ID.fullmatch(sent_id):
                message = "X-Request-ID: 1 to 128 characters of A-Z a-z 0-9 . _ -"
                raise ApiError(400, "invalid_request_id", message, param="X-Request-ID")
            state["request_id"] = sent_id
        path = _path_inside(scope)
        if path not in _PROBES:  # a probe of the cluster calls a pod by its address
            self._check_host(headers.get("host", ""))
        if path not in _OPEN and not path.startswith("/ui/"):
            caller = self._gate.admit(headers.get("authorization"))
            state["caller"], state["required"] = caller.name, caller.filters
            if (route := _ROUTES.get(path)) is not None:
                caller.check(route)
        if scope["method"] == "POST":
            receive = _replay(await self._read_body(headers, receive), receive)
        if path not in _PROBES and self._running >= self._limits.concurrent_requests:
            raise ApiError(429, "overloaded", "this server is at its limit; try again shortly", retry_after_s=1.0)
        self._running += 1
        self._metrics.in_work(self._running)
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                await self._app(scope, receive, send)
        finally:
            self._running -= 1
            self._metrics.in_work(self._running)

    def _check_host(self, host: str) -> None:
        # Without keys, a web page that resolves its own name to this machine could read the index through a browser.
        if not self._gate.is_open or self._allowed_hosts is None:
            return
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in self._allowed_hosts:
            message = f"this server is not called {name!r}: configure api_keys, or name it in allowed_hosts"
            raise ApiError(421, "host_not_allowed", message, param="Host")

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._limits.body_bytes
        too_large = ApiError(413, "body_too_large", f"the body may have at most {limit} bytes")
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):  # Python reads no number of 5,000 digits
            raise too_large
        body = bytearray()
        async with asyncio.timeout(self._limits.request_timeout_s):  # a body may not trickle in for ever
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise asyncio.CancelledError
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)

    def _record(self, scope: Scope, state: dict, status: int, duration_s: float) -> None:
        # The route's pattern, not the path sent: callers must not be able to make new time series.
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.record(route, status, duration_s)
        logger.info(
            "%s %s %d",
            scope["method"],
            route,
            status,
            extra={
                "event": "http_request",
                "http_request_id": state["request_id"],
                "caller": state["caller"],
                "duration_ms": round(duration_s * 1000, 2),
            },
        )


class _Response:
    """A `send` that knows whether an answer has begun, and adds the security headers."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 499

    @property
    def started(self) -> bool:
        return self.status != 499

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)

    async def answer(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if not self.started:
            await error.response()(scope, receive, self.send)


def _path_inside(scope: Scope) -> str:
    """The path below the application's `route_prefix`, which an ASGI server leaves in `path`."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path[len(root) :] or "/" if path == root or path.startswith(f"{root}/") else path


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body already read, and then whatever the client does next."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
