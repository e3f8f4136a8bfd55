"""Pictures: what is stored of good ones of every kind, and how bad ones are refused before they cost anything."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageDraw

from raydr.config import validate
from raydr.data.images import ImageConfig, ImageError, decode_rgb, prepare_image
from raydr.errors import ConfigError

PLAIN = ImageConfig()


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def two_halves(mode: str = "RGB", size=(40, 20), left="red", right="blue") -> Image.Image:
    picture = Image.new(mode, size, left)
    ImageDraw.Draw(picture).rectangle([size[0] // 2, 0, size[0], size[1]], fill=right)
    return picture


def stored(data: bytes, **config) -> np.ndarray:
    return decode_rgb(prepare_image(data, ImageConfig(**config)))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says it has this size, and has next to nothing in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    """An animation of small frames on a canvas that is said to have this size."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


GREATER = {
    "a PNG bomb": png_header(60_000, 60_000),
    "a PNG beyond the limit alone": png_header(10_000, 6_000),
    "a PNG one pixel high": png_header(50_000_001, 1),
    "a GIF": saved(Image.new("P", (8, 8)), "GIF").replace(struct.pack("<HH", 8, 8), struct.pack("<HH", 65535, 65535)),
    "a BMP": b"BM"
    + struct.pack("<IHHI", 70, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 30000, -30000, 1, 24, *[0] * 6),
    "a WebP": webp_header(16_000, 16_000),
}


@pytest.mark.parametrize("kind", GREATER)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(kind):
    data = GREATER[kind]
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ImageError, match=r"has too many pixels: .*(50,000,000 are allowed|no side may be longer)"):
        prepare_image(data, PLAIN)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5_000_000
    assert time.perf_counter() - start < 5


def test_a_file_beyond_the_limit_is_not_opened():
    with pytest.raises(ImageError, match=r"has too many bytes: 101, and 100 are allowed"):
        prepare_image(b"\0" * 101, ImageConfig(max_bytes=100))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_cut_files_are_damaged(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8))
    data = saved(noise, kind)
    assert stored(data).shape == (90, 90, 3)
    with pytest.raises(ImageError, match="is damaged|is not a picture"):
        prepare_image(data[: len(data) * 2 // 3], PLAIN)


@pytest.mark.parametrize(
    "data", [b"\0" * 100, b"<html>", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ImageError, match="is not a picture that can be read|is damaged"):
        prepare_image(data, PLAIN)
    with pytest.raises(ImageError, match="is not a picture that can be read|is damaged"):
        decode_rgb(data)


def test_nothing_is_no_picture():
    with pytest.raises(ImageError, match="is empty"):
        prepare_image(b"", PLAIN)


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "SVG", "ICO", "PPM", "PDF", "JPEG2000"])
def test_other_formats_are_not_opened(kind):
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    data = svg if kind == "SVG" else saved(two_halves(), kind)
    with pytest.raises(ImageError, match=r"is not a picture that can be read: known are PNG, JPEG, WEBP, GIF, BMP"):
        prepare_image(data, PLAIN)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_every_format_and_mode_comes_out_as_rgb(kind, mode):
    picture = two_halves().convert(mode, dither=Image.Dither.NONE)
    if (kind, mode) == ("JPEG", "P"):
        picture = picture.convert("RGB")
    pixels = stored(saved(picture, kind))
    expected = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape == (20, 40, 3)
    assert np.abs(pixels - expected)[:, [2, -3]].max() <= 12, "lossy formats are near, away from the edge"


def test_transparency_is_white():
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    half = Image.new("RGBA", (10, 10), (0, 0, 0, 128))
    grey = Image.new("LA", (10, 10), (0, 0))
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (stored(saved(clear, "PNG")) == 255).all()
    assert (stored(saved(clear, "WEBP", lossless=True)) == 255).all()
    assert (stored(saved(half, "PNG")) == 127).all()
    assert (stored(saved(grey, "PNG")) == 255).all()
    assert (stored(saved(palette, "PNG", transparency=0)) == 255).all()
    assert (stored(saved(palette, "GIF", transparency=0)) == 255).all()
    assert (stored(saved(Image.new("RGB", (9, 9), "red"), "PNG", transparency=(255, 0, 0))) == 255).all()
    # Premultiplied: the red of what cannot be seen does not bleed into the edge.
    edge = two_halves("RGBA", (80, 80), left=(255, 0, 0, 0), right=(0, 0, 0, 255))
    small = stored(saved(edge, "PNG"), size=8)
    assert (small[:, :, 0] == small[:, :, 1]).all()


def test_sixteen_bits_of_grey_keep_their_shades():
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    data = saved(Image.fromarray(values), "PNG")
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert stored(data)[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert stored(saved(Image.fromarray(values), "PNG", transparency=0))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_cmyk():
    pixels = stored(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(pixels[4, 4].astype(int) - [255, 0, 0]).max() <= 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_stand_upright(orientation, kind):
    upright = Image.new("RGB", (32, 16), "white")
    ImageDraw.Draw(upright).rectangle([0, 0, 7, 7], fill="black")  # the corner at the top left
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera stores it that then writes this orientation
    as_stored = upright.transpose(Image.Transpose(turned[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = stored(saved(as_stored, kind, exif=exif, quality=100))
    assert pixels.shape == (16, 32, 3)
    assert pixels[3, 3].max() < 40
    assert pixels[3, 28].min() > 215
    assert pixels[12, 3].min() > 215


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("lime", "red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(stored(data)[5, 5].astype(int) - [0, 255, 0]).max() <= 4


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 500), (168, 336)),
        ((500, 1000), (336, 168)),
        ((336, 10), (10, 336)),
        ((20, 10), (10, 20)),
        ((4000, 1), (1, 336)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_no_side_is_longer_and_none_grows(size, expected, kind):
    assert stored(saved(Image.new("RGB", size, "red"), kind)).shape[:2] == expected


def test_shrinking_a_jpeg_while_decoding_changes_next_to_nothing():
    x, y = np.meshgrid(np.arange(2400), np.arange(1600))
    waves = np.stack([128 + 100 * np.sin(x / 90), 128 + 100 * np.sin(y / 60), (x + y) / 4000 * 255], axis=2)
    picture = Image.fromarray(waves.astype(np.uint8))
    straight = picture.resize((300, 200), Image.Resampling.LANCZOS)
    difference = stored(saved(picture, "JPEG", quality=95), size=300).astype(int) - np.asarray(straight).astype(int)
    assert np.abs(difference).mean() < 1.5


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_what_is_stored_is_of_the_format_asked_for_and_stays(kind, start):
    config = ImageConfig(format=kind, size=64)
    once = prepare_image(saved(two_halves(size=(300, 200)), "PNG"), config)
    assert once.startswith(start)
    again = decode_rgb(prepare_image(once, config)).astype(int)
    assert np.abs(again - decode_rgb(once)).max() <= (0 if kind == "png" else 40)
    assert b"Exif" not in once


def test_no_size_is_stored_that_cannot_be_decoded():
    noise = np.random.default_rng(0).integers(0, 255, (4096, 4096, 3), dtype=np.uint8)
    as_large_as_any = saved(Image.fromarray(noise), "BMP")  # which PNG cannot make smaller
    assert (decode_rgb(as_large_as_any) == noise).all()
    with pytest.raises(ConfigError, match="size"):
        validate(ImageConfig, {"size": 5000}, where="data.images")


def test_threads_give_the_same():
    pictures = [saved(two_halves(size=(200 + n, 100), left=(n, 0, 0)), "JPEG") for n in range(40)]
    one_by_one = [prepare_image(data, PLAIN) for data in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda data: prepare_image(data, PLAIN), pictures)) == one_by_one
