"""Training on Ray Train with DeepSpeed: it learns, it leaves a checkpoint others open, it survives a dead worker."""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from raydr import progress
from raydr.artifacts import write_artifact
from raydr.config import Component
from raydr.data.examples import Example, ExampleSet, write_examples
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ConfigError, RaydrError
from raydr.train import trainer
from raydr.train.config import TrainConfig
from raydr.train.trainer import _find_room, read_metrics, train_model
from raydr.types import Passage, Query
from tests.train import tiny
from tests.train.tiny import losses

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = {**tiny.SETTINGS, "chunk_tokens": 200}


class Killed(BaseException):
    pass


def die(*_args, **_kwargs):
    raise Killed


@pytest.fixture(scope="module")
def interrupted(ray_cluster, method, examples, dev, tmp_path_factory):
    """The folder of a run whose driver died when only the curves were left to draw."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.02")  # so that steps of tiny networks are all reported
        patch.setattr(trainer, "_draw", die)
        with pytest.raises(Killed):
            train_model(method, TrainConfig(**SETTINGS, evaluate_every=6), examples, out, dev=dev)
    return out


@pytest.fixture(scope="module")
def reports(interrupted):
    """What Ray Train says that it was told."""
    (file,) = (interrupted / ".ray_train").glob("*/checkpoint_manager_snapshot.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def trained(interrupted, reports, method, examples, dev):
    """The same started again. No worker was interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_fit", die)  # there is nothing left for Ray Train to do
        return train_model(method, TrainConfig(**SETTINGS, evaluate_every=6), examples, interrupted, dev=dev)


def test_ray_train_is_told_of_steps_evaluations_and_checkpoints(reports):
    """Checkpoints are of steps 4, 8 and 12, evaluations of 6 and 12; all others have only a line in the log."""
    assert reports["current_report_index"] > len({4, 6, 8, 12})
    last = reports["latest_checkpoint_result"]["metrics"]
    assert last["step"] == 12
    assert {"loss", "learning_rate", "gradient_norm", "dev_nDCG@10", "dev_RR@10", "dev_R@100"} <= last.keys()


def test_it_learns_and_says_what_it_did(trained):
    found = losses(trained.path)
    assert sorted(found) == list(range(1, 13))
    assert np.mean([found[step] for step in (10, 11, 12)]) < 0.8 * np.mean([found[step] for step in (1, 2, 3)])
    measured = [r for r in read_metrics(trained.path / "metrics.jsonl") if "dev_nDCG@10" in r]
    assert [int(r["step"]) for r in measured] == [6, 12]
    assert trained.manifest.details["steps"] == 12
    assert (trained.path / "curves.png").stat().st_size > 5000
    assert list((trained.path / "tensorboard").iterdir())
    assert not any((trained.path / name).exists() for name in (".ray_train", "best", "last"))
    trained.verify()


def test_what_it_leaves_opens_in_sentence_transformers(trained, method):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = trained.path / "model"
    mine = EncoderFactory(Component(import_path=method.import_path, args={**method.args, "model": str(folder)}))()
    before = EncoderFactory(method)()
    texts = ["ocean wave tide", "flour yeast dough oven"]
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
    ours = mine.encode_passages([Passage("", text) for text in texts])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert mine.version != before.version
    assert np.abs(ours - before.encode_queries([Query("", text) for text in texts])).max() > 0.01


def test_a_finished_run_is_not_made_again(trained, method, examples, dev, capsys):
    again = train_model(method, TrainConfig(**SETTINGS, evaluate_every=6), examples, trained.path, dev=dev)
    assert again.fingerprint == trained.fingerprint
    assert "has this model already" in capsys.readouterr().err


def test_a_killed_worker_is_replaced_and_nothing_changes(trained, method, examples, dev, tmp_path):
    """Kills one worker's process after the first checkpoint; the curve is that of the uninterrupted run."""
    out = tmp_path / "killed"
    killed: list[psutil.Process] = []
    libraries: set[str] = set()

    def kill_a_worker() -> None:
        while not any(step >= 5 for step in losses(out)):
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):  # other trainings on this machine are not ours
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    libraries.update(Path(mapped.path).name for mapped in process.memory_maps())
                    process.kill()
                    killed.append(process)
                    return

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    train_model(method, TrainConfig(**SETTINGS, evaluate_every=6), examples, out, dev=dev)
    assert killed
    assert "libjemalloc.so" in libraries  # the allocator that keeps freed memory
    assert len([record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]) == 12  # no step twice
    found, expected = losses(out), losses(trained.path)
    assert sorted(found) == sorted(expected)
    assert [found[step] for step in sorted(found)] == pytest.approx([expected[s] for s in sorted(expected)], abs=1e-6)
    from safetensors.numpy import load_file

    mine, theirs = (load_file(folder / "model/model.safetensors") for folder in (out, trained.path))
    assert all(np.allclose(mine[name], theirs[name], atol=1e-6) for name in theirs)


def test_a_run_in_two_parts_is_the_run_in_one(trained, method, examples, tmp_path, monkeypatch):
    """Optimiser, schedule and batches go on where the first part stopped; whose driver dies before it has a model."""
    settings = {**SETTINGS, "schedule_steps": 12, "keep": "last"}
    first_half = TrainConfig(**{**settings, "max_steps": 6})
    with monkeypatch.context() as patch:
        patch.setattr("ray.train.Checkpoint.to_directory", die)
        with pytest.raises(Killed):
            train_model(method, first_half, examples, tmp_path / "first", keep_state=True)
    first = train_model(method, first_half, examples, tmp_path / "first", keep_state=True)
    done_before = []

    def followed(name, done, **how):
        done_before.append(done())
        return progress.followed(name, done, **how)

    monkeypatch.setattr(trainer, "followed", followed)
    second = train_model(method, TrainConfig(**settings), examples, tmp_path / "second", start=first.path / "state")
    assert done_before == [6]
    purged = [event.session_log.status for event in _events(second.path) if event.HasField("session_log")]
    assert purged  # TensorBoard is told where the part begins: what a killed one had drawn behind that is no more
    found = {**losses(first.path), **losses(second.path)}
    expected = losses(trained.path)
    assert [found[step] for step in sorted(found)] == pytest.approx([expected[s] for s in sorted(expected)], abs=1e-6)


def _events(folder: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_workers_that_do_not_fit_are_refused_or_said_to_be_waited_for(method, examples, tmp_path, monkeypatch, capsys):
    import ray

    config = TrainConfig(num_workers=2, batch_size=8, worker_cpus=1000)
    monkeypatch.setattr("raydr.runtime.owns_cluster", lambda: True)
    with pytest.raises(ConfigError, match=r"training asks for 2 x 1000 CPUs, and this machine has .* set them lower"):
        train_model(method, config, examples, tmp_path / "out")
    monkeypatch.setattr("raydr.runtime.owns_cluster", lambda: False)
    cpus = ray.cluster_resources()["CPU"]
    _find_room(TrainConfig(num_workers=1, worker_cpus=cpus))
    assert not capsys.readouterr().err
    _find_room(config)
    assert f"train: waiting for 2 x 1000 CPUs; the cluster has {cpus:g} CPUs" in capsys.readouterr().err


def test_workers_that_hold_every_cpu_do_not_starve_what_tokenises_for_them(method, examples, tmp_path):
    config = TrainConfig(**{**SETTINGS, "worker_cpus": 1.0, "max_steps": 2})
    assert train_model(method, config, examples, tmp_path / "all").manifest.details["steps"] == 2


def test_a_loss_that_is_no_number_stops_and_leaves_the_batch(method, examples, tmp_path):
    """The first of the two batches of a step is the only one with the word that the network has no number for."""
    from safetensors import safe_open

    asked = tmp_path / "examples"
    built = method.build()
    groups = next(iter(built.build_batches(examples, batch_size=8, seed=SETTINGS["seed"])))
    _ask(examples, groups[0].query, "zebra", asked)
    config = TrainConfig(**{**SETTINGS, "max_failures": 0, "accumulation_steps": 2})
    component = Component(
        import_path=method.import_path, args={**method.args, "model": str(_without_a_number("zebra", built, tmp_path))}
    )
    with pytest.raises(RaydrError, match=r"step 0 is not a number; .* \(number 1 of the step's 2\)"):
        train_model(component, config, ExampleSet.open(asked), tmp_path / "nan")
    saved = []
    for file in sorted((tmp_path / "nan").glob("nan-step-0-worker-*.safetensors")):
        with safe_open(file, "pt") as batch:
            assert {"queries.ids", "passages.ids", "passage_rows", "positive_rows"} <= set(batch.keys())
            saved += json.loads(batch.metadata()["queries"])
    assert saved == [examples.query(group.query).query_id for group in groups]
    assert not (tmp_path / "nan" / "manifest.json").exists()


def _ask(examples: ExampleSet, row: int, word: str, folder: Path) -> None:
    """The examples with `word` in the query `row`."""
    passages = {passage.passage_id: passage for passage in examples.passages(range(examples.num_passages))}
    ids = list(passages)
    changed = [
        Example(
            Query(query.query_id, f"{query.text} {word}" if number == row else query.text),
            [ids[place] for place in examples.positives(number)],
            [ids[place] for place in examples.negatives(number)],
        )
        for number, query in ((number, examples.query(number)) for number in range(len(examples)))
    ]
    with write_artifact(folder, kind="examples", config={}) as writer:
        writer.counts.update(write_examples(folder, changed, passages))


def _without_a_number(word: str, method, folder: Path) -> Path:
    """The checkpoint of `method` with an embedding of `word` that is not a number."""
    from safetensors.numpy import load_file, save_file

    source, broken = Path(method.config.model), folder / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name][method.build_encoder().tokenize_queries([Query("", word)])[0][1:-1]] = np.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return broken


def test_metrics_are_lines_of_json(trained):
    for line in (trained.path / "metrics.jsonl").read_text().splitlines():
        assert {"step"} <= json.loads(line).keys()
