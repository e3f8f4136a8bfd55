"""The one door to DeepSpeed: a network, its optimiser and what is split over the workers.

Notable: gradients add up over any number of `backward` calls until `step`, which is what gradient caching and
accumulation need (DeepSpeed's `managed_gradient_accumulation: false`); the learning rate is set before every step as a
function of the step's number, so a resumed run needs no scheduler state. Weights leave as float32, whole, whatever the
ZeRO stage, for the process that asks (all must ask together).

    engine = Engine(network, TrainConfig(zero_stage=2), is_gpu=False)
    engine.backward(loss); engine.step(learning_rate=1e-5)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydr.errors import ConfigError
from raydr.models.towers import towers_of
from raydr.train.config import TrainConfig
from raydr.train.distributed import num_workers, worker_rank
from raydr.train.linear import through_onednn

_TAG = "state"
_NO_DECAY = ("bias", "norm.weight", "layernorm.weight", "layer_norm.weight", "ln_f.weight")


class Engine:
    """A network being trained. Every worker holds one, and all call its methods together."""

    def __init__(self, model: nn.Module, config: TrainConfig, *, is_gpu: bool) -> None:
        deepspeed = _import_deepspeed(is_gpu=is_gpu)
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
        # cuDNN's backward pass makes NaN of rows that attend to next to nothing, as padding on the left does, in texts
        # of 64, 192, 320, ... tokens (github.com/pytorch/pytorch/issues/196678); PyTorch's own fused kernels do not.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if config.activation_checkpointing:
            _checkpoint_activations(model)
        # ZeRO 3 has linear layers of its own.
        if not is_gpu and config.precision == "float32" and config.zero_stage < 3:
            through_onednn(model)
        groups = parameter_groups(model, config)
        settings: dict[str, Any] = {
            "lr": config.learning_rate,
            "betas": config.adam_betas,
            "eps": config.adam_eps,
        }
        optimizer: Any
        if config.offload == "none":
            optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        else:
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **settings)
        network: Any = model
        if num_workers() > 1 and hasattr(network, "always_looks"):
            network.always_looks = True
        exact = _float32_weights(model) if config.precision == "bfloat16" else {}
        self._factors = [group["lr"] / config.learning_rate for group in groups]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, num_workers=num_workers()),
            dist_init_required=False,
        )
        self._stage, self._precision = config.zero_stage, config.precision
        # Activations are computed again in the backward pass, where no length would be at hand.
        self._attention = None if is_gpu or config.activation_checkpointing else _Attention(model)
        for name, weight in self.model.named_parameters():
            if name in exact:  # DeepSpeed makes its float32 copies of weights that it has rounded
                deepspeed.utils.safe_set_full_fp32_param(weight, exact[name])

    @property
    def model(self) -> nn.Module:
        """The network itself; with ZeRO 3 each worker holds only a part of its weights."""
        return self._engine.module

    def __call__(self, *inputs: Tensor | str | None) -> Any:
        if self._attention is not None and isinstance(inputs[0], Tensor):
            self._attention.choose(inputs[0].shape[1])
        return self._engine(*inputs)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Adds the gradient of `loss` to the gradients of the step."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float | None:
        """One update with the mean of the workers' gradients; returns their norm before clipping, where DeepSpeed tells
        it (not in ZeRO 0 with float32).
        """
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = learning_rate * factor
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Every worker's part of weights and optimiser, and `state`, which is small and the same for all."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=state, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        """What `save` wrote, into this engine; gives back `state`. Raises `ConfigError` where the workers differ."""
        saved = len(list((folder / _TAG).glob("*optim_states.pt")))
        if self._stage and saved != num_workers():
            raise ConfigError(
                f"this checkpoint was written by {saved} workers, and ZeRO's parts fit no other number: "
                f"set train.num_workers={saved}"
            )
        path, state = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise ConfigError(f"{folder}: holds no checkpoint of this run")
        return state

    def weights(self) -> dict[str, Tensor] | None:
        """All weights in float32 by name, on the CPU of worker 0; None on the others. In bfloat16 those are the
        optimiser's, because a network's own lack the updates that are too small for their seven binary places.
        """
        if self._stage == 3:
            gathered = self._gathered_weights()
        else:
            gathered = {name: value.detach() for name, value in self.model.state_dict().items()}
        if self._precision == "bfloat16":
            gathered |= self._optimizer_weights()
        if worker_rank():
            return None
        return {
            name: value.cpu().float() if value.is_floating_point() else value.cpu() for name, value in gathered.items()
        }

    def _optimizer_weights(self) -> dict[str, Tensor]:
        """The float32 copies of all weights that are trained."""
        from deepspeed.utils import safe_get_full_fp32_param

        # Tied weights are found under both their names: neither may keep its bfloat16 twin.
        named = self.model.named_parameters(remove_duplicate=False)
        copies = {name: safe_get_full_fp32_param(weight) for name, weight in named}
        return {name: copy for name, copy in copies.items() if copy is not None}

    def _gathered_weights(self) -> dict[str, Tensor]:
        import deepspeed

        # Of the state's names: buffers that are not saved are not among them.
        saved = self.model.state_dict().keys()
        found = {name: value.detach().cpu() for name, value in self.model.named_buffers() if name in saved}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if worker_rank() == 0:
                    found[name] = parameter.detach().cpu().clone()
        return found


class _Attention:
    """Attention by plain matrix products for short texts on a CPU, where the backward pass of PyTorch's fused attention
    is slow (W9 in benchmarks/results.md, before and after). Long texts keep the fused one: plain products need memory
    for every pair of tokens.
    """

    _LONGEST = 192

    def __init__(self, model: nn.Module) -> None:
        chosen = [[m for m in tower.modules() if hasattr(m, "set_attn_implementation")] for tower in towers_of(model)]
        self._networks: list[Any] = [found[0] for found in chosen if found]
        config = self._networks[0].config if self._networks else None
        self._fused = getattr(config, "_attn_implementation", None)
        self._chosen = self._fused

    def choose(self, num_tokens: int) -> None:
        wanted = "eager" if num_tokens <= self._LONGEST else self._fused
        if self._fused == "sdpa" and wanted != self._chosen:
            for network in self._networks:
                network.set_attn_implementation(wanted)
            self._chosen = wanted


def _float32_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: weight.detach().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dtype == torch.float32
    }


def deepspeed_config(config: TrainConfig, *, num_workers: int) -> dict[str, Any]:
    """DeepSpeed's own settings for a training config."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        # Small networks: keep nothing split that is smaller than a worker would notice.
        zero["stage3_param_persistence_threshold"] = 0
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // num_workers,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable weights by learning rate and weight decay; a group's lr is its highest.

    With `layer_decay` the layer n below the top has learning_rate * layer_decay ** n; embeddings lie below the first.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ConfigError("the model has no weights to train")
    depth = 1 + max((number for name in names if (number := _layer(name)) is not None), default=-1)
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.lower().endswith(_NO_DECAY)
        below_top = _below_top(name, depth)
        groups.setdefault((config.learning_rate * config.layer_decay**below_top, decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": config.weight_decay if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]


def _below_top(name: str, depth: int) -> int:
    layer = _layer(name)
    if layer is None:
        return depth if "embed" in name else 0
    return depth - 1 - layer


def _layer(name: str) -> int | None:
    """The number in `encoder.layer.3.attention...`; None outside the layers."""
    parts = name.split(".")
    for before, part in zip(parts, parts[1:], strict=False):
        if part.isdigit() and before in {"layer", "layers", "h", "block", "blocks"}:
            return int(part)
    return None


def _checkpoint_activations(model: nn.Module) -> None:
    for module in _transformers(model):
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _transformers(model: nn.Module) -> Iterator[Any]:
    for tower in towers_of(model):
        found = next((module for module in tower.modules() if hasattr(module, "gradient_checkpointing_enable")), None)
        if found is None:
            raise ConfigError("activation_checkpointing: this network has no transformer that knows how")
        yield found


def _import_deepspeed(*, is_gpu: bool) -> Any:
    """DeepSpeed, told which device there is before it looks for one itself, and quiet."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if is_gpu else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("training needs DeepSpeed: pip install 'raydr[cpu]' or 'raydr[gpu]'") from error
    from deepspeed import comm

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not is_gpu:
        # A reduction of tensor-parallel inference, which would be compiled before the first training.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not comm.is_initialized():
        comm.init_distributed(dist_backend="nccl" if is_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed
