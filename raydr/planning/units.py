"""The unit figures that a plan rests on, each with its unit and its source; `units.yaml` beside this file has them.

Notable: a figure that nobody has measured is there with the value None. For example:

    figures = measured()
    figures["flat_scan_bytes_per_s"].value                 # of one core
    overridden(figures, {"gpu_embed_share": Given(value=0.3, source="a guess")})
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from raydr.config import Config, read_yaml, validate
from raydr.errors import ConfigError

UNITS = Path(__file__).with_name("units.yaml")


class Figure(Config):
    """One figure of `units.yaml`."""

    value: float | None = Field(gt=0)
    """null: nobody has measured it."""
    unit: str
    meaning: str
    source: str
    """Command, commit and hardware that gave it."""


class Given(Config):
    """A figure of the user's own: a number, or a number with where it comes from."""

    value: float = Field(gt=0)
    """In the figure's unit."""
    source: str = "given"
    """Where it comes from."""

    @model_validator(mode="before")
    @classmethod
    def _a_bare_number(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping) else {"value": value}


@cache
def measured() -> dict[str, Figure]:
    """The figures of `units.yaml` by name."""
    return {name: validate(Figure, figure, where=f"{UNITS}: {name}") for name, figure in read_yaml(UNITS).items()}


def overridden(figures: Mapping[str, Figure], own: Mapping[str, Given]) -> dict[str, Figure]:
    """`figures` with the user's own in their places. Raises `ConfigError` for a name that is none of them."""
    if unknown := sorted(set(own) - set(figures)):
        raise ConfigError(f"units.{unknown[0]}: there is no such figure; there are: {', '.join(figures)}")
    updates = {name: given.model_dump() for name, given in own.items()}
    return {name: figure.model_copy(update=updates.get(name, {})) for name, figure in figures.items()}
