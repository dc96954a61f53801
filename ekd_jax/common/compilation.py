"""JAX's persistent compilation cache, in a directory per kind of processor."""

import atexit
import errno
import os
import pathlib
import platform
import zlib

import jax

from ekd_jax.common.files import user_cache


def keep_compiled_programs(directory: pathlib.Path | None = None, gigabytes: float = 4.0) -> None:
    """Keep programs that took more than a second to compile for the next process.

    Several processes may share the directory. A program that cannot be kept, as on a full disk, is left out.

    Args:
        directory: where to; `~/.cache/ekd_jax/compiled` if not given.
        gigabytes: size limit; programs that were not used for longest are deleted.

    Raises:
        OSError: the directory cannot be made or is not writable.
    """
    place = (directory or user_cache() / "compiled") / _processor()
    place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK | os.X_OK):  # JAX writes there even to read
        raise PermissionError(errno.EACCES, "it is not writable", str(place))
    _remove_incomplete(place)
    atexit.register(_remove_incomplete, place)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", int(gigabytes * 1e9))


def _remove_incomplete(place: pathlib.Path) -> None:
    """Remove programs that were written only in part, as on a full disk: JAX would keep no other one beside them.

    The time of the last use, in a file of its own, is what JAX writes last.
    """
    for program in place.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def _processor() -> str:
    """Return a name for the processor's instructions: a program for one CPU must not run on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        known = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        known = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(known.encode()):08x}"
