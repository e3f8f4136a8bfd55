"""The driver's side of training: a Ray Train job that leaves a `model` artifact, whatever dies on the way.

Notable: Ray Train replaces workers that die and starts them from the last checkpoint; a driver that dies is started
again with the same command, and the run goes on from there as well. What is handed on is a plain checkpoint folder.

| in the artifact | what |
| --- | --- |
| model/ | the trained weights and tokenizer; sentence-transformers opens it |
| metrics.jsonl, curves.png, tensorboard/ | what was logged, drawn, and for TensorBoard |
| state/ | optimiser and weights of the last step, where asked for: what a later run starts from |

    model = train_model(method, TrainConfig(), examples, Path("runs/a/train"), dev=dev_examples)
    method.trained(str(model.path / "model"))
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Component
from raydr.data.examples import ExampleSet
from raydr.errors import RaydrError
from raydr.progress import followed
from raydr.train.config import TrainConfig
from raydr.train.loop import BEST, LAST, METRICS, REFUSED, Job, train_worker

KIND = "model"
MODEL = "model"
STATE = "state"
_RUN = ".ray_train"
_PLACES = frozenset({"worker_cpus", "max_failures", "log_every"})
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
    `config.max_steps` in all. Every node must see the same paths. Raises `RaydrError` when training ends with an error.
    """
    inputs = {"examples": examples.artifact, **({"dev": dev.artifact} if dev is not None else {})}
    settings = {
        "method": method.model_dump(mode="json"),
        "train": config.model_dump(mode="json", exclude=set(_PLACES)),
        "start": str(start) if start is not None else None,
        "keep_state": keep_state,
    }
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"train: {out} has this model already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
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
        with followed("train", lambda: _steps_done(folder / METRICS), total=config.max_steps, unit="step"):
            checkpoint = _fit(job, folder / _RUN)
        chosen = BEST if config.keep == "best" and (folder / BEST).is_dir() else LAST
        (folder / chosen).replace(folder / MODEL)
        shutil.rmtree(folder / (BEST if chosen == LAST else LAST), ignore_errors=True)
        if keep_state:
            shutil.rmtree(folder / STATE, ignore_errors=True)
            shutil.copytree(checkpoint, folder / STATE)
        records = read_metrics(folder / METRICS)
        _draw(records, folder / "curves.png")
        writer.details.update(
            _summary(records, config),
            method=method.model_dump(mode="json"),
            seconds=round(time.perf_counter() - started, 1),
        )
    shutil.rmtree(out / _RUN, ignore_errors=True)
    return open_artifact(out, kind=KIND)


def _fit(job: Job, storage: Path) -> Path:
    """Runs the job on Ray Train; the folder of its last checkpoint."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    api: Any = ray.train  # whose names are annotated as those of two generations of Ray Train
    config = job.train
    (job.out / REFUSED).unlink(missing_ok=True)
    resources = {
        "CPU": config.worker_cpus,
        **({"GPU": config.worker_gpus} if config.worker_gpus else {}),
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job.model_dump(mode="json"),
        torch_config=TorchConfig(backend="nccl" if config.worker_gpus else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.worker_gpus > 0, resources_per_worker=resources
        ),
        # The same name in the same storage is how Ray Train knows a run that was interrupted.
        run_config=api.RunConfig(
            name=f"train-{job.out.name}",
            storage_path=str(storage),
            failure_config=api.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=api.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        refused = job.out / REFUSED
        cause = refused.read_text(encoding="utf-8") if refused.is_file() else _cause(error)
        raise RaydrError(f"training failed: {cause}") from error
    if result.checkpoint is None:
        raise RaydrError(f"training ended without a checkpoint; Ray Train's log in {storage} says more")
    return Path(result.checkpoint.path)


def _cause(error: BaseException) -> str:
    """The last line of what a worker raised: the rest is Ray's and the worker's trace, which stay in the log."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl; a line that is being written is left out."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _steps_done(file: Path) -> int:
    """By the log that worker 0 writes; a run that is resumed drops the lines it makes again."""
    return max((int(record["step"]) for record in read_metrics(file)), default=0)


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
