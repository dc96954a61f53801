"""The machine: its processor, and the CPUs that a process may use."""

import os
import pathlib
import platform


def cpu_name() -> str:
    """Return the name of the processor, such as "AMD EPYC 7B13"; its architecture where the system has no name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names and names[0]) or platform.processor() or platform.machine()


def usable_cpus() -> tuple[int, ...]:
    """Return the numbers of the CPUs that this process may use, one of every core first.

    It is empty where a process cannot be kept on certain CPUs, as on macOS.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return tuple(sorted(os.sched_getaffinity(0), key=lambda cpu: (_place_in_core(cpu), cpu)))


def _place_in_core(cpu: int) -> int:
    """Return how many CPUs of the same core have a smaller number; 0 where the system does not say."""
    file = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        parts = [part.split("-") for part in file.read_text().strip().split(",")]
        siblings = [
            number for first, *last in parts for number in range(int(first), int((last or [first])[0]) + 1)
        ]
    except (OSError, ValueError):
        return 0
    return sum(number < cpu for number in siblings)
