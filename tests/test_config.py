"""Configuration: files, overrides, components, and messages that say what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raydr.config import Component, Config, apply_overrides, import_object, load, read_yaml
from raydr.errors import ConfigError


class Inner(Config):
    learning_rate: float = 0.1
    """Step size."""
    names: list[str] = []


class Outer(Config):
    inner: Inner = Inner()
    size: int
    path: Path | None = None


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_a_file_and_overrides_make_a_config(tmp_path):
    file = write(tmp_path, "size: 3\ninner: {learning_rate: 0.5}\n")
    config = load(Outer, file, ["inner.names=[a, b]", "size=4", "path=/tmp/x"])
    assert config == Outer(size=4, inner=Inner(learning_rate=0.5, names=["a", "b"]), path=Path("/tmp/x"))


def test_without_a_file_there_are_defaults_and_overrides():
    assert load(Outer, None, ["size=1"]).inner.learning_rate == 0.1


def test_yaml_one_point_one_floats_are_read_as_floats(tmp_path):
    assert load(Outer, write(tmp_path, "size: 1\ninner: {learning_rate: 5e-5}\n")).inner.learning_rate == 5e-5
    assert load(Outer, None, ["size=1", "inner.learning_rate=5e-5"]).inner.learning_rate == 5e-5


def test_a_config_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        Inner().learning_rate = 1.0


def test_attribute_docstrings_are_the_field_documentation():
    assert Inner.model_fields["learning_rate"].description == "Step size."


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("size: 3\nsiez: 4\n", [], r"siez: unknown key; did you mean 'size'\?"),
        (
            "size: 3\ninner: {learnign_rate: 4}\n",
            [],
            r"inner\.learnign_rate: unknown key; did you mean 'learning_rate'\?",
        ),
        ("size: three\n", [], r"size: .*integer.*\(got 'three'\)"),
        ("inner: {}\n", [], r"size: Field required"),
        ("size: 3\nsize: 4\n", [], r"config\.yaml, line 2: key 'size' is written twice"),
        ("size: [1\n", [], r"config\.yaml: not valid YAML"),
        ("- 1\n", [], r"a config is a mapping .* holds list"),
        ("", [], r"a config is a mapping .* holds NoneType"),
        ("size: 3\n", ["size"], r"'size' is not an override: write key=value"),
        ("size: 3\n", ["=4"], r"'=4' is not an override"),
        ("size: 3\n", ["size=[1"], r"the value is not valid YAML"),
    ],
)
def test_a_fault_is_named_with_the_way_out(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(Outer, write(tmp_path, text), overrides)


def test_all_faults_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(Outer, write(tmp_path, "siez: 4\ninner: {learning_rate: fast}\n"))
    message = str(caught.value)
    assert "3 problems" in message
    assert all(name in message for name in ("siez", "size", "inner.learning_rate"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load(Outer, tmp_path / "nowhere.yaml")


def test_yaml_cannot_make_python_objects(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(write(tmp_path, "size: !!python/object/apply:os.getcwd []\n"))


def test_overrides_leave_the_original_alone_and_may_be_deep():
    values: dict[str, Any] = {"a": {"b": 1}, "c": 2}
    assert apply_overrides(values, ["a.b=3", "c.d.e=x=y", "f="]) == {"a": {"b": 3}, "c": {"d": {"e": "x=y"}}, "f": ""}
    assert values == {"a": {"b": 1}, "c": 2}


class WithSchema:
    Config = Inner

    def __init__(self, config: Inner) -> None:
        self.config = config


class WithKeywords:
    def __init__(self, size: int) -> None:
        self.size = size


HERE = __name__


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch):
    """This module under its own name, which pytest's importlib mode does not promise."""
    monkeypatch.setitem(sys.modules, "config_components", sys.modules[HERE])


def test_a_component_is_built_from_its_own_schema():
    built = Component(import_path="config_components:WithSchema", args={"learning_rate": "1e-3"}).build()
    assert built.config == Inner(learning_rate=0.001)


def test_a_component_without_a_schema_takes_keywords():
    assert Component(import_path="config_components:WithKeywords", args={"size": 3}).build().size == 3


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        (
            "config_components:WithSchema",
            {"learning_rat": 1},
            r"args of config_components:WithSchema.*\n.*did you mean",
        ),
        ("config_components:WithKeywords", {"sise": 1}, r"cannot build config_components:WithKeywords"),
        ("config_components:WithKeyword", {}, r"has no 'WithKeyword'; did you mean 'WithKeywords'\?"),
        ("no_such_module:X", {}, r"no module named 'no_such_module'"),
    ],
)
def test_a_component_that_cannot_be_built_says_why(path, args, message):
    with pytest.raises(ConfigError, match=message):
        Component(import_path=path, args=args).build()


@pytest.mark.parametrize("path", ["raydr.config", "a:b:c", ":b", "a:"])
def test_an_import_path_has_a_module_and_a_name(path):
    with pytest.raises(ValidationError, match=r"package\.module:Name"):
        Component(import_path=path)


def test_import_object_finds_what_it_names():
    assert import_object("raydr.config:Component") is Component
