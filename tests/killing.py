"""Small runs of every method, in processes that can be killed; what is left of them, to compare."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
from conftest import ROOT, latest_state, one_device, tiny_config
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from ekd_jax.config.resolve import to_dict
from ekd_jax.runs.metrics import MEASURED, read_metrics
from ekd_jax.training import single

SMALL = {
    "train__epochs": 2.0,
    "train__log_every_steps": 2,
    "train__evaluate_every_epochs": 2.0,
    "train__checkpoint_every_epochs": 0.5,
    "model__students": (0.25, 0.25),
}
TEACHERS = {"method__teachers": ("{teacher}",)}
CHANGES = {
    "cl_ilr": {"model__students": (0.25, 0.25, 0.25, 0.25)},
    "byot": {"model__students": (0.25,)},
    "snapshot": {"model__students": (0.25,), "method__cycles": 2},
    "dml": {"method__update": "alternating"},
    "kd": {**TEACHERS, "model__students": (0.25,)},
    "dckd": TEACHERS,
    "ekd": {"method__teachers": ("{teacher}", "{teacher}")},
    "meal": {"method__teachers": ("{teacher}", "{teacher}"), "model__students": (0.25,)},
    "meal_v2": {**TEACHERS, "model__students": (0.25,)},
    "srm": {**TEACHERS, "model__students": (0.25,)},
    "blockwise": {**TEACHERS, "model__students": (0.5,)},
    "self_distillation": {"model__students": (0.25,)},
    "ensemble_distillation": {"model__students": (0.25,), "method__members": 2},
}


def config_of(name, teacher):
    changes = SMALL | CHANGES.get(name, {})
    if "method__teachers" in changes:
        changes["method__teachers"] = tuple(str(teacher) for _ in changes["method__teachers"])
    if name == "srm":
        changes |= {"method__dictionary_epochs": 2.0, "method__initialize_epochs": 2.0}
    return tiny_config(name, **changes)


def train_teacher(path):
    """Train the run of one network that methods with teachers use."""
    single.run(tiny_config("baseline", **SMALL | {"model__students": (0.5,)}), path, one_device())
    return path


@contextlib.contextmanager
def compiled_once(folder: pathlib.Path) -> Iterator[None]:
    """Let all processes share the programs that one of them has compiled."""
    before = jax.config.jax_compilation_cache_dir
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    reset_cache()
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", before)
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


def state_of(path):
    """Everything in the latest checkpoint, by name, and the records without times."""
    tree = latest_state(path)
    records = [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(path)]
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}, records


def assert_same_run(killed, whole):
    """The latest states have the same bits, and the records are the same but for times."""
    found, records = state_of(killed)
    expected, recorded = state_of(whole)
    assert found.keys() == expected.keys()
    for leaf in expected:
        np.testing.assert_array_equal(found[leaf], expected[leaf], err_msg=leaf)
    assert records == recorded
