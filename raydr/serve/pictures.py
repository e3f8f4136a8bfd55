"""Pictures in requests and in answers: base64 in, a checked file of our own making inside, `data:` URLs out.

Notable: nothing is fetched, and no name of a file is read. What reads a corpus's pictures (`raydr.data.images`) reads
these as well: it holds the size in the header against the limit before a pixel is decoded, and writes the picture anew,
so that neither an encoder nor a reranker ever sees the bytes that were sent. Two threads decode, whatever arrives: two
of the largest pictures are all the memory it takes.

    pictures = PictureReader(limits)
    await pictures.read(request.parts)                # [b"...", None]; raises ApiError 422
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raydr.data.images import ImageConfig, ImageError, decode_base64, prepare_image
from raydr.serve.config import Limits
from raydr.serve.errors import ApiError
from raydr.serve.fanout import together
from raydr.serve.schema import Part

NUM_THREADS = 2

_STARTS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


class PictureReader:
    """Makes files for models out of pictures as they were sent."""

    def __init__(self, limits: Limits) -> None:
        self._config = ImageConfig(max_bytes=limits.largest_image_bytes, max_pixels=limits.image_pixels)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="picture")

    async def read(self, parts: Sequence[Part]) -> list[bytes | None]:
        """The file of each one's picture, if it has one. Raises `ApiError` 422 naming the field that is no picture."""
        return await together(self._one(part) for part in parts)

    async def _one(self, part: Part) -> bytes | None:
        if part.image is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._prepared, part.field, part.image)

    def _prepared(self, field: str, image: str) -> bytes:
        try:
            return prepare_image(decode_base64(image, self._config), self._config)
        except ImageError as error:
            raise ApiError(422, "invalid_image", f"{field}: {error}", param=field) from None


def data_url(image: bytes) -> str:
    """A picture's file as a URL that a browser shows."""
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"


def media_type(image: bytes) -> str:
    """What the first bytes say that a file is; nothing that a browser would run."""
    for start, name in _STARTS.items():
        if image.startswith(start):
            return name
    return "image/webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else "application/octet-stream"
