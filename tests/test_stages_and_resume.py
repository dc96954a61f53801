"""Every method, killed with SIGKILL in each of its stages, ends with the bits of a run that was not."""

import signal
import time

import pytest
from conftest import one_device
from killing import assert_same_run, compiled_once, config_of, start, train_teacher

from ekd_jax.methods import list_methods
from ekd_jax.runs.metrics import METRICS
from ekd_jax.training import plans


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def kill_in(folder, process):
    """SIGKILL as soon as a checkpoint and a later record of the run in `folder` are there."""
    deadline = time.monotonic() + 200
    while True:
        assert time.monotonic() < deadline
        steps = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
        records = (folder / METRICS).read_bytes().count(b"\n") if (folder / METRICS).exists() else 0
        if (steps and records >= 2) or process.poll() is not None:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


NAMES = list_methods()


@pytest.mark.slow  # test_train.py and test_outside.py kill runs, too
@pytest.mark.parametrize("name", NAMES)
def test_killed_in_every_stage(name, teacher, tmp_path):
    config = config_of(name, teacher)
    folders = [
        folder.relative_to(tmp_path / "killed") for folder in plans.runs(config, tmp_path / "killed")
    ]
    for folder in folders:
        kill_in(tmp_path / "killed" / folder, start(config, tmp_path / "killed"))
        assert list((tmp_path / "killed" / folder / "checkpoints").glob("[0-9]*"))
        assert not (tmp_path / "killed" / folder / "summary.json").exists(), "it was over before the kill"
    plans.run(config, tmp_path / "killed", one_device())
    plans.run(config, tmp_path / "whole", one_device())
    for folder in folders:
        assert_same_run(tmp_path / "killed" / folder, tmp_path / "whole" / folder)
