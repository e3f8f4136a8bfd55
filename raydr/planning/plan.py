"""`raydr plan`: nodes, memory, hours and cost of every stage, each with its formula and the figures it rests on.

Notable: pure arithmetic, in milliseconds; nothing heavy is imported and nothing is looked up elsewhere. A cost appears
where a node has a price. `benchmarks/plan.py` compares predictions with runs.

    raydr plan corpus.passages=1e7 search.qps=50
    plan = make_plan(load(PlanConfig, None, ["corpus.passages=1e7"]))
    print(as_text(plan))
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raydr.planning.config import PlanConfig
from raydr.planning.serving import plan_search
from raydr.planning.sheet import Line, readable
from raydr.planning.stages import StagePlan, plan_embedding, plan_index, plan_reranking, plan_training
from raydr.planning.units import Figure, measured, overridden

_PLANNERS: dict[str, Callable[[PlanConfig, Mapping[str, Figure]], StagePlan]] = {
    "embed": plan_embedding,
    "index": plan_index,
    "search": plan_search,
    "rerank": plan_reranking,
    "train": plan_training,
}
_WIDTH = 118


@dataclass(frozen=True)
class Plan:
    """The stages planned, and the figures they rest on."""

    config: PlanConfig
    stages: list[StagePlan]
    figures: dict[str, Figure]
    """Those that a formula used, by name."""

    def __getitem__(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)


def make_plan(config: PlanConfig) -> Plan:
    """The plan for a config. Raises `ConfigError` for a unit figure that does not exist."""
    figures = overridden(measured(), config.units)
    left_out = {"rerank": config.rerank is None, "train": config.train is None}
    names = [name for name in _PLANNERS if name in config.stages and not left_out.get(name)]
    stages = [_PLANNERS[name](config, figures) for name in names]
    used = {name for stage in stages for name in stage.used}
    return Plan(config, stages, {name: figure for name, figure in figures.items() if name in used})


def unmeasured(plan: Plan, stage: StagePlan) -> list[str]:
    """Names of the figures that a stage needs and nobody has measured."""
    return [name for name, figure in plan.figures.items() if name in stage.used and figure.value is None]


def as_text(plan: Plan, *, brief: bool = False) -> str:
    """The table, what to mind, and, unless `brief`, every formula and every figure with its source."""
    parts = [_table(plan), *_to_mind(plan)]
    if not brief:
        parts += ["", *(_formulas(stage) for stage in plan.stages), "rests on", *_sources(plan.figures)]
    return "\n".join(parts)


def as_json(plan: Plan) -> str:
    """The plan as a JSON object: config, stages with their lines, figures. Unknown values are null."""
    stages = [
        {
            "name": stage.name,
            "nodes": stage.nodes,
            "memory_bytes_per_node": stage.memory_bytes,
            "disk_bytes": stage.disk_bytes,
            "hours": stage.hours,
            "core_hours": stage.core_hours,
            "gpu_hours": stage.gpu_hours,
            "cost": stage.cost,
            "warnings": stage.warnings,
            "unmeasured": unmeasured(plan, stage),
            "lines": [line._asdict() for line in stage.lines],
        }
        for stage in plan.stages
    ]
    content: dict[str, Any] = {
        "config": plan.config.model_dump(mode="json"),
        "stages": stages,
        "figures": {name: figure.model_dump() for name, figure in plan.figures.items()},
    }
    return json.dumps(content, indent=2)


def _table(plan: Plan) -> str:
    heads = ["stage", "nodes", "memory/node", "disk", "hours", "core-hours", "GPU-hours", "cost"]
    rows = [heads]
    for stage in plan.stages:
        on_gpus = stage.gpu_hours is None or stage.gpu_hours > 0
        rows.append(
            [
                stage.name,
                readable(stage.nodes),
                readable(stage.memory_bytes, "bytes"),
                "-" if stage.disk_bytes is None else readable(stage.disk_bytes, "bytes"),
                readable(stage.hours),
                "-" if on_gpus else readable(stage.core_hours),
                readable(stage.gpu_hours) if on_gpus else "-",
                readable(stage.cost) if stage.cost is not None else "no price",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _to_mind(plan: Plan) -> list[str]:
    found = []
    for stage in plan.stages:
        missing = unmeasured(plan, stage)
        if missing:
            given = " ".join(f"units.{name}=..." for name in missing)
            found.append(f"{stage.name}: nobody has measured {', '.join(missing)}; what rests on it is ?. Give {given}")
        found += [f"{stage.name}: {warning}" for warning in stage.warnings]
    return ["", *(textwrap.fill(f"! {line}", _WIDTH, subsequent_indent="  ") for line in found)] if found else []


def _formulas(stage: StagePlan) -> str:
    width = max(len(line.name) for line in stage.lines)
    return "\n".join([stage.name, *(_line(line, width) for line in stage.lines), ""])


def _line(line: Line, width: int) -> str:
    value = readable(line.value, "bytes") if line.unit == "bytes" else f"{readable(line.value)} {line.unit}"
    whole = f"  {line.name:<{width}} = {line.formula} = {line.numbers} = {value}"
    if len(whole) <= _WIDTH:
        return whole
    indent = " " * (width + 3)
    return f"  {line.name:<{width}} = {line.formula}\n{indent}= {line.numbers} = {value}"


def _sources(figures: Mapping[str, Figure]) -> list[str]:
    texts = (f"  {name} = {readable(figure.value)} {figure.unit}: {figure.source}" for name, figure in figures.items())
    whole = {"break_on_hyphens": False, "break_long_words": False}
    return [textwrap.fill(text, _WIDTH, subsequent_indent="    ", **whole) for text in texts]
