"""Every method has its line in docs/papers.md, a config that can be run, and a test."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import raydr.methods
from raydr.config import load
from raydr.methods.base import Method
from raydr.verbs.config import RunConfig

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "jobs/configs").glob("*.yaml"))


def methods() -> list[type[Method]]:
    names = [found.name for found in pkgutil.iter_modules(raydr.methods.__path__) if found.name != "base"]
    modules = [importlib.import_module(f"raydr.methods.{name}") for name in names]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    }
    return sorted(classes, key=lambda method: method.__qualname__)


def path_of(method: type[Method]) -> str:
    return f"{method.__module__}:{method.__qualname__}"


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """Import path -> config, as docs/papers.md says."""
    text = (REPOSITORY / "docs/papers.md").read_text()
    return dict(re.findall(r"\| `(raydr\.methods[\w.:]+)` \| `([\w.]+)` \|", text))


def test_the_table_names_every_method_and_nothing_else(table):
    assert sorted(table) == sorted(map(path_of, methods()))


@pytest.mark.parametrize("method", methods(), ids=path_of)
def test_a_method_has_a_config_and_a_test(method, table):
    assert (REPOSITORY / "jobs/configs" / table[path_of(method)]).is_file()
    files = [file for file in (REPOSITORY / "tests").rglob("test_*.py") if file != Path(__file__)]
    tests = "\n".join(file.read_text() for file in files)
    assert method.__module__ in tests


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_is_valid_and_its_method_can_be_built(file, table):
    config = load(RunConfig, file, ["data.path=somewhere"])
    assert isinstance(config.method.build(), Method)
    assert file.name.replace("_small.yaml", ".yaml") in table.values()
    assert f"jobs/configs/{file.name}" in file.read_text(), "the comment at its top says how it is run"
