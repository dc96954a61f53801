"""Files that are written as a whole or not at all, and the user's cache directory."""

import errno
import json
import os
import pathlib
import stat
from typing import Any


def user_cache() -> pathlib.Path:
    """Return the directory of results that can be computed again: ~/.cache/ekd_jax or, if $XDG_CACHE_HOME
    is set, ekd_jax below it."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ekd_jax"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a value as JSON, the whole file or nothing."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write the whole file or nothing: readers see the old content or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_bytes(path: pathlib.Path, limit: int | None = None) -> bytes:
    """Read a regular file. Anything else, such as a pipe or a device, might never end.

    Args:
        path: of the file, or of a link to it.
        limit: the largest size in bytes.

    Raises:
        OSError: it is missing, is not a regular file, is larger than the limit, or cannot be read.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    if limit is not None and found.st_size > limit:
        raise OSError(f"{path} has {found.st_size:,} bytes, more than the {limit:,} that are allowed")
    return path.read_bytes()
