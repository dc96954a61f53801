"""Eight virtual CPU devices, a tiny configuration, and commands run as a user runs them."""

import atexit
import dataclasses
import gc
import importlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

# PyTorch's threads would spin while they wait, and take the cores from the other workers of pytest-xdist.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Networks are tiny here: compiling is what takes time, and so it is cut short in tests and in what they start.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(  # a process of a test inherits them
        [
            *os.environ.get("XLA_FLAGS", "").split(),
            "--xla_cpu_parallel_codegen_split_count=1",
            # later versions have no other emitters
            *["--xla_cpu_use_fusion_emitters=false"]
            * importlib.metadata.version("jaxlib").startswith("0.10."),
            # with the other scheduler devices may start all-reduces in different orders, and wait for ever
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
            "--xla_force_host_platform_device_count=8",
        ]
    )
)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept, not in the user's directory but in one that all workers of pytest-xdist and all commands
# share: many tests train the same tiny runs.
if "ekd_jax-cache-" not in os.environ.get("XDG_CACHE_HOME", ""):
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ekd_jax-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import numpy as np
import pytest

from ekd_jax import cli
from ekd_jax.common import parallel
from ekd_jax.common.compilation import keep_compiled_programs
from ekd_jax.config.knobs import default_config
from ekd_jax.config.resolve import resolve
from ekd_jax.models.cost import count_parameters
from ekd_jax.runs.checkpoint import open_checkpoints
from ekd_jax.students.description import NetworkDescription, Preprocessing, Provenance, StudentDescription
from ekd_jax.students.student import LoadedStudent
from ekd_jax.students.torch_arrays import match_arrays
from ekd_jax.training import single

if not multiprocessing.parent_process():  # a command does so itself
    keep_compiled_programs()

# A fifth of the time would go into looking for garbage among the million objects of programs that were traced.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

# A shell's background jobs ignore SIGINT, those of nohup SIGHUP, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = pathlib.Path(__file__).parent.parent
REFERENCE = pathlib.Path(__file__).parent / "reference"

TINY = {
    "model.name": "resnet8",
    "model.students": (0.25, 0.125),
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


# Commands are forked from a process that has imported them: the same as `python -m ekd_jax.<module>`, without the
# two seconds of imports.
COMMANDS = (
    "main",
    "status",
    "compare",
    "search",
    "extract",
    "export",
    "benchmark",
    "choose",
    "report",
    "evaluate",
    "predict",
    "describe",
    "convert",
    "prepare",
    "preview",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"ekd_jax.{name}" for name in COMMANDS])


class Started:
    """A command in a process, and process group, of its own.

    Args:
        module: of the command.
        args: its arguments.
        largest_file: how many bytes a file may have that it writes; 0 for any number.
        environment: what is different in its environment; one device if not given.
    """

    def __init__(
        self,
        module: str,
        *args: object,
        largest_file: int = 0,
        environment: dict[str, str] | None = None,
    ):
        self._directory = tempfile.TemporaryDirectory()
        self._files = [pathlib.Path(self._directory.name) / name for name in ("stdout", "stderr")]
        self._process = FORKS.Process(
            target=_run_command,
            args=(
                module,
                list(map(str, args)),
                self._files,
                largest_file,
                environment or plain_environment(),
            ),
        )
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, None while the command runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, or to none if it has ended."""
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def ended(self, seconds: float = 300) -> subprocess.CompletedProcess:
        """Wait for the end; return the exit code and what was printed."""
        self._process.join(seconds)
        assert self.poll() is not None, f"{self._process} did not end"
        return subprocess.CompletedProcess((), self.poll(), *self.printed())

    def printed(self) -> list[str]:
        """Return what came on standard output and on standard error so far."""
        return [file.read_text() if file.exists() else "" for file in self._files]


def command(module: str, *args: object, largest_file: int = 0) -> subprocess.CompletedProcess:
    """Run a command on one device, in a process of its own, to its end."""
    return Started(module, *args, largest_file=largest_file).ended()


def _run_command(
    module: str, args: list[str], files: list[pathlib.Path], largest_file: int, environment: dict[str, str]
) -> None:
    os.setsid()
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [module, *args]
    cli.run(importlib.import_module(f"ekd_jax.{module}"))


def forward(ensemble, variables, images, **mode):
    """Return `Ensemble.apply` as one program: operations one by one would each be compiled."""
    return jax.jit(lambda variables, images: ensemble.apply(variables, images, **mode))(variables, images)


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
    """Return the environment of a command: the same, with one device."""
    flags = os.environ["XLA_FLAGS"].split()
    return os.environ | {"XLA_FLAGS": " ".join(f for f in flags if "device_count" not in f)}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the directory and the summary of a complete run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    return path, single.run(tiny_config(), path, one_device())


@pytest.fixture
def copy(finished, tmp_path):
    """Return a copy of a complete run whose summary is missing, as if it had been killed before writing it."""
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    (path / "summary.json").unlink()
    return path


def fresh_student(class_names: tuple[str, ...], shape: tuple[int, int, int] = (8, 8, 1), seed: int = 0):
    """Return an untrained student of a tiny network, which is nevertheless complete."""
    network = NetworkDescription("resnet8", ("1/4",) * 3, len(class_names), shape, "float32", {})
    own = StudentDescription(
        network=network,
        student=1,
        parameters=0,
        macs=0,
        class_names=class_names,
        preprocessing=Preprocessing((0.5,), (0.5,)),
        provenance=Provenance("arrays"),
    )
    student = LoadedStudent(own, {})
    trace = student.ensemble.trace(shape)
    variables = student.ensemble.student_variables(trace.init(seed), 1)
    own = dataclasses.replace(
        own, parameters=count_parameters(variables["params"]), macs=trace.cost(1).macs
    )
    return LoadedStudent(own, variables)


def luminance(color):
    """Relative luminance of a color like "#1a5fd0", as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Contrast of two colors, from 1 to 21; level AA of WCAG 2 is 4.5 for text."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
