"""What a training worker does: build, resume, step, report. Ray Train runs it on every worker, and again after a loss.

Notable: everything that a step depends on is a function of the config and the step's number (batches, negatives,
learning rate) or is in the checkpoint (weights, optimiser, random states), so a run that was killed goes on as if
nothing had happened: its curve is that of the uninterrupted run. A loss that is not a number stops the run and leaves
the batch that did it. What is logged goes to metrics.jsonl and TensorBoard, and to whoever listens to Ray Train.

    TorchTrainer(train_worker, train_loop_config=Job(...).model_dump(mode="json"), ...)
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydr import series
from raydr.artifacts import bring
from raydr.config import Component, Config
from raydr.data.examples import ExampleSet
from raydr.errors import RaydrError
from raydr.manifest import sync_files
from raydr.storage import Location, latest, publish
from raydr.train.config import TrainConfig
from raydr.train.metrics import METRICS, append, drop_after

BEST = "best"
LAST = "last"
REFUSED = ".refused"
"""Why a worker gave up for good: what is wrong with the config or the data is no better on a second try."""
_WIDTHS_IN_BFLOAT16 = 8
"""Texts of a batch are padded to a multiple of it: on a CPU every new width leaves memory behind in bfloat16, gigabytes
after a few hundred batches of all widths, and a GPU's tensor cores work in eights."""
_COLLECTED_EVERY_S = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
"""Ray Train's setting of how often it collects reports, one from each worker; a worker that has another one waits."""


class Job(Config):
    """What a worker is told."""

    method: Component
    """The method whose model is trained."""
    train: TrainConfig
    examples: Location
    """Artifact of training examples."""
    dev: Location | None = None
    """Artifact of dev examples."""
    out: Location
    """Folder that all workers share, or its bucket: the log, the batch of a failed step."""
    start: Location | None = None
    """A checkpoint to go on from, with its optimiser and its count of steps: a run that is one part of many."""


def train_worker(settings: dict[str, Any]) -> None:
    """The loop of one worker, under Ray Train."""
    import ray.train

    job = Job.model_validate(settings)
    if latest(job.out / REFUSED).is_file():
        raise RaydrError((job.out / REFUSED).read_text(encoding="utf-8"))
    context = ray.train.get_context()
    checkpoint = ray.train.get_checkpoint()
    try:
        training = _Training(job, context.get_world_rank(), context.get_world_size())
        if checkpoint is None:
            training.run(bring(job.start) if job.start is not None else None)
            return
        with checkpoint.as_directory() as folder:
            training.run(Path(folder))
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        job.out.mkdir(parents=True, exist_ok=True)
        (job.out / REFUSED).write_text(str(reason), encoding="utf-8")
        publish(job.out / REFUSED)
        raise reason from None


def _refusal(error: BaseException | None) -> RaydrError | None:
    """The error of raydr's own behind what was raised, which Ray wraps where it comes from another process."""
    while error is not None:
        error = getattr(error, "cause", None) or error  # of a RayTaskError, which may pass for its cause
        if isinstance(error, RaydrError):
            return error
        error = error.__cause__
    return None


class _Training:
    """The state of one worker."""

    def __init__(self, job: Job, worker_rank: int, num_workers: int) -> None:
        import torch

        from raydr.train.dropout import set_dropout
        from raydr.train.engine import Engine
        from raydr.train.lora import with_adapters

        self.job, self.config = job, job.train
        self.worker_rank, self.num_workers = worker_rank, num_workers
        if not self.config.worker_gpus:
            torch.set_num_threads(max(1, int(self.config.worker_cpus)))
        torch.manual_seed(self.config.seed)  # the same new weights everywhere
        method: Any = job.method.build()  # a `Learner`
        self.tokenizer = method.tokenizer()
        self.objective = method.build_objective()
        self.examples = ExampleSet.open(job.examples)
        self.dev = ExampleSet.open(job.dev) if job.dev is not None and method.is_measured_on_dev else None
        self.sampler = method.build_batches(self.examples, batch_size=self.config.batch_size, seed=self.config.seed)
        model = method.build_model()
        if self.config.dropout is not None:
            set_dropout(model, self.config.dropout)
        if self.config.lora is not None:
            model = with_adapters(model, self.config.lora)
        self.method = method
        self.engine = Engine(model, self.config, is_gpu=self.config.worker_gpus > 0)
        torch.manual_seed(self.config.seed + 1 + worker_rank)  # different dropout everywhere
        self.step = 0
        self.best: float | None = None
        self.without_gain = 0
        self.reported_at = time.perf_counter()
        self.report_every_s = 2.5 * float(os.environ.get(_COLLECTED_EVERY_S, "2"))

    def run(self, start: Path | None) -> None:
        from raydr.train.batches import stream

        if start is not None:
            self._load(start)
        if start == self.job.start:  # not a part of this run: its evaluations say nothing about what this one gains
            self.best, self.without_gain = None, 0
        if not self.worker_rank:
            from tensorboardX import SummaryWriter

            self.job.out.mkdir(parents=True, exist_ok=True)  # which it is not on another machine than the driver's
            drop_after(latest(self.job.out / METRICS), self.step)
            self.tensorboard = SummaryWriter(str(self.job.out / "tensorboard"), purge_step=self.step + 1)
        batches = stream(
            self.sampler,
            self.tokenizer,
            self.examples,
            first=self.step * self.config.accumulation_steps,
            last=self.config.max_steps * self.config.accumulation_steps,
            worker_rank=self.worker_rank,
            num_workers=self.num_workers,
            multiple_of=_WIDTHS_IN_BFLOAT16 if self.config.precision == "bfloat16" else 1,
        )
        self.engine.train()
        started, tokens, seen = time.perf_counter(), 0, 0
        while self.step < self.config.max_steps and not self._is_out_of_patience():
            metrics = self._one_step(batches)
            self.step += 1
            if not self.worker_rank:
                series.count("raydr_train_steps_total")
                series.set_to("raydr_train_loss", metrics["loss"])
            tokens, seen = tokens + int(metrics.pop("tokens")), seen + 1
            since_report_s = metrics.pop("since_report_s")
            measured = self._evaluate() if self._is_time(self.config.evaluate_every) else {}
            is_logged = self._is_time(self.config.log_every)
            if is_logged:
                seconds = time.perf_counter() - started
                self._log({**metrics, "steps_per_s": seen / seconds, "tokens_per_s": tokens / seconds})
                started, tokens, seen = time.perf_counter(), 0, 0
            if self._is_time(self.config.checkpoint_every) or self._is_out_of_patience():
                with series.timed("raydr_train_seconds_total", phase="checkpoint"):
                    self._checkpoint({**metrics, **measured})
            elif measured or (is_logged and since_report_s >= self.report_every_s):  # else it would wait
                self._report({**metrics, **measured})

    def _is_time(self, every: int) -> bool:
        """Whether what is done every so many steps (0: never) is due; after the last step everything is."""
        return self.step == self.config.max_steps or (every > 0 and self.step % every == 0)

    def _one_step(self, batches: Any) -> dict[str, float]:
        from raydr.train.distributed import mean_over_workers

        weight = 1 / self.config.accumulation_steps
        # The mean of what the workers' clocks say, because all of them must report or none.
        totals: dict[str, float] = {"since_report_s": time.perf_counter() - self.reported_at}
        done: list[tuple[Any, float]] = []
        for _ in range(self.config.accumulation_steps):
            with series.timed("raydr_train_seconds_total", phase="data"):
                batch = next(batches)
            with series.timed("raydr_train_seconds_total", phase="step"):
                output = self._backward(batch, weight)
            series.count("raydr_train_examples_total", len(batch.names))
            done.append((batch, float(output.loss)))
            figures = {"loss": done[-1][1], "tokens": _num_tokens(batch), **output.metrics}
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + float(value) * (1 if name == "tokens" else weight)
        series.count("raydr_train_tokens_total", totals["tokens"])
        means = mean_over_workers(totals)
        means["tokens"] *= self.num_workers
        if not math.isfinite(means["loss"]):  # the mean over workers, so that all of them see it and stop together
            self._stop_at_nan("loss", done)
        means["learning_rate"] = self.config.learning_rate_at(self.step)
        with series.timed("raydr_train_seconds_total", phase="step"):
            norm = self.engine.step(means["learning_rate"])
        if norm is not None and not math.isfinite(norm):  # of all workers' gradients
            self._stop_at_nan("gradient", done)
        return means if norm is None else {**means, "gradient_norm": norm}

    def _backward(self, batch: Any, weight: float) -> Any:
        from raydr.train import grad_cache
        from raydr.train.objective import EmbeddingObjective

        if isinstance(self.objective, EmbeddingObjective):
            return grad_cache.backward(
                self.engine, self.objective, batch, chunk_tokens=self.config.chunk_tokens, weight=weight
            )
        output = self.objective(self.engine, batch.to(self.engine.device))
        self.engine.backward(output.loss * weight)
        return output

    def _stop_at_nan(self, what: str, done: list[tuple[Any, float]]) -> None:
        """Saves the first of the step's batches that gave such a loss, on whatever worker: each saves its own share.
        Where all losses are numbers and the gradient is not, it is the last of them.
        """
        from raydr.train.distributed import most_of_all_workers
        from raydr.train.dump import save_batch

        own = next((number for number, (_, loss) in enumerate(done) if not math.isfinite(loss)), len(done))
        number = min(-most_of_all_workers(-own, self.engine.device), len(done) - 1)
        name = f"nan-step-{self.step}-worker-{{}}.safetensors"
        save_batch(done[number][0], self.job.out / name.format(self.worker_rank))
        raise RaydrError(
            f"the {what} of step {self.step} is not a number; the batch that did it (number {number + 1} of the step's "
            f"{len(done)}) is in {self.job.out / name.format('*')}: each worker's share, with the ids of its queries. "
            "Usual causes: a learning rate that is too high, no clipping, bfloat16 with a very low temperature"
        )

    def _evaluate(self) -> dict[str, float]:
        """The dev measures by the names they are logged under; keeps the weights if they are the best so far."""
        from raydr.train.evaluate import evaluate

        if self.dev is None:
            return {}
        with series.timed("raydr_train_seconds_total", phase="evaluate"):
            found = evaluate(self.engine, self.dev, self.tokenizer)
        measured = {f"dev_{name}": value for name, value in found.items()}
        value = measured[f"dev_{self.config.metric}"]
        self._log(measured)
        if self.best is None or value > self.best:
            self.best, self.without_gain = value, 0
            self._export(BEST)
        else:
            self.without_gain += 1
        return measured

    def _is_out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.without_gain

    def _log(self, metrics: dict[str, float]) -> None:
        """A record of worker 0; the driver shows progress and draws curves from metrics.jsonl."""
        if self.worker_rank:
            return
        append(self.job.out / METRICS, self.step, metrics)
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, self.step)
        self.tensorboard.flush()
        publish(self.job.out / METRICS)

    def _checkpoint(self, metrics: dict[str, float]) -> None:
        """A Ray Train checkpoint: each worker puts its files into the same one."""
        import ray.train

        folder = Path(tempfile.mkdtemp(prefix="raydr-checkpoint-"))
        try:
            self.engine.save(folder, {"step": self.step, "best": self.best, "without_gain": self.without_gain})
            _save_random_state(folder / f"random-{self.worker_rank}.safetensors")
            self._export(LAST)
            self._report(metrics, ray.train.Checkpoint.from_directory(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _report(self, metrics: dict[str, float], checkpoint: Any = None) -> None:
        """Tells Ray Train; a barrier, so all workers make the same calls."""
        import ray.train

        ray.train.report({"step": self.step, **metrics}, checkpoint=checkpoint)
        self.reported_at = time.perf_counter()

    def _load(self, folder: Path) -> None:
        state = self.engine.load(folder)
        self.step, self.best, self.without_gain = state["step"], state["best"], state["without_gain"]
        _load_random_state(folder / f"random-{self.worker_rank}.safetensors")

    def _export(self, name: str) -> None:
        """The weights as a folder that transformers and sentence-transformers open; replaces the one before whole."""
        from raydr.train.lora import with_adapters, without_adapters

        weights = self.engine.weights()
        if weights is None:
            return
        with _random_state_kept():  # building a network draws its first weights
            model = self.method.build_model()
            if self.config.lora is not None:
                model = with_adapters(model, self.config.lora)
        # What is frozen is in the engine only in the precision it computes in.
        named, own = model.named_parameters(remove_duplicate=False), model.state_dict()
        frozen = {name: own[name] for name, weight in named if not weight.requires_grad}
        model.load_state_dict({**weights, **frozen})
        if self.config.lora is not None:
            model = without_adapters(model)
        target, scratch = self.job.out / name, self.job.out / f".{name}.{os.getpid()}"
        for leftover in self.job.out.glob(f".{name}.*"):  # of workers that were killed here
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            self.method.save_model(model, scratch)
            # The driver takes what has this name for whole, also after a power cut.
            sync_files(scratch, [file.relative_to(scratch).as_posix() for file in scratch.rglob("*") if file.is_file()])
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # on a full disk it would take what is left
        publish(target)


def _num_tokens(batch: Any) -> int:
    sides = (batch.queries, batch.passages, batch.pairs)
    return sum(int(side.lengths.sum()) for side in sides if side is not None)


@contextmanager
def _random_state_kept() -> Generator[None]:
    """What is drawn inside the block leaves no trace: training must not depend on when weights are written."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


def _save_random_state(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, file)


def _load_random_state(file: Path) -> None:
    import torch
    from safetensors.torch import load_file

    states = load_file(file)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
