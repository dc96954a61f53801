"""Results that took long to compute, kept in the user's cache directory for the next run."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from ekd_jax.common.files import replacing, user_cache
from ekd_jax.common.zipped import read_npz


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
        try:
            path = self._path(key)
            arrays = read_npz(path)
        except Exception:  # a damaged archive raises many kinds
            return None
        with contextlib.suppress(OSError):  # it may be read, but not changed
            path.touch()
        return arrays

    def store(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays under a key, the whole file or nothing; a full disk is no error."""
        with contextlib.suppress(OSError):
            needed = sum(array.nbytes for array in arrays.values())
            with replacing(self._path(key), needed, durable=False) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's types take names for options
            self._delete_oldest()

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
