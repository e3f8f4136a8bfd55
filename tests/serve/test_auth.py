"""API keys and rate limits, without a server."""

import hashlib

import pytest

from raydr.config import validate
from raydr.errors import ConfigError
from raydr.serve.auth import Bucket, Gate, make_key
from raydr.serve.config import ApiKey, AppArgs
from raydr.serve.errors import ApiError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_keys_everyone_is_anonymous():
    assert Gate([]).admit(None).name == "anonymous"
    assert Gate([]).admit("Bearer whatever").name == "anonymous"


def test_only_the_right_key_gets_in_under_its_name():
    alice_key, alice = make_key("alice")
    bob_key, bob = make_key("bob")
    gate = Gate([alice, bob])
    assert gate.admit(f"Bearer {alice_key}").name == "alice"
    assert gate.admit(f"bearer  {bob_key} ").name == "bob"
    for header, code in [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Basic abc", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        (f"Bearer {alice_key}x", "invalid_api_key"),
        (f"Bearer {alice.sha256}", "invalid_api_key"),  # the stored hash is not a key
    ]:
        with pytest.raises(ApiError) as refused:
            gate.admit(header)
        assert (refused.value.status, refused.value.code) == (401, code)


def test_a_key_is_stored_as_its_hash_only():
    key, entry = make_key("alice")
    assert key not in entry.model_dump_json()
    assert entry.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert make_key("alice")[0] != key


def test_a_bucket_allows_its_burst_and_then_its_rate():
    clock = Clock()
    bucket = Bucket(rate_per_s=2.0, burst=3, clock=clock)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert bucket.take() == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.take() == 0
    assert bucket.take() > 0
    clock.now += 1000
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]  # it never holds more than its burst
    assert bucket.take() > 0


def test_one_callers_rate_does_not_slow_another():
    clock = Clock()
    key, entry = make_key("slow")
    other_key, other = make_key("other")
    gate = Gate([entry.model_copy(update={"requests_per_minute": 60.0, "burst": 1}), other], clock)
    gate.admit(f"Bearer {key}")
    with pytest.raises(ApiError) as refused:
        gate.admit(f"Bearer {key}")
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.response().headers["Retry-After"] == "2"  # 1 s, rounded up to be safe
    for _ in range(50):
        gate.admit(f"Bearer {other_key}")
    clock.now += 1.0
    assert gate.admit(f"Bearer {key}").name == "slow"


def test_wrong_keys_take_no_token():
    clock = Clock()
    key, entry = make_key("a")
    gate = Gate([entry.model_copy(update={"requests_per_minute": 60.0, "burst": 1})], clock)
    for _ in range(10):
        with pytest.raises(ApiError):
            gate.admit("Bearer wrong")
    assert gate.admit(f"Bearer {key}").name == "a"


def test_keys_come_from_the_file_an_environment_variable_names(tmp_path, monkeypatch):
    _, entry = make_key("alice")
    file = tmp_path / "keys.yaml"
    file.write_text(f"api_keys:\n  - name: alice\n    sha256: {entry.sha256}\n")
    args = AppArgs(index="x", api_keys_env="RAYDR_TEST_KEYS")
    monkeypatch.delenv("RAYDR_TEST_KEYS", raising=False)
    with pytest.raises(ConfigError, match="RAYDR_TEST_KEYS is not set"):
        args.read_api_keys()  # never open by mistake
    monkeypatch.setenv("RAYDR_TEST_KEYS", str(file))
    assert args.read_api_keys() == [entry]
    file.write_text("api_keys: []\n")
    with pytest.raises(ConfigError, match="api_keys"):
        args.read_api_keys()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"api_keys": [{"name": "a", "sha256": "secret"}]}, "sha256"),
        ({"api_keys": [{"name": "a", "sha256": "0" * 64}, {"name": "a", "sha256": "1" * 64}]}, "same name"),
        ({"api_keys": [{"name": "a", "sha256": "0" * 64}, {"name": "b", "sha256": "0" * 64}]}, "same sha256"),
        ({"api_keys": [{"name": "a", "sha256": "0" * 64}], "api_keys_env": "X"}, "not both"),
        ({"limits": {"kk": 3}}, "did you mean 'k'"),
    ],
)
def test_faulty_arguments_are_named(values, complaint):
    with pytest.raises(ConfigError, match=complaint):
        validate(AppArgs, {"index": "x", **values}, where="test")


def test_api_key_names_are_safe_in_logs():
    with pytest.raises(ValueError, match="name"):
        ApiKey(name="a\nb", sha256="0" * 64)
