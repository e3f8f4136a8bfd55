"""What nobody may read in a manifest, a log or an error: keys, cloud credentials, passwords in URLs, tokens."""

import logging

import pytest

from raydr.cli import main
from raydr.config import validate
from raydr.errors import ConfigError, RaydrError
from raydr.llm.engine import EngineConfig
from raydr.serve.config import AppArgs
from raydr.storage import connect, place
from tests.conftest import write_beir

CANARY = "CANARYvalueThatNobodyMaySee"
URLS = [
    f"s3://AKIAEXAMPLE:{CANARY}@bucket/corpus",
    f"s3://:{CANARY}@bucket/corpus",
    f"https://user:{CANARY}@host.example/corpus.jsonl",
    f"abfs://container@account.dfs.core.windows.net/x?client_secret={CANARY}",
    f"https://host.example/corpus.jsonl?sig=1&access_token={CANARY}",
]
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "RAY_AUTH_TOKEN",
    "OPENAI_API_KEY",
    "RAYDR_LLM_KEY",
)


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_a_secret_is_refused_and_not_repeated(tmp_path, url):
    for use in (connect, place, lambda url: validate(AppArgs, {"index": url}, where="args")):
        with pytest.raises(RaydrError) as refused:
            use(url)
        assert CANARY not in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        EngineConfig(model="m", backend="remote", url=url)
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a:b@c", "http://10.0.0.5:8000/v1", "http://[::1]:80/x", "abfs://box@account.x/y", "hdfs://me@h:9/x"],
)
def test_other_urls_are_no_secrets(url):
    from raydr.storage import holds_secret

    assert not holds_secret(url)


def test_a_run_with_secrets_around_it_writes_none_of_them(tmp_path, capfd, caplog, monkeypatch):
    """Every verb that makes an artifact, with credentials in the environment; then a URL that holds some."""
    for name in VARIABLES:
        monkeypatch.setenv(name, CANARY)
    data = write_beir(tmp_path / "data")
    caplog.set_level(logging.DEBUG)
    settings = [f"data.path={data}", f"out={tmp_path / 'out'}", "runtime=local"]
    assert main(["reproduce", *settings, "method.import_path=tests.corpora:WordCounts"]) == 0
    assert main(["reproduce", f"data.path={URLS[0]}", f"out={tmp_path / 'other'}", "runtime=local"]) == 2
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"manifest.json"} <= {file.name for file in written}
    assert [file for file in written if CANARY.encode() in file.read_bytes()] == []
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err + caplog.text
    assert "credentials in the environment" in " ".join((shown.out + shown.err).split())


def test_a_key_in_the_place_of_its_hash_is_not_repeated():
    """Neither by raydr's own message nor by pydantic's, which Ray Serve prints of a faulty config."""
    faulty = [{"name": "a", "sha256": CANARY}, {"name": "a", "key": CANARY}, CANARY]
    for entry in faulty:
        with pytest.raises(ConfigError) as refused:
            validate(AppArgs, {"index": "x", "api_keys": [entry]}, where="args")
        assert CANARY not in str(refused.value)
        with pytest.raises(ValueError, match="api_keys") as refused:
            AppArgs.model_validate({"index": "x", "api_keys": [entry]})
        assert CANARY not in str(refused.value)
