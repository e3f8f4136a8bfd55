"""What messages, logs and manifests must not repeat: fields that hold secrets, and URLs with one in them.

Imports nothing of raydr, so that schemas may use it.

    is_secret("api_keys.0.sha256", "hunter2")        True: whatever stands there
    holds_secret("s3://KEY:SECRET@bucket/runs")      True
"""

from __future__ import annotations

import re

_FIELD = re.compile(r"api_key|secret|password|credential|sha256|(^|[._])token$", re.IGNORECASE)
_URL = re.compile(
    r"://[^/?#@\[]*:(?!\d+(?:[/?#]|$))|://.*[?&][^=&]*(?:secret|password|token|key|credential)[^=&]*=", re.IGNORECASE
)


def holds_secret(text: str) -> bool:
    """Whether it is a URL with a password, a key or a token in it."""
    return _URL.search(text) is not None


def is_secret(field: str, value: object) -> bool:
    """Whether a message must not repeat what was given: somebody's key in the place of its hash, say."""
    return _FIELD.search(field) is not None or holds_secret(str(value))
