"""Every method, killed with SIGKILL in each of its stages, ends with the bits of a run that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, latest_state, one_device, tiny_config
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from ekd_jax.config.resolve import to_dict
from ekd_jax.methods import list_methods
from ekd_jax.runs.metrics import METRICS, read_metrics
from ekd_jax.training import loop, plans

SMALL = {
    "train__epochs": 2.0,
    "train__log_every_steps": 2,
    "train__evaluate_every_epochs": 2.0,
    "train__checkpoint_every_epochs": 0.5,
    "model__students": (0.5, 0.5),
}
TEACHERS = {"method__teachers": ("{teacher}",)}
CHANGES = {
    "cl_ilr": {"model__students": (0.5, 0.5, 0.5, 0.5)},
    "byot": {"model__students": (0.5,)},
    "snapshot": {"model__students": (0.5,), "method__cycles": 2},
    "dml": {"method__update": "alternating"},
    "kd": {**TEACHERS, "model__students": (0.25,)},
    "dckd": TEACHERS,
    "ekd": {"method__teachers": ("{teacher}", "{teacher}")},
    "meal": {"method__teachers": ("{teacher}", "{teacher}"), "model__students": (0.5,)},
    "meal_v2": {**TEACHERS, "model__students": (0.5,)},
    "srm": {**TEACHERS, "model__students": (0.25,)},
    "blockwise": {**TEACHERS, "model__students": (1,)},
    "self_distillation": {"model__students": (0.5,)},
    "ensemble_distillation": {"model__students": (0.5,), "method__members": 2},
}


def config_of(name, teacher):
    changes = SMALL | CHANGES.get(name, {})
    if "method__teachers" in changes:
        changes["method__teachers"] = tuple(str(teacher) for _ in changes["method__teachers"])
    if name == "srm":
        changes |= {"method__dictionary_epochs": 2.0, "method__initialize_epochs": 2.0}
    return tiny_config(name, **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a finished run of one network."""
    path = tmp_path_factory.mktemp("teacher") / "run"
    loop.run(tiny_config("baseline", **SMALL | {"model__students": (1,)}), path, one_device())
    return path


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Programs are compiled once, for all processes."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    reset_cache()
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()


PROGRAM = """
import json, pathlib, sys
import jax
from ekd_jax.common import parallel
from ekd_jax.config.resolve import resolve
from ekd_jax.training import plans
config = resolve(json.loads(sys.argv[1]))
plans.run(config, pathlib.Path(sys.argv[2]), parallel.make_mesh(jax.devices()[:1]))
"""


def start(config, path):
    arguments = [json.dumps(to_dict(config)), str(path)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


def state_of(path):
    """Everything in the latest checkpoint, by name, and the records without times."""
    tree = latest_state(path)
    records = [
        {k: v for k, v in r.items() if k not in ("images/s", "input_wait")} for r in read_metrics(path)
    ]
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}, records


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
        found, records = state_of(tmp_path / "killed" / folder)
        expected, whole = state_of(tmp_path / "whole" / folder)
        assert found.keys() == expected.keys()
        for leaf in expected:
            np.testing.assert_array_equal(found[leaf], expected[leaf], err_msg=leaf)
        assert records == whole
