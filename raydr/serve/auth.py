"""API keys and per-key rate limits.

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
from collections.abc import Callable, Sequence

from raydr.serve.config import ApiKey
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


class Gate:
    """Lets a request in, by its `Authorization` header. Without keys everyone is let in, as `anonymous`."""

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._hashes = [(key, bytes.fromhex(key.sha256)) for key in keys]
        self._buckets = {
            key.name: Bucket(rate / 60, key.burst or max(1, round(rate / 6)), clock)
            for key in keys
            if (rate := key.requests_per_minute) is not None
        }

    def admit(self, authorization: str | None) -> str:
        """The caller's name. Raises `ApiError` 401 without a right key, 429 beyond the key's rate."""
        if not self._hashes:
            return "anonymous"
        scheme, _, sent = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not sent.strip():
            raise ApiError(401, "missing_api_key", "send the key as: Authorization: Bearer KEY")
        digest = hashlib.sha256(sent.strip().encode()).digest()
        # Every hash is compared, so the time says nothing about which key matched.
        found = [key for key, hash_ in self._hashes if hmac.compare_digest(digest, hash_)]
        if not found:
            raise ApiError(401, "invalid_api_key", "this API key is not known here")
        name = found[0].name
        bucket = self._buckets.get(name)
        if bucket is not None and (wait_s := bucket.take()) > 0:
            raise ApiError(429, "rate_limit_exceeded", f"more requests than {name} may send", retry_after_s=wait_s)
        return name


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
