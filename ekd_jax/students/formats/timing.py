"""How fast networks run, and in how much memory: the files that `export` writes, timed in fresh processes."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.log import logger
from ekd_jax.common.machine import cpu_name, usable_cpus
from ekd_jax.common.progress import Progress
from ekd_jax.students.formats.exportable import Exportable, exportable_student
from ekd_jax.students.formats.onnx_file import UnwritableError
from ekd_jax.students.formats.registry import FORMATS, missing_package
from ekd_jax.students.formats.request import Request
from ekd_jax.students.formats.stablehlo import write_program
from ekd_jax.students.student import LoadedStudent
from ekd_jax.version import __version__

# runtime -> the format that it runs. JAX's is traced anew, for this device, as `jax.jit` would do.
RUNTIMES = {"jax": "stablehlo", "onnxruntime": "onnx", "openvino": "openvino"}
BATCH_SIZES, THREADS, SECONDS, ROUNDS = (1, 64), 1, 1.0, 3
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from ekd_jax.students.formats.timing_process import main"
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network to be timed.

    Attributes:
        name: "student_3", "ensemble", or the directory of a student.
        network: as it is exported.
        step: of the checkpoint.
        weights: SHA-256 of its weights, hexadecimal.
        onnx_file: an ONNX file to be timed in place of the network's own, such as one in int8.
    """

    name: str
    network: Exportable
    step: int = 0
    weights: str = ""
    onnx_file: bytes = b""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The machine and the runtime that a network is timed with.

    Attributes:
        runtime: a key of `RUNTIMES`.
        version: of the runtime.
        ekd_jax: version of this package, which wrote the file.
        device: what computes: the name of the processor, or of the accelerator.
        platform: "cpu", or the accelerator's as `jax.export` names it.
        cores: number of CPUs that could be used.
        threads: number of threads that compute.
        cpus: the CPUs that the process was kept on, as many as threads; empty where the system cannot do that.
    """

    runtime: str
    version: str
    ekd_jax: str
    device: str
    platform: str
    cores: int
    threads: int
    cpus: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How fast a network ran in a runtime, at one batch size.

    A call takes images in host memory, normalized float32 unless the network has its preprocessing inside, and gives
    logits or probabilities in host memory.

    Attributes:
        network, step, weights: as in `Subject`.
        conditions: what it was timed with.
        batch_size: images in a call.
        file_bytes: what the runtime was given; of JAX the program with its weights.
        calls: how many were timed, in all rounds.
        median_ms: time of a call.
        p10_ms, p90_ms: a tenth of the calls was faster, or slower.
        rounds_ms: the median of every round, each a process of its own.
        images_per_second: `batch_size` divided by the median.
        busy_cpus: how many CPUs the process used on average while it was timed; the most of the rounds.
        load_seconds: to load, to compile, and for the first call; median of the rounds.
        peak_bytes: largest memory of the process, the runtime's own included; on an accelerator, of its memory.
        runtime_bytes: the same when the runtime was imported and no network loaded.
        time: when, in UTC.
    """

    network: str
    step: int
    weights: str
    conditions: Conditions
    batch_size: int
    file_bytes: int
    calls: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds_ms: tuple[float, ...]
    images_per_second: float
    busy_cpus: float
    load_seconds: float
    peak_bytes: int
    runtime_bytes: int
    time: str


def benchmark_student(
    student: LoadedStudent,
    runtimes: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int = THREADS,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> tuple[Measurement, ...]:
    """Time a student in one or several runtimes, each measurement in fresh processes.

    Args:
        student: as `load_student` or `load_run(...).student(n)` returns it.
        runtimes: "jax", "onnxruntime", "openvino"; those that are installed if not given.
        batch_sizes: numbers of images in a call.
        threads: that compute.
        seconds: of timing for each runtime and batch size, warm-up not counted.
        rounds: processes among which these seconds are divided.

    Raises:
        UserError: a runtime is unknown, not installed, or fails; more threads than there are CPUs.
    """
    subject = student_subject(student, f"student_{student.description.student}")
    found = [conditions(runtime, threads) for runtime in chosen_runtimes(runtimes)]
    return measure([subject], found, batch_sizes, seconds, rounds)


def student_subject(student: LoadedStudent, name: str) -> Subject:
    """Return a student as a network to be timed."""
    network, step = exportable_student(student), student.description.provenance.step
    return Subject(name, network, step, digest(student.variables))


def digest(variables: Any) -> str:
    """Return the SHA-256 of the names and values of arrays, hexadecimal."""
    found = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(value)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def installed_runtimes() -> list[str]:
    """Return the runtimes whose packages are installed."""
    return [name for name, kind in RUNTIMES.items() if not missing_package(kind)]


def chosen_runtimes(asked: Sequence[str]) -> list[str]:
    """Return the runtimes that are asked for, each once; all that are installed if none is.

    Raises:
        UserError: one is unknown, or its package is not installed.
    """
    for name in asked:
        if name not in RUNTIMES:
            raise UserError(f"--runtime={name} is not known{nearest(name, RUNTIMES)}")
        if lacks := missing_package(RUNTIMES[name]):
            raise UserError(f"--runtime={name} needs {lacks}")
    return list(dict.fromkeys(asked)) or installed_runtimes()


def check_threads(threads: int) -> None:
    """Raise UserError unless there are CPUs for so many threads."""
    if not 1 <= threads <= _cores():
        raise UserError(f"--threads={threads} must be from 1 to {_cores()}, the CPUs that can be used here")


def _cores() -> int:
    return len(usable_cpus()) or os.cpu_count() or 1


def conditions(runtime: str, threads: int) -> Conditions:
    """Return what a network would be timed with now.

    Raises:
        UserError: more threads than CPUs, or JAX does not start.
    """
    check_threads(threads)
    usable = usable_cpus()
    cpus = tuple(sorted(usable[:threads]))
    job = {"runtime": runtime, "threads": threads, "cpus": cpus}
    facts = _result(job, "jax does not start") if runtime == "jax" else {"platform": "cpu"}
    return Conditions(
        runtime=runtime,
        version=importlib.metadata.version(FORMATS[RUNTIMES[runtime]].runtime),
        ekd_jax=__version__,
        device=cpu_name() if facts["platform"] == "cpu" else facts["device"],
        platform=facts["platform"],
        cores=_cores(),
        threads=threads,
        cpus=cpus,
    )


def written(subject: Subject, found: Conditions, batch_size: int) -> dict[str, bytes]:
    """Return the files that a runtime is given to run a network.

    Raises:
        UnwritableError: the network cannot be written for this runtime.
    """
    try:
        if found.runtime == "jax":
            return {"program": write_program(subject.network, batch_size, found.platform)}
        kind = FORMATS[RUNTIMES[found.runtime]]
        if subject.onnx_file and kind.of_onnx:
            return kind.of_onnx(subject.onnx_file)
        return kind.write(Request((subject.network,)))
    except UnwritableError as error:
        raise UnwritableError(f"{error}; --runtime=jax takes every network") from error


def measure(
    subjects: Sequence[Subject],
    runtimes: Sequence[Conditions],
    batch_sizes: Sequence[int],
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> tuple[Measurement, ...]:
    """Time every network with every runtime at every batch size.

    In every round each of them has a turn, in a process of its own, so that whatever else the machine does is
    divided among all. A network that cannot be written for a runtime is left out there, with a warning.

    Args:
        subjects: the networks.
        runtimes: with which, and how.
        batch_sizes: numbers of images in a call.
        seconds: of timing for each of them, warm-up not counted.
        rounds: how many.

    Raises:
        UserError: no network can be written for any of the runtimes, or a runtime fails.
    """
    asked = [(subject, found, size) for subject in subjects for found in runtimes for size in batch_sizes]
    with tempfile.TemporaryDirectory() as name:
        turns, jobs, refused = [], [], {}
        writing = Progress("writing files to be timed", len(asked), unit="files")
        for number, (subject, found, size) in enumerate(asked):
            writing.update(number, _named(subject, found, size))
            try:
                files = written(subject, found, size)
            except UnwritableError as error:
                refused[str(error)] = error
                continue
            shape = (size, *subject.network.input_shape)
            job = _job(pathlib.Path(name) / str(number), files, found, shape)
            jobs.append(job | {"dtype": subject.network.input_type})
            turns.append((subject, found, size))
        writing.clear()
        if refused and not turns:
            raise next(iter(refused.values()))
        for why in refused:
            logger.warning(f"warning: left out: {why}")
        results: list[list[dict[str, Any]]] = [[] for _ in turns]
        timing = Progress("timing", rounds * len(turns), unit="measurements")
        for number in range(rounds):
            for place, turn in enumerate(turns):
                timing.update(number * len(turns) + place, _named(*turn))
                job = jobs[place] | {"seconds": seconds / rounds}
                results[place].append(_result(job, f"{_named(*turn)} fails"))
        timing.clear()
    return tuple(_joined(*turn, job, found) for turn, job, found in zip(turns, jobs, results, strict=True))


def _named(subject: Subject, found: Conditions, batch_size: int) -> str:
    return f"{subject.name} in {found.runtime}, batch {batch_size}"


def _job(
    folder: pathlib.Path, files: dict[str, bytes], found: Conditions, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Write the files of a network, and return what its process has to do."""
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    paths = [str(folder / file) for file in files]
    return {
        "runtime": found.runtime,
        "threads": found.threads,
        "cpus": found.cpus,
        "files": paths,
        "bytes": sum(map(len, files.values())),
        "shape": shape,
    }


def _result(job: dict[str, Any], failure: str) -> dict[str, Any]:
    """Return what a fresh process finds out; see `timing_process.main`.

    Raises:
        UserError: the process fails; the message begins with `failure`.
    """
    own = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as name:
        file, result = (pathlib.Path(name) / each for each in ("job.json", "result.json"))
        file.write_text(json.dumps(job | {"result": str(result)}))
        done = subprocess.run(
            [sys.executable, "-c", f"{START}; main(sys.argv[2])", json.dumps(sys.path), file],
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode < 0:
            raise UserError(
                f"{failure}: {signal.Signals(-done.returncode).name} ended its process; is memory short?"
            )
        if done.returncode:
            raise UserError(f"{failure}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        found: dict[str, Any] = json.loads(result.read_bytes())
        return found


def _joined(
    subject: Subject, found: Conditions, batch_size: int, job: dict[str, Any], results: list[dict[str, Any]]
) -> Measurement:
    """Return the results of all rounds as one measurement."""
    rounds = [1e3 * np.array(result["times"]) for result in results]
    low, median, high = np.percentile(np.concatenate(rounds), (10, 50, 90))
    return Measurement(
        network=subject.name,
        step=subject.step,
        weights=subject.weights,
        conditions=found,
        batch_size=batch_size,
        file_bytes=job["bytes"],
        calls=sum(map(len, rounds)),
        median_ms=float(median),
        p10_ms=float(low),
        p90_ms=float(high),
        rounds_ms=tuple(float(np.median(times)) for times in rounds),
        images_per_second=float(1e3 * batch_size / median),
        busy_cpus=max(result["busy_cpus"] for result in results),
        load_seconds=float(np.median([result["load_seconds"] for result in results])),
        peak_bytes=max(result["peak_bytes"] for result in results),
        runtime_bytes=max(result["runtime_bytes"] for result in results),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
