"""The demos as a new user runs them, small and without a terminal: they answer, stop, and reuse what they made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.data.corpus import Corpus
from raydr.data.drawn_pictures import PICTURE
from raydr.verbs.demo import DemoConfig, demo
from raydr.verbs.demo_images import DemoImagesConfig, demo_images
from tests.methods.conftest import instant_training  # noqa: F401
from tests.servers import free_port

pytestmark = [pytest.mark.slow]


@pytest.mark.ray
def test_the_demo_runs_to_its_end_and_a_second_run_makes_nothing_again(tmp_path):
    first = _demo(tmp_path)
    for query in ("join two data frames on a column", "retry a task when its worker dies"):
        assert query in first
    table = (tmp_path / "evaluate/summary.txt").read_text()
    assert table in first
    assert all(name in table for name in ("BM25", "dense", "hybrid", "nDCG@10", "RR@10", "R@100"))
    assert (tmp_path / "evaluate/report.png").stat().st_size > 10_000
    made = _manifests(tmp_path)
    assert {"corpus", "embed", "index", "search_bm25", "search_dense", "search_hybrid", "evaluate"} <= set(made)
    _demo(tmp_path)
    assert _manifests(tmp_path) == made


@pytest.mark.usefixtures("instant_training")
def test_what_was_trained_stands_beside_the_rest(tmp_path, monkeypatch, capsys):
    """Two rounds of AR2 in this process, whose trainings are not Ray Train's; what is made of them is real."""
    monkeypatch.setattr("raydr.runtime.uses_ray", lambda *_, **__: False)
    monkeypatch.setattr("raydr.data.api_docs.PACKAGES", ["fastapi", "httpx", "pydantic"])
    demo(DemoConfig(out=tmp_path, size=120, first=False, serve=False))
    table = (tmp_path / "evaluate_trained/summary.txt").read_text()
    assert table in capsys.readouterr().out
    assert all(f" {name} " in table for name in ("BM25", "dense", "hybrid", "AR2", "AR2 + ranker"))
    trained = Component.model_validate(open_artifact(tmp_path / "method").manifest.details["method"]).build()
    served = open_artifact(tmp_path / "round-02/index").manifest.details["encoder_version"]
    assert trained.encoder().version == served != open_artifact(tmp_path / "index").manifest.details["encoder_version"]
    assert "round-02/ranker" in trained.ranker.args["model"]


@pytest.mark.ray
@pytest.mark.usefixtures("instant_training")
def test_pictures_are_drawn_learned_and_searched_and_a_second_run_makes_nothing_again(
    ray_cluster, tmp_path, monkeypatch, capsys
):
    """Ten kinds of shape in eight colours, in this process; as above, the trainings alone are not Ray Train's, which
    tests/train/test_mm_embed_ray.py has.
    """
    monkeypatch.setattr("raydr.data.drawn_pictures.FONTS", ())
    monkeypatch.setattr("raydr.runtime.uses_ray", lambda *_, **__: False)
    config = DemoImagesConfig(out=tmp_path, size=80, clip_steps=2, random_steps=2, hard_steps=2, serve=False)
    demo_images(config)
    first = capsys.readouterr().out
    table = (tmp_path / "mm_embed/evaluate/summary.txt").read_text()
    assert table in first
    tasks = ("text to image", "image to text", "image,text to image")
    assert all(name in table for name in ("CLIP", "MM-Embed", "R@10", "R@5", "R@1", "WrongModality@1", *tasks))
    shown = re.findall(r"^    (.+)  ->  (.+)$", first, re.MULTILINE)
    assert len(shown) == 3 * len(tasks)
    changes = [asked.partition(" + ") for asked, _ in shown if " + " in asked]
    assert len(changes) == 3 and all(changed.startswith('"the same in ') for _, _, changed in changes)
    for asked, found in shown:
        picture, with_picture, _ = asked.partition("]")
        assert not with_picture or f"{picture}]" not in found  # nobody is answered with what they asked with
    queries = Corpus.open(tmp_path / "mm_embed/corpus")
    held_out = {path.stem for path in (tmp_path / "pictures/held_out").iterdir()}
    trained_on = (tmp_path / "pictures/qrels/train.tsv").read_text()
    assert held_out and not any(name in trained_on for name in held_out)
    assert set(queries.excluded()) == {query.query_id for query in queries.queries() if query.image is not None}
    served = open_artifact(tmp_path / "mm_embed/index").manifest.details["encoder_version"]
    method = Component.model_validate(open_artifact(tmp_path / "mm_embed/method").manifest.details["method"]).build()
    assert method.encoder().version == served and method.config.instruction == PICTURE
    assert "train_hard_2" in method.config.model and open_artifact(tmp_path / "mm_embed/hard_index_2/index")
    made = _manifests(tmp_path)
    demo_images(config)
    assert _manifests(tmp_path) == made


def _demo(out: Path) -> str:
    """What `raydr demo` prints; fails where it does not end by itself with status 0."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("raydr")), "demo", "size=300", "train=false"]
    done = subprocess.run(
        [*command, f"out={out}", f"port={port}"],
        env={**os.environ, "RAY_ADDRESS": "local"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"http://127.0.0.1:{port}" in done.stdout
    return done.stdout


def _manifests(out: Path) -> dict[str, int]:
    """When each artifact was finished."""
    return {str(path.parent.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
