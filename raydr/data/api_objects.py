"""The documented public objects of a Python package, found from its sources without importing it.

Notable: re-exports (`from ._core import mean`, star imports, `__all__`) are followed to the shortest public name of
each function, class and method. A method is reported once: under the class that defines it, or, where that is a base
class nobody re-exports, under the shortest class that inherits it (`pandas.Series.head`, not
`pandas.core.generic.NDFrame.head`).

    for item in read_objects("numpy", find_files("numpy")):
        print(item.name, item.signature)
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from raydr.data.api_sources import Definition, Kind, SourceModule, read_source, root_of

_MAX_SIGNATURE_CHARACTERS = 240

_Home: TypeAlias = tuple[str, str]
"""Where something is defined: module, name."""


@dataclass(frozen=True)
class ApiObject:
    """One documented function, class, method or property."""

    name: str
    """Shortest public qualified name."""
    kind: Kind
    signature: str
    """The qualified name with its parameters, without annotations."""
    doc: str
    """The docstring, dedented."""
    package: str
    module: str
    """The module that defines the object."""
    source: str
    """`path/on/the/import/path.py:line`."""


def read_objects(
    package: str, files: Sequence[Path], *, on_file: Callable[[], object] = lambda: None
) -> list[ApiObject]:
    """The documented public objects in a package's files, sorted by name; `on_file` is called after each file."""
    modules: dict[str, SourceModule] = {}
    with _no_garbage_collection():
        for file in files:
            module = read_source(file, root_of(files, package))
            if module is not None:
                modules[module.name] = module
            on_file()
    return sorted(_Names(package, modules).objects(), key=lambda item: item.name)


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    """Syntax trees are large, short-lived and free of cycles; collecting among them costs as much as parsing them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Names:
    """Finds the public names of definitions by following imports inside one package."""

    def __init__(self, package: str, modules: dict[str, SourceModule]) -> None:
        self.package = package
        self.modules = modules
        found: dict[_Home, list[str]] = {}
        for module in modules.values():
            for name in self._exports(module) if module.is_public else []:
                if (home := self._resolve(module.name, name)) is not None:
                    found.setdefault(home, []).append(f"{module.name}.{name}")
        # At equal depth the place where a thing is written wins: matplotlib.pyplot.plot, not matplotlib.pylab.plot.
        self.public = {
            home: min(names, key=lambda name, home=home: (name.count("."), name != ".".join(home), len(name), name))
            for home, names in sorted(found.items())
        }

    def objects(self) -> Iterator[ApiObject]:
        """Every public object that has a docstring, each once."""
        named: dict[str, tuple[SourceModule, Definition]] = {}
        for (module_name, name), public in self.public.items():
            named[public] = (self.modules[module_name], self.modules[module_name].definitions[name])
        for public, home in self._methods().items():
            named.setdefault(public, home)
        for module in self.modules.values():
            for public, definition in module.attached.items():
                named.setdefault(public, (module, definition))
        for public, (module, definition) in named.items():
            if definition.doc:
                yield self._object(public, module, definition)

    def _object(self, name: str, module: SourceModule, definition: Definition) -> ApiObject:
        doc, parameters = definition.doc, definition.parameters
        # Docstrings of C functions, and of functions that hide theirs behind `*args`, open with the signature.
        written = re.match(
            rf"(?:\w+\.)?{re.escape(name.rpartition('.')[2])}(\((?:[^()]|\([^()]*\))*\))(?: *->.*)?", doc
        )
        if written is not None:
            doc, parameters = doc[written.end() :].lstrip(), " ".join(written[1].split())
        signature = name + parameters
        if len(signature) > _MAX_SIGNATURE_CHARACTERS:
            signature = signature[: _MAX_SIGNATURE_CHARACTERS - 4].rpartition(",")[0] + ", ...)"
        source = f"{module.path}:{definition.line}"
        return ApiObject(name, definition.kind, signature, doc, self.package, module.name, source)

    def _methods(self) -> dict[str, tuple[SourceModule, Definition]]:
        """Public name -> method, for the methods of every public class, inherited ones included where they are due."""
        names: dict[tuple[_Home, str], list[str]] = {}
        for home, public in self.public.items():
            for owner in self._ancestors(home):
                if owner != home and not self._lends_methods(owner, public):
                    continue
                for member in self._definition(owner).members:
                    names.setdefault((owner, member), []).append(f"{public}.{member}")
        return {
            min(found, key=_length): (self.modules[owner[0]], self._definition(owner).members[member])
            for (owner, member), found in sorted(names.items())
        }

    def _lends_methods(self, owner: _Home, heir: str) -> bool:
        """Whether a base class leaves its methods to an heir: it is private, or not re-exported and deeper."""
        own = self.public.get(owner)
        return own is None or (own == ".".join(owner) and own.count(".") > heir.count("."))

    def _ancestors(self, home: _Home) -> Iterator[_Home]:
        """The class itself, then its bases inside the package, depth first."""
        pending, seen = [home], set()
        while pending:
            current = pending.pop(0)
            if current in seen:
                continue
            seen.add(current)
            yield current
            for base in self._definition(current).bases:
                module_name, _, name = base.rpartition(".")
                if not module_name and (found := self._resolve(current[0], name)) is not None:
                    pending.append(found)

    def _definition(self, home: _Home) -> Definition:
        return self.modules[home[0]].definitions[home[1]]

    def _exports(self, module: SourceModule, seen: frozenset[str] = frozenset()) -> set[str]:
        """Names that `from module import *` could bring; for a package also what its `__init__` imports from inside."""
        names = set(module.exported or ())
        if module.exported is None or module.is_package:
            names |= set(module.definitions)
        if module.is_package:
            inside = (name for name, (source, _) in module.imports.items() if source.split(".")[0] == self.package)
            names.update(inside)
        if module.exported is None or module.is_package:
            for star in module.stars:
                if star in self.modules and star not in seen:
                    names |= self._exports(self.modules[star], seen | {module.name})
        return {name for name in names if not name.startswith("_")}

    def _resolve(self, module_name: str, name: str, seen: frozenset[_Home] = frozenset()) -> _Home | None:
        """Where the thing that a module calls `name` is defined; None outside the package or not statically known."""
        module = self.modules.get(module_name)
        if module is None or (module_name, name) in seen:
            return None
        if name in module.definitions:
            return module_name, name
        seen |= {(module_name, name)}
        if name in module.imports:
            return self._resolve(*module.imports[name], seen)
        for star in module.stars:
            if (found := self._resolve(star, name, seen)) is not None:
                return found
        return None


def _length(name: str) -> tuple[int, int, str]:
    return name.count("."), len(name), name
