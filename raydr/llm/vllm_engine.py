"""vLLM in this process: the asynchronous engine, whose core runs in a process of its own and batches what waits.

Notable: `logprob_token_ids` makes vLLM return exactly the ids asked for. Waiting prompts are put into one batch by
vLLM whatever request they come from, so windows of many callers share a step. A caller that gives up aborts its prompt.
The core's death shows as `EngineError`, for every prompt that was in work and every later one. Where vLLM's own code of
a network cannot be imported here, which for those that read pictures is so without torchvision and with some versions
of transformers, vLLM runs transformers' code of it with its own attention, cache and batches.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydr.encoders.checkpoint import locate
from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig, EngineError, count_answer, load_llm_tokenizer, without_end
from raydr.llm.pictures import check_placeholders, picture_reader

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES_PER_PROMPT = 2
"""A query's and a candidate's."""
_NOT_IMPORTED = "failed to be inspected"
"""What vLLM says of a network whose code it cannot import."""


class VllmEngine:
    """An `Engine` on `vllm.v1.engine.async_llm.AsyncLLM`."""

    def __init__(self, config: EngineConfig) -> None:
        path = locate(config.model)
        self.tokenizer: Any = load_llm_tokenizer(config.model)
        self.pictures = picture_reader(config.model, self.tokenizer)
        arguments = engine_arguments(config)
        if self.pictures is not None:
            _ = self.pictures.processor  # which vLLM needs whole: without, it would fail after a minute and not say why
            arguments["limit_mm_per_prompt"] = {"image": PICTURES_PER_PROMPT, "video": 0, "audio": 0}
        _set_environment(config)
        self._engine = _started(path, arguments)
        self._closed = False
        self.max_model_tokens = int(self._engine.model_config.max_model_len)

    async def next_token_logprobs(
        self, prompt: Sequence[int], candidates: Sequence[int], pictures: Sequence[Image] = ()
    ) -> list[float]:
        from vllm import SamplingParams

        wanted = list(dict.fromkeys(candidates))
        settings = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=wanted, detokenize=False)
        output = await self._run(prompt, settings, pictures)
        found = output.logprobs[0]
        if missing := [token for token in wanted if token not in found]:
            raise EngineError(f"vLLM returned no log-probability for token ids {missing}; its version is not supported")
        return [float(found[token].logprob) for token in candidates]

    async def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        from vllm import SamplingParams

        settings = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, stop_token_ids=list(stop) or None, detokenize=False
        )
        made = (await self._run(prompt, settings)).token_ids
        return without_end(made, {*stop, self.tokenizer.eos_token_id})

    async def _run(self, prompt: Sequence[int], settings: Any, pictures: Sequence[Image] = ()) -> Any:
        """The finished output of one prompt. A cancelled caller aborts it."""
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        check_placeholders(self.pictures, prompt, pictures)
        asked: Any = {"prompt_token_ids": list(prompt)}
        if pictures:
            asked["multi_modal_data"] = {"image": list(pictures)}
        settings.output_kind = RequestOutputKind.FINAL_ONLY
        try:
            last = None
            async for output in self._engine.generate(asked, settings, uuid.uuid4().hex):
                last = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(f"vLLM's engine has stopped: {error}") from error
        if last is None:
            raise EngineError("vLLM's engine gave no answer")
        answer = last.outputs[0]
        read = len(last.prompt_token_ids or prompt)  # visual tokens included
        count_answer(prompt=read, generated=len(answer.token_ids), cached=last.num_cached_tokens or 0)
        return answer

    async def check(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            raise EngineError(f"vLLM's engine has stopped: {error}") from error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.shutdown()


def _started(path: Path, arguments: dict[str, Any]) -> Any:
    """The engine of vLLM. Raises `ConfigError` where there is no vLLM, or it does not serve the checkpoint."""
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); run make setup, or choose another backend") from error
    try:
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(path), **arguments))
        except ValueError as error:
            if _NOT_IMPORTED not in str(error):
                raise
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(path), model_impl="transformers", **arguments))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{path}: vLLM cannot serve this checkpoint: {error}") from error


def engine_arguments(config: EngineConfig) -> dict[str, Any]:
    """What vLLM calls the settings of `config`, but for the model."""
    arguments: dict[str, Any] = {
        # Generation settings of the checkpoint would change what the engine answers with (a penalty, a temperature).
        "generation_config": "vllm",
        "trust_remote_code": False,
        "load_format": "safetensors",
        "max_num_seqs": config.max_batch_prompts,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "gpu_memory_utilization": config.gpu_memory_share,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": not (_has_gpu() if config.compile is None else config.compile),
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    given = {
        "dtype": config.dtype,
        "max_model_len": config.max_model_tokens,
        "max_num_batched_tokens": config.max_batch_tokens,
        "quantization": config.quantization,
    }
    if config.tensor_parallel * config.pipeline_parallel > 1 and _in_placement_group():
        # Its GPUs are those of the group's bundles, of which this process has the first alone.
        given["distributed_executor_backend"] = "ray"
    return arguments | {name: value for name, value in given.items() if value is not None}


def _set_environment(config: EngineConfig) -> None:
    """What vLLM reads from the environment alone; the operator's own settings stand."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.cache_gib))))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _in_placement_group() -> bool:
    """Whether Ray has placed this process, such as a Serve replica with `placement_group_bundles`, in a group."""
    import ray

    return ray.is_initialized() and ray.util.get_current_placement_group() is not None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
