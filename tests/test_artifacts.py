"""Artifacts under everything that happens to folders: kills, moves, damage, strangers, two writers at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raydr.artifacts import (
    MANIFEST,
    Artifact,
    artifact_of,
    artifacts_named_in,
    fingerprint,
    is_finished,
    open_artifact,
    update_artifact,
    write_artifact,
    write_durably,
)
from raydr.config import Config
from raydr.errors import ArtifactError, RaydrError


class Settings(Config):
    size: int = 1


def make(path: Path, *, config=Settings(), content: bytes = b"x" * 1000, inputs=None, resume=False) -> Artifact:  # noqa: B008
    with write_artifact(path, kind="thing", config=config, inputs=inputs, resume=resume) as writer:
        (writer.path / "data").mkdir(exist_ok=True)
        (writer.path / "data" / "part-0").write_bytes(content)
        writer.counts["rows"] = 3
        writer.details["speed"] = 1.5
    return open_artifact(path, kind="thing")


def test_a_finished_step_says_what_it_did(tmp_path):
    artifact = make(tmp_path / "a")
    manifest = artifact.manifest
    assert (manifest.counts, manifest.details, manifest.config) == ({"rows": 3}, {"speed": 1.5}, {"size": 1})
    assert list(manifest.files) == ["data/part-0"]
    assert manifest.files["data/part-0"].bytes == 1000
    assert artifact.fingerprint == fingerprint("thing", Settings(), {})
    artifact.verify()


def test_scratch_in_hidden_files_is_no_part_of_it(tmp_path):
    with write_artifact(tmp_path / "a", kind="thing", config={}) as writer:
        (writer.path / ".checkpoint").mkdir()
        (writer.path / ".checkpoint" / "block").write_text("scratch")
        (writer.path / "real").write_text("data")
    assert list(open_artifact(tmp_path / "a").manifest.files) == ["real"]


def test_a_moved_folder_still_opens(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    open_artifact(tmp_path / "b", kind="thing").verify()
    assert str(tmp_path) not in (tmp_path / "b" / MANIFEST).read_text()


def test_artifacts_that_move_together_still_find_each_other(tmp_path):
    """Also one that is named in the details, and one that stayed where it was; an update keeps all of it."""
    elsewhere = make(tmp_path / "base", content=b"z")
    first = make(tmp_path / "run/model", config=Settings(size=2))

    def settings(run: Path) -> dict:
        model = {"import_path": "a:B", "args": {"model": str(run / "model/data"), "words": ["minilm", "/no/such"]}}
        return {"method": model, "start": str(elsewhere.path)}

    with write_artifact(tmp_path / "run/index", kind="thing", config=settings(tmp_path / "run")) as writer:
        writer.details["models"] = [str(first.path)]
    made = open_artifact(tmp_path / "run/index")
    assert made.manifest.config == settings(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with update_artifact(tmp_path / "moved/index", kind="thing") as update:
        update.details["more"] = 1
    (tmp_path / "moved").rename(tmp_path / "again")
    moved = open_artifact(tmp_path / "again/index")
    assert moved.manifest.config == settings(tmp_path / "again")
    assert moved.manifest.details == {"models": [str(tmp_path / "again/model")], "more": 1}
    assert is_finished(moved.path, fingerprint("thing", settings(tmp_path / "again"), {}))
    make(tmp_path / "again/model", config=Settings(size=3))
    assert not is_finished(moved.path, fingerprint("thing", settings(tmp_path / "again"), {}))


def test_a_copy_names_the_copy(tmp_path):
    make(tmp_path / "run/model")
    with write_artifact(tmp_path / "run/index", kind="thing", config={"model": str(tmp_path / "run/model")}):
        pass
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert open_artifact(tmp_path / "copy/index").manifest.config == {"model": str(tmp_path / "copy/model")}
    assert open_artifact(tmp_path / "run/index").manifest.config == {"model": str(tmp_path / "run/model")}


def test_a_file_belongs_to_the_artifact_it_lies_in(tmp_path, monkeypatch):
    artifact = make(tmp_path / "run/a")
    for path in (artifact.path, artifact.path / "data", str(artifact.path / "data/part-0")):
        assert artifact_of(path) == artifact
    (tmp_path / "link").symlink_to(artifact.path / "data")
    assert artifact_of(tmp_path / "link/part-0") == artifact
    monkeypatch.chdir(tmp_path)
    assert artifact_of("run/a/data").fingerprint == artifact.fingerprint
    for path in (tmp_path / "run", artifact.path / "no-such-file", "minilm", "x" * 10_000, "a\0b"):
        assert artifact_of(path) is None
    (artifact.path / "data" / MANIFEST).write_text('{"name": "a web page"}')  # of a checkpoint, say
    assert artifact_of(artifact.path / "data/part-0") == artifact


def test_what_a_configuration_names_is_found_at_any_depth(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", config=Settings(size=2))
    parts = {"args": {"models": [{"model": str(second.path / "data")}, "minilm"], "k": 3, "none": None, "text": ""}}
    config = {"method": parts, "start": str(first.path)}
    assert artifacts_named_in(config) == {"method.args.models.0.model": second, "start": first}


def test_the_fingerprint_depends_on_kind_config_and_inputs(tmp_path):
    first = make(tmp_path / "in")
    prints = {
        fingerprint("thing", Settings(), {}),
        fingerprint("other", Settings(), {}),
        fingerprint("thing", Settings(size=2), {}),
        fingerprint("thing", Settings(), {"corpus": first.fingerprint}),
    }
    assert len(prints) == 4
    assert make(tmp_path / "out", inputs={"corpus": first}).fingerprint in prints


def test_is_finished_knows_this_step_from_another(tmp_path):
    path = tmp_path / "a"
    assert not is_finished(path)
    mine = make(path).fingerprint
    assert is_finished(path)
    assert is_finished(path, mine)
    assert not is_finished(path, fingerprint("thing", Settings(size=2), {}))


def test_opening_nothing_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="no artifact here"):
        open_artifact(tmp_path / "nowhere")


def test_opening_the_wrong_kind_says_which(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="holds 'thing', but 'index' is needed"):
        open_artifact(tmp_path / "a", kind="index")


def test_a_truncated_file_is_found_on_opening(tmp_path):
    make(tmp_path / "a")
    os.truncate(tmp_path / "a" / "data" / "part-0", 999)
    with pytest.raises(ArtifactError, match=r"part-0: missing or truncated"):
        open_artifact(tmp_path / "a")


def test_a_missing_file_is_found_on_opening(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a" / "data" / "part-0").unlink()
    with pytest.raises(ArtifactError, match=r"part-0: missing or truncated"):
        open_artifact(tmp_path / "a")


def test_a_flipped_bit_is_found_when_it_is_opened_or_verified(tmp_path):
    make(tmp_path / "a")
    file = tmp_path / "a" / "data" / "part-0"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"part-0: differs from its checksum.*delete the artifact's folder"):
        open_artifact(tmp_path / "a")
    artifact = open_artifact(tmp_path / "a", later=True)  # whoever reads the file compares it
    with pytest.raises(ArtifactError, match=r"part-0: differs from its checksum"):
        artifact.verify()


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"kind": 3}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    make(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json: not a raydr manifest"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(tmp_path, name):
    make(tmp_path / "a")
    (tmp_path / "outside").write_bytes(b"x" * 1000)
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    manifest |= {"files": {name: manifest["files"]["data/part-0"]}, "checksum": ""}
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="leaves the artifact's folder"):
        open_artifact(tmp_path / "a")


def test_a_foreign_folder_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="raydr did not make"), write_artifact(tmp_path, kind="thing", config={}):
        pytest.fail("the step must not start")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "a").mkdir()
    make(tmp_path / "a").verify()
    assert is_finished(tmp_path / "a")


def test_other_settings_replace_a_finished_artifact(tmp_path):
    make(tmp_path / "a", content=b"old")
    with write_artifact(tmp_path / "a", kind="thing", config=Settings(size=2)) as writer:
        assert not (writer.path / MANIFEST).exists()
        assert not (writer.path / "data").exists()
        (writer.path / "new").write_bytes(b"new")
    assert list(open_artifact(tmp_path / "a").manifest.files) == ["new"]


def fail_midway(path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), write_artifact(path, kind="thing", config=Settings()) as writer:
        (writer.path / "half").write_text("half")
        raise ZeroDivisionError


def test_a_step_that_raises_leaves_no_artifact_but_may_be_resumed(tmp_path):
    path = tmp_path / "a"
    fail_midway(path)
    assert not is_finished(path)
    with pytest.raises(ArtifactError, match="did not finish; run it again"):
        open_artifact(path)
    with write_artifact(path, kind="thing", config=Settings(), resume=True) as writer:
        assert (writer.path / "half").read_text() == "half"
    assert list(open_artifact(path).manifest.files) == ["half"]


def test_a_worker_that_ray_ended_for_its_memory_is_told_with_the_way_out(tmp_path):
    from ray.exceptions import OutOfMemoryError, RayTaskError

    error = RayTaskError("map", "Traceback ...", OutOfMemoryError("Task was killed due to the node running low"))
    with (
        pytest.raises(RaydrError, match=r"/a: a node's memory was used up.*embed\.worker_cpus.*same command again"),
        write_artifact(tmp_path / "a", kind="thing", config={}),
    ):
        raise error.as_instanceof_cause()


@pytest.mark.parametrize(("size", "resume"), [(2, True), (1, False)])
def test_leftovers_of_other_settings_or_without_resume_are_removed(tmp_path, size, resume):
    fail_midway(tmp_path / "a")
    with write_artifact(tmp_path / "a", kind="thing", config=Settings(size=size), resume=resume) as writer:
        assert not (writer.path / "half").exists()


WRITER = """
import sys, time
from pathlib import Path
from raydr.artifacts import write_artifact
with write_artifact(sys.argv[1], kind="thing", config={"size": 1}) as writer:
    (writer.path / "part-0").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writing(tmp_path):
    """Another process in the middle of `write_artifact(tmp_path / "a")`."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_kill_nine_midway_leaves_nothing_that_looks_finished(tmp_path, writing):
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    path = tmp_path / "a"
    assert (path / "part-0").exists()
    assert not is_finished(path)
    with pytest.raises(ArtifactError, match="did not finish"):
        open_artifact(path)
    # The lock died with its process, and the step can be taken up where it stopped.
    with write_artifact(path, kind="thing", config={"size": 1}, resume=True) as writer:
        assert (writer.path / "part-0").stat().st_size == 1000
    open_artifact(path).verify()


def test_two_processes_cannot_write_one_artifact(tmp_path, writing):
    with (
        pytest.raises(ArtifactError, match="another process is writing"),
        write_artifact(tmp_path / "a", kind="thing", config={"size": 1}),
    ):
        pytest.fail("the step must not start")
    assert (tmp_path / "a" / "part-0").exists(), "the refused writer must not clear the other's work"


def test_write_durably_replaces_and_leaves_no_scratch(tmp_path):
    write_durably(tmp_path / "file", b"one")
    write_durably(tmp_path / "file", b"two")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"two")]
