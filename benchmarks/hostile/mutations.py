"""What is done to a valid file or body: seeded, so that a case is found again by its number.

Notable: a text is also changed where it means something (a value of another type, a number out of range, nesting, half
of a surrogate pair), because flipped bits alone are refused by the first check of a parser.

    mutate(b'{"_id": "a"}', random.Random(7))
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from random import Random
from typing import TypeAlias

Mutation: TypeAlias = Callable[[bytes, Random], bytes]

VALUES = (
    *(b"null", b"true", b"[]", b"{}", b'""', b"-1", b"0", b"-0", b"1e999", b"NaN", b"-Infinity", b"0.5", b"1e-400"),
    *(b"9223372036854775808", b"-9223372036854775809", b"1" * 400, b"1" * 5000, b"1_0", b"0x10", b"1e308"),
    *(b'"\\ud800"', b'"\\u0000"', b'"\\udc00\\ud800"', '"\u202eabc\u2066"'.encode(), '"e\u0301\u0345"'.encode()),
    *('"\U0001f468\u200d\U0001f469\u200d\U0001f467"'.encode(), '"\ufeff"'.encode(), '"\u00a0\u3000\u2028"'.encode()),
    *('"\u0661\u00b2\uff11"'.encode(), '"\u0130\u1e9e\ufb03"'.encode(), ('"' + "\u0336" * 500 + '"').encode()),
    *(b'["x"]', b'{"text": "x"}', b'{"a": {"b": {"c": []}}}', b'["a", 1, null]', b'"../../../etc/passwd"', b'"/etc"'),
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b'"' + b"x" * 200_000 + b'"'),
    *(
        b"[" * 400 + b"]" * 400,
        b"[" * 100_000,
        b'{"a":' * 450 + b"1" + b"}" * 450,
        b"!!python/object:os.system",
        b"&a [*a]",
    ),
)
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|[^\s,:\[\]{}\t]+')
_PIECES = (b"\x00", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n\n\n", b"\t", b" ", b'"', b"\\", b"\x1f\x8b", b"\xff", b"\x1a")


def mutate(data: bytes, rng: Random, *, text: bool) -> bytes:
    """`data` after one to three changes; `text`: whether it has tokens."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_OF_TEXT if text else _OF_BYTES)(data, rng)
    return data


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _number(data: bytes, rng: Random) -> bytes:
    """Four or eight bytes become a length that cannot be: what binary headers are made of."""
    width = rng.choice((4, 8))
    value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)) % 2 ** (8 * width)
    at = rng.randrange(max(1, len(data)))
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice(_PIECES) * rng.choice((1, 1, 1, 50)) if rng.random() < 0.7 else rng.randbytes(rng.randrange(64))
    return data[:at] + piece + data[at:]


def _duplicate(data: bytes, rng: Random) -> bytes:
    first = rng.randrange(len(data) + 1)
    last = min(len(data), first + rng.choice((8, 64, 1024)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[first:last] * rng.choice((1, 2, 20)) + data[at:]


def _drop(data: bytes, rng: Random) -> bytes:
    first = rng.randrange(len(data) + 1)
    return data[:first] + data[first + rng.choice((1, 8, 64, 1024)) :]


def _swap(data: bytes, rng: Random) -> bytes:
    """A token becomes a value of another kind."""
    tokens = list(_TOKEN.finditer(data))
    if not tokens:
        return data + rng.choice(VALUES)
    found = rng.choice(tokens)
    return data[: found.start()] + rng.choice(VALUES) + data[found.end() :]


def _repeat_line(data: bytes, rng: Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"".join(lines)


def _line_ends(data: bytes, rng: Random) -> bytes:
    return re.sub(rb"\n", lambda _: rng.choice((b"\n", b"\r\n", b"\r", "\u2028".encode(), b"\x0b\n", b"\x85")), data)


def _long_line(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b" ", b"x", b"0", b"\t")) * rng.choice((10_000, 2_000_000)) + data[at:]


def _empty(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"", b"\n", b"\x00" * 100, b"{", b"[]", b"null", b"PAR1PAR1", b"ARROW1\x00\x00", b"\x93NUMPY"))


_OF_BYTES: tuple[Mutation, ...] = (_flip, _flip, _number, _number, _truncate, _insert, _duplicate, _drop, _empty)
_OF_TEXT: tuple[Mutation, ...] = (
    *(_swap, _swap, _swap, _swap, _flip, _truncate, _insert, _insert, _duplicate, _drop),
    *(_repeat_line, _line_ends, _long_line, _empty),
)


def gzip_bomb(num_bytes: int, *, unit: bytes = b" ") -> bytes:
    """A gzip file a thousandth of what it unpacks to, of many members: it is made without the memory that it wants."""
    member = min(16 << 20, num_bytes)
    return gzip.compress(unit * (member // len(unit)), compresslevel=9) * (num_bytes // member)
