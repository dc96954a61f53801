"""Files that are written as a whole or not at all, and the user's cache directory."""

import errno
import fcntl
import json
import os
import pathlib
import stat
from typing import IO, Any

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


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


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends.

    Args:
        file: opened for writing.
        wait: until another process unlocks it.

    Returns:
        Whether it is locked now; False if its file system has no locks.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: another error.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno == errno.EACCES:  # what some network file systems say instead
            raise BlockingIOError(errno.EAGAIN, "locked by another process", file.name) from error
        raise
    return True


def read_bytes(path: str | os.PathLike[str], limit: int = 2**63) -> bytes:
    """Read a regular file. Anything else, such as a pipe or a device, is refused and never waited for.

    Args:
        path: of the file, or of a link to it.
        limit: the largest size in bytes.

    Raises:
        OSError: it is missing, is not a regular file, is larger than the limit, or cannot be read; `strerror`
            says which.
    """
    found = os.stat(path)
    why = ""
    if stat.S_ISDIR(found.st_mode):
        why = "it is a directory"
    elif not stat.S_ISREG(found.st_mode):
        why = "it is a pipe, a socket or a device"
    elif found.st_size > limit:
        why = f"it has {found.st_size:,} bytes, above the limit of {limit:,}"
    if why:
        raise OSError(errno.EINVAL, why, os.fspath(path))
    # The file may have been replaced meanwhile, so opening must not wait, and reading must end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read(found.st_size)
