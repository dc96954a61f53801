"""Files that are written as a whole or not at all, and the user's cache directory."""

import json
import os
import pathlib
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
