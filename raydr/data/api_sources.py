"""The Python sources of installed packages, parsed but never imported: definitions, imports, docstrings.

Notable: statements inside `if`, `try` and `with` count, so lazily importing packages (`if TYPE_CHECKING:`) are seen
through; functions written in C are found where a package keeps their docstrings in Python (numpy's `add_newdoc`,
torch's `add_docstr`). `raydr.data.api_objects` follows the names.

    module = read_source(file, root)
    module.definitions["mean"].doc
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["function", "class", "method", "property"]

STANDARD_LIBRARY = "python"
"""The name under which the modules of the standard library count as one package."""

_SKIPPED_PARTS = frozenset(
    {"tests", "test", "testing", "conftest", "_vendor", "vendored", "vendor", "externals", "extern", "site-packages"}
)
_SKIPPED_FOLDERS = ("transformers/models/",)
"""Hundreds of copies of one documentation with a model's name changed: half of all reading time for nothing new."""
_SKIPPED_STANDARD = frozenset(
    {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "antigravity", "this", "distutils"}
)
_FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Definition:
    """A function, class, method or property as it is written."""

    kind: Kind
    parameters: str
    """`(a, b=1)`, without annotations and `self`; empty for a property."""
    doc: str
    line: int
    bases: list[str] = field(default_factory=list)
    members: dict[str, Definition] = field(default_factory=dict)


@dataclass
class SourceModule:
    """What one file defines, imports and exports."""

    name: str
    is_package: bool
    path: str
    """Relative to the folder on the import path."""
    definitions: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Local name -> (module, name there), of `from module import name`."""
    stars: list[str] = field(default_factory=list)
    exported: list[str] | None = None
    """The literal part of `__all__`."""
    attached: dict[str, Definition] = field(default_factory=dict)
    """Public qualified name -> an object whose docstring is attached from here (`add_docstr(torch.abs, ...)`)."""

    @property
    def is_public(self) -> bool:
        """Whether no part of the name starts with an underscore."""
        return not any(part.startswith("_") for part in self.name.split("."))


def installed_packages() -> list[str]:
    """Importable top-level names of this environment's site-packages, then the standard library."""
    names: set[str] = set()
    for folder in _site_folders():
        for child in folder.iterdir():
            is_package = (child / "__init__.py").is_file()
            if (is_package or child.suffix == ".py") and child.stem.isidentifier() and not child.stem.startswith("_"):
                names.add(child.stem)
    return [*sorted(names - _SKIPPED_PARTS), STANDARD_LIBRARY]


def find_files(package: str, search_path: Sequence[Path] | None = None) -> list[Path]:
    """The source files of a package in a fixed order, without tests, vendored code and copies; empty when absent."""
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in _SKIPPED_STANDARD)
        return [file for name in names for file in _files_of(root, name)]
    for root in search_path if search_path is not None else _site_folders():
        if files := _files_of(root, package):
            return files
    return []


def _site_folders() -> list[Path]:
    return [Path(p) for p in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])]


def _files_of(root: Path, name: str) -> list[Path]:
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    if not (root / name / "__init__.py").is_file():
        return []
    files = (f for f in (root / name).rglob("*.py") if not _is_skipped(f.relative_to(root)))
    return sorted(files, key=lambda f: f.parts)


def _is_skipped(relative: Path) -> bool:
    parts = relative.with_suffix("").parts
    if relative.as_posix().startswith(_SKIPPED_FOLDERS):
        return True
    return any(part in _SKIPPED_PARTS or part.startswith("test_") or part.endswith("_test") for part in parts)


def root_of(files: Sequence[Path], package: str) -> Path:
    """The folder on the import path that a package's files lie under."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    first = files[0]
    return first.parent if first.stem == package else next(p.parent for p in first.parents if p.name == package)


def read_source(file: Path, root: Path) -> SourceModule | None:
    """The module in `file`; None where the file is no Python of this version (a template, say)."""
    relative = file.relative_to(root)
    parts = relative.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = SourceModule(".".join(parts[:-1] if is_package else parts), is_package, relative.as_posix())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return None  # a template, or a file for another Python
    for statement in _statements(tree.body):
        _read_statement(module, statement)
    return module


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those inside `if`, `try` and `with` included."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            handlers = [inner for handler in statement.handlers for inner in handler.body]
            yield from _statements([*statement.body, *handlers, *statement.orelse, *statement.finalbody])
        elif isinstance(statement, ast.With):
            yield from _statements(statement.body)
        else:
            yield statement


def _read_statement(module: SourceModule, statement: ast.stmt) -> None:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            definition = _read_definition(statement)
            known = module.definitions.get(statement.name)
            if definition is not None and not (known and known.doc and not definition.doc):
                module.definitions[statement.name] = definition
        case ast.ImportFrom():
            source = _absolute(module, statement)
            for alias in statement.names:
                if alias.name == "*":
                    module.stars.append(source)
                else:
                    module.imports[alias.asname or alias.name] = (source, alias.name)
        case ast.Assign(targets=[ast.Name("__all__")]) | ast.AugAssign(target=ast.Name("__all__")):
            module.exported = [*(module.exported or []), *_strings(statement.value)]
        case ast.Assign(targets=[ast.Name(name)], value=ast.Call() as call) if _is_newdoc(call):
            attached = _read_newdoc(module, call)
            if attached is not None:
                module.definitions[name] = attached[1]
        case ast.Expr(value=ast.Call() as call) if _is_newdoc(call):
            attached = _read_newdoc(module, call)
            if attached is not None and attached[0]:
                module.attached[attached[0]] = attached[1]


def _read_definition(node: _FunctionNode | ast.ClassDef) -> Definition | None:
    decorators = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
    if "overload" in decorators:
        return None
    doc = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        return _read_class(node, doc)
    if any(name.endswith("property") for name in decorators):
        return Definition("property", "", doc, node.lineno)
    return Definition("function", _parameters(node.args), doc, node.lineno)


def _read_class(node: ast.ClassDef, doc: str) -> Definition:
    bases = [ast.unparse(base).split("[")[0] for base in node.bases]
    result = Definition("class", "", doc, node.lineno, bases)
    for inner in _statements(node.body):
        if not isinstance(inner, _FunctionNode):
            continue
        if inner.name == "__init__" or (inner.name == "__new__" and not result.parameters):
            result.parameters = _parameters(_without_self(inner).args)
        if inner.name.startswith("_"):
            continue
        member = _read_definition(_without_self(inner))
        # A property's setter has no docstring of its own and must not hide the getter's.
        if member is not None and (member.doc or inner.name not in result.members):
            member.kind = "property" if member.kind == "property" else "method"
            result.members[inner.name] = member
    return result


def _without_self(node: _FunctionNode) -> _FunctionNode:
    """The method with its first parameter taken off, unless it is static."""
    if any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list):
        return node
    positional = node.args.posonlyargs or node.args.args
    del positional[:1]
    # Defaults belong to the last parameters: one too many is left when `self` had one.
    count = len(node.args.posonlyargs) + len(node.args.args)
    node.args.defaults = node.args.defaults[len(node.args.defaults) - min(count, len(node.args.defaults)) :]
    return node


def _parameters(arguments: ast.arguments) -> str:
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


def _absolute(module: SourceModule, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - statement.level + module.is_package]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


def _strings(node: ast.expr) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


# ---- docstrings that Python sources attach to C functions -------------------------------------------------------


def _is_newdoc(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name.lstrip("_") in {"add_newdoc", "add_docstr", "add_docstr_all"}


def _read_newdoc(module: SourceModule, call: ast.Call) -> tuple[str, Definition] | None:
    """The public name ("" where the call names none) and the object that `add_docstr(...)` documents."""
    if not call.args:
        return None
    last, member = call.args[-1], ""
    if isinstance(last, ast.Tuple) and len(last.elts) == 2:  # add_newdoc(module, "ndarray", ("shape", doc))
        member, last = f".{_literal(last.elts[0])}", last.elts[1]
    doc = _literal(last)
    if doc is None:
        return None
    owner = ".".join(module.name.split(".")[:-1])
    target = _literal(call.args[0])
    if target is None:  # add_docstr(torch.abs, doc)
        name = ast.unparse(call.args[0])
        name = name if re.fullmatch(r"[A-Za-z][\w.]*\.[A-Za-z]\w*", name) and "._" not in name else ""
    elif len(call.args) == 2:  # add_newdoc("airy", doc) in scipy.special, add_docstr_all("abs", doc) for torch.Tensor
        name = f"{owner}.Tensor.{target}" if "tensor" in module.name else f"{owner}.{target}"
    else:  # add_newdoc("numpy._core.multiarray", "array", doc)
        attribute = _literal(call.args[1])
        name = f"{target.split('._')[0]}.{attribute}{member}" if attribute and "._" in target else ""
    if name.rpartition(".")[2].startswith("_"):
        return None
    kind: Kind = "method" if member or ".Tensor." in name else "function"
    return name, Definition(kind, "", inspect.cleandoc(doc), call.lineno)


def _literal(node: ast.expr) -> str | None:
    """The text of a string literal, or of a literal template whose `{placeholders}` are dropped."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        template = _literal(node.func.value)
        if template is not None:
            return re.sub(r"(?<!\{)\{\w+\}(?!\})", "", template).replace("{{", "{").replace("}}", "}")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _literal(node.left), _literal(node.right)
        return None if left is None else left + (right or "")
    return None
