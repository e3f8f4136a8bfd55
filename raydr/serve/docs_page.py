"""`/docs`: the OpenAPI document as a plain page, without scripts and without anything loaded from another host."""

from __future__ import annotations

import json
from html import escape
from typing import Any


def docs_page(openapi: dict[str, Any]) -> str:
    """HTML that lists every route with its fields, an example and a `curl` line."""
    info = openapi["info"]
    schemas = openapi.get("components", {}).get("schemas", {})
    sections = [
        _section(path, method, operation, schemas)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} HTTP API</title></head><body><main>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}: the HTTP API</h1><p>{escape(info['summary'])} "
        'The same in machine-readable form: <a href="openapi.json">openapi.json</a>. '
        '<a href="./">The search page</a>.</p>' + "".join(sections) + "</main></body></html>"
    )


def _section(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"]
    reference = _body_reference(operation)
    if reference:
        schema = schemas[reference]
        rows = "".join(_row(name, field, schema) for name, field in schema["properties"].items())
        parts.append(f"<table><tr><th>field</th><th>type</th><th>default</th><th>meaning</th></tr>{rows}</table>")
        for example in schema.get("examples", []):
            body = json.dumps(example)
            parts.append(f"<pre>curl -H 'Content-Type: application/json' -d '{escape(body)}' $URL{escape(path)}</pre>")
    return "<section>" + "".join(parts) + "</section>"


def _body_reference(operation: dict[str, Any]) -> str | None:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference = content.get("schema", {}).get("$ref")
    return reference.rpartition("/")[2] if reference else None


def _row(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    default = "required" if name in schema.get("required", []) else json.dumps(field.get("default"))
    cells = (f"<code>{escape(name)}</code>", escape(_type(field)), f"<code>{escape(default)}</code>")
    meaning = escape(field.get("description", ""))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in (*cells, meaning)) + "</tr>"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(arm) for arm in field["anyOf"]))
    if "enum" in field:
        return " | ".join(json.dumps(value) for value in field["enum"])
    if "const" in field:
        return json.dumps(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return field.get("type", "any")
