"""Which arithmetic the processor really has, and the precision to encode with.

Notable: detected, never assumed. bfloat16 on a processor with AVX512-BF16, AMX or Arm's BF16 extension is two to four
times as fast as float32; on one without it is emulated and far slower, so `auto` then stays with float32.

    python -c "from raydr.encoders.precision import processor_features; print(processor_features())"
"""

from __future__ import annotations

import functools
import logging
import platform
from pathlib import Path
from typing import Literal, TypeAlias

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]

log = logging.getLogger(__name__)

_FLAGS = {
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
    "avx512_vnni": "avx512_vnni",
    "bf16": "arm_bf16",
}
"""Flag in /proc/cpuinfo (x86: `flags`, Arm: `Features`) -> the name used here."""


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
    return bool(processor_features() & {"avx512_bf16", "amx_bf16", "arm_bf16"})


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
