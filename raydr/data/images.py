"""Pictures: checked, brought to a size, and encoded again; the one place where foreign picture files are decoded.

Notable: the header is looked at before anything is decoded, so a small file that would unpack to gigabytes is refused
at the price of its header. What comes out is upright (EXIF), RGB with transparency on white, and no side is longer than
asked. Only PNG, JPEG, WebP, GIF (its first frame) and BMP are opened, by Pillow's decoders of these names alone.

    stored = prepare_image(data, ImageConfig(size=336))         # raises ImageError
    decode_rgb(stored)                                          # UInt8[np.ndarray, "height width 3"]
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from raydr.config import Config
from raydr.errors import RaydrError

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_RESIZED_AS_THEY_ARE = frozenset({"L", "RGB", "RGBA", "LA", "CMYK", "YCbCr"})
"""Modes whose pixels can be averaged; Pillow weighs colours by their alpha meanwhile."""
_LONGEST_SIDE = 65_535
"""JPEG's own limit. Pillow keeps a pointer to each row: of one pixel times 24 million it took 0.7 GB and seconds."""


class ImageError(RaydrError):
    """What was given as a picture cannot be used as one."""


class ImageConfig(Config):
    """Which pictures are taken, and what is stored of them."""

    size: int = Field(default=336, ge=8)
    """Longest side in pixels of what is stored; smaller pictures stay as they are."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Width times height beyond which a picture is refused."""
    max_bytes: int = Field(default=20 << 20, ge=1)
    """Size of a file beyond which a picture is refused."""
    format: Literal["png", "jpeg", "webp"] = "png"
    """What is stored; png loses nothing."""


def prepare_image(data: bytes, config: ImageConfig) -> bytes:
    """The bytes of a picture file as they are stored. Raises `ImageError` saying what is wrong with it."""
    from PIL import Image, ImageOps

    with _opened(data, config) as opened:
        try:
            box = (config.size, config.size)
            if opened.mode in _RESIZED_AS_THEY_ARE and "transparency" not in opened.info:
                # First of all: of a JPEG no more is decoded than the size needs, and what follows has few pixels.
                opened.thumbnail(box, Image.Resampling.LANCZOS)
            picture = _on_white(ImageOps.exif_transpose(opened))
            picture.thumbnail(box, Image.Resampling.LANCZOS)
        except Exception as error:  # decoders raise whatever the file makes them stumble over
            raise ImageError(f"is damaged: {error}") from error
    out = io.BytesIO()
    picture.save(out, config.format.upper(), **({"quality": 90} if config.format != "png" else {}))
    return out.getvalue()


def decode_rgb(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of what `prepare_image` gave. Raises `ImageError` for other bytes."""
    with _opened(data, ImageConfig()) as opened:
        try:
            return np.asarray(_on_white(opened))
        except Exception as error:
            raise ImageError(f"is damaged: {error}") from error


def _opened(data: bytes, config: ImageConfig):  # noqa: ANN202 (Pillow is imported where it is used)
    """The picture, of which no more than the header was read."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("is empty")
    if len(data) > config.max_bytes:
        raise ImageError(f"has {len(data):,} bytes, and {config.max_bytes:,} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit warns; the one here decides
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"is not a picture that can be read ({', '.join(_FORMATS)})") from error
    except Exception as error:
        raise ImageError(f"is damaged: {error}") from error
    width, height = opened.size
    if max(width, height) > _LONGEST_SIDE:
        raise ImageError(f"has {width} x {height} pixels, and no side may be longer than {_LONGEST_SIDE:,}")
    if width * height > config.max_pixels:
        raise ImageError(f"has {width} x {height} pixels, and {config.max_pixels:,} are allowed")
    return opened


def _on_white(picture):  # noqa: ANN001, ANN202
    """RGB, with what is transparent in white."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):  # whose conversion cuts what is above 255
        values = np.asarray(picture, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")
