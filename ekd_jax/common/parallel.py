"""Devices and processes.

One mesh with the axes `data` and `fsdp`. A batch is split over all devices. The train state is replicated on
every device; with `train.fsdp=N`, each N devices in a row share one copy, with its large arrays sharded.

Every process runs the same program on its own devices. Where processes could diverge (a signal, a clock, a
directory listing), they agree here first.
"""

import atexit
import contextlib
import math
import os
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import distributed  # for the store of keys that all processes share; nothing public gives it
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.log import logger
from ekd_jax.common.watch import TRY_AGAIN, Watch

Array = jax.Array
AXES = ("data", "fsdp")
SMALLEST_SHARDED = 2**14  # elements: gathering fewer takes longer than keeping them everywhere
WATCH_KEY = "ekd_jax/watch"
_watches: list[Watch] = []  # the watch of this process, if it is one of several


# --- processes -----------------------------------------------------------------------------------


def start(coordinator: str | None, processes: int | None, number: int | None, timeout: int) -> None:
    """Join the other processes of the run, if there are any. Must come before anything else of JAX.

    Without arguments, JAX recognizes Cloud TPU, GKE, Slurm and Open MPI.

    Args:
        coordinator: HOST:PORT that process 0 listens on.
        processes: how many there are.
        number: of this process, from 0.
        timeout: seconds to wait for the others.

    Raises:
        UserError: some of the arguments are given and some are not, or the others do not answer.
    """
    given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": number}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is None or processes is None or number is None:
        if len(missing) < len(given):
            raise UserError(f"{' and '.join(missing)} missing: give all of {', '.join(given)}, or none")
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:1234")
        if not 0 <= number < processes:
            raise UserError(f"--process_id={number} must be from 0 to {processes - 1}")
    jax.config.update("jax_enable_preemption_service", False)  # the training loop handles signals itself
    jax.config.update("jax_check_proxy_envs", False)  # the relay uses no proxy
    with _patience(coordinator, processes, number, timeout):
        try:
            with _relayed() as watches:
                jax.distributed.initialize(
                    coordinator, processes, number, initialization_timeout=timeout + 60
                )
            for watch in watches:
                _meet(watch)
        except ValueError as error:
            if "coordinator_address" not in str(error):
                raise UserError(f"cannot join the other processes: {reason(error)}") from error
            # no cluster: this process is alone
        except RuntimeError as error:
            raise UserError(f"cannot join the other processes: {reason(error)}") from error


@contextlib.contextmanager
def _patience(
    coordinator: str | None, processes: int | None, number: int | None, seconds: int
) -> Iterator[None]:
    """End this process with one line when its time is over; JAX would abort it with a stack trace."""
    where = f"at {coordinator}" if coordinator else "at the address that the cluster gives"
    if number == 0:
        what = f"process 0 waited {seconds} s {where} for the other {(processes or 0) - 1} to join"
    else:
        own = "this process" if number is None else f"process {number}"
        what = f"{own} could not reach the coordinator, process 0 {where}, in {seconds} s"

    def give_up() -> None:
        print(
            f"error: {what}: check that all processes were started and that the port is open between them, "
            f"or raise --coordinator_timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TRY_AGAIN)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _relayed() -> Iterator[list[Watch]]:
    """Have JAX connect to its coordinator through the relay of a watch (see watch.py), which is then in the list.

    JAX finds out itself which address and number it has, so the function that makes its client is replaced.
    """
    make, watches = _jax.get_distributed_runtime_client, list[Watch]()

    def make_relayed(address: str, number: int, **options: Any) -> Any:
        watches.append(Watch(number, address))
        if options.get("mtls_cert_file"):  # the coordinator's certificate is for its own address
            return make(address, number, **options)
        no_proxy = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112
        os.environ["no_grpc_proxy"] = f"127.0.0.1,{no_proxy}".rstrip(",")  # noqa: SIM112
        return make(watches[0].relay(), number, **options)

    _jax.get_distributed_runtime_client = make_relayed
    try:
        yield watches
    finally:
        _jax.get_distributed_runtime_client = make


def _meet(watch: Watch) -> None:
    """Connect the watch to those of the other processes."""
    state = distributed.global_state
    if state.num_processes == 1 or state.client is None:
        return
    _watches.append(watch)
    # A process that ends at once leaves semaphores of its data workers. Python's tracker removes them, with a warning.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    atexit.register(watch.farewell)  # JAX's own function, which waits for the others, comes later
    if watch.number == 0:
        state.client.key_value_set(WATCH_KEY, watch.listen())
        return
    try:
        watch.connect(state.client.blocking_key_value_get(WATCH_KEY, 60_000))
    except OSError as error:
        logger.warning(
            f"process {watch.number} cannot connect to the watch of process 0 ({reason(error)}): open TCP between "
            f"the hosts; otherwise JAX aborts all processes 100 s after one is lost"
        )


def farewell(code: int = 0) -> None:
    """Tell the other processes that this one ends on purpose, so that it is not taken for lost.

    Args:
        code: 0 if all processes end, now or soon; otherwise the exit code of this process, which failed. The others
            then end with the same code, if they do not end by themselves within 10 s.
    """
    for watch in _watches:
        watch.farewell(code)


def await_loss() -> None:
    """Let the watch end this process, if something failed here because another process was lost.

    Which exception that raises depends on what this process was doing.
    """
    for watch in _watches:
        watch.await_loss()


def is_main() -> bool:
    """Return whether this is process 0, the only one that writes files and reports."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Return whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def who() -> str:
    """Return "process 3: ", for messages, or "" if there is only one process."""
    return f"process {jax.process_index()}: " if several() else ""


def gathered(values: Any) -> np.ndarray:
    """Return the arrays of all processes, stacked to (processes, ...); wait for all of them."""
    values = np.asarray(values)
    if not several():
        return values[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(values))


def from_main(tree: Any) -> Any:
    """Return the tree of numpy arrays of process 0, in all processes; wait for all of them."""
    if not several():
        return tree
    with jax.transfer_guard("allow"):
        return multihost_utils.broadcast_one_to_all(tree)


# --- devices -------------------------------------------------------------------------------------


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """Make a mesh over `devices`; over all there are if not given.

    Raises:
        UserError: their number is not a multiple of `fsdp`.
    """
    found = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    if len(found) % fsdp:
        nearest = max(n for n in range(1, fsdp) if len(found) % n == 0)
        raise UserError(f"train.fsdp={fsdp} does not divide the {len(found)} devices; nearest: {nearest}")
    return Mesh(np.asarray(found).reshape(-1, fsdp), AXES)


def shares(number: int, mesh: Mesh | None = None) -> list[list[jax.Device]]:
    """Divide the devices of a mesh, or all there are, into equal parts of neighbors.

    Raises:
        UserError: `number` does not divide their number; this is one of several processes.
    """
    devices = list(mesh.devices.flat) if mesh else jax.devices()
    if number > 1 and several():
        raise UserError(f"at_once={number}: several processes train one run at a time: leave it out")
    if number < 1 or len(devices) % number:
        fitting = max(n for n in range(1, max(number, 2)) if len(devices) % n == 0)
        raise UserError(
            f"at_once={number} does not divide the number of devices, {len(devices)}; nearest: {fitting}"
        )
    each = len(devices) // number
    return [devices[i : i + each] for i in range(0, len(devices), each)]


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that has the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding with one axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return the sharding of each array of a train state, or of its shape.

    It is replicated, or the longest axis that can be divided is sharded over the mesh axis `fsdp`.
    """
    parts = mesh.shape["fsdp"]

    def of(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
        if parts == 1 or not axes or math.prod(shape) < SMALLEST_SHARDED:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: (shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(of, state)


def place(tree: Any, shardings: Any) -> Any:
    """Put host arrays, the same in every process, on the devices."""

    def one(value: Any, sharding: NamedSharding) -> Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    with jax.transfer_guard_host_to_device("allow"):  # this transfer is intended
        return jax.tree.map(one, tree, shardings)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put host arrays, the same in every process, on every device."""
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def whole(mesh: Mesh, tree: Any) -> Any:
    """Return sharded arrays as whole ones on every device, inside a traced function."""
    return tree if mesh.shape["fsdp"] == 1 else lax.with_sharding_constraint(tree, replicated(mesh))


def fetch(tree: Any) -> Any:
    """Return arrays of the devices as whole numpy arrays, in every process; all processes must call it."""

    def one(value: Any) -> Any:
        there = not isinstance(value, Array) or value.is_fully_addressable or value.is_fully_replicated
        return value if there else multihost_utils.process_allgather(value, tiled=True)

    return jax.device_get(jax.tree.map(one, tree))


def own_rows(sharding: NamedSharding, count: int) -> slice:
    """Return which of `count` rows are on this process's devices; they are consecutive."""
    places = sharding.addressable_devices_indices_map((count,)).values()
    held = [place[0].indices(count) for place in places if place is not None]
    return slice(min(first for first, _, _ in held), max(last for _, last, _ in held))


def device_memory(mesh: Mesh) -> int:
    """Return a device's bytes of memory, the smallest of all processes; for CPUs their share of the machine's."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    limit = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)
    return int(gathered(np.float32(limit)).min()) if several() else limit


def peak_memory(mesh: Mesh) -> int:
    """Return the most bytes that a device of this process has taken so far; on CPUs, the process itself.

    No device is waited for.
    """
    devices = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mesh.local_devices]
    known = [int(peak) for peak in devices if peak]
    unit = 1 if sys.platform == "darwin" else 1024  # of what the system says about a process
    return max(known, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def check_divisible(name: str, batch_size: int, parts: int, what: str) -> None:
    """Raise UserError unless a batch can be divided into equal parts."""
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"{name}={batch_size} cannot be split over {what}; nearest: {nearest}")
