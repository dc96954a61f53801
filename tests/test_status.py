"""The status of a run, from its directory, and the table that a terminal shows while it trains."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, command, plain_environment, tiny_flags

from ekd_jax.common import progress
from ekd_jax.common.errors import UserError
from ekd_jax.runs.picture import draw
from ekd_jax.runs.status import as_text, one_line, read_status


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of a complete run."""
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    return path


def test_a_complete_run(finished):
    path, summary = finished
    status = read_status(path)
    assert (status.state, status.step, status.steps) == ("complete", summary.steps, summary.steps)
    assert status.remaining_seconds is None
    assert status.checkpoint == summary.steps
    assert [row.name for row in status.predictors] == ["student_1", "student_2", "ensemble"]
    for row, own in zip(status.predictors, [*summary.students, summary.ensemble], strict=True):
        assert (row.top1, row.best) == (own.top1_last, own.top1_best)
    assert status.predictors[1].losses.keys() == {"ce", "kd", "intermediate"}, "not each block's part of it"
    result = command("status", path, "--json")
    found = json.loads(result.stdout)
    assert (found["state"], found["step"]) == ("complete", summary.steps)
    assert not result.stderr


def test_a_lock_tells_a_run_that_trains_from_one_that_was_stopped(run):
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines[:-2]) if '"split": "train"' in line)
    half = lines[last + 1][: len(lines[last + 1]) // 2]  # a line that is being written
    (run / "metrics.jsonl").write_text("".join(lines[: last + 1]) + half)
    shutil.rmtree(run / "checkpoints")
    stopped = read_status(run)
    assert (stopped.state, stopped.step) == ("stopped", json.loads(lines[last])["step"])
    assert stopped.remaining_seconds is None
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status = read_status(run)
        assert status.state == "running"
        assert status.remaining_seconds is not None
        assert one_line(status).startswith(f"running, step {status.step} of {status.steps}, epoch ")
    assert read_status(run).state == "stopped"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", '{"model": 3, "train": {"epochs": "x", "batch_size": null}, "newer": [{}]}'),
        ("config.json", "[]"),
        ("students.json", "{"),
        ("students.json", '{"data": {"train_examples": "many"}}'),
        ("summary.json", "null"),
        (
            "metrics.jsonl",
            '{"step": 1, "epoch": "x", "split": []}\n{"step": 1, "epoch": 1, "split": "test"}\n',
        ),
        ("metrics.jsonl", '{"step": 2, "epoch": 1, "split": "test", "student_1/top1": "high"}\n'),
    ],
)
def test_files_of_another_version_or_damaged_do_no_harm(run, file, text):
    (run / file).write_text(text)
    status = read_status(run)
    for shown in (as_text(status), one_line(status), draw(status, 80, 24)):
        assert shown
        assert "None" not in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name one directory, not 0: ekd status RUN"),
        (["docs", "tests"], "name one directory, not 2: ekd status RUN"),
        (["--workdir=docs"], "unknown flag --workdir; this command takes runs without a flag: RUN"),
        (["nowhere"], "nowhere is not the directory of a run, nor of several: there is no such"),
        (["docs"], "docs is not the directory of a run, nor of several: it has no config.json"),
        (["docs", "--json", "--follow"], "pass --json or --follow, not both"),
        (["docs", "--interval=5"], "--interval is for --follow"),
        (["docs", "--follow", "--interval=0"], "--interval"),
    ],
)
def test_mistakes_get_one_line(flags, message):
    result = command("status", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_is_followed_to_its_end(run):
    result = command("status", run, "--follow")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1, "it has ended"
    assert "complete, step " in result.stdout


def test_several_runs_are_one_line_each(run, tmp_path):
    for name in ("a/seed10", "a/seed9"):
        shutil.copytree(run, tmp_path / "all" / name)
    (tmp_path / "all" / "a" / "seed10" / "summary.json").unlink()
    status = read_status(tmp_path / "all")
    assert [part.path.rpartition("/")[2] for part in status.parts] == ["seed9", "seed10"]
    text = as_text(status)
    assert text.startswith(f"{tmp_path}/all: stopped")
    assert text.count("\n") == 4
    with pytest.raises(UserError, match="is not the directory of a run"):
        read_status(tmp_path / "all" / "a" / "seed9" / "checkpoints")


def test_a_plan_shows_the_run_that_was_reached(run, tmp_path):
    plan = tmp_path / "plan"
    shutil.copytree(run, plan / "earlier" / "member1")
    (plan / "earlier" / "member1" / "summary.json").unlink()
    status = read_status(plan)
    assert (status.state, status.place) == ("stopped", "earlier run 1, member1")
    assert "earlier run 1, member1: resnet8, oem, digits, seed 0" in as_text(status)
    assert "student 2" in draw(status, 80)
    shutil.copytree(run, plan, dirs_exist_ok=True)
    status = read_status(plan)
    assert (status.state, status.place) == ("complete", "run 2 of 2")


def test_the_columns_that_fit(finished):
    status = read_status(finished[0])
    for width in (30, 50, 80, 120):
        drawn = [progress.STYLE.sub("", line) for line in draw(status, width).splitlines()]
        assert max(map(len, drawn)) < width
        assert ("intermediate" in "".join(drawn)) == (width >= 80)
        assert "test last" in "".join(drawn)
    assert len(draw(status, 80, 4).splitlines()) == 3, "of four lines, the cursor's is the last"


def test_a_block_is_written_over(monkeypatch):
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((10, 5)))
    written = []
    block = progress.Block(written.append)
    block.clear()
    assert not written
    block.show("one\ntwo and more")
    block.show("three")
    block.clear()
    assert written[0] == "one\x1b[K\ntwo and more\x1b[K\n\x1b[J"
    assert written[1].startswith("\x1b[3F"), "a line that is wrapped counts as two"
    assert written[2] == "\x1b[1F\x1b[J"


def train_on_a_terminal(path, signal_at, **environment):
    """Train on a terminal; send SIGINT when a text was shown. Return the exit code and all that was written."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ekd_jax.main", *tiny_flags(train__epochs=2000), f"--workdir={path}"],
        cwd=ROOT,
        env=plain_environment() | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"} | environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown, sent = b"", False
    while True:
        try:
            shown += os.read(main, 65536)
        except OSError:  # the process has ended
            break
        if not sent and signal_at in shown:
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(main)
    return process.wait(60), shown.decode()


def test_a_terminal_shows_a_table_and_is_left_as_it_was(tmp_path):
    code, shown = train_on_a_terminal(tmp_path / "run", b"loss ce", NO_COLOR="1")
    assert code == 130
    assert "compiling" in shown
    assert "step 4/" not in shown, "no lines of records besides"
    assert "\x1b[?25l" not in shown, "the cursor is never hidden"
    assert not any(f"\x1b[{color}m" in shown for color in (31, 32, 33, 34, 35, 36)), "NO_COLOR"
    last = shown.rpartition("\x1b[J")[2]
    assert last.strip().startswith("interrupted at step "), "the table was wiped"
    assert last.count("\n") == 1
