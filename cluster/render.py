"""Writes the manifests of this folder from `templates/`, `values.yaml`, pyproject.toml and serve_configs/, and the
Grafana dashboard from dashboard.py.

Notable: what it writes is committed, so `kubectl apply -f cluster/ray-cluster.yaml` works from a checkout, and a test
compares it with what would be written now. Versions of Ray and raydr come from where the installation has them; the
Serve config of a RayService is that of serve_configs/, with what a cluster changes in it.

    python cluster/render.py             after a change of values, templates, Ray's version or a Serve config
    python cluster/render.py --out DIR   elsewhere: values of another cluster can be tried beside the committed files
"""

from __future__ import annotations

import argparse
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

DASHBOARD = "grafana-dashboard.json"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def versions() -> dict[str, str]:
    """The versions that everything here has to agree on: Ray's as pyproject.toml pins it, and raydr's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ray,) = (found[1] for need in project["dependencies"] if (found := re.fullmatch(r"ray\[.*\]==([\d.]+)", need)))
    version = re.search(r'__version__ = "(.+)"', (ROOT / "raydr/version.py").read_text(encoding="utf-8"))
    if version is None:
        raise ValueError("raydr/version.py names no version")
    return {"ray": ray, "raydr": version[1]}


def serve_config(name: str, values: dict[str, Any]) -> str:
    """A file of serve_configs/ as a RayService runs it: reachable from other nodes, with keys, files on the storage."""
    service, storage = values["services"][name], values["storage"]["path"]

    def on_storage(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: on_storage(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [on_storage(inner) for inner in part]
        return f"{storage}/{part}" if isinstance(part, str) and part.startswith("runs/") else part

    config = yaml.safe_load((ROOT / f"serve_configs/{name}.yaml").read_text(encoding="utf-8"))
    config["http_options"]["host"] = "0.0.0.0"  # noqa: S104 -- inside a Pod; a NetworkPolicy opens this port alone
    (application,) = config["applications"]
    application["args"] |= {"index": service["index"], "api_keys_env": "RAYDR_API_KEYS"}
    deployments = {deployment["name"]: deployment for deployment in application["deployments"]}
    deployments["Ingress"]["user_config"]["index"] = service["index"]
    for deployment, changes in service["deployments"].items():
        deployments[deployment] |= changes
    return yaml.safe_dump(on_storage(config), sort_keys=False, width=110)


def rendered(values: dict[str, Any]) -> dict[str, str]:
    """The text of every file, by its name."""
    # Nothing here is HTML, and everything that is filled in comes from this repository.
    environment = Environment(  # noqa: S701
        loader=FileSystemLoader(HERE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    everywhere = values | {"version": versions()}

    def write(template: str, **more: Any) -> str:
        return environment.get_template(template).render(everywhere | more)

    def groups(wanted: list[str]) -> list[dict[str, Any]]:
        return [group for group in values["groups"] if group["name"] in wanted]

    plain = ("namespace.yaml", "secrets.example.yaml", "pod-monitor.yaml", "prometheus.yaml")
    files = {name: write(name) for name in plain} | {DASHBOARD: runpy.run_path(str(HERE / "dashboard.py"))["as_json"]()}
    for name in ("ray-up.aws.yaml", "ray-cluster.yaml"):
        files[name] = write(name, kind="cluster", name="raydr", node_groups=values["groups"])
    for verb, job in values["jobs"].items():
        settings = [setting.format(storage=values["storage"]["path"]) for setting in job["settings"]]
        files[f"ray-job.{verb}.yaml"] = write(
            "ray-job.yaml",
            kind="job",
            name=f"raydr-{verb}",
            verb=verb,
            config=job["config"],
            settings=settings,
            node_groups=groups(job["groups"]),
        )
    for service, wanted in values["services"].items():
        files[f"ray-service.{service}.yaml"] = write(
            "ray-service.yaml",
            kind="service",
            name=f"raydr-{service}",
            service=service,
            serve_config=serve_config(service, values),
            node_groups=groups(wanted["groups"]),
        )
    return files


def read_values() -> dict[str, Any]:
    return yaml.safe_load((HERE / "values.yaml").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the manifests of cluster/ from templates and values.yaml.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in rendered(read_values()).items():
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
