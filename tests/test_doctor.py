"""The doctor on this machine, and on machines made ill on purpose."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from raydr import doctor
from raydr.doctor import Check, as_json, as_table, run_doctor


def named(checks, name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def test_this_machine_is_ready():
    checks = run_doctor()
    assert not [check for check in checks if check.status == "fail"], as_table(checks)
    assert {"python", "packages", "torch", "faiss", "default model", "processor", "port 8000"} <= {
        c.name for c in checks
    }
    assert all(bool(check.way_out) == (check.status != "ok") for check in checks)


def test_it_imports_nothing_that_takes_long():
    code = (
        "import sys; from raydr.doctor import run_doctor; run_doctor(); "
        "print([m for m in ('ray', 'vllm', 'deepspeed', 'transformers', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_of_the_wrong_version_or_none_is_named():
    assert doctor._fault(Requirement("numpy>=2")) == ""
    assert "needed is <1" in doctor._fault(Requirement("numpy<1"))
    assert doctor._fault(Requirement("no-such-package-anywhere>=1")) == "no-such-package-anywhere is missing"


def test_the_torchvision_trap_is_seen(monkeypatch: pytest.MonkeyPatch):
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    (check,) = doctor._torchvision()
    assert check.status == "fail"
    assert check.way_out.startswith("pip uninstall -y torchvision ")
    monkeypatch.setattr(doctor, "_version", {**versions, "torchvision": "0.28.0+cpu"}.get)
    (check,) = doctor._torchvision()
    assert check.status == "ok"


def test_a_taken_port_is_seen(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(doctor, "_PORTS", {port: "a test"})
        (check,) = doctor._ports()
    assert check.status == "warn"
    assert "taken" in check.detail
    (check,) = doctor._ports()
    assert check.status == "ok"


@pytest.mark.parametrize(
    ("script", "status"),
    [("echo 'NVIDIA H200, 143771 MiB, 580.1'", "warn"), ("echo 'no devices were found'; exit 9", "warn")],
)
def test_a_gpu_that_torch_cannot_use_is_a_warning(script, status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13.0+cpu"}.get)
    (check,) = doctor._gpu()
    assert check.status == status
    assert check.way_out


def test_a_check_that_breaks_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes `import faiss` fail
    check = named(run_doctor(), "faiss")
    assert check.status == "fail"
    assert "faiss" in check.detail


def test_the_table_and_the_json_say_the_same():
    checks = [Check("a", "ok", "fine"), Check("long name", "fail", "broken", "mend it")]
    assert as_table(checks).splitlines() == [
        "ok    a          fine",
        "fail  long name  broken",
        "                 -> mend it",
        "",
        "not ready: 1 failed, 0 warned, 2 checks",
    ]
    assert json.loads(as_json(checks))[1] == {
        "name": "long name", "status": "fail", "detail": "broken", "way_out": "mend it",
    }  # fmt: skip


@pytest.mark.ray
def test_ray_is_started_when_asked():
    code = "from raydr.doctor import as_json, run_doctor; print(as_json(run_doctor(with_ray=True)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    checks = [Check(**record) for record in json.loads(done.stdout)]
    assert named(checks, "ray").status == "ok"
    assert "ran a task" in named(checks, "ray").detail
