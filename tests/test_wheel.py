"""The wheel built from the tree installs and works outside it, with its assets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, so that leftovers of an earlier build cannot get into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "raydr", source / "raydr", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ".", cwd=source)
    (built,) = out.glob("raydr-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with raydr from the wheel and everything else from this environment."""
    home = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    python = home / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    # Behind the new environment's own packages; only the folder is added, so this checkout's editable hook is not.
    (site / "everything_else.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_every_module_and_asset_of_the_tree_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    tree = {
        str(file.relative_to(REPOSITORY))
        for file in (REPOSITORY / "raydr").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert tree - packed == set()
    assert "raydr/serve/ui/index.html" in packed


def test_nothing_but_the_package_is_in_the_wheel(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"raydr"} | {top for top in tops if top.endswith(".dist-info")}
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_it_is_the_installed_package_that_runs(installed):
    where = run(installed, "-c", "import raydr; print(raydr.__file__)", cwd=installed.parent)
    assert str(REPOSITORY) not in where


def test_every_module_can_be_imported_outside_the_tree(installed):
    code = """
import importlib, pkgutil, raydr
names = [m.name for m in pkgutil.walk_packages(raydr.__path__, "raydr.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    assert int(run(installed, "-c", code, cwd=installed.parent)) > 30


def test_the_command_works_outside_the_tree(installed, tmp_path):
    command = installed.parent / "raydr"
    assert "raydr demo" in run(command, "--help", cwd=tmp_path)
    assert "all-MiniLM-L6-v2" in run(command, "doctor", cwd=tmp_path)
