"""The files of cluster/ are what their templates give, agree with one another and with pyproject.toml, and are valid.

Notable: nothing here needs Kubernetes. Its own kinds are checked with kubernetes-validate's schemas, KubeRay's with
those in `kuberay-1.7.0.json`, both refusing unknown fields, which a real cluster drops without a word; what KubeRay's
operator checks beyond its schemas is written out below.

    pytest tests/cluster/test_manifests.py
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.render import HERE, ROOT, read_values, rendered
from raydr.config import load, validate
from raydr.errors import ConfigError
from raydr.serve.app import IngressSettings
from raydr.serve.config import ApiKeys, AppArgs
from raydr.serve.encoder import EncoderSettings
from raydr.verbs.config import RunConfig
from tests.cluster.kuberay_schemas import SCHEMAS

KUBERNETES = "1.37"
VALUES = read_values()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RAY = next(str(need.specifier) for line in PROJECT["dependencies"] if (need := Requirement(line)).name == "ray")[2:]
FILES = sorted(rendered(VALUES))
MANIFESTS = [name for name in FILES if not name.startswith(("ray-up", "pod-monitor", "prometheus", "grafana"))]
RAY_MANIFESTS = [name for name in MANIFESTS if name.startswith("ray-")]
JOBS = [name for name in FILES if name.startswith("ray-job")]
SERVICES = [name for name in FILES if name.startswith("ray-service")]
KUBERAY = json.loads(SCHEMAS.read_text(encoding="utf-8"))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((HERE / name).read_text(encoding="utf-8")))


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The RayClusterSpec in a RayCluster, RayJob or RayService."""
    spec = document["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[
        document["kind"]
    ]


def serve_config(name: str) -> dict[str, Any]:
    return yaml.safe_load(documents(name)[0]["spec"]["serveConfigV2"])


def pods(document: Any) -> Iterator[dict[str, Any]]:
    """Every Pod's spec in a document."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for inner in document.values():
            yield from pods(inner)
    elif isinstance(document, list):
        for inner in document:
            yield from pods(inner)


def wrong_with(document: dict[str, Any]) -> list[str]:
    """What the schemas say against a document."""
    if document["apiVersion"] == "ray.io/v1":
        schema = Draft202012Validator({"$ref": f"#/$defs/{document['kind']}", "$defs": KUBERAY["$defs"]})
        found = [f"{error.json_path}: {error.message}" for error in schema.iter_errors(document)]
        # KubeRay's schemas take any metadata, the API server does not.
        return found + wrong_with({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("name", FILES)
def test_committed_files_are_what_the_templates_give(name):
    fresh = rendered(VALUES)[name]
    assert (HERE / name).read_text(encoding="utf-8") == fresh, "run: python cluster/render.py"
    assert name.endswith(".json") or max(map(len, fresh.splitlines())) <= 120


def test_no_manifest_is_left_over():
    found = {file.name for kind in ("*.yaml", "*.json") for file in HERE.glob(kind)}
    assert found - {"values.yaml", "secrets.yaml"} == set(FILES)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid(name):
    for document in documents(name):
        assert wrong_with(document) == []
        assert document["metadata"].get("namespace", VALUES["namespace"]) == VALUES["namespace"]


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("ray-cluster.yaml", ["spec", "rayversion"], "2.60.0"),
        ("ray-cluster.yaml", ["spec", "headGroupSpec", "template", "spec", "containers", 0, "imagepolicy"], "Always"),
        ("ray-cluster.yaml", ["spec", "workerGroupSpecs", 0, "minReplicas"], "one"),
        ("ray-cluster.yaml", ["spec", "autoscalerOptions", "version"], "v3"),
        ("ray-cluster.yaml", ["metadata", "label"], {}),
        ("ray-job.embed.yaml", ["spec", "rayClusterConfig"], {}),
        ("ray-service.search.yaml", ["spec", "rayClusterConfig", "workerGroupSpecs", 0, "label"], {}),
        ("namespace.yaml", ["spec"], {"finalisers": []}),
    ],
)
def test_a_wrong_field_is_found(name, path, value):
    document = copy.deepcopy(documents(name)[0])
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert wrong_with(document)


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_ray_versions_agree_everywhere(name):
    cluster = cluster_of(documents(name)[0])
    assert cluster["rayVersion"] == RAY
    text = (HERE / name).read_text(encoding="utf-8")
    tags = set(re.findall(re.escape(VALUES["image"]) + r":(\S+)", text))
    assert tags
    for tag in tags:
        assert re.fullmatch(rf"[\d.]+-ray{re.escape(RAY)}-(cpu|gpu)", tag)
    # The commands in the Dockerfile that make these images give them these very tags.
    assert all(f"{VALUES['image']}:{tag}" in (HERE / "Dockerfile").read_text(encoding="utf-8") for tag in tags)


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_what_the_operator_checks_beyond_its_schema(name):
    """`ray-operator/controllers/ray/utils/validation.go` of KubeRay 1.7, as far as it concerns what is used here."""
    document = documents(name)[0]
    cluster = cluster_of(document)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    assert len(document["metadata"]["name"]) <= 47  # RayJob and RayService; a RayCluster may have 63
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        # `labels` and `resources` are fields of the group; in rayStartParams they are refused, or a second opinion.
        assert not {"labels", "resources", "num-cpus", "num-gpus", "memory"} & group["rayStartParams"].keys()
        assert "restartPolicy" not in group["template"]["spec"]  # Never, where the autoscaler is v2
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["containers"][0]["resources"]["requests"].keys() >= {"cpu", "memory"}
    if document["kind"] == "RayJob":
        assert document["spec"]["shutdownAfterJobFinishes"]  # or ttlSecondsAfterFinished is refused
        assert "deletionStrategy" not in document["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_pod_runs_as_root_or_becomes_it(name):
    for document in documents(name):
        for pod in pods(document):
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_what_is_named_exists():
    """Claims, secrets and services, by the names that Pods know them by."""
    shared = {(d["kind"], d["metadata"]["name"]) for name in MANIFESTS for d in documents(name)}
    for name in MANIFESTS:
        text = (HERE / name).read_text(encoding="utf-8")
        assert {("PersistentVolumeClaim", claim) for claim in re.findall(r"claimName: ([\w-]+)", text)} <= shared
        secrets = re.findall(r"secretName: ([\w-]+)|secret(?:KeyRef|Ref): \{name: ([\w-]+)", text)
        assert {("Secret", a or b) for a, b in secrets} <= shared
        assert {("Service", host) for host in re.findall(r"redisAddress: (\w+):", text)} <= shared


def test_the_pod_monitor_asks_every_pod_for_ports_it_has():
    """Its kind is the Prometheus operator's, of which there is no schema here."""
    (monitor,) = documents("pod-monitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["metadata"]["namespace"] == VALUES["namespace"]
    assert monitor["spec"].keys() == {"jobLabel", "selector", "podMetricsEndpoints"}
    asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    open_to_it = {8080, 44217, 44227}
    for name in RAY_MANIFESTS:
        (head,) = cluster_of(documents(name)[0])["headGroupSpec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in head["ports"]}
        assert {ports[port] for port in asked} == open_to_it
    policies = [rule for d in documents("namespace.yaml") for rule in d.get("spec", {}).get("ingress", [])]
    assert any({port["port"] for port in rule.get("ports", [])} == open_to_it for rule in policies)


def test_no_secret_is_committed():
    """The examples hold none, and cannot be used as they are."""
    given = {document["metadata"]["name"]: document["stringData"] for document in documents("secrets.example.yaml")}
    with pytest.raises(ConfigError, match="sha256"):
        validate(ApiKeys, yaml.safe_load(given["raydr-api-keys"]["keys.yaml"]), where="keys.yaml")
    assert given["raydr-redis"]["password"] == ""
    keys = {key for key in given["raydr-environment"] if key != "AWS_DEFAULT_REGION"}
    assert {given["raydr-environment"][key] for key in keys} == {"CHANGE-ME"}
    assert "cluster/secrets.yaml" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_only_the_search_is_reached_from_outside():
    policies = {d["metadata"]["name"]: d["spec"] for d in documents("namespace.yaml") if d["kind"] == "NetworkPolicy"}
    assert policies["closed"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    everybody = [rule for policy in policies.values() for rule in policy.get("ingress", []) if "from" not in rule]
    assert everybody == [{"ports": [{"port": 8000}]}]


@pytest.mark.parametrize("name", SERVICES)
def test_serve_configs_are_valid_for_ray_and_for_raydr(name):
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(name)
    (application,) = ServeDeploySchema.model_validate(config).applications
    args = AppArgs.model_validate(application.args)
    assert args.api_keys_env == "RAYDR_API_KEYS"
    (container,) = cluster_of(documents(name)[0])["headGroupSpec"]["template"]["spec"]["containers"]
    assert "RAYDR_API_KEYS" in {variable["name"] for variable in container["env"]}
    storage = VALUES["storage"]["path"]
    assert str(args.index).startswith(storage)
    assert not re.search(r"\bruns/", json.dumps(config).replace(f"{storage}/runs/", ""))
    groups = {group["groupName"] for group in cluster_of(documents(name)[0])["workerGroupSpecs"]}
    for deployment in config["applications"][0]["deployments"]:
        settings = {"Ingress": IngressSettings, "Encoder": EncoderSettings}.get(deployment["name"])
        if "user_config" in deployment:
            assert settings is not None
            settings.model_validate(deployment["user_config"])
        wanted = deployment.get("ray_actor_options", {}).get("label_selector", {}).get("raydr/group")
        assert wanted is None or wanted in groups


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_differs_from_its_serve_config_only_where_a_cluster_must(name):
    """Everything not listed here is what serve_configs/ says, so there is no second copy to keep."""
    service = name.split(".")[1]
    ours, theirs = serve_config(name), yaml.safe_load((ROOT / f"serve_configs/{service}.yaml").read_text())
    changed = VALUES["services"][service]["deployments"]
    for config in (ours, theirs):
        del config["http_options"]["host"]
        (application,) = config["applications"]
        application["args"].pop("api_keys_env", None)
        for deployment in application["deployments"]:
            for key in changed.get(deployment["name"], {}):
                del deployment[key]
    as_text = json.dumps(ours).replace(VALUES["storage"]["path"] + "/", "")
    index = theirs["applications"][0]["args"]["index"]
    assert json.loads(as_text.replace(VALUES["services"][service]["index"], index)) == theirs


@pytest.mark.parametrize("name", JOBS)
def test_jobs_ask_for_what_their_cluster_can_have(name):
    document = documents(name)[0]
    python, script, config, *settings = shlex.split(document["spec"]["entrypoint"])
    assert python == "python"
    script, config = (Path(path).relative_to(VALUES["code"]) for path in (script, config))
    assert script == Path(f"jobs/{document['metadata']['name'].removeprefix('raydr-')}.py")
    assert (ROOT / script).is_file()
    run = load(RunConfig, ROOT / config, settings)
    groups = [group for group in VALUES["groups"] if f"groupName: {group['name']}" in (HERE / name).read_text()]
    gpus = sum(group["gpu"] * group["max"] for group in groups)
    for pool in (run.embed, run.rerank):
        if pool.worker_gpus:
            assert pool.num_workers is not None, "an autoscaled cluster has fewer GPUs at first than it may have"
            assert pool.worker_gpus * pool.num_workers[1] <= gpus
    if run.train is not None and name == "ray-job.train.yaml":
        assert run.train.num_workers * run.train.worker_gpus <= gpus
        assert run.train.worker_cpus <= max(group["cpu"] for group in groups if group["gpu"])
    assert sum(group["cpu"] * group["min"] for group in groups) >= 2  # a pool's stages need two from the start
    assert str(run.out).startswith(VALUES["storage"]["path"])


def test_the_dockerfile_passes_its_linter_and_agrees_with_the_rest():
    linted = subprocess.run([Path(sys.executable).parent / "hadolint", HERE / "Dockerfile"], capture_output=True)
    assert linted.returncode == 0, linted.stdout.decode()
    text = (HERE / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^FROM base AS (\w+)$", text, re.M)) == {"cpu", "gpu"}
    python = re.findall(r"^ARG PYTHON_VERSION=(.+)$", text, re.M)
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in python)
    assert f"ARG TORCH_CPU_INDEX={VALUES['torch_cpu_index']}\n" in text
    assert f"--uid {VALUES['user']} " in text
    assert set(re.findall(r"^USER (.+)$", text, re.M)) == {str(VALUES["user"])}
    assert f"WORKDIR {VALUES['code']}\n" in text
    assert "==" not in text  # versions of packages are pyproject.toml's
    ignored = (HERE / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    for source in re.findall(r"^!(.+)$", ignored, re.M):
        assert (ROOT / source).exists()


def test_the_ray_up_file_is_valid_for_ray():
    from ray.autoscaler._private.util import prepare_config, validate_config

    (given,) = documents("ray-up.aws.yaml")
    config = prepare_config(copy.deepcopy(given))
    validate_config(config)
    types = config["available_node_types"]
    assert types.keys() == {"head", *(group["name"] for group in VALUES["groups"])}
    assert config["max_workers"] == sum(group["max"] for group in VALUES["groups"])
    for group in VALUES["groups"]:
        kind = types[group["name"]]
        assert kind["labels"] == {"raydr/group": group["name"]}
        assert f".ci/setup {group['image']} " in kind["worker_setup_commands"][-1]
