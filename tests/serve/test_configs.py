"""The Serve config files: valid for Ray, valid for raydr, and naming deployments that exist."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from raydr.config import read_yaml
from raydr.errors import ArtifactError, ConfigError
from raydr.serve.config import PROXY_TIMEOUT, AppArgs
from raydr.verbs.serve import prefer_few_hops

CONFIGS = sorted((Path(__file__).parents[2] / "serve_configs").glob("*.yaml"))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.name)
def config(request):
    return read_yaml(request.param)


def test_there_are_configs():
    assert {path.name for path in CONFIGS} >= {
        "local.yaml",
        "multimodal.yaml",
        "rerank.yaml",
        "search.yaml",
        "search_prf.yaml",
    }


def test_serve_accepts_it(config):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.host == "127.0.0.1"
    assert schema.logging_config.encoding == "JSON"


def test_its_arguments_and_deployments_are_raydrs(config, animals, monkeypatch, tmp_path):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import build_app as build

    from raydr.serve.app import IngressSettings, build_app
    from raydr.serve.auth import make_key
    from raydr.serve.encoder import EncoderSettings

    (application,) = config["applications"]
    assert application["import_path"] == "raydr.serve.app:build_app"
    args = AppArgs.model_validate({**application["args"], "index": str(animals)})
    if args.api_keys_env:
        _, entry = make_key("alice")
        (tmp_path / "keys.yaml").write_text(f"api_keys: [{{name: alice, sha256: {entry.sha256}}}]")
        monkeypatch.setenv(args.api_keys_env, str(tmp_path / "keys.yaml"))
    application_object = call_user_app_builder_with_args_if_necessary(build_app, args.model_dump(mode="json"))
    built = build(application_object, name="raydr")
    names = {deployment.name for deployment in built.deployments}
    parts = {"Ingress"} if args.colocate else {"Ingress", "Encoder", "Shard0", "Shard1", "Bm25"}
    assert names == parts | {f"Reranker_{name}" for name in args.rerankers}
    for deployment in application.get("deployments", []):
        assert deployment["name"] in names
        schema = {"Ingress": IngressSettings, "Encoder": EncoderSettings}.get(deployment["name"])
        if "user_config" in deployment:
            schema.model_validate(deployment["user_config"])


def test_haproxy_waits_for_longer_than_an_answer_may_take(config, monkeypatch):
    limits = AppArgs.model_validate({**config["applications"][0]["args"], "index": "x"}).limits
    monkeypatch.setattr("os.environ", {})
    prefer_few_hops()
    limits.check_proxy()
    monkeypatch.setenv(PROXY_TIMEOUT, f"{limits.request_timeout_s:g}")
    with pytest.raises(ConfigError, match=rf"must be less than {PROXY_TIMEOUT} .* raise the other in the environment"):
        limits.check_proxy()


def test_a_typo_in_the_arguments_is_an_error():
    with pytest.raises(ValidationError, match="limts"):
        AppArgs.model_validate({"index": "x", "limts": {}})


def test_an_index_that_is_not_there_is_named_before_anything_starts(tmp_path):
    from raydr.serve.app import build_app

    with pytest.raises(ArtifactError, match="no artifact here"):
        build_app(AppArgs(index=tmp_path / "nothing"))


def test_missing_keys_never_mean_an_open_server(animals, monkeypatch):
    from raydr.errors import ConfigError
    from raydr.serve.app import build_app

    monkeypatch.delenv("RAYDR_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="RAYDR_API_KEYS is not set"):
        build_app(AppArgs(index=animals, api_keys_env="RAYDR_API_KEYS"))
