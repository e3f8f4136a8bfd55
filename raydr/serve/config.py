"""The arguments of the served application, as `args:` of a Serve config file or of `build_app`.

Notable: what one deployment is given (replicas, processors, autoscaling, the index to swap to) is not here but under
`deployments:` of the Serve config, where Ray expects it; this schema holds what is raydr's own.

    args: {index: runs/demo/index, api_keys: [{name: alice, sha256: 9f86d0...}], limits: {k: 200}}
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from raydr.config import Component, Config, read_yaml, validate
from raydr.data.images import MOST_PIXELS
from raydr.errors import ConfigError
from raydr.index.filters import MAX_IDS
from raydr.index.fusion import FusionConfig
from raydr.stages.config import FeedbackSteps, PrfConfig
from raydr.storage import Location

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Names by which only this machine can mean itself."""
PROXY_TIMEOUT = "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"
"""Ray Serve's variable for how long HAProxy waits for a replica's answer; unset, for ever."""

RerankerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Route = Literal["search", "embeddings", "rerank", "models"]


class ApiKey(Config):
    """One caller. The key itself is never stored: `python -m raydr.serve.auth NAME` makes one and prints its hash."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    """Who this is, in logs and metrics."""
    sha256: Sha256 | Annotated[list[Sha256], Field(min_length=1)]
    """SHA-256 (hex) of the key; a list of two while a new key replaces an old one."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Sustained rate, per Ingress replica; null: no limit."""
    burst: int | None = Field(default=None, ge=1)
    """Requests that may come at once; null: one sixth of a minute's worth, at least one."""
    routes: list[Route] | None = Field(default=None, min_length=1)
    """What may be asked for with the key: `search`, `embeddings`, `rerank`, `models`; null: all of them."""
    filters: dict[str, JsonValue] = Field(default_factory=dict)
    """Conditions in the language of a search's `filters`. Every passage found with the key meets them, whatever the
    request says, so that several callers share one index and none sees another's passages."""

    @property
    def hashes(self) -> list[str]:
        return [self.sha256] if isinstance(self.sha256, str) else self.sha256


def _distinct(keys: list[ApiKey]) -> list[ApiKey]:
    for field, values in {
        "name": [key.name for key in keys],
        "sha256": [hash_ for key in keys for hash_ in key.hashes],
    }.items():
        if len(set(values)) < len(values):
            raise ValueError(f"two api keys have the same {field}")
    return keys


DistinctKeys = Annotated[list[ApiKey], AfterValidator(_distinct)]


class ApiKeys(Config):
    """The content of a key file."""

    api_keys: DistinctKeys = Field(min_length=1)


class Limits(Config):
    """What one request, and one Ingress replica, may take. A request beyond a limit is refused, never shortened."""

    body_bytes: int = Field(default=4 << 20, ge=1024)
    """Largest request body, counted while it arrives, before anything is parsed."""
    image_bytes: int | None = Field(default=None, ge=64)
    """Largest file of a picture, of which base64 makes four thirds in the body; null: the largest that `body_bytes`
    lets in."""
    image_pixels: int = Field(default=25_000_000, ge=1, le=MOST_PIXELS)
    """Most pixels of a picture (width times height), looked up in its header before anything is decoded."""
    images: int = Field(default=32, ge=1)
    """Most pictures in one request."""
    image_hits: int = Field(default=100, ge=1)
    """Most hits in one response that are to carry their passage's picture, `k` times the number of queries."""
    query_chars: int = Field(default=8192, ge=1)
    """Longest query text."""
    text_chars: int = Field(default=200_000, ge=1)
    """Longest text to embed or rerank; the encoder reads only its first `max_passage_tokens` tokens anyway."""
    k: int = Field(default=1000, ge=1)
    """Most hits per query."""
    queries: int = Field(default=64, ge=1)
    """Most queries in one search."""
    hits: int = Field(default=10_000, ge=1)
    """Most hits in one response, `k` times the number of queries; and most hits that one request has judged or read,
    `rerank_depth` (and `feedback.depth`, `prf.k`) times the number of queries."""
    inputs: int = Field(default=256, ge=1)
    """Most texts in one embeddings request."""
    documents: int = Field(default=1000, ge=1)
    """Most documents in one rerank request, and most hits reordered per query of a search."""
    shard_timeout_s: float | None = Field(default=None, gt=0)
    """A search waits so long for each answer of a shard, and of the word side; then it fails with 503, or does without
    the shard, as it asked. Less than `request_timeout_s`; null: a sixth of it."""
    rerank_timeout_s: float | None = Field(default=None, gt=0)
    """A search waits so long for its rerankers, those of feedback included; then it fails or keeps the first order, as
    it asked. Shorter than `request_timeout_s`, which leaves no time to answer; null: two thirds of it."""
    ids: int = Field(default=10_000, ge=1, le=MAX_IDS)
    """Most entries of `allow_ids` and of `exclude_ids`."""
    filter_values: int = Field(default=1000, ge=1)
    """Most values over all conditions of a filter."""
    concurrent_requests: int = Field(default=128, ge=1)
    """Requests one Ingress replica works on at a time; more are answered 429 with `Retry-After` at once."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """A request that takes longer is cancelled and answered 504."""

    @model_validator(mode="after")
    def _a_picture_fits_its_body(self) -> Limits:
        if self.largest_image_bytes > _image_bytes_in(self.body_bytes):
            raise ValueError(
                f"image_bytes ({self.image_bytes}) does not fit body_bytes ({self.body_bytes}), of which a picture in "
                f"base64 may take {_image_bytes_in(self.body_bytes)}; raise body_bytes, or leave image_bytes out"
            )
        return self

    @model_validator(mode="after")
    def _time_left_to_answer(self) -> Limits:
        if self.judging_s >= self.request_timeout_s:
            raise ValueError(
                f"rerank_timeout_s ({self.judging_s:g}) must be less than request_timeout_s "
                f"({self.request_timeout_s:g}), or no search could keep its first order when a reranker is slow"
            )
        if self.answering_s >= self.request_timeout_s:
            raise ValueError(
                f"shard_timeout_s ({self.answering_s:g}) must be less than request_timeout_s "
                f"({self.request_timeout_s:g}), or no search could answer without a shard that is slow"
            )
        return self

    @property
    def largest_image_bytes(self) -> int:
        """Bytes of the largest picture that a request may carry."""
        return _image_bytes_in(self.body_bytes) if self.image_bytes is None else self.image_bytes

    @property
    def answering_s(self) -> float:
        """Seconds that a search waits for each answer of a shard."""
        return self.request_timeout_s / 6 if self.shard_timeout_s is None else self.shard_timeout_s

    @property
    def judging_s(self) -> float:
        """Seconds that a search waits for its rerankers."""
        return self.request_timeout_s * 2 / 3 if self.rerank_timeout_s is None else self.rerank_timeout_s

    def check_proxy(self) -> None:
        """Raises `ConfigError` where HAProxy gives requests up that are still being answered."""
        waits_s = os.environ.get(PROXY_TIMEOUT)
        if waits_s and float(waits_s) <= self.request_timeout_s:
            raise ConfigError(
                f"limits.request_timeout_s ({self.request_timeout_s:g}) must be less than {PROXY_TIMEOUT} ({waits_s}), "
                "or HAProxy gives requests up that are still being answered: lower the one, or raise the other in the "
                "environment of `ray start`"
            )


def _image_bytes_in(body_bytes: int) -> int:
    """Bytes of a picture whose base64 fits a body, with an eighth of the body left for all else."""
    return body_bytes * 7 // 8 * 3 // 4


class AppArgs(Config):
    """Arguments of `raydr.serve.app:build_app`."""

    index: Location
    """The index artifact served at the start: a path that every node can read, or the URL of a bucket. Later ones come
    through `user_config` of the Ingress deployment."""
    model_name: str | None = Field(default=None, pattern=r"^[\w./:-]{1,128}$")
    """Name of the encoder in `/v1/models`; null: the name its method gives the model."""
    colocate: bool = False
    """Whether encoder, shards and word side live in each Ingress replica instead of in deployments of their own: no
    hop between processes and one copy of everything per replica, for an index that fits one."""
    shard_deployments: int | None = Field(default=None, ge=1)
    """How many Shard deployments there are; null: one per shard of `index`. Deployment `i` holds the shards `j` with
    `j % shard_deployments == i`, so an index with another number of shards can be swapped in."""
    bm25: bool = True
    """Whether the word side of the index is served (a Bm25 deployment), where the index has one."""
    rerankers: dict[RerankerName, Component] = Field(default_factory=dict)
    """`raydr.protocols.Reranker`s, or methods that build one, by the name that requests and `/v1/models` know them by;
    the first is used where a request names none. Each is a deployment of its own, `Reranker_<name>`. Empty: the rerank
    routes answer 501."""
    rerank_depth: int = Field(default=20, ge=1)
    """search with `rerank`: hits that are reordered where the request does not say."""
    feedback: FeedbackSteps = Field(default_factory=FeedbackSteps)
    """search with `feedback`: how queries move."""
    prf: PrfConfig | None = None
    """Pseudo-relevance feedback of searches that do not say (`prf`), and what `learned` and `rocchio` mean to others;
    null: by the refiner of the index's own method, where it has one. `{method: none, refiner: ...}` offers a learned
    refiner to those that ask for it."""
    api_keys: DistinctKeys = Field(default_factory=list)
    """Who may call the routes that search and embed; empty (and no `api_keys_env`): everyone who can reach the port."""
    api_keys_env: str | None = None
    """Name of an environment variable that holds the path of a YAML file with `api_keys: [...]`."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names (`Host` header) the server answers to beside localhost while no keys are configured; `*`: any name. It
    keeps a foreign web page from reading the index through a browser on this machine (DNS rebinding)."""
    limits: Limits = Field(default_factory=Limits)
    """What one request may take."""
    fusion: FusionConfig = Field(default_factory=FusionConfig)
    """hybrid: how the two sides become one ranking."""
    candidates: int = Field(default=100, ge=1)
    """hybrid: hits taken from each side before they are fused (at least `k`)."""
    versions_held: int = Field(default=2, ge=2)
    """Index versions (and encoders) a replica keeps in memory: the live one and those swapped out last."""

    @property
    def refiner(self) -> Component | None:
        """The method whose learned refiner is served in the place of the index's own."""
        return self.prf.refiner if self.prf is not None else None

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> AppArgs:
        if self.api_keys and self.api_keys_env:
            raise ValueError("give api_keys or api_keys_env, not both")
        return self

    def read_api_keys(self) -> list[ApiKey]:
        """The keys in force. Raises `ConfigError` where `api_keys_env` names nothing readable: never silently open."""
        if self.api_keys_env is None:
            return self.api_keys
        path = os.environ.get(self.api_keys_env)
        if not path:
            raise ConfigError(f"api_keys_env: the environment variable {self.api_keys_env} is not set")
        return validate(ApiKeys, read_yaml(path), where=path).api_keys
