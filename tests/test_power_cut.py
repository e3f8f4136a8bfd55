"""A power cut between any two system calls of a step leaves the old artifact, the new one, or one that says it is
unfinished and is made by the same command; in the worst order in which a disk may have taken what was not synced.

Notable: the step really runs. Before each of its calls that changes a folder the state is taken, together with what
`fsync` has made durable until then, and disks are made of it: names and contents as the process sees them, or only
those that were synced, in one folder or in all.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from raydr.artifacts import open_artifact, update_artifact, write_artifact
from raydr.errors import ArtifactError

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
_recorders: list[Recorder] = []  # an audit hook stays for good, so there is one for all tests


@dataclass
class Recorder:
    """The states of a folder, and what of it is durable."""

    root: Path
    disks: list[dict[str, bytes]] = field(default_factory=list)
    """Files by relative name (folders end with a slash) of each disk that a power cut might leave."""
    synced: dict[int, bytes] = field(default_factory=dict)
    """Content by inode."""
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    """Entries by the inode of a folder."""
    held: dict[int, int] = field(default_factory=dict)
    """A descriptor by inode."""

    def look(self) -> None:
        """Takes the disks of this moment."""
        contents: dict[int, bytes] = {}
        entries: dict[int, dict[str, int]] = {}
        for folder, _, files in os.walk(self.root):
            here = Path(folder)
            for path in (here, *(here / name for name in files)):
                if path.stat().st_ino not in self.held:  # as long as it is, its number is not given to another
                    self.held[path.stat().st_ino] = os.open(path, os.O_PATH)
            entries[here.stat().st_ino] = {child.name: child.lstat().st_ino for child in here.iterdir()}
            contents |= {(here / name).stat().st_ino: (here / name).read_bytes() for name in files}
        root = self.root.stat().st_ino
        durable = {number: self.synced.get(number, b"") for number in [*contents, *self.synced]}
        held = {**{number: {} for number in entries}, **self.names}
        late = [{**held, **entries, number: held[number]} for number in entries]  # a folder that is behind the others
        for tree in (entries, held, *late):
            for content in ({**durable, **contents}, durable):
                disk = dict(_files(root, tree, content, ""))
                if disk not in self.disks:
                    self.disks.append(disk)

    def sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_relative_to(self.root):
            return
        if path.is_dir():
            self.names[status.st_ino] = {child.name: child.lstat().st_ino for child in path.iterdir()}
        else:
            self.synced[status.st_ino] = path.read_bytes()


def _files(folder: int, tree: dict[int, dict[str, int]], content: dict[int, bytes], at: str) -> Iterator:
    for name, number in tree[folder].items():
        if number in tree:
            yield f"{at}{name}/", b""
            yield from _files(number, tree, content, f"{at}{name}/")
        else:
            yield f"{at}{name}", content.get(number, b"")


def _hook(event: str, arguments: tuple) -> None:
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (opened or event in _CHANGES) and _recorders:
        recorder = _recorders.pop()  # what it does itself is no event
        recorder.look()
        _recorders.append(recorder)


sys.addaudithook(_hook)


@pytest.fixture
def recorded(monkeypatch) -> Callable:
    """`with recorded(root) as disks:` runs a step and gives every disk that a power cut in it might leave."""
    sync = os.fsync

    def both(descriptor: int) -> None:
        sync(descriptor)
        if _recorders:
            recorder = _recorders.pop()
            recorder.look()
            recorder.sync(descriptor)
            recorder.look()
            _recorders.append(recorder)

    monkeypatch.setattr(os, "fsync", both)

    @contextmanager
    def record(root: Path) -> Iterator[list[dict[str, bytes]]]:
        recorder = Recorder(root)
        for folder, _, files in os.walk(root):  # what was there before is on disk
            here = Path(folder)
            recorder.names[here.stat().st_ino] = {child.name: child.lstat().st_ino for child in here.iterdir()}
            recorder.synced |= {(here / name).stat().st_ino: (here / name).read_bytes() for name in files}
        _recorders.append(recorder)
        try:
            yield recorder.disks
        finally:
            _recorders.clear()
            recorder.look()
            for descriptor in recorder.held.values():
                os.close(descriptor)

    return record


def restored(disk: dict[str, bytes], target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name, content in disk.items():
        (target / name).mkdir() if name.endswith("/") else (target / name).write_bytes(content)
    return target


def make(path: Path, size: int) -> None:
    with write_artifact(path, kind="thing", config={"size": size}, resume=True) as writer:
        (writer.path / "deep/er").mkdir(parents=True, exist_ok=True)
        (writer.path / "deep/er/data").write_bytes(b"%d" % size * size)
        (writer.path / "beside").write_bytes(b"%d" % -size)


def size_of(path: Path) -> int | None:
    """Of the artifact, which must be wholly one or the other; None where it says that it is not finished."""
    try:
        artifact = open_artifact(path)
    except ArtifactError as error:
        assert "did not finish" in str(error) or "no artifact here" in str(error)
        return None
    size = artifact.manifest.config["size"]
    assert (path / "deep/er/data").read_bytes() == b"%d" % size * size
    assert (path / "beside").read_bytes() == b"%d" % -size
    return size


@pytest.mark.parametrize("before", [None, 500])
def test_a_step_that_loses_power_anywhere(tmp_path, recorded, before):
    root = tmp_path / "root"
    root.mkdir()
    if before is not None:
        make(root / "runs/a", before)
    with recorded(root) as disks:
        make(root / "runs/a", 700)
    found = []
    for disk in disks:
        again = restored(disk, tmp_path / "after") / "runs/a"
        found.append(size_of(again))
        make(again, 700)
        assert size_of(again) == 700
    assert set(found) == {before, None, 700}
    assert found[-1] == 700  # what was said to be finished stays so
    assert len(found) > 20


def test_an_update_that_loses_power_anywhere(tmp_path, recorded):
    root = tmp_path / "root"
    root.mkdir()
    make(root / "a", 500)
    with recorded(root) as disks, update_artifact(root / "a", kind="thing") as update:
        (root / "a/new").mkdir()
        (root / "a/new/data").write_bytes(b"new")
        update.files = {"new/data", "beside"}
        update.counts["rows"] = 1
    states = []
    for disk in disks:
        artifact = open_artifact(restored(disk, tmp_path / "after") / "a")
        is_new = artifact.manifest.counts == {"rows": 1}
        assert set(artifact.manifest.files) == ({"new/data", "beside"} if is_new else {"deep/er/data", "beside"})
        states.append(is_new)
    assert set(states) == {False, True}
    assert states[-1]
