"""Measuring this machine: figures that the planner knows, of the right size; printed, they are a config.

The whole measurement takes a minute or two; here are its quick parts, on few vectors.
"""

from __future__ import annotations

import pytest

from raydr.cli import main
from raydr.config import load
from raydr.planning import measure
from raydr.planning.config import PlanConfig
from raydr.planning.units import measured


def test_a_shard_is_built_and_vectors_are_scanned():
    points = measure.draw(2000, seed=1, dim=measure.DIM)
    found = measure._building(points) | measure._scans(points, points[:32], cores=1)
    assert set(found) <= set(measured())
    assert found["embedding_file_ratio"] == pytest.approx(1.0, abs=0.05)
    assert found["index_io_bytes_per_s"] > 0
    assert found["flat_scan_bytes_per_s"] > 0 and found["tail_ratio"] >= 1


def test_what_is_printed_is_a_config_of_the_planner(monkeypatch, tmp_path, capsys):
    units = {"gemm_flops": {"value": 5e10, "source": "here"}}
    monkeypatch.setattr(measure, "measure", lambda *, say: say("nothing") or units)
    assert main(["plan", "--measure"]) == 0
    printed = capsys.readouterr()
    assert "measuring: nothing" in printed.err
    file = tmp_path / "here.yaml"
    file.write_text(printed.out)
    assert load(PlanConfig, file, ["corpus.passages=1e6"]).units["gemm_flops"].value == 5e10
