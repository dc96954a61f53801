"""Trackers: the same records, offline; one that is missing or fails."""

import importlib.util
import sys
import types

import pytest
from conftest import one_device, tiny_config

from ekd_jax.common.errors import UserError
from ekd_jax.runs.metrics import MetricWriter, read_metrics
from ekd_jax.runs.tracking import Tracker
from ekd_jax.training import single

MISSING = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(not MISSING, reason="both are installed")
def test_a_package_that_is_missing_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=rf"pip install 'ekd_jax\[{MISSING[0]}\]'"):
        single.run(tiny_config(train__tracker=MISSING[0]), tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"tracker='wandbb' must be one of"):
        tiny_config(train__tracker="wandbb")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_ends_nothing_and_is_said_once(fails, tmp_path, monkeypatch, caplog):
    def failing(*_, **__):
        raise ConnectionError("no route to host")

    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    module = types.SimpleNamespace(init=lambda **_: run)
    setattr(module if fails == "init" else run, fails, failing)
    monkeypatch.setitem(sys.modules, "trackio", module)
    writer = MetricWriter(tmp_path, 0, 0, Tracker("trackio", tmp_path, {}))
    for step in (1, 2):
        writer.write(step, 0.5, "train", {"loss": 1.0})
    writer.close()
    assert caplog.messages == ["trackio fails (no route to host): training goes on without it"]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_weights_and_biases_offline(tmp_path, monkeypatch, caplog):
    """A run that resumes has the same name; the records are in its files."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for step in (1, 2):
        tracker = Tracker("wandb", tmp_path, {"seed": 3})
        writer = MetricWriter(tmp_path, step - 1, 0, tracker)
        name = wandb.run.id
        writer.write(step, 0.5, "train", {"student_1/loss_kd": 1.25})
        writer.close()
    assert not caplog.messages
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{name}.wandb"}
    assert all(b"train/student_1/loss_kd" in file.read_bytes() for file in files)
