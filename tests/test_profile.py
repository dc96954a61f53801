"""Traces of training steps."""

import gzip
import json

import jax
import pytest
from conftest import command, one_device, tiny_config
from killing import assert_same_run

from ekd_jax.common.errors import UserError
from ekd_jax.training import plans
from ekd_jax.training.profile import WARM_UP


def test_a_trace_has_the_steps_and_changes_nothing(finished, tmp_path):
    path = tmp_path / "run"
    plans.run(tiny_config(), path, one_device(), profile=4)
    assert_same_run(path, finished[0])
    (folder,) = (path / "profile" / "plugins" / "profile").iterdir()
    (file,) = folder.glob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    steps = sorted(dict(event.stats)["step_num"] for event in events)
    assert steps == [*range(WARM_UP, WARM_UP + 4)]
    with gzip.open(folder / "perfetto_trace.json.gz") as trace:
        named = [event for event in json.load(trace)["traceEvents"] if event.get("name") == "train"]
    assert len(named) == 4


def test_steps_that_are_not_there(finished, tmp_path):
    with pytest.raises(
        UserError, match="with 10 steps to warm up, these are more than the 19 that are left"
    ):
        plans.run(tiny_config(), tmp_path / "run", one_device(), profile=10)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="is complete, there is no step to trace"):
        plans.run(tiny_config(), finished[0], one_device(), profile=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile=0"], "not an integer in the range"),
        (["--profile=many"], "--profile"),
        (["--profile=5", "--dry_run"], "--profile traces training, and --dry_run trains nothing"),
        (["--profile=5", "--config.seeds=(0,1)"], "--profile is for one run"),
    ],
)
def test_mistakes_get_one_line(flags, message):
    result = command("main", "--config=configs/digits.py", "--workdir=nowhere", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
