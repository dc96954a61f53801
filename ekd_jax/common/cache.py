"""Results that took long to compute, kept in the user's cache directory for the next run."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from ekd_jax.common.files import user_cache


@dataclasses.dataclass(frozen=True)
class Cache:
    """A cache of named arrays on disk, one file per entry: `<kind>-<digest of the key>.npz`.

    Several processes may use it at once. Whatever goes wrong, nothing is lost but time: a damaged entry counts
    as missing, and an entry that cannot be written is left out.

    Attributes:
        kind: what the entries hold; the first part of their file names.
        max_bytes: size of all entries of this kind; beyond it the least recently used ones are deleted.
    """

    kind: str
    max_bytes: float = 1e8

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the arrays stored under a key, or None if there are none or they are damaged."""
        path = self._path(key)
        try:
            with np.load(path) as file:  # verifies the checksum of each array
                arrays = {name: file[name] for name in file.files}
            path.touch()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return arrays

    def store(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays under a key, the whole file or nothing; a full disk is no error."""
        path = self._path(key)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's types take names for options
            os.replace(partial, path)
            self._delete_oldest()
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> pathlib.Path:
        digest = hashlib.sha256(key.encode()).hexdigest()[:24]
        return user_cache() / f"{self.kind}-{digest}.npz"

    def _delete_oldest(self) -> None:
        """Delete the entries that were not used for longest until the others fit in `max_bytes`."""
        total = 0
        entries = user_cache().glob(f"{self.kind}-*.npz")
        for path in sorted(entries, key=lambda path: -path.stat().st_mtime):
            total += path.stat().st_size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)
