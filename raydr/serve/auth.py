"""API keys: who calls, how often, which routes, and which passages of the index.

Notable: keys are random 256-bit strings, so one SHA-256 is the right hash (a slow one protects passwords, and would
only let wrong keys burn the server's time); the comparison takes the same time whichever key is sent. A key's token
bucket lives in the Ingress replica that answers: with N replicas a key can reach N times its rate, and no request pays
another hop for the count.

    python -m raydr.serve.auth alice        makes a key; prints it once, with the lines for the config
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from raydr.serve.config import ApiKey, Route
from raydr.serve.errors import ApiError


class Bucket:
    """A token bucket: `burst` requests at once, refilled at `rate_per_s`."""

    def __init__(self, rate_per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()

    def take(self) -> float:
        """Takes one token: 0 when there was one, otherwise the seconds until there is."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate_per_s)
        self._filled_at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate_per_s


class Caller(NamedTuple):
    """Who sent a request, and what a key's entry says of it."""

    name: str
    routes: Sequence[Route] | None = None
    filters: Mapping[str, Any] = {}
    """What every passage that is found has to meet."""

    def check(self, route: Route) -> None:
        """Raises `ApiError` 403 where the key is not for this route."""
        if self.routes is not None and route not in self.routes:
            message = f"the key of {self.name} is for {', '.join(self.routes)}, not for {route}"
            raise ApiError(403, "route_not_allowed", message)


class Gate:
    """Lets a request in, by its `Authorization` header. Without keys everyone is let in, as `anonymous`."""

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: list[ApiKey] = []
        self._buckets: dict[str, Bucket] = {}
        self.use(keys)

    @property
    def is_open(self) -> bool:
        """Whether everyone is let in."""
        return not self._keys

    def use(self, keys: Sequence[ApiKey]) -> None:
        """Takes `keys` in the place of those before; a caller whose rate is the same keeps what is left of it."""
        rates = {key.name: (key.requests_per_minute, key.burst) for key in self._keys}
        buckets = {}
        for key in keys:
            rate = key.requests_per_minute
            if rate is not None and rates.get(key.name) == (rate, key.burst):
                buckets[key.name] = self._buckets[key.name]
            elif rate is not None:
                buckets[key.name] = Bucket(rate / 60, key.burst or max(1, round(rate / 6)), self._clock)
        self._hashes = [(key, bytes.fromhex(hash_)) for key in keys for hash_ in key.hashes]
        self._keys, self._buckets = list(keys), buckets

    def admit(self, authorization: str | None) -> Caller:
        """Who calls. Raises `ApiError` 401 without a right key, 429 beyond the key's rate."""
        if self.is_open:
            return Caller("anonymous")
        scheme, _, sent = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not sent.strip():
            raise ApiError(401, "missing_api_key", "send the key as: Authorization: Bearer KEY")
        digest = hashlib.sha256(sent.strip().encode()).digest()
        # Every hash is compared, so the time says nothing about which key matched.
        found = [key for key, hash_ in self._hashes if hmac.compare_digest(digest, hash_)]
        if not found:
            raise ApiError(401, "invalid_api_key", "this API key is not known here")
        key = found[0]
        bucket = self._buckets.get(key.name)
        if bucket is not None and (wait_s := bucket.take()) > 0:
            raise ApiError(429, "rate_limit_exceeded", f"more requests than {key.name} may send", retry_after_s=wait_s)
        return Caller(key.name, key.routes, key.filters)


def make_key(name: str) -> tuple[str, ApiKey]:
    """A new random key and its config entry."""
    key = f"raydr-{secrets.token_urlsafe(32)}"
    return key, ApiKey(name=name, sha256=hashlib.sha256(key.encode()).hexdigest())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m raydr.serve.auth NAME")
    new_key, entry = make_key(sys.argv[1])
    print(f"key (shown once, give it to {entry.name}): {new_key}", file=sys.stderr)
    print(f"api_keys:\n  - name: {entry.name}\n    sha256: {entry.sha256}")
