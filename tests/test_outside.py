"""The package in docs/extending.md: a network, a method and data from outside, from the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, plain_environment

from ekd_jax.runs.metrics import METRICS, read_metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the files of docs/extending.md."""
    path = tmp_path_factory.mktemp("outside")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S):
        name = block.splitlines()[0].removeprefix("# ")
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(block)
    assert sorted(p.name for p in path.rglob("*.py")) == ["data.py", "methods.py", "nets.py", "recipe.py"]
    return path


def start(place, command, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "ekd_jax", command, *arguments],
        cwd=place,
        env=plain_environment() | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ekd(place, command, *arguments):
    process = start(place, command, *arguments)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def trained(place):
    """The run, of half as many epochs, killed once in the middle and resumed by the same command."""
    run = place / "run"
    train = ("train", "--config=recipe.py", "--config.train.epochs=5", "--workdir=run")
    process = start(place, *train)
    deadline = time.monotonic() + 200
    complete = lambda: any(path.name.isdecimal() for path in run.glob("checkpoints/*"))
    while not complete() or (run / METRICS).read_bytes().count(b"\n") < 8:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "summary.json").exists()
    code, out, errors = ekd(place, *train)
    assert code == 0, errors
    assert "resuming from step" in errors
    return run, out


def test_it_learns(trained):
    run, out = trained
    assert "ensemble teacher" in out
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["model"], summary["method"], summary["data"]) == (
        "two_stage",
        "follow_the_best",
        "shapes",
    )
    assert [s["width"] for s in summary["students"]] == ["1", "0.5", "0.25"]
    assert summary["students"][0]["parameters"] > 2 * summary["students"][1]["parameters"]
    assert all(s["top1_last"] > 80 for s in summary["students"])
    steps = [r["step"] for r in read_metrics(run) if r["split"] == "train"]
    assert steps == sorted(set(steps)), "a record is written once, also after a kill"


def test_a_student_is_extracted_and_evaluated(place, trained):
    code, out, errors = ekd(place, "extract", "--workdir=run", "--student=3", "--output=small")
    assert code == 0, errors
    code, out, errors = ekd(place, "evaluate", "--student_dir=small", "--json")
    assert code == 0, errors
    last = [r for r in read_metrics(place / "run") if r["split"] == "test"][-1]
    assert json.loads(out)["student_3/top1"] == pytest.approx(last["student_3/top1"], abs=1e-3)
    code, out, errors = ekd(place, "evaluate", "--workdir=run", "--json")
    assert code == 0, errors
    assert json.loads(out)["ensemble/top1"] == pytest.approx(last["ensemble/top1"], abs=1e-3)


def test_the_missing_module_is_named(place, trained, tmp_path):
    """Elsewhere, where the user's package is not on the path."""
    if not (place / "small").exists():
        ekd(place, "extract", "--workdir=run", "--student=3", "--output=small")
    for arguments in (("evaluate", f"--student_dir={place}/small"), ("evaluate", f"--workdir={place}/run")):
        code, out, errors = ekd(tmp_path, *arguments)
        assert (code, out) == (2, "")
        assert "needs the module 'shapes_lab.nets', which cannot be imported" in errors
        assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == []
