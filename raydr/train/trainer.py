"""The driver's side of training: a Ray Train job that leaves a `model` artifact, whatever dies on the way.

Notable: Ray Train replaces workers that die and starts them from the last checkpoint; a driver that dies is started
again with the same command, and the run goes on from there as well, also from a death after the last step. What is
handed on is a plain checkpoint folder. A setting that the training would silently ignore is refused before it starts.

| in the artifact | what |
| --- | --- |
| model/ | the trained weights and tokenizer; sentence-transformers opens it |
| metrics.jsonl, curves.png, tensorboard/ | what was logged, drawn, and for TensorBoard |
| state/ | optimiser and weights of the last step, where asked for: what a later run starts from |

    model = train_model(method, TrainConfig(), examples, Path("runs/a/train"), dev=dev_examples)
    method.trained(str(model.path / "model"))
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydr import runtime
from raydr.artifacts import (
    Artifact,
    artifact_of,
    artifacts_named_in,
    fingerprint,
    is_finished,
    open_artifact,
    write_artifact,
)
from raydr.config import Component, validate
from raydr.data.examples import ExampleSet
from raydr.errors import LESS_MEMORY, ConfigError, RaydrError, is_out_of_memory
from raydr.progress import followed
from raydr.runtime import PLACEMENT
from raydr.storage import exists, latest, named, reach, remove_file, remove_folder
from raydr.train.config import TrainConfig
from raydr.train.loop import BEST, LAST, REFUSED, Job, train_worker
from raydr.train.metrics import METRICS, read_metrics

KIND = "model"
MODEL = "model"
STATE = "state"
_RUN = ".ray_train"
_ROOM_FOR_A_CHECKPOINT = 1 << 30
"""Bytes; with less left after a training has failed, the disk is a likely cause."""
_PLACES = PLACEMENT | {"worker_cpus", "max_failures", "log_every"}
"""Settings that do not change what is learned."""


def train_model(
    method: Component,
    config: TrainConfig,
    examples: ExampleSet,
    out: Path,
    *,
    dev: ExampleSet | None = None,
    start: Path | None = None,
    keep_state: bool = False,
) -> Artifact:
    """Trains `method` on `examples`; a finished artifact of the same is returned as it is.

    `start` is the `state` folder of an earlier artifact: weights, optimiser and count of steps go on from there, up to
    `config.max_steps` in all. Every node must see the same paths, or they are a bucket's. Raises `ConfigError` for a
    setting that means nothing to this method or without dev examples, and `RaydrError` when training ends with an
    error.
    """
    config = validate(TrainConfig, config.model_dump(), where="train")  # which a method may have changed a part of
    settings = {
        "method": method.model_dump(mode="json"),
        "train": config.model_dump(mode="json", exclude=set(_PLACES)),
        "start": str(start) if start is not None else None,
        "keep_state": keep_state,
    }
    inputs = {"examples": examples.artifact, **artifacts_named_in(settings)}
    if dev is not None:
        inputs["dev"] = dev.artifact
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"train: {named(out)} has this model already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
    _check(method, config, has_dev=dev is not None)
    with write_artifact(out, kind=KIND, config=settings, inputs=inputs, resume=True) as writer:
        started = time.perf_counter()
        folder = out.resolve()
        job = Job(
            method=method,
            train=config,
            examples=examples.artifact.path.resolve(),
            dev=dev.artifact.path.resolve() if dev is not None else None,
            out=folder,
            start=start.resolve() if start is not None else None,
        )
        if not (folder / MODEL).is_dir():  # renamed last, so one that is there says that Ray Train has done its work
            first = _steps_before(start)
            with followed("train", lambda: max(first, _steps_done(folder)), total=config.max_steps, unit="step"):
                checkpoint = _fit(job, folder / _RUN)
            if keep_state:
                shutil.rmtree(folder / STATE, ignore_errors=True)
                checkpoint.to_directory(str(folder / STATE))
            has_best = config.keep == "best" and exists(folder / BEST)
            latest(folder / (BEST if has_best else LAST)).replace(folder / MODEL)
        records = read_metrics(latest(folder / METRICS))
        _draw(records, folder / "curves.png")
        writer.details.update(
            _summary(records, config),
            method=method.model_dump(mode="json"),
            seconds=round(time.perf_counter() - started, 1),
        )
        for name in (BEST, LAST, _RUN):
            remove_folder(folder / name)
    return open_artifact(out, kind=KIND)


def settings_for(method: Component, config: TrainConfig) -> TrainConfig:
    """`config` without what the training of `method` would ignore: for one training of several under the same config,
    where what is meant for the retriever must not stop its ranker. Says what it leaves out.
    """
    ignored = _ignored(method, config)
    for name, reason in ignored.items():
        print(f"train: {name} left out: {reason}", file=sys.stderr)
    changes: dict[str, Any] = {"chunk_tokens": None} if "chunk_tokens" in ignored else {}
    if "evaluate_every" in ignored:
        changes |= {"evaluate_every": 0, "patience": 0}
    return config.model_copy(update=changes)


def _check(method: Component, config: TrainConfig, *, has_dev: bool) -> None:
    for name, reason in _ignored(method, config).items():
        raise ConfigError(f"train.{name}: {reason}")
    if config.evaluate_every and not has_dev:
        raise ConfigError(
            "train.evaluate_every: there are no dev examples; name their split in mine.dev_split, or leave "
            "evaluate_every and patience out"
        )


def _ignored(method: Component, config: TrainConfig) -> dict[str, str]:
    """Settings that mean nothing to this method -> why, and the way out."""
    built: Any = method.build()
    found = {}
    if config.evaluate_every and not built.is_measured_on_dev:
        found["evaluate_every"] = f"{type(built).__name__} is not measured on dev examples; leave it and patience out"
    if config.chunk_tokens is not None:
        from raydr.train.objective import EmbeddingObjective

        if not isinstance(built.build_objective(), EmbeddingObjective):
            found["chunk_tokens"] = (
                f"the loss of {type(built).__name__} is not one over an embedding of each text, which gradient caching "
                "needs; leave it out, and save memory with a smaller batch_size and accumulation_steps, or with "
                "activation_checkpointing"
            )
    return found


def _fit(job: Job, storage: Path) -> Any:
    """Runs the job on Ray Train; its last checkpoint, as Ray Train has it."""
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from raydr.train.process_group import torch_config

    _find_room(job.train)
    api: Any = ray.train  # whose names are annotated as those of two generations of Ray Train
    config = job.train
    remove_file(job.out / REFUSED)
    filesystem, (kept_at,) = reach([storage])
    resources = {
        "CPU": config.worker_cpus,
        **({"GPU": config.worker_gpus} if config.worker_gpus else {}),
        **config.resources,
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job.model_dump(mode="json"),
        torch_config=torch_config(is_gpu=config.worker_gpus > 0),
        scaling_config=api.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.worker_gpus > 0,
            resources_per_worker=resources,
            label_selector=config.labels or None,
        ),
        # The same name in the same storage is how Ray Train knows a run that was interrupted; the dashboard has it too.
        run_config=api.RunConfig(
            name=f"{job.out.parent.name}-{job.out.name}",
            storage_path=kept_at,
            storage_filesystem=filesystem,
            failure_config=api.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=api.CheckpointConfig(num_to_keep=1),
            worker_runtime_env={} if config.worker_gpus else {"env_vars": _memory(config.precision)},
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        refused = latest(job.out / REFUSED)
        cause = refused.read_text(encoding="utf-8") if refused.is_file() else _cause(error)
        if is_out_of_memory(error):
            cause = LESS_MEMORY
        raise RaydrError(f"training failed: {cause}{_if_the_disk_is_full(storage, cause)}") from error
    if result.checkpoint is None:
        raise RaydrError(f"training ended without a checkpoint; Ray Train's log in {storage} says more")
    return result.checkpoint


def _find_room(config: TrainConfig) -> None:
    """Raises `ConfigError` where the workers do not fit a cluster that nobody will enlarge, the one started here; says
    what is waited for on another one.
    """
    runtime.connect()
    nodes = config.nodes()
    room = sum(_fitting(node, config) for node in nodes)
    if room >= config.num_workers:
        return
    asked = f"{config.num_workers} x {config.worker_cpus:g} CPUs"
    asked += f" and {config.worker_gpus:g} GPUs" if config.worker_gpus else ""
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    has = f"{cpus:g} CPUs and {gpus:g} GPUs, room for {room} workers"
    if runtime.owns_cluster():
        raise ConfigError(
            f"train.num_workers, train.worker_cpus, train.worker_gpus: training asks for {asked}, and this machine has "
            f"{has}; set them lower, or submit the job to a larger cluster"
        )
    print(f"train: waiting for {asked}; the cluster has {has}", file=sys.stderr)


def _fitting(node: Mapping[str, float], config: TrainConfig) -> int:
    """Training workers that a node has the resources for."""
    room = node.get("CPU", 0) // config.worker_cpus
    return int(min(room, node.get("GPU", 0) // config.worker_gpus) if config.worker_gpus else room)


def _cause(error: BaseException) -> str:
    """The last line of what a worker raised: the rest is Ray's and the worker's trace, which stay in the log."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _if_the_disk_is_full(storage: Path, cause: str) -> str:
    """What to do about it: PyTorch, DeepSpeed and safetensors each call a full disk something else, or nothing.

    A checkpoint is put together in the folder for temporary files of a worker's node, then kept in `storage`.
    """
    disks = (storage.parent, Path(tempfile.gettempdir()))
    left = {disk: shutil.disk_usage(disk).free for disk in disks}
    short = [f"the disk of {disk} has {free >> 20:,} MB left" for disk, free in left.items()
             if free < _ROOM_FOR_A_CHECKPOINT]  # fmt: skip
    if not short and os.strerror(errno.ENOSPC) in cause:
        short = [f"the disk of {disks[0]}, or of {disks[1]} on a worker's node, has no room for a checkpoint"]
    if not short:
        return ""
    return f"\n{'; '.join(short)}: free some, and give the command again, which goes on from the last checkpoint"


def _steps_before(start: Path | None) -> int:
    """Steps that the artifact to go on from has done."""
    earlier = artifact_of(start) if start is not None else None
    return int(earlier.manifest.details["steps"]) if earlier is not None else 0


def _steps_done(folder: Path) -> int:
    """By the log that worker 0 writes; a run that is resumed drops the lines it makes again."""
    return max((int(record["step"]) for record in read_metrics(latest(folder / METRICS))), default=0)


def _summary(records: list[dict[str, float]], config: TrainConfig) -> dict[str, Any]:
    losses = [record["loss"] for record in records if "loss" in record]
    dev = [record for record in records if f"dev_{config.metric}" in record]
    best = max(dev, key=lambda record: record[f"dev_{config.metric}"], default=None)
    rates = [record["steps_per_s"] for record in records if "steps_per_s" in record]
    return {
        "steps": max((int(record["step"]) for record in records), default=0),
        "loss": losses[-1] if losses else None,
        "best": best,
        "steps_per_s": sorted(rates)[len(rates) // 2] if rates else None,
    }


def _draw(records: list[dict[str, float]], file: Path) -> None:
    """Loss, learning rate and dev measures over the steps."""
    from matplotlib.figure import Figure

    dev_names = sorted({name for record in records for name in record if name.startswith("dev_")})
    panels = [["loss"], ["learning_rate"], *([dev_names] if dev_names else [])]
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            axes.plot(*zip(*points, strict=True), label=name.removeprefix("dev_"), linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_title("dev" if names == dev_names else names[0].replace("_", " "), fontsize=10)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def _memory(precision: str) -> dict[str, str]:
    """The environment of a worker on a CPU, which keeps freed memory: every step allocates what the one before has
    freed, and where that goes back to the system in between, its pages have to be made anew.

    The jemalloc in Ray's wheel for Linux does that, and is made not to fall to pieces as the lengths of batches change.
    Large blocks it would give back at once, but for `oversize_threshold` (W9 in benchmarks/results.md has both).
    In bfloat16 oneDNN makes a kernel, with memory of its own, for each shape that it meets, and keeps a thousand of
    them, so memory would grow with every new length. There it keeps few, and memory goes back after ten seconds.
    """
    import ray

    library, kept_ms, found = Path(ray.__file__).parent / "core/libjemalloc.so", -1, dict[str, str]()
    if precision == "bfloat16":
        kept_ms, found = 10_000, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    if library.is_file():
        settings = f"thp:always,oversize_threshold:0,dirty_decay_ms:{kept_ms},muzzy_decay_ms:{kept_ms}"
        found |= {"LD_PRELOAD": str(library), "MALLOC_CONF": settings}
    return found
