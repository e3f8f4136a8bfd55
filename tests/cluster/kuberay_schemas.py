"""Makes KubeRay's custom resource definitions into one small JSON schema to validate manifests with, offline.

Notable: Kubernetes drops a field it does not know without a word, so here every object that lists its fields refuses
others. What occurs more than once (a Pod's description occurs eight times) is written once, under `$defs`. Rules in CEL
(`x-kubernetes-validations`) are left out: a JSON schema cannot hold them.

    git clone --branch v1.7.0 https://github.com/ray-project/kuberay       (Apache-2.0, as is what this writes)
    python tests/cluster/kuberay_schemas.py kuberay/ray-operator/config/crd/bases

writes `kuberay-1.7.0.json` beside this file.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

VERSION = "1.7.0"
SCHEMAS = Path(__file__).with_name(f"kuberay-{VERSION}.json")
KINDS = ("rayclusters", "rayjobs", "rayservices")
_WORTH_A_NAME = 120
"""Characters from which on a repeated part is written once."""


def strict(schema: Any) -> Any:
    """The schema in plain JSON Schema, refusing fields that are not listed."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(part) for name, part in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-")
    }
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


def shared(kinds: dict[str, Any]) -> dict[str, Any]:
    """One schema for all kinds, repeated parts under `$defs`, named after the field where they first occur."""
    times: Counter[str] = Counter()

    def count(part: Any) -> None:
        if isinstance(part, dict):
            times[json.dumps(part)] += 1
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            count(inner)

    count(kinds)
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def refer(part: Any, field: str) -> Any:
        if isinstance(part, list):
            return [refer(inner, field) for inner in part]
        if not isinstance(part, dict):
            return part
        text = json.dumps(part)
        # A table of properties may well have one that is called `type`.
        is_schema = isinstance(part.get("type"), str) or isinstance(part.get("anyOf"), list)
        if not (is_schema and times[text] > 1 and len(text) > _WORTH_A_NAME):
            return {key: refer(inner, field if key in ("properties", "items") else key) for key, inner in part.items()}
        if text not in names:
            taken = sum(name.split(".")[0] == field for name in definitions)
            names[text] = name = f"{field}.{taken}" if taken else field
            definitions[name] = {}  # holds the name while what is inside is looked at
            definitions[name] = {key: refer(inner, field) for key, inner in part.items()}
        return {"$ref": f"#/$defs/{names[text]}"}

    properties = {kind: refer(schema, kind) for kind, schema in kinds.items()}
    return {"$defs": {**definitions, **properties}}


def main(folder: Path) -> None:
    kinds = {}
    for plural in KINDS:
        definition = yaml.safe_load((folder / f"ray.io_{plural}.yaml").read_text(encoding="utf-8"))["spec"]
        (version,) = (version for version in definition["versions"] if version["name"] == "v1")
        schema = version["schema"]["openAPIV3Schema"]
        del schema["properties"]["status"]  # written by the operator, never by a manifest
        kinds[definition["names"]["kind"]] = strict(schema)
    notice = f"From the CRDs of KubeRay v{VERSION} (ray-project/kuberay, Apache-2.0) by {Path(__file__).name}."
    made = {"$comment": notice, **shared(kinds)}
    SCHEMAS.write_text(json.dumps(made, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
