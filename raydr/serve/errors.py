"""What a caller is told when a request fails: one JSON shape, OpenAI's, for every status.

Notable: nothing of an unexpected error reaches the caller but its request id; the trace is in the log. FastAPI's own
errors (validation, unknown route, wrong method) are put into the same shape, with the faulty field in `param`.

    {"error": {"message": "k: Input should be less than or equal to 1000", "type": "invalid_request_error",
               "param": "k", "code": "invalid_value"}}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from raydr.serve import metrics

logger = logging.getLogger("ray.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}
_VALIDATION_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}


class ApiError(Exception):
    """An answer other than 200, raised anywhere while a request is handled."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after_s = (
            status, code, message, param, retry_after_s,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        # It crosses processes when a deployment raises it for the ingress to answer.
        return _rebuild, (self.status, self.code, self.message, self.param, self.retry_after_s)

    def response(self) -> Response:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s + 0.5)))  # whole seconds, rounded up
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return error_response(self.status, self.code, self.message, self.param, headers)


def _rebuild(status: int, code: str, message: str, param: str | None, retry_after_s: float | None) -> ApiError:
    return ApiError(status, code, message, param=param, retry_after_s=retry_after_s)


def error_response(
    status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The one shape; counted by its code."""
    metrics.record_error(code)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
    return Response(body, status, headers, media_type="application/json")


def install_handlers(app: FastAPI) -> None:
    """Makes `app` answer every error in the one shape."""

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation_error(_: Request, error: RequestValidationError) -> Response:
        fault: dict[str, Any] = error.errors()[0]
        location = [str(part) for part in fault["loc"][1:]]  # the first part says where: body
        if fault["type"] == "json_invalid":
            return error_response(400, "invalid_json", f"the body is not JSON: {fault['ctx']['error']}")
        message = fault["msg"].removeprefix("Value error, ")
        param = fault.get("ctx", {}).get("param") or ".".join(location) or None
        code = _VALIDATION_CODES.get(fault["type"], "invalid_value")
        if fault["type"] == "extra_forbidden":
            message = "unknown field"
        return error_response(422, code, f"{param}: {message}" if param else message, param)

    @app.exception_handler(HTTPException)
    async def _http_exception(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(error.status_code, code, message, headers=error.headers)


def internal_error(error: Exception, request_id: str) -> Response:
    """500, for what nobody expected: the trace goes to the log."""
    logger.error("unexpected error in request %s", request_id, exc_info=error)
    return error_response(500, "internal_error", f"internal error; the server's log has it under {request_id}")
