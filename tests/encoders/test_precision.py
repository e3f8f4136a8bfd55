"""Instruction sets are read from the machine, and precision follows them."""

import logging
import platform

import pytest
import torch

from raydr.encoders import precision
from raydr.encoders.precision import choose_precision, features_of_cpuinfo, processor_features

ZEN4 = "".join(f"processor : {i}\nflags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n\n" for i in range(2))
SAPPHIRE_RAPIDS = "flags : avx512_bf16 amx_bf16 amx_tile avx512_vnni\n"
SKYLAKE = "flags : fpu avx2 avx512f avx512bw\n"
GRAVITON3 = "Features : fp asimd bf16 i8mm\n"


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        (ZEN4, {"avx512_bf16", "avx512_vnni"}),
        (SAPPHIRE_RAPIDS, {"avx512_bf16", "amx_bf16", "avx512_vnni"}),
        (SKYLAKE, set()),
        (GRAVITON3, {"arm_bf16"}),
        (ZEN4 + SKYLAKE, set()),  # a feature that not every core has is no feature
        ("", set()),
    ],
)
def test_features_of_known_processors(cpuinfo, features):
    assert features_of_cpuinfo(cpuinfo) == features


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks torch about x86 features")
def test_agrees_with_torch_on_this_machine():
    found = processor_features()
    assert ("avx512_bf16" in found) == torch.cpu._is_avx512_bf16_supported()
    assert ("avx512_vnni" in found) == torch.cpu._is_vnni_supported()


@pytest.mark.parametrize(("cpuinfo", "expected"), [(ZEN4, "bfloat16"), (SKYLAKE, "float32"), (GRAVITON3, "bfloat16")])
def test_auto_follows_the_processor(monkeypatch, cpuinfo, expected):
    monkeypatch.setattr(precision, "processor_features", lambda: features_of_cpuinfo(cpuinfo))
    assert choose_precision("auto", "cpu") == expected


def test_an_emulated_precision_is_granted_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset())
    with caplog.at_level(logging.WARNING):
        assert choose_precision("bfloat16", "cpu") == "bfloat16"
    assert "emulated" in caplog.text
