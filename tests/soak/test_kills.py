"""Methods of several runs, killed with SIGKILL at random moments until that has happened 30 times."""

import os
import random
import shutil
import time

import pytest
from conftest import one_device
from killing import assert_same_run, compiled_once, config_of, start, train_teacher

from ekd_jax.training import plans

KILLS = int(os.environ.get("EKD_JAX_SOAK_KILLS", 30))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def changed_at(path):
    """Return when anything below a directory changed last; 0 if it is not there."""
    times = [0]
    for entry in (path, *path.rglob("*")):
        try:
            times.append(entry.stat().st_mtime_ns)
        except FileNotFoundError:  # renamed while we look
            continue
    return max(times)


def kill_sometime(process, path, generator, seconds):
    """Kill a process somewhere in its life: at any time, or soon after it began to write.

    Returns:
        Whether it was killed; otherwise it had ended by itself.
    """
    if generator.random() < 0.5:
        begun = changed_at(path)
        while process.poll() is None and changed_at(path) == begun:
            time.sleep(0.002)
        seconds = 2.0
    moment = time.monotonic() + generator.uniform(0, seconds)
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.002)
    process.kill()
    printed, _ = process.communicate()
    assert process.returncode in (0, -9), printed
    return process.returncode == -9


@pytest.mark.parametrize("name", plans.PLANS)
def test_random_kills(name, teacher, tmp_path):
    """However often it is killed, the plan ends with the states and the records of one that never was."""
    config, generator = config_of(name, teacher), random.Random(name)
    plans.run(config, tmp_path / "whole", one_device())
    folders = [folder.relative_to(tmp_path / "whole") for folder in plans.runs(config, tmp_path / "whole")]
    started = time.monotonic()
    assert start(config, tmp_path / "timed").wait() == 0
    seconds = time.monotonic() - started

    killed = tmp_path / "killed"
    kills = ends = 0
    while kills < KILLS:
        if kill_sometime(start(config, killed), killed, generator, seconds):
            kills += 1
            continue
        ends += 1
        for folder in folders:
            assert_same_run(killed / folder, tmp_path / "whole" / folder)
        shutil.rmtree(killed)
    plans.run(config, killed, one_device())
    for folder in folders:
        assert_same_run(killed / folder, tmp_path / "whole" / folder)
    print(f"{name}: {kills} kills, {ends + 1} plans of {len(folders)} runs, all equal")
