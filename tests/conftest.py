"""Eight virtual CPU devices, a tiny configuration, and commands run as a user runs them."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    # with the other scheduler devices may start all-reduces in different orders, and wait for ever
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ekd_jax-cache-")  # not the user's

import jax
import numpy as np
import pytest

from ekd_jax.common import parallel
from ekd_jax.config.knobs import default_config
from ekd_jax.config.resolve import resolve
from ekd_jax.runs.checkpoint import open_checkpoints
from ekd_jax.students.convert import match_arrays
from ekd_jax.training import loop

# Networks are tiny here: compiling is what takes time. Commands run optimized programs, as a user's do.
jax.config.update("jax_disable_most_optimizations", True)

# A shell's background jobs ignore SIGINT, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).parent.parent
REFERENCE = pathlib.Path(__file__).parent / "reference"

TINY = {
    "model.name": "resnet8",
    "model.students": (1, 0.5),
    "data.name": "digits",
    "data.train_examples": 200,
    "data.crop_padding": 1,
    "data.flip": False,
    "train.epochs": 3,
    "train.batch_size": 32,
    "train.log_every_steps": 4,
    "train.evaluate_every_epochs": 1,
    "train.checkpoint_every_epochs": 0.5,
}


# What takes longest begins, so that both workers of pytest-xdist end together.
FIRST = ("test_train.py", "test_processes.py", "test_stages_and_resume.py", "test_launch.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files."""
    items.sort(key=lambda item: item.path.name not in FIRST)


def tiny_config(method: str = "oem", **changes):
    """Two students on 200 digits; `changes` with __ for the dot: train__epochs=1."""
    config = default_config(method)
    for name, value in (TINY | {k.replace("__", "."): v for k, v in changes.items()}).items():
        section, _, knob = name.rpartition(".")
        (config[section] if section else config)[knob] = value
    return resolve(config)


def tiny_flags(**changes: object) -> list[str]:
    """The same as flags for `python -m ekd_jax.main`."""
    knobs = TINY | {k.replace("__", "."): v for k, v in changes.items()}
    return [f"--config={ROOT}/configs/digits.py", *(f"--config.{k}={v}" for k, v in knobs.items())]


def one_device():
    return parallel.make_mesh(jax.devices()[:1])


def command(module: str, *args: object, **kwargs) -> subprocess.CompletedProcess:
    """Runs `python -m ekd_jax.<module>` on one device, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"ekd_jax.{module}", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=plain_environment(),
        timeout=300,
        **kwargs,
    )


def student_from_torch(like, state, rules, dtype=np.float32):
    """Return a student's variables with the values of a PyTorch state dict, all of which must fit."""
    match = match_arrays(like, state, rules, dtype)
    assert not match.problems, match
    return match.variables


def latest_state(path: pathlib.Path) -> dict:
    """Everything in the latest checkpoint of a run."""
    with open_checkpoints(path) as checkpoints:
        step = checkpoints.choose()
        return checkpoints.restore_variables(checkpoints.shapes(step), step)[0]


def plain_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the directory and the summary of a complete run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    return path, loop.run(tiny_config(), path, one_device())
