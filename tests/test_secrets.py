"""What nobody may read in a manifest, a log or an error: keys, cloud credentials, passwords in URLs, tokens."""

import logging

import pytest

from raydr.config import validate
from raydr.data.config import DataConfig
from raydr.data.ingest import ingest
from raydr.errors import ConfigError, RaydrError
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.llm.engine import EngineConfig
from raydr.serve.config import AppArgs
from raydr.storage import connect, place
from tests.corpora import embedded_corpus, integers

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
    from raydr.secrets import holds_secret

    assert not holds_secret(url)


def test_artifacts_made_with_secrets_around_them_hold_none(tmp_path, capfd, caplog, monkeypatch):
    """Corpus, embeddings and index, with credentials in the environment; then a corpus at a URL that holds some."""
    for name in VARIABLES:
        monkeypatch.setenv(name, CANARY)
    caplog.set_level(logging.DEBUG)
    corpus, embeddings = embedded_corpus(tmp_path / "run", {"a": "alpha", "b": "beta"}, integers(2, 4))
    build_index(corpus, embeddings, IndexConfig(), tmp_path / "run" / "index", use_ray=False)
    with pytest.raises(ConfigError, match="credentials in the environment"):
        ingest(DataConfig(path=URLS[0]), tmp_path / "other")
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sum(file.name == "manifest.json" for file in written) == 3
    assert [file for file in written if CANARY.encode() in file.read_bytes()] == []
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err + caplog.text


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
