"""The routes: from HTTP to a `Service` and back. FastAPI, no Ray.

Notable: the application is built around any `Service`, so the same routes run in a Serve replica, in a test without a
cluster, and in the benchmark that measures what Serve's hop costs. Answers are written by pydantic's serialiser
without being validated a second time. `/docs` is a page made from the OpenAPI document, because FastAPI's own loads
its scripts from other hosts.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from jaxtyping import Float32
from pydantic import BaseModel
from starlette.responses import FileResponse, HTMLResponse
from starlette.staticfiles import StaticFiles

from raydr.serve.answers import (
    EmbeddingItem,
    EmbeddingsAnswer,
    ErrorAnswer,
    ModelList,
    RerankAnswer,
    RerankDocument,
    RerankItem,
    SearchAnswer,
    Status,
    TeiRerankItem,
    Usage,
)
from raydr.serve.auth import Gate
from raydr.serve.config import LOCAL_HOSTS, AppArgs
from raydr.serve.docs_page import docs_page
from raydr.serve.errors import ApiError, error_response, install_handlers
from raydr.serve.limits import check_embeddings, check_rerank, check_search
from raydr.serve.metrics import HttpMetrics
from raydr.serve.middleware import Door
from raydr.serve.schema import EmbeddingsRequest, RerankRequest, SearchRequest, TeiRerankRequest
from raydr.version import __version__

UI = Path(__file__).parent / "ui"


def _errors(*more: int) -> dict[int | str, dict[str, Any]]:
    """What any route with a key may answer, and what this one does."""
    statuses = (400, 401, 403, 413, 415, 421, 422, 429, 500, 503, 504, *more)
    return {status: {"model": ErrorAnswer} for status in sorted(statuses)}


@runtime_checkable
class Service(Protocol):
    """What the routes need; `raydr.serve.search.Searcher` is one. Errors meant for the caller are `ApiError`."""

    async def search(self, request: SearchRequest, *, request_id: str, required: Mapping[str, Any]) -> SearchAnswer:
        """Finds nothing that does not meet the `required` filters of the caller's key."""
        ...

    async def embed(
        self, request: EmbeddingsRequest, *, request_id: str
    ) -> tuple[Float32[np.ndarray, "input dim"], int, str]:
        """Embeddings, number of tokens read, name of the model."""
        ...

    def reranker_name(self, asked: str | None) -> str:
        """The reranker a request means. Raises `ApiError` 501 without any, 404 for a name that is not there."""
        ...

    async def rerank(
        self, query: str, documents: Sequence[str], *, model: str | None = None, request_id: str
    ) -> list[tuple[int, float]]:
        """(place in `documents`, score), best first. Raises `ApiError` like `reranker_name`."""
        ...

    def models(self) -> ModelList: ...

    def status(self) -> Status: ...


def build_http(service: Service, args: AppArgs, gate: Gate | None = None) -> FastAPI:
    """The application over `service`, with everything in front of it that a request has to pass.

    `gate`: who is let in; without, the callers that `args` names.
    """
    gate = gate or Gate(args.read_api_keys())
    app = FastAPI(
        title="raydr",
        version=__version__,
        summary="Dense, word and hybrid search, embeddings and reranking over HTTP.",
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = _StrictJsonRoute
    install_handlers(app)
    _add_search(app, service, args)
    _add_rerank(app, service, args)
    _add_pages(app, service)
    hosts = None if "*" in args.allowed_hosts else [*LOCAL_HOSTS, *args.allowed_hosts]
    app.add_middleware(Door, gate=gate, limits=args.limits, allowed_hosts=hosts, metrics=HttpMetrics())
    return app


def _add_search(app: FastAPI, service: Service, args: AppArgs) -> None:
    @app.post("/v1/search", response_model=SearchAnswer, response_model_exclude_none=True, responses=_errors(404, 501))
    async def search(body: SearchRequest, request: Request) -> Response:
        """The best passages for one query (`query`, `image` or both) or many (`queries`, `images`)."""
        check_search(body, args.limits)
        state = request.state
        return _json(await service.search(body, request_id=state.request_id, required=state.required))

    @app.post("/v1/embeddings", response_model=EmbeddingsAnswer, responses=_errors(404))
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Embeddings of texts, token ids or pictures, in OpenAI's shape; pictures in Jina's."""
        check_embeddings(body, args.limits)
        _check_model(body.model, service, "embeddings")
        matrix, num_tokens, model = await service.embed(body, request_id=request.state.request_id)
        if body.dimensions is not None:
            matrix = _truncated(matrix, body.dimensions)
        if body.encoding_format == "base64":
            rows: list[Any] = [b64encode(row.astype("<f4").tobytes()).decode() for row in matrix]
        else:
            rows = matrix.tolist()
        data = [EmbeddingItem.model_construct(index=index, embedding=row) for index, row in enumerate(rows)]
        usage = Usage(prompt_tokens=num_tokens, total_tokens=num_tokens)
        return _json(EmbeddingsAnswer(data=data, model=model, usage=usage))

    @app.get("/v1/models", response_model=ModelList, response_model_exclude_none=True, responses=_errors())
    async def models(request: Request) -> Response:
        """The models this server answers with; the first one names the live index as well."""
        found = service.models()
        if request.state.required:  # how much others have in the index is theirs
            hidden = {"num_passages": None, "num_shards": None}
            found = ModelList(data=[card.model_copy(update=hidden) for card in found.data])
        return _json(found)


def _add_rerank(app: FastAPI, service: Service, args: AppArgs) -> None:
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Scores documents for a query, best first (Cohere's and Jina's shape)."""
        check_rerank(body, args.limits)
        request_id = request.state.request_id
        model = service.reranker_name(body.model)
        ranked = await service.rerank(body.query, body.documents, model=model, request_id=request_id)
        results = [
            RerankItem(
                index=index,
                relevance_score=score,
                document=RerankDocument(text=body.documents[index]) if body.return_documents else None,
            )
            for index, score in ranked[: body.top_n]
        ]
        # A reranker does not report tokens; clients only need the fields to be there.
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        usage = Usage(prompt_tokens=0, total_tokens=0)
        return _json(RerankAnswer(id=request_id, model=model, results=results, usage=usage, meta=meta))

    for version in ("v1", "v2"):
        app.post(
            f"/{version}/rerank",
            operation_id=f"rerank_{version}",
            response_model=RerankAnswer,
            response_model_exclude_none=True,
            responses=_errors(404, 501),
        )(rerank)

    @app.post(
        "/rerank",
        response_model=list[TeiRerankItem],
        response_model_exclude_none=True,
        responses=_errors(501),
    )
    async def rerank_tei(body: TeiRerankRequest, request: Request) -> Response:
        """Scores texts for a query, best first (the shape of Text Embeddings Inference)."""
        as_rerank = RerankRequest(query=body.query, documents=body.texts)
        check_rerank(as_rerank, args.limits, documents_field="texts")
        ranked = await service.rerank(body.query, body.texts, request_id=request.state.request_id)
        items = [
            {"index": index, "score": score, **({"text": body.texts[index]} if body.return_text else {})}
            for index, score in ranked
        ]
        return Response(json.dumps(items), media_type="application/json")


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Status, response_model_exclude_none=True)
    async def health() -> Response:
        """200 while the process answers."""
        return _json(Status(status="ok"))

    @app.get("/ready", response_model=Status, response_model_exclude_none=True, responses={503: {"model": Status}})
    async def ready() -> Response:
        """200 once index and encoder are loaded."""
        status = service.status()
        return _json(status, 200 if status.status == "ready" else 503)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        if not (UI / "index.html").is_file():
            return error_response(404, "not_found", "the search page is not part of this installation")
        return FileResponse(UI / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/ui", StaticFiles(directory=UI), name="ui")


def _check_model(name: str | None, service: Service, capability: str) -> None:
    known = [card.id for card in service.models().data if capability in card.capabilities]
    if name is not None and known and name not in known:
        message = f"no model {name!r} for {capability} here; there is: {', '.join(known)}"
        raise ApiError(404, "model_not_found", message, param="model")


def _truncated(matrix: Float32[np.ndarray, "text dim"], dimensions: int) -> Float32[np.ndarray, "text kept"]:
    if dimensions > matrix.shape[1]:
        message = f"dimensions: at most {matrix.shape[1]}, the encoder's own"
        raise ApiError(422, "invalid_value", message, param="dimensions")
    kept = matrix[:, :dimensions]
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return np.divide(kept, norms, out=np.zeros_like(kept), where=norms > 0)


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), status, media_type="application/json")


def _refuse_constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(f"{name} is not JSON", name, 0)


class _StrictRequest(Request):
    """A request whose body is JSON proper: Python's parser alone lets NaN, Infinity and lone surrogates pass."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            value = json.loads(body, parse_constant=_refuse_constant)
            if b"\\u" in body:
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise json.JSONDecodeError("it is not UTF-8", "", error.start) from error
        except UnicodeEncodeError as error:
            raise json.JSONDecodeError("it holds half of a surrogate pair", "", error.start) from error
        except RecursionError as error:
            raise json.JSONDecodeError("it is nested too deeply", "", 0) from error
        return value


def _check_content_type(value: str) -> None:
    media_type = value.partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"send Content-Type: application/json, not {media_type or 'none'!r}"
        raise ApiError(415, "unsupported_media_type", message, param="Content-Type")


class _StrictJsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method == "POST":
                _check_content_type(request.headers.get("content-type", ""))
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict
