"""`build_app`: the Serve application, from typed arguments. Names the deployments that a Serve config may override.

Notable: Ingress (routes, searcher), Encoder, Shard0 .. Shard<D-1>, Bm25 and a Reranker_<name> each. Fan-out
and merge run inside the Ingress replica, because a deployment of their own would put one more hop before every answer.
With `colocate` the encoder, the shards and the word side are in the Ingress replica as well, and it alone is scaled.
The index to serve is the Ingress's `user_config`, so a new one is swapped in by editing the YAML and `serve deploy`;
while a replica prepares it, it goes on answering with the one it has.

    serve run raydr.serve.app:build_app index=runs/demo/index
    serve run serve_configs/local.yaml
    serve deploy serve_configs/search.yaml
"""

# No `from __future__ import annotations` here: Serve looks at build_app's annotation to make the arguments of a config
# file into an AppArgs, and would see a string.
import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from raydr.config import Config, validate
from raydr.errors import ConfigError, RaydrError
from raydr.index.filters import FilterError, check_filters
from raydr.index.reader import IndexReader
from raydr.serve.auth import Gate
from raydr.serve.colocated import colocated_searcher
from raydr.serve.config import ApiKey, AppArgs
from raydr.serve.encoder import Encoder, EncoderSettings
from raydr.serve.http import build_http
from raydr.serve.rerank import Reranker
from raydr.serve.search import Searcher
from raydr.serve.shard import Bm25, Shard
from raydr.storage import Location, named

logger = logging.getLogger("ray.serve")

# Replicas that wait for others or for mapped files most of the time; a laptop of two cores holds all of them. A Serve
# config overrides every one of these.
_LIGHT = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 64, "max_queued_requests": 256}
_OVERLOAD = {"status_code": 429, "retry_after_s": 1}
# A dead replica is replaced when a check finds it: Serve's own 10 s would be most of the time that callers wait.
_HEALTH_CHECK_PERIOD_S = 2


class IngressSettings(Config):
    """`user_config` of the Ingress deployment: which index is live."""

    index: Location
    """Path of the index artifact, readable on every node, or its URL in a bucket."""
    version: str | None = Field(default=None, min_length=1)
    """The version expected there; another one is refused. Name it when an index is republished under the same path."""
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    """Settings of the encoder where `colocate` has it in this replica; else they are the Encoder's own user_config."""
    keys_as_of: str | int | None = None
    """Any text or number: a new one has every replica read the key file of `args.api_keys_env` again, which then has to
    be on its node."""


@serve.ingress()
class Ingress:
    """One replica: the HTTP routes over a searcher."""

    def __init__(
        self,
        args: AppArgs,
        api_keys: Sequence[ApiKey],
        encoder: DeploymentHandle | None,
        shards: Sequence[DeploymentHandle],
        bm25: DeploymentHandle | None,
        rerankers: dict[str, DeploymentHandle],
    ) -> None:
        self._args = args
        self._gate = Gate(api_keys)
        self._keys_as_of: str | int | None = None
        self._own_encoder = Encoder(args.versions_held, args.refiner) if encoder is None else None
        if self._own_encoder is not None:
            self._searcher = colocated_searcher(args, self._own_encoder, rerankers=rerankers)
        else:
            self._searcher = Searcher(args, encoder=encoder, shards=shards, bm25=bm25, rerankers=rerankers)
        self._swap: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http(self._searcher, self._args, self._gate)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads the first index before the replica counts as started; later ones while it goes on serving.

        Serve sends no requests to a replica that is in here, so a swap is only begun: a large index would otherwise
        hold up every caller while it loads.
        """
        settings = validate(IngressSettings, user_config, where="user_config of the Ingress deployment")
        path = named(settings.index.resolve())
        if settings.keys_as_of != self._keys_as_of:
            self._read_keys_again(settings.keys_as_of)
        if self._own_encoder is not None:
            self._own_encoder.reconfigure(settings.encoder.model_dump())
        if self._swap is None:
            self._swap = asyncio.ensure_future(self._searcher.use(path, version=settings.version))
            await self._swap
            return
        self._swap.cancel()  # a newer order counts
        self._swap = asyncio.create_task(self._swap_to(path, settings.version))

    def _read_keys_again(self, keys_as_of: str | int | None) -> None:
        try:
            self._gate.use(self._args.read_api_keys())
        except RaydrError:
            if self._swap is None:  # a replica does not start with keys that may have been taken back
                raise
            logger.exception("api keys not read again; those before are still in force")
            return
        self._keys_as_of = keys_as_of
        logger.info("api keys read again", extra={"event": "api_keys", "keys_as_of": keys_as_of})

    async def _swap_to(self, path: str, version: str | None) -> None:
        try:
            await self._searcher.use(path, version=version)
        except Exception:
            logger.exception("index %s not swapped in; the one before is still served", path)


def build_app(args: AppArgs) -> Application:
    """The application for `args.index`.

    Raises `RaydrError` when there is no such index, a key file is missing, or HAProxy would not wait for answers.
    """
    index = args.index.resolve()
    reader = IndexReader.open(index)
    num_shards = reader.num_shards
    if num_shards < 1:
        raise RaydrError(f"{index}: has no shards to serve")
    args.limits.check_proxy()
    api_keys = args.read_api_keys()
    _check_filters_of(api_keys, reader)
    held = args.versions_held
    # More than `concurrent_requests`, so that the replica itself refuses what is too much, as JSON like any error.
    ongoing = 2 * args.limits.concurrent_requests
    encoder: Application | None = None
    shards: list[Application] = []
    bm25: Application | None = None
    if not args.colocate:
        encoder = _deployed(
            Encoder,
            held,
            args.refiner,
            max_ongoing_requests=256,
            max_queued_requests=512,
            user_config=EncoderSettings().model_dump(),
        )
        num_deployments = args.shard_deployments or num_shards
        shards = [
            _deployed(Shard, number, num_deployments, held, name=f"Shard{number}", **_LIGHT)
            for number in range(num_deployments)
        ]
        bm25 = _deployed(Bm25, held, **_LIGHT) if args.bm25 else None
    rerankers = {
        name: _deployed(Reranker, component, name=f"Reranker_{name}", **_LIGHT)
        for name, component in args.rerankers.items()
    }
    return _deployed(
        Ingress,
        args.model_copy(update={"index": index}),
        api_keys,
        encoder,
        shards,
        bm25,
        rerankers,
        ray_actor_options={"num_cpus": 1 if args.colocate else 0.1},
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        user_config=IngressSettings(index=index).model_dump(mode="json"),
    )


def _check_filters_of(api_keys: Sequence[ApiKey], reader: IndexReader) -> None:
    for key in api_keys:
        try:
            check_filters(key.filters, reader.schema)
        except FilterError as error:
            raise ConfigError(f"api_keys, {key.name}: {error}") from error


def _deployed(part: type, *bound: Any, **options: Any) -> Application:
    made: Any = serve.deployment(
        part, backpressure_config=_OVERLOAD, health_check_period_s=_HEALTH_CHECK_PERIOD_S, **options
    )
    return made.bind(*bound)
