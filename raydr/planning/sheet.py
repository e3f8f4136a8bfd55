"""A sheet of formulas: what is printed as the formula of a figure is what computed it.

Notable: a formula is text over names, evaluated here and kept beside its result, so the two cannot drift apart. A unit
figure that nobody has measured is None, and everything that rests on it is None as well, never a guess.

    sheet = Sheet({"passages": 1e6, "dim": 384})
    sheet.line("embeddings_bytes", "passages * dim * 4", "bytes")      # 1.536e9
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

Number: TypeAlias = int | float | None
"""None: nobody has measured what it rests on."""

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def slowest(tail_ratio: int | float, number: int | float) -> float:
    """How much slower than one median time the 99th percentile of the slowest of `number` times is.

    For log-normal times whose own 99th percentile is `tail_ratio` medians; with one, that is the answer.
    """
    z = NormalDist().inv_cdf
    return math.exp(math.log(tail_ratio) * z(0.99 ** (1 / number)) / z(0.99))


_FUNCTIONS: dict[str, Callable[..., float]] = {
    "ceil": lambda value: float(math.ceil(value - 1e-9 * abs(value))),  # 3.0000000001 nodes are three
    "log2": math.log2,
    "max": max,
    "min": min,
    "slowest": slowest,
}
_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Line(NamedTuple):
    """One figure of a plan."""

    name: str
    value: Number
    """None where the formula needs a figure that has not been measured."""
    unit: str
    formula: str
    numbers: str
    """The formula with its names replaced by their values."""


class Sheet:
    """Named values, and lines computed from them in order."""

    def __init__(self, values: Mapping[str, Number]) -> None:
        self._values: dict[str, Number] = dict(values)
        self.lines: list[Line] = []
        self.used: set[str] = set()
        """Names that a formula has used so far."""

    def __getitem__(self, name: str) -> Number:
        return self._values[name]

    def get(self, name: str) -> Number:
        """The value of a name, None where there is none."""
        return self._values.get(name)

    def let(self, **values: Number) -> None:
        """Gives the formulas that follow further values."""
        self._values |= values

    def line(self, name: str, formula: str, unit: str) -> Number:
        """Computes a figure, keeps it under `name` for the formulas after it, and returns it.

        Raises `KeyError` for a name that is not there, `ValueError` for anything but arithmetic.
        """
        names = names_in(formula)
        self.used |= names
        known = {key: self._values[key] for key in names}
        given = {key: value for key, value in known.items() if value is not None}
        value = evaluate(formula, given) if len(given) == len(known) else None
        numbers = re.sub(r"[A-Za-z_]\w*", lambda word: _substituted(word[0], known), formula)
        self._values[name] = value
        self.lines.append(Line(name, value, unit, formula, numbers))
        return value


def names_in(formula: str) -> set[str]:
    """The names of values in a formula."""
    words = {node.id for node in ast.walk(ast.parse(formula, mode="eval")) if isinstance(node, ast.Name)}
    return words - set(_FUNCTIONS)


def evaluate(formula: str, values: Mapping[str, int | float]) -> float:
    """The value of an arithmetic formula. Raises `ValueError` for anything but + - * / ** and `_FUNCTIONS`."""
    return float(_value(ast.parse(formula, mode="eval").body, values))


def _value(node: ast.expr, values: Mapping[str, int | float]) -> int | float:
    match node:
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.Name():
            return values[node.id]
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(argument, values) for argument in node.args))
    raise ValueError(f"not arithmetic: {ast.unparse(node)}")


def _substituted(word: str, known: Mapping[str, Number]) -> str:
    return readable(known[word]) if word in known else word


def readable(value: Number, unit: str = "") -> str:
    """A number for a person: three digits where it is small, powers of ten where it is large, bytes in 1024s."""
    if value is None:
        return "?"
    if unit == "bytes":
        power = 0 if value < 1024 else min(int(math.log2(value) // 10), len(_BINARY) - 1)
        return f"{_digits(value / 1024**power)} {_BINARY[power]}"
    return _digits(value) + (f" {unit}" if unit else "")


def _digits(value: int | float) -> str:
    if value == 0 or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
