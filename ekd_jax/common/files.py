"""Files that are written as a whole or not at all, and the user's cache directory."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import stat
from collections.abc import Iterator
from typing import IO, Any

from ekd_jax.common.text import human

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files


def user_cache() -> pathlib.Path:
    """Return the directory of results that can be computed again: ekd_jax in $XDG_CACHE_HOME or in ~/.cache.

    An empty or relative $XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification asks.

    Raises:
        OSError: there is no home directory.
    """
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.cache")
    if not os.path.isabs(folder):
        raise FileNotFoundError(errno.ENOENT, "there is no home directory for a cache")
    return pathlib.Path(folder) / "ekd_jax"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a value as JSON, the whole file or nothing; errors are those of `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write the whole file or nothing: readers see the old content or the new one, also after a power cut.

    Raises:
        OSError: it cannot be written; see `replacing`.
    """
    with replacing(path, len(data)) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: pathlib.Path, needed: int = 0, durable: bool = True) -> Iterator[pathlib.Path]:
    """Give a name beside `path` for a new file or directory, which becomes `path` at the end of the block.

    If anything fails, `path` is as it was, and nothing that was made for it is left.

    Args:
        path: of a file, or of a directory that is new or empty. A link is followed, missing parents are made.
        needed: how many bytes will be written, for the error; 0 if that is not known.
        durable: wait until it is on the disk, so that a power cut loses nothing; of a directory, write the files
            in it in the same way.

    Raises:
        OSError: it cannot be written; `filename` is `path`, and `strerror` says why and how much room is needed.
    """
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device", os.fspath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # left by a process of this number that was killed
        yield partial
        if durable and partial.is_file():
            sync(partial)
        os.replace(partial, target)
    except BaseException as error:
        _remove(partial)
        room = _room(error, target.parent, needed) if isinstance(error, OSError) else ""
        for parent in new_parents:  # the innermost first
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            why = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(error.errno or errno.EIO, f"{why}{room}", os.fspath(path)) from error
        raise
    if durable:
        with contextlib.suppress(OSError):  # some file systems cannot sync a directory
            sync(target.parent)


def why_not_writable(path: pathlib.Path) -> str:
    """Return why nothing can be made at `path`, "" if it seems possible; nothing is written."""
    parent = next(p for p in pathlib.Path(os.path.realpath(path)).parents if p.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    return "" if writable else f"{parent} is not a writable directory"


def sync(path: pathlib.Path) -> None:
    """Wait until a file, or the list of files in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    """Remove a file or directory, if it is there and that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _room(error: OSError, folder: pathlib.Path, needed: int) -> str:
    """Return how much room was needed and how much there is, in brackets; "" if room is not what lacks."""
    known = [f"{human(needed)}B needed"] if needed and error.errno in NO_ROOM else []
    if error.errno == errno.ENOSPC:
        with contextlib.suppress(OSError):
            known.append(f"{human(shutil.disk_usage(folder).free)}B free")
    return f" ({', '.join(known)})" if known else ""


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


def is_locked(path: pathlib.Path) -> bool | None:
    """Return whether a process holds the lock of a file, as `lock` takes it; None if that cannot be told.

    It is tried for an instant with a lock that readers share; nothing is written.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None


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
