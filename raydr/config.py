"""Configuration: one pydantic schema per component, YAML files, `key=value` overrides, components by import path.

Notable: unknown keys are errors that suggest the nearest known one; a key written twice in a YAML file is an error;
`5e-5`, which YAML 1.1 reads as a string, is read as the number it looks like wherever a schema says float. A component
is named like a Ray Serve application (`import_path` + `args`), so adding one edits no existing file.

    config = load(ReproduceConfig, "jobs/configs/zero_shot.yaml", ["data.split=test", "out=/tmp/run"])
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from raydr.errors import ConfigError
from raydr.secrets import is_secret

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """Base of every schema: immutable, no unknown keys, attribute docstrings as the documentation of the fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # Ray prints pydantic's own message of a faulty Serve config
    )


ConfigClass: TypeAlias = type[Config]
"""For a class that has an attribute `Config` of its own, where `type[Config]` would name that attribute."""


class Component(Config):
    """A class named by import path, with its arguments: `{import_path: "package.module:Name", args: {...}}`."""

    import_path: str
    """`module:attribute`, as in a Ray Serve config."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Handed to the class's own `Config` schema where it has one, otherwise as keyword arguments."""

    @field_validator("import_path")
    @classmethod
    def _has_a_colon(cls, path: str) -> str:
        if path.count(":") != 1 or not all(path.split(":")):
            raise ValueError(f"{path!r} is not of the form 'package.module:Name'")
        return path

    def build(self) -> Any:
        """An instance of the named class. Raises `ConfigError` when it does not exist or its arguments do not fit."""
        factory = import_object(self.import_path)
        schema = getattr(factory, "Config", None)
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            return factory(validate(schema, self.args, where=f"args of {self.import_path}"))
        try:
            return factory(**self.args)
        except TypeError as error:
            raise ConfigError(f"cannot build {self.import_path} from args {sorted(self.args)}: {error}") from error


def import_object(path: str) -> Any:
    """The attribute that `package.module:Name` names. Raises `ConfigError` naming what is missing."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        message = f"import_path {path!r}: no module named {error.name!r} (is its package installed?)"
        raise ConfigError(message) from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(f"import_path {path!r}: {module_name} has no {attribute!r}{_nearest(attribute, public)}")
    return getattr(module, attribute)


class _StrictLoader(yaml.SafeLoader):
    """`SafeLoader` that refuses a key written twice, which PyYAML would silently let win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is one value", key_node.start_mark)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{key_node.start_mark.name}, line {line}: key {key!r} is written twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""Also what is not UTF-8, a number of thousands of digits, a date that is none, and endless nesting."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        with path.open(encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this file holds {type(content).__name__}")
    return content


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with every `dotted.key=value` set; the value is read as YAML (`k=10`, `names=[a, b]`, `x=null`)."""
    result = _deep_copy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override!r} is not an override: write key=value, for example data.split=test")
        *parents, last = key.strip().split(".")
        node = result
        for parent in parents:
            if not isinstance(node.setdefault(parent, {}), dict):
                node[parent] = {}
            node = node[parent]
        try:
            node[last] = yaml.load(text, Loader=_StrictLoader) if text else ""  # noqa: S506
        except _NOT_YAML as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
    return result


def load(schema: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """The config in a YAML file (None: only defaults and overrides), checked against `schema`."""
    values = read_yaml(path) if path is not None else {}
    return validate(schema, apply_overrides(values, overrides), where=str(path or schema.__name__))


def validate(schema: type[C], values: Mapping[str, Any], *, where: str) -> C:
    """`values` as a `schema`. Raises `ConfigError` with one line per fault: the field, what is wrong, the way out."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{where}: {error.error_count()} problem{'s'[: error.error_count() != 1]} in the configuration"]
        for fault in error.errors():
            location = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                message = "unknown key" + _nearest(str(fault["loc"][-1]), _known_keys(schema, fault["loc"][:-1]))
            elif fault["type"] == "value_error" and isinstance(fault["input"], Mapping):
                pass  # values that do not go together, which the message names: no need of all the others
            elif fault["type"] != "missing" and not is_secret(location, fault["input"]):
                message += f" (got {fault['input']!r})"
            lines.append(f"  {location or '(top level)'}: {message}")
        raise ConfigError("\n".join(lines)) from error


def part_of(schema: type[C], config: BaseModel) -> C:
    """The settings of `config` that `schema` has; `config` has all of them, as one that inherits from it does (which
    pydantic's own `from_attributes` would give back whole).
    """
    return schema(**{name: getattr(config, name) for name in schema.model_fields})


def _known_keys(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names of the fields at `location` of a schema; empty where the schema cannot be followed."""
    for part in location:
        field = schema.model_fields.get(str(part))
        models = _models_in(field.annotation) if field else []
        if not models:
            return []
        schema = models[0]
    return list(schema.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models_in(inner)]


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are: {', '.join(sorted(known)[:20])}" if known else ""


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}
