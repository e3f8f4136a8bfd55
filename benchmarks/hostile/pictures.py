"""Pictures that are none, or more than they seem: cut short, changed, bombs, and what is sent in the place of base64.

Notable: a bomb's file is small and its header true, so only a look at the header, or decoding, tells; others claim in
the header what the file does not hold. Seeded, like the other mutations.

    hostile_file(random.Random(7))       bytes of a file
    hostile_text(random.Random(7))       what a request carries as `image`
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from functools import cache
from random import Random

from hostile.mutations import mutate

FORMS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
OTHER_FORMS = ("TIFF", "ICO", "TGA", "PPM", "PCX", "JPEG2000", "DDS", "SGI")
SIDES = (0, 1, 5000, 5001, 20_000, 65_500, 100_000, 2**31 - 1, 2**32 - 1)
BOMBS = ((5000, 5000), (5001, 5000), (30_000, 30_000), (1, 24_000_000), (1, 65_535), (65_535, 381), (381, 65_535))
DATA_URLS = ("data:image/png;base64,", "data:image/svg+xml;base64,", "data:;base64,", "data:text/html;base64,",
             "data:image/png,", "DATA:IMAGE/PNG;BASE64,", "data:image/png;base64,data:image/png;base64,")  # fmt: skip
ADDRESSES = ("http://127.0.0.1:1/a.png", "https://169.254.169.254/latest", "//localhost/x", "file:///etc/passwd",
             "ftp://x/y", "/etc/passwd", "s3://bucket/key", "blob:x", "javascript:alert(1)", "../../a.png")  # fmt: skip


@cache
def valid(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, form)
    return file.getvalue()


def hostile_file(rng: Random) -> bytes:
    """The bytes of a file, a valid one in one case of five."""
    kind = rng.randrange(10)
    if kind < 2:
        mode = rng.choice(("RGB", "L", "P", "1"))
        return valid(rng.choice(FORMS[:1] if mode in ("1", "P") else FORMS), mode)
    if kind < 6:
        return mutate(valid(rng.choice(FORMS)), rng, text=False)
    if kind == 6:
        return valid(rng.choice(OTHER_FORMS))
    if kind == 7:
        return claiming(rng.choice(SIDES), rng.choice(SIDES), rng)
    if kind == 8:
        return png_bomb(rng.choice(BOMBS))
    return rng.choice((chunk_bomb(1 << 20), chunk_bomb(64 << 20), many_chunks(20_000), long_gif(2000)))


def hostile_text(rng: Random) -> str:
    """What stands in the place of a picture in base64."""
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(ADDRESSES)
    coded = base64.b64encode(hostile_file(rng)).decode()
    if kind == 1:
        return rng.choice(DATA_URLS) + coded
    if kind == 2:
        at = rng.randrange(len(coded) + 1)
        return coded[:at] + rng.choice(("\n", " ", "=", "-", "_", "é", "\u0000", "%3D", "====")) + coded[at:]
    if kind == 3:
        return coded[: -rng.choice((1, 2, 3))]
    if kind == 4:
        return coded * rng.choice((2, 50))
    return coded


def claiming(width: int, height: int, rng: Random) -> bytes:
    """A small file whose header says that it is so large."""
    form = rng.choice(FORMS)
    if form == "PNG":
        return _png(width % 2**31, height % 2**31, zlib.compress(bytes(64)))
    data = bytearray(valid(form))
    if form == "GIF":  # the canvas and the first frame
        for at in (6, data.index(b",", 13) + 5):
            data[at : at + 4] = struct.pack("<HH", width % 2**16, height % 2**16)
    elif form == "BMP":
        data[18:26] = struct.pack("<II", width, height)
    elif form == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
    else:  # WEBP, the lossy kind: 14 bits each
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", width % 2**14, height % 2**14)
    return bytes(data)


@cache
def png_bomb(size: tuple[int, int]) -> bytes:
    """A whole PNG of one bit per pixel, a thousandth of what it unpacks to and less."""
    width, height = size
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    rows = max(1, (1 << 20) // len(row))
    packed = b"".join(packer.compress(row * min(rows, height - first)) for first in range(0, height, rows))
    return _png(width, height, packed + packer.flush())


@cache
def chunk_bomb(num_bytes: int) -> bytes:
    """A small picture with a comment, and a colour profile, that unpack to so much."""
    packed = zlib.compress(bytes(num_bytes), 9)
    extra = _chunk(b"iCCP", b"x\0\0" + packed) + _chunk(b"zTXt", b"Comment\0\0" + packed)
    return _png(8, 8, zlib.compress(bytes(2 * 8)), extra)


@cache
def many_chunks(count: int) -> bytes:
    return _png(8, 8, zlib.compress(bytes(2 * 8)), _chunk(b"tEXt", b"Comment\0x") * count)


@cache
def long_gif(frames: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    images = [Image.new("L", (16, 16), number % 255) for number in range(frames)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def _png(width: int, height: int, pixels: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
