"""Long work in a log: a line now and then, with how far it is and how long it takes."""

import re
import time

import pytest

from raydr import progress
from raydr.progress import Progress, followed


def test_without_a_terminal_lines_appear(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with Progress("embed", total=8000, initial=1000, unit="passage") as bar:
        bar.update(500)
        bar.update_to(2500)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\(.*\)", "()", line) for line in lines] == ["embed: 1,500 of 8,000 ()", "embed: 2,500 of 8,000 ()"]
    assert re.search(r"\([\d,]+ passage/s, \d+ s left\)", lines[0])


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
    assert capsys.readouterr().err.startswith("train: 5 of 8 (")


def test_work_that_is_resumed_further_back_has_no_negative_rate(monkeypatch, capsys):
    """A training goes on from its last checkpoint, behind the last step that its log held."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with Progress("train", total=40, initial=30, unit="step") as bar:
        bar.update_to(20)
        time.sleep(0.01)
        bar.update_to(25)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 20 of 40 (0 step/s)"
    assert re.fullmatch(r"train: 25 of 40 \([\d,.e+]+ step/s, \d+ s left\)", lines[1])
