"""Writes docs/configuration.md from the pydantic schemas, so that the page cannot drift from the code.

Notable: name, type, default and meaning of a field all come from the schema (the meaning is the attribute's docstring);
a schema nested in another becomes a section of its own under the dotted name used in overrides. `--check` writes
nothing and fails when the page is out of date.

    python docs/make_configuration.py [--check]
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raydr.config import import_object

PAGE = Path(__file__).with_name("configuration.md")

# (heading, what it is, dotted prefix of the fields, schema)
SECTIONS = [
    (
        "A run",
        "The config of `raydr ingest|embed|index|search|rerank|evaluate|reproduce|mine|train` and of the scripts in\n"
        "`jobs/`, such as `jobs/configs/zero_shot.yaml`.",
        "",
        "raydr.verbs.config:RunConfig",
    ),
    (
        "The encoder",
        "`method.args` of `raydr.methods.zero_shot:ZeroShot`, and of every method whose encoder is a `TextEncoder`.",
        "method.args.",
        "raydr.encoders.text:TextEncoderConfig",
    ),
    ("The demo", "`raydr demo key=value ...`", "", "raydr.verbs.demo:DemoConfig"),
    (
        "The demo of picture search",
        "`raydr demo-images key=value ...`",
        "",
        "raydr.verbs.demo_images:DemoImagesConfig",
    ),
    (
        "A plan",
        "The config of `raydr plan`; [Scaling](scaling.md) has examples.",
        "",
        "raydr.planning.config:PlanConfig",
    ),
    (
        "Serving",
        "`args` of `raydr.serve.app:build_app` in a Serve config file such as `serve_configs/local.yaml`.",
        "args.",
        "raydr.serve.config:AppArgs",
    ),
]

OPENING = """\
<!-- Written by docs/make_configuration.py from the schemas. Edit the docstrings of the fields, then run it again. -->

# Configuration

Every part has one schema, next to the code that reads it. A config is a YAML file; `key=value` on the command line
sets any field by its dotted name, and the value is read as YAML:

```sh
raydr reproduce jobs/configs/zero_shot.yaml data.path=DIR search.k=100 "evaluate.measures=[nDCG@10, AP]"
```

`--dry-run` prints the resolved config, and the manifest of every artifact keeps it. An unknown key is an error that
names the nearest known one; so is a key written twice. Environment variables say where things are, never numbers.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [OPENING]
    for heading, introduction, prefix, path in SECTIONS:
        parts += [f"## {heading}\n", introduction + "\n", *_tables(import_object(path), prefix)]
    return "\n".join(parts).rstrip() + "\n"


def fields_without_meaning() -> list[str]:
    """Dotted names of the fields that say nothing about themselves."""
    found = []
    for *_, prefix, path in SECTIONS:
        for name, schema in _walk(import_object(path), prefix):
            found += [f"{name}{field}" for field, info in schema.model_fields.items() if not info.description]
    return found


def _walk(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A schema and those nested in it, each with its dotted prefix."""
    yield prefix, schema
    for name, info in schema.model_fields.items():
        for inner in _schemas_in(info.annotation):
            yield from _walk(inner, f"{prefix}{name}.")


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for part in get_args(annotation) for schema in _schemas_in(part)]


def _tables(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, part in _walk(schema, prefix):
        if name != prefix:
            yield f"### {name.removesuffix('.')}\n"
        yield "| field | type | default | meaning |\n| --- | --- | --- | --- |"
        yield from (_row(f"{name}{field}", info) for field, info in part.model_fields.items())
        yield ""


def _row(name: str, info: FieldInfo) -> str:
    meaning = " ".join((info.description or "").split())
    # No pipes inside the cells: GitHub and Python-Markdown escape them differently.
    kinds = ", ".join(f"`{_type(kind)}`" for kind in _alternatives(info.annotation))
    return f"| `{name}` | {kinds} | {_default(info)} | {meaning} |"


def _alternatives(annotation: Any) -> list[Any]:
    """The arms of a union and the values of a `Literal`; any other type alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else [annotation]


def _type(annotation: Any) -> str:
    """A type as a person writes it in YAML: `int`, `dense`, `list[str]`, `mapping`, `null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, str):
        return annotation
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    if annotation is Path:
        return "path"
    if origin in (Literal, Union, types.UnionType):
        return "/".join(_type(kind) for kind in _alternatives(annotation))
    if origin is not None:
        inner = ", ".join("..." if part is Ellipsis else _type(part) for part in arguments)
        return f"{'list' if origin is tuple else origin.__name__}[{inner.removesuffix(', ...')}]"
    return getattr(annotation, "__name__", str(annotation))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return ""
    if isinstance(default, BaseModel):
        given = default.model_dump(mode="json", exclude_defaults=True)
        pairs = ", ".join(f"{name}: {value}" for name, value in given.items())
        return f"`{{{pairs}}}`" if given else "see below"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (tuple, frozenset)):
        default = list(default)
    return f"`{default!r}`" if isinstance(default, str) and not default.strip() else f"`{default}`"


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is out of date: run python {Path(sys.argv[0])}")
