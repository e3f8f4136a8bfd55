"""Instruction sets are read from the machine, and precision follows them."""

import logging
import platform

import pytest
import torch

from raydr.encoders import precision
from raydr.encoders.precision import bfloat16_speedup, choose_precision, features_of_cpuinfo, processor_features

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


@pytest.mark.parametrize(
    ("cpuinfo", "speedup", "expected"),
    [
        (ZEN4, 2.9, "bfloat16"),
        (ZEN4, 0.55, "float32"),  # it has the instructions, and they are slow
        (SKYLAKE, 9.0, "float32"),  # it has not, and is not asked
        (GRAVITON3, 2.0, "bfloat16"),
    ],
)
def test_auto_takes_what_is_faster(monkeypatch, cpuinfo, speedup, expected):
    monkeypatch.setattr(precision, "processor_features", lambda: features_of_cpuinfo(cpuinfo))
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda: speedup)
    assert choose_precision("auto", "cpu") == expected


def test_the_speedup_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYDR_CACHE", str(tmp_path))
    bfloat16_speedup.cache_clear()
    measured = bfloat16_speedup()
    assert 0.01 < measured < 100
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"bfloat16_speedup": 7.5}')
    bfloat16_speedup.cache_clear()
    assert bfloat16_speedup() == 7.5
    file.write_text("half a fi")  # what cannot be read is measured again
    bfloat16_speedup.cache_clear()
    assert 0.01 < bfloat16_speedup() < 100
    bfloat16_speedup.cache_clear()


def test_the_speedup_agrees_with_a_longer_measurement():
    """The choice must not be a matter of chance: a larger product, measured apart, prefers the same precision."""
    import time

    pairs = {
        kind: (torch.randn(2048, 768).to(kind), torch.randn(768, 768).to(kind))
        for kind in (torch.float32, torch.bfloat16)
    }
    seconds = dict.fromkeys(pairs, float("inf"))
    for _ in range(15):
        for kind, (x, weight) in pairs.items():
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[kind] = min(seconds[kind], time.perf_counter() - started)
    longer = seconds[torch.float32] / seconds[torch.bfloat16]
    if not 0.8 < longer < 1.5:  # near 1 either choice is right
        assert (bfloat16_speedup() >= 1.15) == (longer >= 1.15)


def test_an_emulated_precision_is_granted_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset())
    with caplog.at_level(logging.WARNING):
        assert choose_precision("bfloat16", "cpu") == "bfloat16"
    assert "emulated" in caplog.text
