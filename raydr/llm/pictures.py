"""How a checkpoint reads pictures: what stands for one in a prompt, how many tokens it takes, and its pixels.

Notable: a prompt holds one placeholder token for each picture, wherever it is to stand; an engine puts the picture's
visual tokens in its place. How many these are is the checkpoint's own affair (LLaVA-NeXT cuts a picture into tiles,
Qwen2-VL takes more patches of a larger one) and depends on the picture's size alone. Everything comes from
transformers' processors, which are also what vLLM reads pictures with. Those that read videos as well need torchvision,
which raydr does without: of these the image processor alone is used.

    pictures = picture_reader("llava-hf/llava-v1.6-mistral-7b-hf", tokenizer)       # None: a model of text
    pictures.num_tokens(picture)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydr.data.images import ImageError
from raydr.encoders.checkpoint import locate
from raydr.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class PictureReader:
    """Reads pictures for one checkpoint; safe to call from several threads."""

    def __init__(self, path: Path, tokenizer: Any, token_id: int) -> None:
        self._path, self._tokenizer = path, tokenizer
        self.token_id = token_id
        """The placeholder of a picture, and of each of its visual tokens."""
        self.placeholder: str = tokenizer.convert_ids_to_tokens(token_id)
        """The same as a text."""
        self._num_tokens = lru_cache(maxsize=4096)(self._counted)

    def num_tokens(self, picture: Image) -> int:
        """Visual tokens of a picture. Raises `ImageError` for a shape that the checkpoint does not read."""
        try:
            return self._num_tokens(picture.width, picture.height)
        except ValueError as error:
            size = f"{picture.width} x {picture.height}"
            raise ImageError(f"has {size} pixels, which {self._path} does not read: {error}") from error

    def expanded(self, prompt: Sequence[int], pictures: Sequence[Image]) -> list[int]:
        """The prompt with each placeholder as often as its picture, the next of `pictures`, has visual tokens."""
        check_placeholders(self, prompt, pictures)
        counts = map(self.num_tokens, pictures)
        return [copy for token in prompt for copy in [token] * (next(counts) if token == self.token_id else 1)]

    def inputs(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """What transformers' network is given beside the token ids: pixels, and what it wants to know of them."""
        return dict(self._image_processor(images=list(pictures), return_tensors="pt"))

    def _counted(self, width: int, height: int) -> int:
        from PIL import Image

        blank = Image.new("RGB", (width, height))
        grid = self._image_processor(images=[blank]).get("image_grid_thw")
        if grid is not None:  # the Qwen family: patches along time, height and width, merged in squares
            return math.prod(map(int, grid[0])) // self._image_processor.merge_size**2
        ids = self.processor(text=self.placeholder, images=[blank])["input_ids"]
        return list(ids[0]).count(self.token_id)

    @cached_property
    def _image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self._loaded(AutoImageProcessor)

    @cached_property
    def processor(self) -> Any:
        """The whole of transformers' processor. Raises `ConfigError` where it cannot be loaded here."""
        from transformers import AutoProcessor

        return self._loaded(AutoProcessor)

    def _loaded(self, loader: Any) -> Any:
        try:
            return loader.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"{self._path}: transformers cannot load what prepares its pictures: {why}") from error


def picture_reader(model: str, tokenizer: Any) -> PictureReader | None:
    """The reader of a checkpoint; None where it is a model of text. Raises `ConfigError` for a config that is none."""
    from transformers import AutoConfig

    path = locate(model)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: transformers cannot read this checkpoint's config.json: {error}") from error
    token_id = getattr(config, "image_token_id", None)
    if token_id is None or getattr(config, "vision_config", None) is None:
        return None
    return PictureReader(path, tokenizer, int(token_id))


def check_placeholders(reader: PictureReader | None, prompt: Sequence[int], pictures: Sequence[Image]) -> None:
    """Raises `ConfigError` where the prompt has not one placeholder for each picture: others would be read as words."""
    if reader is None:
        if pictures:
            raise ConfigError("this engine reads text only, and the prompt has pictures")
    elif (found := list(prompt).count(reader.token_id)) != len(pictures):
        raise ConfigError(f"the prompt has {found} placeholders {reader.placeholder!r} for {len(pictures)} pictures")
