"""What a reranker asks of a causal language model, and which engine answers: vLLM here, vLLM elsewhere, transformers.

Notable: an engine speaks token ids. It gives the log-probability of exactly the ids it is asked for (vLLM's
`logprob_token_ids`), never the best k of the vocabulary, among which an identifier may be missing. The three engines
give the same numbers; transformers is the reference the others are tested against. A model that reads pictures is given
them beside the ids, among which one placeholder stands for each (`raydr/llm/pictures.py`).

    engine = build_engine(EngineConfig(model="castorini/first_mistral"))
    await engine.next_token_logprobs(prompt_ids, letter_ids)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from raydr import series
from raydr.config import Config
from raydr.errors import ConfigError, RaydrError
from raydr.storage import refuse_secrets

if TYPE_CHECKING:
    from PIL.Image import Image

    from raydr.llm.pictures import PictureReader

log = logging.getLogger(__name__)


class EngineError(RaydrError):
    """The language model did not answer: the engine is gone, or a server refused. Trying again may help."""


class EngineConfig(Config):
    """A language model, and what runs it."""

    model: str
    """Folder or hub name of a causal language model, of text or of text and pictures."""
    backend: Literal["auto", "vllm", "remote", "transformers"] = "vllm"
    """`vllm`: here, on CPU or GPU; `remote`: a vLLM server at `url`, for text alone; `transformers`: slow, for
    comparison; `auto`: vllm where it runs this checkpoint here, otherwise transformers, and the log says why."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; `auto`: the checkpoint's own."""
    max_model_tokens: int | None = Field(default=None, ge=32)
    """Longest prompt and answer together; null: the checkpoint's own."""
    max_batch_tokens: int | None = Field(default=None, ge=32)
    """vllm: tokens of all prompts in one step; null: vLLM's own."""
    max_batch_prompts: int = Field(default=64, ge=1)
    """vllm: prompts worked on at a time."""
    tensor_parallel: int = Field(default=1, ge=1)
    """vllm: GPUs that share each layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """vllm: groups of GPUs that hold consecutive layers."""
    quantization: str | None = None
    """vllm: `awq`, `gptq`, `fp8`, ...; null: what the checkpoint states."""
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    """vllm: share of a GPU's memory for weights and cache."""
    cache_gib: float = Field(default=1.0, gt=0)
    """vllm on a CPU: memory for keys and values."""
    compile: bool | None = None
    """vllm: compile the network when the engine starts, which takes about a minute on a CPU; null: on GPUs only."""
    prefix_caching: bool = True
    """vllm: keep what prompts have in common."""
    url: str | None = None
    """remote: address of the server, e.g. http://10.0.0.5:8000."""
    api_key_env: str | None = None
    """remote: environment variable that holds the server's key."""
    timeout_s: float = Field(default=60.0, gt=0)
    """remote: longest wait for one answer."""

    @model_validator(mode="after")
    def _possible(self) -> EngineConfig:
        if (self.backend == "remote") != (self.url is not None):
            raise ValueError("backend: remote and url belong together: give both or neither")
        if self.url is not None:
            refuse_secrets(self.url)  # the server's key has a variable of its own
        return self


@runtime_checkable
class Engine(Protocol):
    """A causal language model. Calls may overlap; an engine batches what waits. Errors are `EngineError`."""

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's transformers tokenizer."""
        ...

    @property
    def max_model_tokens(self) -> int:
        """Longest prompt, visual tokens included, and answer together."""
        ...

    @property
    def pictures(self) -> PictureReader | None:
        """How it reads pictures; None: it reads text only."""
        ...

    async def next_token_logprobs(
        self, prompt: Sequence[int], candidates: Sequence[int], pictures: Sequence[Image] = ()
    ) -> list[float]:
        """Natural log-probability, over the whole vocabulary, of each candidate as the token after `prompt`.

        The prompt has one placeholder for each of `pictures`, in their order; otherwise `ConfigError`.
        """
        ...

    async def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        """The most likely continuation, greedily, up to the end token, one of `stop`, or `max_tokens`."""
        ...

    async def check(self) -> None:
        """Raises `EngineError` when the engine cannot answer any more."""
        ...

    def close(self) -> None:
        """Ends what the engine started."""
        ...


def build_engine(config: EngineConfig) -> Engine:
    """The engine of a config; importing vLLM and loading weights happen here."""
    if config.backend in ("vllm", "auto"):
        from raydr.llm.vllm_engine import VllmEngine

        try:
            return VllmEngine(config)
        except ConfigError as error:
            if config.backend == "vllm":
                raise
            log.warning("%s. transformers runs it instead, one prompt after another.", error)
    if config.backend == "remote":
        from raydr.llm.remote_engine import RemoteEngine

        return RemoteEngine(config)
    from raydr.llm.transformers_engine import TransformersEngine

    return TransformersEngine(config)


def count_answer(*, prompt: int, generated: int, cached: int = 0) -> None:
    """Tells the time series of one answered prompt: its tokens, and how many of them were in the prefix cache."""
    series.count("raydr_llm_prompts_total")
    for kind, tokens in (("prompt", prompt), ("cached", cached), ("generated", generated)):
        series.count("raydr_llm_tokens_total", tokens, kind=kind)


def without_end(made: Sequence[int], ends: Collection[int | None]) -> list[int]:
    """Generated tokens without the one that ended them."""
    return list(made[:-1]) if made and made[-1] in ends else list(made)


def load_llm_tokenizer(model: str) -> Any:
    """The checkpoint's tokenizer, without code of its own. Raises `ConfigError` for one that cannot be loaded."""
    from transformers import AutoTokenizer

    from raydr.encoders.checkpoint import locate

    path = locate(model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        beside = path / "chat_template.json"  # where older multimodal checkpoints have it
        if not tokenizer.chat_template and beside.is_file():
            tokenizer.chat_template = json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: transformers cannot load this tokenizer: {error}") from error
    return tokenizer
