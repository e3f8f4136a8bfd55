"""Places and buckets: what a URL is, files there and back, and who may write."""

import json
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from raydr import storage
from raydr.config import Config, validate
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.storage import Location, bucket_of, leased, place, url_of


class Where(Config):
    out: Location


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYDR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_url_has_a_place_and_a_place_its_url(cache):
    assert place("s3://b/runs/a") == cache / "s3/b/runs/a"
    assert url_of(cache / "s3/b/runs/a/embed") == "s3://b/runs/a/embed"
    assert url_of("/elsewhere/runs") is None
    assert url_of(cache) is None
    assert place("runs/a") == Path("runs/a")


@pytest.mark.parametrize("text", ["http://host/x", "https://host/x", "file:///x", "minilm", "a:b", "raydr.methods:X"])
def test_what_is_no_folder_of_a_bucket_is_left_as_it_is(text):
    assert not storage.is_url(text)
    assert place(text) == Path(text)


@pytest.mark.parametrize("text", ["s3://b/x?endpoint_override=h", "s3://b/../../etc", "s3://", "s3:///x"])
def test_a_url_that_has_no_place_is_refused(text):
    with pytest.raises(ConfigError, match="not a folder of a bucket"):
        place(text)


def test_a_location_is_a_place_in_python_and_a_url_in_json(cache):
    where = Where.model_validate({"out": "gs://b/runs"})
    assert where.out == cache / "gs/b/runs"
    assert where.model_dump(mode="json") == {"out": "gs://b/runs"}
    assert Where.model_validate(where.model_dump(mode="json")) == where
    assert Where.model_validate({"out": "runs/a"}).model_dump(mode="json") == {"out": "runs/a"}


def test_an_unknown_scheme_is_named():
    with pytest.raises(DataError, match=r"nosuch://b/x: neither pyarrow nor fsspec"):
        storage.connect("nosuch://b/x")


def test_fsspec_filesystems_are_buckets_too(cache):
    bucket = bucket_of(place("memory://b/runs"))
    bucket.write("deep/a.txt", b"one")
    assert bucket.read("deep/a.txt") == b"one"
    assert bucket.sizes() == {"deep/a.txt": 3}
    assert bucket.pull("deep/a.txt")
    assert (cache / "memory/b/runs/deep/a.txt").read_bytes() == b"one"
    bucket.remove("deep/a.txt")
    assert bucket.sizes() == {}


def test_files_there_and_back(url):
    bucket = bucket_of(place(url))
    assert bucket.sizes() == {}
    assert bucket.read("no.txt") is None
    assert not bucket.pull("no.txt")
    bucket.remove("no.txt")
    (bucket.place / "sub").mkdir(parents=True)
    (bucket.place / "sub/x").write_bytes(b"x" * 5000)
    storage.publish(bucket.place / "sub")
    assert bucket.sizes() == {"sub/x": 5000}
    (bucket.place / "sub/x").unlink()
    storage.latest(bucket.place / "sub")
    assert (bucket.place / "sub/x").read_bytes() == b"x" * 5000
    assert storage.files_in(bucket.place / "sub") == [bucket.place / "sub/x"]
    storage.remove_folder(bucket.place / "sub")
    assert not storage.exists(bucket.place / "sub")
    bucket.write("y", b"y")
    with pytest.raises(ArtifactError, match="differs from its checksum"):
        bucket.pull("y", sha256="0" * 64)
    assert not (bucket.place / "y").exists()


def test_a_bucket_that_is_not_there_says_so(s3):
    with pytest.raises(ArtifactError, match=r"s3://no-such-bucket/a"):
        bucket_of(place("s3://no-such-bucket/a")).write("x", b"x")


@pytest.mark.parametrize("jump_s", [0, 86_400, -86_400])
def test_a_lease_is_held_renewed_and_given_back(url, monkeypatch, jump_s):
    monkeypatch.setattr(storage, "BEAT_S", 0.1)
    monkeypatch.setattr(storage, "PATIENCE_S", 1.0)
    bucket = bucket_of(place(url))
    with leased(bucket) as held:
        assert held
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)  # the clock of the other machine, or of this one
        monkeypatch.setattr(storage.socket, "gethostname", lambda: "another")
        with leased(bucket) as also:
            assert not also
    assert bucket.sizes() == {}
    bucket.write(storage.LEASE, json.dumps({"host": "a machine that died"}).encode())
    with leased(bucket) as held:
        assert held


def test_a_writer_that_was_asleep_does_not_publish(url, monkeypatch):
    """Its process was stopped, or its machine suspended: no clock of its own tells it for how long."""
    monkeypatch.setattr(storage, "BEAT_S", 0.1)
    monkeypatch.setattr(storage, "PATIENCE_S", 0.5)
    bucket = bucket_of(place(url))
    with leased(bucket) as first:
        with monkeypatch.context() as asleep:  # it renews nothing, and knows nothing of it
            asleep.setattr(storage.Lease, "is_held", lambda _: False)
            time.sleep(0.3)
        monkeypatch.setattr(storage.socket, "gethostname", lambda: "another")
        first.check()
        with leased(bucket) as second:
            second.check()
            with pytest.raises(ArtifactError, match="another machine writes this artifact"):
                first.check()
            assert b"another" in bucket.read(storage.LEASE)
    assert bucket.sizes() == {}


def test_one_process_brings_a_file_while_the_others_wait(url):
    folder = place(url)
    order = []

    def second():
        with storage.locked(folder, ".x", wait=True):
            order.append("second")

    with storage.locked(folder, ".x", wait=True) as held:
        assert held
        thread = threading.Thread(target=second)
        thread.start()
        with storage.locked(folder, ".x", wait=False) as also:
            assert not also
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_location_is_read_from_python_and_from_json_alike(cache):
    assert Where.model_validate_json('{"out": "s3://b/runs"}') == Where(out=cache / "s3/b/runs")
    with pytest.raises(ValidationError, match="must be a path or a URL, not 7"):
        Where.model_validate({"out": 7})
    with pytest.raises(ConfigError, match="out: .*not a folder of a bucket"):
        validate(Where, {"out": "s3://b/x?y=1"}, where="where")
