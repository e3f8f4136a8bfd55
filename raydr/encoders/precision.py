"""Which arithmetic the processor really has, and the precision to encode with.

Notable: detected, then measured, never assumed. With AVX512-BF16, AMX or Arm's BF16 extension bfloat16 can be two to
four times as fast as float32 (AMD Zen 4) and can also be half as fast (an Intel Xeon whose AMX the hypervisor hides:
its AVX512-BF16 has half the rate). So one matrix product of an encoder's size is timed in both, once per processor,
and the outcome is kept in raydr's cache. Without these instructions bfloat16 is emulated, and nothing is timed.

    python -c "from raydr.encoders.precision import *; print(processor_features(), bfloat16_speedup())"
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Literal, TypeAlias

from raydr.encoders.cache import cache_folder

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]

log = logging.getLogger(__name__)

_FLAGS = {
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
    "avx512_vnni": "avx512_vnni",
    "bf16": "arm_bf16",
}
"""Flag in /proc/cpuinfo (x86: `flags`, Arm: `Features`) -> the name used here."""
_BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "arm_bf16"}
_WORTH_IT = 1.15
"""Below this speed-up float32 is taken: the network also converts, normalises and adds, which bfloat16 slows."""
_TRIES = 20


@functools.cache
def processor_features() -> frozenset[str]:
    """What of avx512_bf16, amx_bf16, avx512_vnni, arm_bf16 this machine's processor has."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        return features_of_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    if platform.machine().lower() in {"x86_64", "amd64"}:
        import torch

        supported = {
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
            "avx512_vnni": torch.cpu._is_vnni_supported(),
        }
        return frozenset(name for name, present in supported.items() if present)
    return frozenset()


def features_of_cpuinfo(text: str) -> frozenset[str]:
    """The features every processor listed in the text of /proc/cpuinfo has."""
    lists = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))]
    common = set.intersection(*map(set, lists)) if lists else set()
    return frozenset(name for flag, name in _FLAGS.items() if flag in common)


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is clearly faster than float32 on this processor."""
    return bool(processor_features() & _BFLOAT16_FEATURES) and bfloat16_speedup() >= _WORTH_IT


@functools.cache
def bfloat16_speedup() -> float:
    """Time of a matrix product in float32 over its time in bfloat16; measured once per processor and build of torch."""
    import torch

    key = f"{processor_name()} {sorted(processor_features())} {os.cpu_count()} torch {torch.__version__}"
    file = cache_folder() / "processors" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["bfloat16_speedup"])
    except FileNotFoundError:
        log.info("measuring once whether bfloat16 is faster than float32 on %s", processor_name())
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read, so the processor is measured again: %r", file, error)
    speedup = _measure_bfloat16_speedup()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"processor": key, "bfloat16_speedup": round(speedup, 3)}), encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        log.warning("%s cannot be written, so the processor is measured at every start: %s", file, error)
    return speedup


def processor_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor()


def _measure_bfloat16_speedup() -> float:
    import torch

    # A feed-forward layer of a small encoder over a batch of 512 tokens; the best of interleaved calls, so that other
    # work on the machine disturbs both alike.
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    inputs = {kind: (torch.randn(512, 384).to(kind), torch.randn(1536, 384).to(kind)) for kind in best}
    for _ in range(_TRIES):
        for kind, (x, weight) in inputs.items():
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[kind] = min(best[kind], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def choose_precision(requested: Literal["auto"] | Precision, device: str) -> Precision:
    """The precision to run with on `device` ("cpu", "cuda", "cuda:1", "mps"); a request is granted, with a warning
    where the processor has to emulate it.
    """
    if device.startswith("cuda"):
        return _on_cuda() if requested == "auto" else requested
    if requested == "auto":
        return "bfloat16" if device == "cpu" and has_fast_bfloat16() else "float32"
    if device == "cpu" and (requested == "float16" or (requested == "bfloat16" and not has_fast_bfloat16())):
        log.warning("precision %s is emulated on this processor and slow; `precision: auto` avoids it", requested)
    return requested


def _on_cuda() -> Precision:
    import torch

    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
