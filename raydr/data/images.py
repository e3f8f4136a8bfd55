"""Pictures: checked, brought to a size, and encoded again; the one place where foreign picture files are decoded.

Notable: the header is looked at before anything is decoded, so a small file that would unpack to gigabytes is refused
at the price of its header. What comes out is upright (EXIF), RGB with transparency on white, and no side is longer than
asked. Only PNG, JPEG, WebP, GIF (its first frame) and BMP are opened, by Pillow's decoders of these names alone.

    stored = prepare_image(data, ImageConfig(size=336))         # raises ImageError
    decode_rgb(stored)                                          # UInt8[np.ndarray, "height width 3"]
"""

from __future__ import annotations

import binascii
import io
import re
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from raydr.config import Config
from raydr.errors import RaydrError

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk0", "Qk1", "Qk2", "Qk3")
"""How the base64 of a file of each of these formats begins."""
_DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]{1,64};base64,")
_RESIZED_AS_THEY_ARE = frozenset({"L", "RGB", "RGBA", "LA", "CMYK", "YCbCr"})
"""Modes whose pixels can be averaged; Pillow weighs colours by their alpha meanwhile."""
_LONGEST_SIDE = 65_535
"""JPEG's own limit. Pillow keeps a pointer to each row: of one pixel times 24 million it took 0.7 GB and seconds."""
_LARGEST_SIZE = 4096
_STORED_BYTES = 64 << 20
"""More than a picture of the largest size takes in any format that is stored."""
_MOST_PIXELS = 89_478_485
"""Beyond these Pillow warns of a decompression bomb, and beyond twice as many it refuses the file itself."""


class ImageError(RaydrError):
    """What was given as a picture cannot be used as one; the message goes on after its name ("is empty")."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail
        """The kind of fault, and what is particular about this one."""


class ImageConfig(Config):
    """Which pictures are taken, and what is stored of them."""

    size: int = Field(default=336, ge=8, le=_LARGEST_SIZE)
    """Longest side in pixels of what is stored; smaller pictures stay as they are."""
    max_pixels: int = Field(default=50_000_000, ge=1, le=_MOST_PIXELS)
    """Width times height beyond which a picture is refused."""
    max_bytes: int = Field(default=20 << 20, ge=1)
    """Size of a file beyond which a picture is refused."""
    format: Literal["png", "jpeg", "webp"] = "png"
    """What is stored; png loses nothing."""


def prepare_image(data: bytes, config: ImageConfig) -> bytes:
    """The bytes of a picture file as they are stored. Raises `ImageError` saying what is wrong with it."""
    from PIL import Image, ImageOps

    with _opened(data, max_bytes=config.max_bytes, max_pixels=config.max_pixels) as opened:
        try:
            box = (config.size, config.size)
            if opened.mode in _RESIZED_AS_THEY_ARE and "transparency" not in opened.info:
                # First of all: of a JPEG no more is decoded than the size needs, and what follows has few pixels.
                opened.thumbnail(box, Image.Resampling.LANCZOS)
            picture = _on_white(ImageOps.exif_transpose(opened))
            picture.thumbnail(box, Image.Resampling.LANCZOS)
        except Exception as error:  # decoders raise whatever the file makes them stumble over
            raise ImageError("is damaged", str(error)) from error
    out = io.BytesIO()
    picture.save(out, config.format.upper(), **({"quality": 90} if config.format != "png" else {}))
    return out.getvalue()


def decode_rgb(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of what `prepare_image` gave. Raises `ImageError` for other bytes."""
    with _opened(data, max_bytes=_STORED_BYTES, max_pixels=_LARGEST_SIZE**2) as opened:
        try:
            return np.asarray(_on_white(opened))
        except Exception as error:
            raise ImageError("is damaged", str(error)) from error


def decode_base64(text: str, config: ImageConfig) -> bytes:
    """The file that base64 (or a `data:image/...;base64,` URL) holds, which is not looked at. Raises `ImageError`."""
    start = _DATA_URL.match(text)
    encoded = text[start.end() :] if start else text
    _check_size(len(encoded) * 3 // 4 - 2, config.max_bytes)
    try:
        return binascii.a2b_base64("".join(encoded.split()), strict_mode=True)
    except ValueError as error:  # also for what is not ASCII
        raise ImageError("is neither base64 nor a data:image/...;base64, URL", str(error)) from error


def _opened(data: bytes, *, max_bytes: int, max_pixels: int):  # noqa: ANN202 (Pillow is imported where it is used)
    """The picture, of which no more than the header was read."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("is empty")
    _check_size(len(data), max_bytes)
    try:
        opened = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError("is not a picture that can be read", f"known are {', '.join(_FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("has too many pixels", f"{max_pixels:,} are allowed") from error
    except Exception as error:
        raise ImageError("is damaged", str(error)) from error
    width, height = opened.size
    if max(width, height) > _LONGEST_SIDE:
        raise ImageError("has too many pixels", f"{width} x {height}, and no side may be longer than {_LONGEST_SIDE:,}")
    if width * height > max_pixels:
        raise ImageError("has too many pixels", f"{width} x {height}, and {max_pixels:,} are allowed")
    return opened


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ImageError("has too many bytes", f"{num_bytes:,}, and {max_bytes:,} are allowed")


def _on_white(picture):  # noqa: ANN001, ANN202
    """RGB, with what is transparent in white."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits of grey, whose conversion cuts what is above 255
        values = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
