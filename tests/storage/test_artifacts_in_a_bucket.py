"""Artifacts whose folder is a URL: written here, read on another machine, which is another cache."""

from contextlib import suppress

import pytest

from raydr.artifacts import (
    MANIFEST,
    artifact_of,
    artifacts_named_in,
    bring,
    fingerprint,
    is_finished,
    open_artifact,
    update_artifact,
    write_artifact,
)
from raydr.errors import ArtifactError
from raydr.storage import bucket_of, place


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Go to another machine: `elsewhere()`, or back: `elsewhere("machine")`."""
    return lambda name="other": monkeypatch.setenv("RAYDR_CACHE", str(tmp_path / name))


def write(url, config, files, **kwargs):
    with write_artifact(url, kind="things", config=config, **kwargs) as writer:
        for name, content in files.items():
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            (writer.path / name).write_bytes(content)
    return open_artifact(url)


def test_another_machine_reads_what_one_has_written(url, elsewhere):
    written = write(url, {"a": 1}, {"one": b"1", "sub/two": b"22"})
    assert set(bucket_of(place(url)).sizes()) == {MANIFEST, "one", "sub/two"}
    elsewhere()
    found = open_artifact(url, kind="things")
    assert found.fingerprint == written.fingerprint
    assert found.path != written.path
    assert (found.path / "sub/two").read_bytes() == b"22"
    found.verify()
    assert is_finished(url, fingerprint("things", {"a": 1}, {}))
    assert not is_finished(url, "another")


def test_files_come_when_they_are_asked_for(url, elsewhere):
    write(url, {}, {"one": b"1", "sub/two": b"22", "sub/three": b"333"})
    elsewhere()
    found = open_artifact(url, later=True)
    assert not (found.path / "one").exists()
    bring(found.path / "sub")
    assert (found.path / "sub/three").read_bytes() == b"333"
    assert not (found.path / "one").exists()
    assert bring(found.path / "one").read_bytes() == b"1"
    assert bring(f"{url}/one") == found.path / "one"


def test_a_file_that_was_altered_or_lost_is_never_opened(url, elsewhere):
    write(url, {}, {"one": b"1", "two": b"2"})
    bucket_of(place(url)).write("one", b"x")
    bucket_of(place(url)).remove("two")
    elsewhere()
    with pytest.raises(ArtifactError, match=r"/one: differs from its checksum|/two: listed in manifest.json but"):
        open_artifact(url)
    found = open_artifact(url, later=True)
    with pytest.raises(ArtifactError, match=r"/one: differs"):
        bring(found.path / "one")
    assert not (found.path / "one").exists()


def test_a_step_that_was_interrupted_is_no_artifact_anywhere(url, elsewhere):
    with suppress(KeyboardInterrupt), write_artifact(url, kind="things", config={}, resume=True) as writer:
        (writer.path / "one").write_bytes(b"1")
        raise KeyboardInterrupt
    elsewhere()
    with pytest.raises(ArtifactError, match="did not finish"):
        open_artifact(url)
    write(url, {}, {"two": b"2"})
    elsewhere("machine")  # whose leftover must not come back
    assert set(open_artifact(url).manifest.files) == {"two"}


def test_new_settings_replace_the_artifact_on_every_machine(url, elsewhere):
    write(url, {"a": 1}, {"one": b"1", "same": b"s"})
    elsewhere()
    open_artifact(url)
    elsewhere("machine")
    write(url, {"a": 2}, {"one": b"2", "same": b"s"})
    assert set(bucket_of(place(url)).sizes()) == {MANIFEST, "one", "same"}
    elsewhere()
    assert (open_artifact(url).path / "one").read_bytes() == b"2"


def test_an_update_is_seen_when_the_artifact_is_opened_again(url, elsewhere):
    write(url, {}, {"one": b"1"})
    elsewhere()
    open_artifact(url)
    elsewhere("machine")
    with update_artifact(url, kind="things") as update:
        (update.artifact.path / "two").write_bytes(b"22")
        update.files = {"two"}
    elsewhere()
    assert (open_artifact(url).path / "two").read_bytes() == b"22"


def test_files_put_into_the_bucket_by_others_belong_to_the_artifact(url, elsewhere):
    with write_artifact(url, kind="things", config={}) as writer:
        bucket_of(writer.path).write("far/part", b"part")
        bucket_of(writer.path).write(".scratch/x", b"x")
        (writer.path / "near").write_bytes(b"near")
    assert set(open_artifact(url, later=True).manifest.files) == {"far/part", "near"}
    elsewhere()
    assert (open_artifact(url).path / "far/part").read_bytes() == b"part"


def test_a_folder_that_raydr_did_not_make_is_left_alone(url):
    bucket_of(place(url)).write("precious.txt", b"mine")
    with (
        pytest.raises(ArtifactError, match="holds files that raydr did not make"),
        write_artifact(url, kind="things", config={}),
    ):
        pass
    assert bucket_of(place(url)).sizes() == {"precious.txt": 4}


def test_two_machines_cannot_write_one_artifact(url, elsewhere, monkeypatch):
    from raydr import storage

    monkeypatch.setattr(storage, "BEAT_S", 0.1)
    monkeypatch.setattr(storage, "PATIENCE_S", 1.0)
    with write_artifact(url, kind="things", config={}) as writer:
        (writer.path / "one").write_bytes(b"1")
        elsewhere()
        monkeypatch.setattr(storage.socket, "gethostname", lambda: "another")
        with (
            pytest.raises(ArtifactError, match="another process is writing"),
            write_artifact(url, kind="things", config={}),
        ):
            pass
        elsewhere("machine")
    assert set(open_artifact(url).manifest.files) == {"one"}


def test_settings_name_artifacts_by_url_on_every_machine(url, elsewhere):
    model = write(f"{url}/train", {}, {"model/weights": b"w"})
    settings = {"model": str(model.path / "model")}  # as code that has the place would say it
    other = write(f"{url}/index", settings, {"x": b"x"})
    assert other.manifest.config == {"model": f"{url}/train/model"}
    elsewhere()
    assert artifacts_named_in({"model": f"{url}/train/model"})["model"].fingerprint == model.fingerprint
    assert artifact_of(f"{url}/train/model").path == place(f"{url}/train")
    assert artifact_of(f"{url}/nothing") is None
    assert open_artifact(f"{url}/index").manifest.config == {"model": f"{url}/train/model"}
    assert fingerprint("k", {"model": f"{url}/train/model"}, {}) == fingerprint(
        "k", {"model": str(place(f"{url}/train/model"))}, {}
    )
