"""A process that times one network in one runtime.

`timing` starts it, fresh for every measurement: its memory is then that of this network alone, and nothing is
compiled or cached before. So it imports NumPy and the runtime, and nothing of this package that loads JAX.
"""

import gc
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Call = Callable[[Any], Any]
WARM_UP_CALLS, MIN_CALLS = 2, 3


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    On Linux it is VmHWM: `ru_maxrss` is inherited from the process that started this one.
    """
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found if sys.platform == "darwin" else 1024 * found


class Runtime(NamedTuple):
    """A runtime that has been imported.

    Attributes:
        load: (files, shape of a batch) -> a function from images in host memory to logits in host memory.
        peak: peak memory so far in bytes, of an accelerator if that is what computes.
        facts: of JAX its "platform", as `jax.export` names it, and its "device".
    """

    load: Callable[[Sequence[str], Sequence[int]], Call]
    peak: Callable[[], int] = peak_memory
    facts: dict[str, str] = {}


def main(job_file: str) -> None:
    """Do what a job says and write the result, both of them JSON files.

    The job has `runtime`, `threads`, `cpus` to stay on, `result`, and, to time a network, `files`, `shape` and `dtype`
    of a batch of images, and `seconds`. The result has the runtime's facts, `cpus`, and, of a network,
    `load_seconds`, `times` of the calls in seconds, `busy_cpus`, `peak_bytes` and `runtime_bytes`.
    """
    job = json.loads(pathlib.Path(job_file).read_bytes())
    if job["cpus"]:
        os.sched_setaffinity(
            0, job["cpus"]
        )  # before a runtime starts its threads: JAX starts one for each CPU
    runtime = STARTS[job["runtime"]](job["threads"])
    result: dict[str, Any] = dict(runtime.facts)
    result["cpus"] = sorted(os.sched_getaffinity(0)) if job["cpus"] else []
    if job.get("files"):
        result |= _timed(runtime, job)
    pathlib.Path(job["result"]).write_text(json.dumps(result))


def _timed(runtime: Runtime, job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    shape, seconds, generator = job["shape"], job["seconds"], np.random.default_rng(0)
    images = generator.normal(size=shape).astype(np.float32)
    if job["dtype"] == "uint8":
        images = generator.integers(0, 256, shape, dtype=np.uint8)
    runtime_bytes = runtime.peak()
    begin = time.perf_counter()
    call = runtime.load(job["files"], shape)
    call(images)
    load_seconds = time.perf_counter() - begin
    _times(call, images, seconds / 2, WARM_UP_CALLS)
    gc.disable()
    begin, used = time.perf_counter(), time.process_time()
    times = _times(call, images, seconds, MIN_CALLS)
    busy_cpus = (time.process_time() - used) / (time.perf_counter() - begin)
    return {
        "load_seconds": load_seconds,
        "busy_cpus": busy_cpus,
        "times": times,
        "peak_bytes": runtime.peak(),
        "runtime_bytes": runtime_bytes,
    }


def _times(call: Call, images: Any, seconds: float, at_least: int) -> list[float]:
    """Return the times of calls in seconds, one after the other for so long."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < end:
        begin = time.perf_counter()
        call(images)
        times.append(time.perf_counter() - begin)
    return times


def _start_jax(threads: int) -> Runtime:
    import jax
    import jax.export
    import numpy as np

    device = jax.devices()[0]

    def load(files: Sequence[str], shape: Sequence[int]) -> Call:
        program = jax.export.deserialize(bytearray(pathlib.Path(files[0]).read_bytes()))
        compute = jax.jit(program.call)
        return lambda images: np.asarray(jax.block_until_ready(compute(images)))

    facts = {"platform": jax.export.default_export_platform(), "device": device.device_kind}
    if device.platform == "cpu":
        return Runtime(load, facts=facts)
    return Runtime(load, lambda: int(device.memory_stats()["peak_bytes_in_use"]), facts)


def _start_onnxruntime(threads: int) -> Runtime:
    import onnxruntime

    def load(files: Sequence[str], shape: Sequence[int]) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(files[0], options, providers=["CPUExecutionProvider"])
        (name,) = (given.name for given in session.get_inputs())
        return lambda images: session.run(None, {name: images})[0]

    return Runtime(load)


def _start_openvino(threads: int) -> Runtime:
    from ekd_jax.students.formats.openvino import import_openvino

    openvino = import_openvino()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # this process is kept on its CPUs as a whole
    }

    def load(files: Sequence[str], shape: Sequence[int]) -> Call:
        core = openvino.Core()
        model = core.read_model(files[0])
        model.reshape(list(shape))  # compiled for the size of the batch, as JAX does
        compiled = core.compile_model(model, "CPU", settings)
        return lambda images: compiled({0: images})[0]

    return Runtime(load)


STARTS = {"jax": _start_jax, "onnxruntime": _start_onnxruntime, "openvino": _start_openvino}
