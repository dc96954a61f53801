"""What a run writes while it goes on: console, metrics.jsonl, TensorBoard; and whole files safely."""

import json
import os
import pathlib
from typing import Any


def user_cache() -> pathlib.Path:
    """Where things are kept that can be made again: ~/.cache/ekd_jax, or below $XDG_CACHE_HOME."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ekd_jax"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes the file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
