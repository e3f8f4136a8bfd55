"""Long work in a log: a line now and then, with how far it is and how long it takes."""

import re
import time
from types import SimpleNamespace

import pytest

from raydr import progress
from raydr.progress import Progress, followed


def test_without_a_terminal_lines_appear(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with Progress("embed", total=8000, initial=1000, unit="passage") as bar:
        bar.update(500)
        time.sleep(0.001)
        bar.update_to(2500)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "embed: 1,500 of 8,000"
    assert re.fullmatch(r"embed: 2,500 of 8,000 \([\d,]+ passage/s, \d+ s left\)", lines[1])


def test_what_comes_before_the_first_is_not_in_the_rate(monkeypatch, capsys):
    """A model that is loaded for a minute does not make the rest take an hour."""
    now = iter([0.0, 60.0, 80.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with Progress("embed", total=500, unit="passage") as bar:
        bar.update(1)
        bar.update(99)
    assert capsys.readouterr().err.splitlines() == ["embed: 1 of 500", "embed: 100 of 500 (5 passage/s, 81 s left)"]


def test_short_work_says_nothing(capsys):
    with Progress("embed", total=10, unit="passage") as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_an_error_inside_passes(capsys):
    with pytest.raises(ValueError, match="x"), Progress("embed", total=1):
        raise ValueError("x")


def test_work_elsewhere_is_asked_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    counts = iter([2, 5])
    with followed("train", lambda: next(counts), total=8, unit="step"):
        pass
    assert capsys.readouterr().err == "train: 5 of 8\n"


def test_work_that_is_resumed_further_back_has_no_negative_rate(monkeypatch, capsys):
    """A training goes on from its last checkpoint, behind the last step that its log held."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with Progress("train", total=40, initial=30, unit="step") as bar:
        bar.update_to(20)
        time.sleep(0.01)
        bar.update_to(25)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 20 of 40"
    assert re.fullmatch(r"train: 25 of 40 \([\d,.e+]+ step/s, \d+ s left\)", lines[1])
