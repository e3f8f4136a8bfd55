"""A collection of pictures that a machine draws itself: emoji of an installed font, or coloured shapes.

Notable: nothing is downloaded. Emoji get their names from Python's own Unicode table, and skin tones where the font has
them; without the font (Debian's fonts-noto-color-emoji) shapes are drawn in every colour, size and place. What the
test queries show is shown by no training query: parts are split by what is drawn. The picture that a query asks with
is excluded from its answers. The folder is one that `data.path` names (docs/data_formats.md).

| task | query | looks for |
| --- | --- | --- |
| text to image | a name | its picture |
| image to text | a picture | its name |
| image,text to image | a picture and "the same with dark skin tone" or "the same in blue" | the picture changed so |

    build_drawn_pictures(Path("runs/pictures"))
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.errors import DataError
from raydr.types import EXCLUDED_IDS, IMAGE, INSTRUCTIONS, PASSAGE_ID, QUERY_ID, TASK, TEXT

KIND = "drawn_pictures"
HELD_OUT = "held_out"
"""The folder with some pictures of the test part as files, to search with."""
_FILES = 40
FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
_FONT_SIZE = 109
"""The one size that the font's bitmaps have."""
_SIDE = 72
_BLOCKS = ((0x2600, 0x27C0), (0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FB00))
_TONES = {
    "light": "\U0001f3fb",
    "medium-light": "\U0001f3fc",
    "medium": "\U0001f3fd",
    "medium-dark": "\U0001f3fe",
    "dark": "\U0001f3ff",
}
_SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "bar", "star")
_COLORS = {
    "red": (214, 39, 40),
    "blue": (31, 88, 190),
    "green": (44, 150, 50),
    "yellow": (240, 200, 30),
    "purple": (140, 70, 180),
    "orange": (250, 130, 20),
    "black": (20, 20, 20),
    "pink": (240, 120, 180),
}
_PLACES = {"on the left": 22, "in the middle": 36, "on the right": 50}
_SIZES = {"small": 9, "large": 18}
_TEST_EVERY = 5
PICTURE, NAME = "Find a picture.", "Find a name."
"""The shortest wording of what is looked for; both kinds of query for pictures have the first."""
INSTRUCTIONS_OF = {
    "text to image": ["Find the picture that the words describe.", "Which picture shows this?", PICTURE],
    "image to text": ["Find the name of the picture.", "What does this picture show?", NAME],
    "image,text to image": [
        "Find the picture changed as the text says.",
        "Which picture is this one, changed so?",
        PICTURE,
    ],
}


class Drawn(NamedTuple):
    """One picture."""

    name: str
    """What it shows; unique."""
    kind: str
    """What is drawn, without what can be changed about it: pictures of one kind are in one part."""
    change: str
    """What a picture of its kind becomes it by ("with dark skin tone", "in blue"); empty for the plain one."""
    png: bytes


def build_drawn_pictures(out: Path, *, size: int | None = None) -> Artifact:
    """Passages, queries and judgements of a train and a test part in `out` (kind "drawn_pictures"), a folder that
    `data.path` names; of the first `size` pictures where it is given. Finished ones of the same font and size stay.

    Raises `DataError` where these are too few to have both parts.
    """
    font = next((Path(path) for path in FONTS if Path(path).is_file()), None)
    settings = {"size": size, "font": None if font is None else [font.name, font.stat().st_size]}
    if not is_finished(out, fingerprint(KIND, settings, {})):
        pictures = list(islice(_shapes() if font is None else _emoji(font), size))
        with write_artifact(out, kind=KIND, config=settings) as writer:
            writer.counts.update(pictures=len(pictures), **_write(pictures, writer.path))
    return open_artifact(out, kind=KIND)


def _write(pictures: list[Drawn], folder: Path) -> dict[str, int]:
    """The tables of these pictures; how many queries there are of each part."""
    kinds = list(dict.fromkeys(picture.kind for picture in pictures))
    part_of = {kind: "test" if number % _TEST_EVERY == 0 else "train" for number, kind in enumerate(kinds)}
    if len(kinds) < 2:
        raise DataError(f"size: of {len(pictures)} pictures no part can be held out; take more")
    passages = [{PASSAGE_ID: _id("picture", one), TEXT: "", IMAGE: one.png} for one in pictures]
    passages += [{PASSAGE_ID: _id("name", one), TEXT: one.name, IMAGE: None} for one in pictures]
    schema = pa.schema({PASSAGE_ID: pa.string(), TEXT: pa.string(), IMAGE: pa.binary()})
    pq.write_table(pa.Table.from_pylist(passages, schema=schema), folder / "passages.parquet")
    queries, lines = [], {"train": ["query-id\tcorpus-id\tscore"], "test": ["query-id\tcorpus-id\tscore"]}
    for query, target, kind in _queries(pictures):
        queries.append(query)
        lines[part_of[kind]].append(f"{query[QUERY_ID]}\t{target}\t1")
    schema = pa.schema(
        {
            QUERY_ID: pa.string(),
            TEXT: pa.string(),
            IMAGE: pa.binary(),
            INSTRUCTIONS: pa.list_(pa.string()),
            TASK: pa.string(),
            EXCLUDED_IDS: pa.list_(pa.string()),
        }
    )
    pq.write_table(pa.Table.from_pylist(queries, schema=schema), folder / "queries.parquet")
    (folder / HELD_OUT).mkdir()
    shown = [one for one in pictures if part_of[one.kind] == "test" and not one.change]
    for one in shown[:: max(1, len(shown) // _FILES)][:_FILES]:
        (folder / HELD_OUT / f"{one.name.replace(' ', '-')}.png").write_bytes(one.png)
    (folder / "qrels").mkdir()
    for part, own in lines.items():
        (folder / f"qrels/{part}.tsv").write_text("\n".join(own) + "\n", encoding="utf-8")
    return {f"{part}_queries": len(own) - 1 for part, own in lines.items()}


def _queries(pictures: list[Drawn]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Query, what it looks for, and the kind that is shown."""

    def query(query_id: str, task: str, text: str, shown: Drawn | None = None) -> dict[str, Any]:
        asked = {QUERY_ID: query_id, TEXT: text, INSTRUCTIONS: INSTRUCTIONS_OF[task], TASK: task}
        if shown is None:
            return asked
        return {**asked, IMAGE: shown.png, EXCLUDED_IDS: [_id("picture", shown)]}

    plain = {one.kind: one for one in pictures if not one.change}
    for one in pictures:
        yield query(_id("t", one), "text to image", one.name), _id("picture", one), one.kind
        yield query(_id("i", one), "image to text", "", one), _id("name", one), one.kind
        if one.change and one.kind in plain:
            text = f"the same {one.change}"
            asked = query(_id("c", one), "image,text to image", text, plain[one.kind])
            yield asked, _id("picture", one), one.kind


def _id(prefix: str, picture: Drawn) -> str:
    return f"{prefix}:{picture.name.replace(' ', '-')}"


def _emoji(font_file: Path) -> Iterator[Drawn]:
    from PIL import ImageFont, features

    font = ImageFont.truetype(str(font_file), _FONT_SIZE)
    joins = features.check("raqm")  # what puts an emoji and a skin tone into one picture
    for first, last in _BLOCKS:
        for point in range(first, last):
            letter = chr(point)
            name = unicodedata.name(letter, "").lower()
            if not name or "modifier" in name or font.getmask(letter).getbbox() is None:
                continue
            plain = _emoji_png(letter, font)
            yield Drawn(name, name, "", plain)
            if not joins or font.getlength(letter + _TONES["dark"]) > 1.5 * font.getlength(letter):
                continue
            for tone, modifier in _TONES.items():
                change = f"with {tone} skin tone"
                changed = _emoji_png(letter + modifier, font)
                if changed != plain:  # of somebody who is all clothes no skin is seen
                    yield Drawn(f"{name} {change}", name, change, changed)


def _emoji_png(text: str, font: Any) -> bytes:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
    return _png(canvas.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))


def _shapes() -> Iterator[Drawn]:
    for shape in _SHAPES:
        for size, radius in _SIZES.items():
            for place, x in _PLACES.items():
                for color, rgb in _COLORS.items():
                    kind = f"a {size} {shape} {place}"
                    change = "" if color == "red" else f"in {color}"
                    yield Drawn(f"a {size} {color} {shape} {place}", kind, change, _shape_png(shape, radius, x, rgb))


def _shape_png(shape: str, radius: int, x: int, color: tuple[int, int, int]) -> bytes:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (_SIDE, _SIDE), "white")
    draw, y = ImageDraw.Draw(canvas), _SIDE // 2
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "ring":
        draw.ellipse(box, outline=color, width=max(2, radius // 3))
    elif shape == "bar":
        draw.rectangle((x - radius, y - radius // 3, x + radius, y + radius // 3), fill=color)
    elif shape == "cross":
        width = max(2, radius // 3)
        draw.line((x - radius, y, x + radius, y), fill=color, width=width)
        draw.line((x, y - radius, x, y + radius), fill=color, width=width)
    elif shape == "star":
        draw.regular_polygon((x, y, radius), 3, fill=color)
        draw.regular_polygon((x, y, radius), 3, rotation=180, fill=color)
    else:
        draw.regular_polygon(
            (x, y, radius), 3 if shape == "triangle" else 4, rotation=45 * (shape == "diamond"), fill=color
        )
    return _png(canvas)


def _png(picture: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
