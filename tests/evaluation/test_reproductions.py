"""Reproductions: the project's own YAML and page, and the runner on commands that really run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydr.config import validate
from raydr.errors import ConfigError
from raydr.evaluation.reproduction_runner import compare, run_row, run_rows
from raydr.evaluation.reproductions import (
    Reproduction,
    Verified,
    check_page,
    read_rows,
    render_page,
    select_rows,
    write_page,
    write_rows,
)

REPOSITORY = Path(__file__).resolve().parents[2]
WRITE_SCORES = """python -c "
import json, pathlib, sys
data, out = map(pathlib.Path, sys.argv[1:])
(out / 'evaluate').mkdir(parents=True)
score = float((data / 'tiny' / 'score').read_text())
(out / 'evaluate' / 'metrics.json').write_text(json.dumps({'nDCG@10': score, 'RR@10': 0.25}))
" {data} {out}"""


def make_row(**fields):
    row = {
        "id": "tiny-row",
        "title": "A tiny row",
        "source": "this test",
        "figure": "own",
        "dataset": "tiny",
        "commands": [WRITE_SCORES],
        "expected": {"nDCG@10": 0.5},
        "tolerance": 0.01,
    }
    return Reproduction(**{**row, **fields})


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "score").write_text("0.505")
    return folder


def test_the_projects_own_page_is_current():
    check_page(REPOSITORY / "docs/reproductions.yaml", REPOSITORY / "docs/reproductions.md")


def test_the_projects_own_yaml_has_the_runners_layout(tmp_path):
    rows = read_rows(REPOSITORY / "docs/reproductions.yaml")
    write_rows(rows, tmp_path / "rows.yaml")
    assert (tmp_path / "rows.yaml").read_text() == (REPOSITORY / "docs/reproductions.yaml").read_text()
    for row in rows:
        if row.verified:
            assert compare(row, row.verified.measured).status == "reproduced", row.id


def test_a_row_is_run_compared_and_recorded(tmp_path, data):
    rows_file, page_file = tmp_path / "rows.yaml", tmp_path / "page.md"
    write_rows([make_row(), make_row(id="other-row", expected={"nDCG@10": 0.9})], rows_file)
    outcomes = list(run_rows(rows_file=rows_file, page_file=page_file, data=data))
    assert [outcome.status for outcome in outcomes] == ["reproduced", "differs"]
    assert outcomes[0].message == "nDCG@10 0.5050, expected 0.5 ± 0.01"
    recorded, other = read_rows(rows_file)
    assert other.verified is None
    assert recorded.verified.measured == {"nDCG@10": 0.505, "RR@10": 0.25}
    assert recorded.verified.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "cores" in recorded.verified.hardware
    check_page(rows_file, page_file)
    page = page_file.read_text()
    assert "| [A tiny row](#tiny-row) | nDCG@10 | 0.5 ± 0.01 (own figure) | 0.5050 | 20" in page
    assert "| nDCG@10 | 0.9 ± 0.01 (own figure) | not yet |  |" in page


def test_runs_are_kept_where_asked_and_placeholders_filled(tmp_path, data):
    outcome = run_row(make_row(), data=data, out=tmp_path / "kept")
    assert outcome.measured["nDCG@10"] == 0.505
    assert (tmp_path / "kept" / "tiny-row" / "evaluate" / "metrics.json").is_file()
    assert (tmp_path / "kept" / "tiny-row.log").is_file()
    again = run_row(make_row(), data=data, out=tmp_path / "kept")
    assert again.status == "failed"
    assert "exists already" in again.message


def test_recording_one_row_does_not_make_the_next_ones_commit_dirty(tmp_path, data, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    rows_file, page_file = Path("rows.yaml"), Path("page.md")
    write_rows([make_row(), make_row(id="other-row")], rows_file)
    Path("code.py").write_text("")
    git("init")
    git("add", "rows.yaml", "code.py")
    git("commit", "-m", "first")
    assert len(list(run_rows(rows_file=rows_file, page_file=page_file, data=data))) == 2
    commits = [row.verified.commit for row in read_rows(rows_file)]
    assert len(commits[0]) == 12
    assert commits[1] == commits[0]
    Path("code.py").write_text("changed = True")
    list(run_rows(["tiny-row"], rows_file=rows_file, page_file=page_file, data=data))
    assert read_rows(rows_file)[0].verified.commit == f"{commits[0]}-dirty"


def test_commands_run_with_this_interpreter_and_without_a_shell(tmp_path, data):
    command = """python -c "import sys; assert sys.prefix == sys.argv[1], sys.prefix; raise SystemExit(3)" """
    outcome = run_row(make_row(commands=[f"{command} '{sys.prefix}' {{out}} > {tmp_path}/redirected"]), data=data)
    assert outcome.status == "failed"
    assert "exit status 3" in outcome.message
    assert not (tmp_path / "redirected").exists()


def test_failures_say_why(data):
    broken = run_row(make_row(commands=["python -c 'raise ValueError(42)' {out}"]), data=data)
    assert broken.status == "failed"
    assert "exit status 1" in broken.message
    assert "ValueError: 42" in broken.message
    absent = run_row(make_row(commands=["no-such-program {out}"]), data=data)
    assert "no-such-program" in absent.message
    silent = run_row(make_row(commands=["python -c pass {out}"]), data=data)
    assert "left no metrics.json" in silent.message


def test_a_command_that_hangs_ends_with_its_children(tmp_path, data):
    script = (
        "import subprocess, sys, pathlib, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"pathlib.Path('{tmp_path}/child').write_text(str(child.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    outcome = run_row(make_row(commands=[f'python -c "{script}" {{out}}'], timeout_s=3), data=data)
    assert time.monotonic() - started < 30
    assert "still running after 3 s" in outcome.message
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not _is_running(child):
            break
        time.sleep(0.1)
    assert not _is_running(child)


def _is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    # An orphan that nobody has reaped yet is dead all the same.
    return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_rows_without_their_data_or_gpu_are_skipped(data, monkeypatch):
    assert (
        run_row(make_row(dataset="absent"), data=data).message == f"no collection 'absent' at {data} (set RAYDR_DATA)"
    )
    monkeypatch.setenv("PATH", "")
    assert run_row(make_row(needs_gpu=True), data=data).status == "skipped"


def test_tolerance_includes_its_boundary():
    assert compare(make_row(), {"nDCG@10": 0.51}).status == "reproduced"
    assert compare(make_row(), {"nDCG@10": 0.4899}).status == "differs"
    missing = compare(make_row(), {"RR@10": 0.5})
    assert (missing.status, missing.message) == ("differs", "nDCG@10 missing, expected 0.5 ± 0.01")


def test_selecting_rows():
    rows = [make_row(), make_row(id="scifact-minilm")]
    assert select_rows(rows, []) == rows
    assert select_rows(rows, ["scifact-minilm"]) == rows[1:]
    with pytest.raises(ConfigError, match="did you mean 'scifact-minilm'"):
        select_rows(rows, ["scifact-minilmm"])


def test_page_shows_versions_and_commands_to_copy():
    verified = Verified(measured={"nDCG@10": 0.5}, date="2026-01-02T03:04+00:00", commit="abc", wall_s=12.4,
                        hardware="a machine", versions={"python": "3.11"})  # fmt: skip
    page = render_page(
        [make_row(commands=["run data={data}/x out={out} keep={this}"], verified=verified, note="A note.")]
    )
    assert "\nrun data=$RAYDR_DATA/x out=runs/reproductions/tiny-row keep={this}\n" in page
    assert "Last verified 2026-01-02 at commit `abc` in 12 s\non a machine; python 3.11." in page
    assert "A note." in page


def test_a_stale_page_is_noticed(tmp_path):
    rows_file, page_file = tmp_path / "rows.yaml", tmp_path / "page.md"
    write_rows([make_row()], rows_file)
    with pytest.raises(ConfigError, match="raydr reproductions render"):
        check_page(rows_file, page_file)
    write_page(read_rows(rows_file), page_file)
    check_page(rows_file, page_file)
    write_rows([make_row(tolerance=0.02)], rows_file)
    with pytest.raises(ConfigError, match="does not match"):
        check_page(rows_file, page_file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"commands": ["python x.py"]}, "no command names"),
        ({"expected": {}}, "expected"),
        ({"id": "Has Spaces"}, "id"),
        ({"tolerence": 0.1}, "did you mean 'tolerance'"),
        ({"figure": "guessed"}, "figure"),
    ],
)
def test_rows_with_mistakes(fields, message):
    row = {**make_row().model_dump(exclude_defaults=True), **fields}
    with pytest.raises(ConfigError, match=message):
        validate(Reproduction, row, where="rows.yaml")


def test_yaml_with_mistakes(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text("rows: []\n")
    with pytest.raises(ConfigError, match="wants one key, `reproductions`"):
        read_rows(path)
    path.write_text("reproductions: [text]\n")
    with pytest.raises(ConfigError, match="row 1: a row is a mapping"):
        read_rows(path)
    write_rows([make_row(), make_row()], path)
    with pytest.raises(ConfigError, match="'tiny-row' is used twice"):
        read_rows(path)
