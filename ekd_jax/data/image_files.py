"""Image files on disk as examples."""

import hashlib
import os
from typing import NamedTuple

import numpy as np

from ekd_jax.common.text import printable
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import read_image_file


class ImageFile(NamedTuple):
    """An image file: path below a directory, label, size in bytes, and time of the last change in ns."""

    path: str
    label: int
    size: int
    modified: int


class ImageFiles:
    """Image files of known classes.

    Args:
        root: directory that the paths begin at.
        files: the files, in the order of their numbers.

    Attributes:
        labels: (N,) int32.
        sizes: (N,) int64, in bytes.
    """

    def __init__(self, root: str, files: list[ImageFile]):
        self._root = root
        self._paths = [file.path for file in files]
        self.labels = np.array([file.label for file in files], np.int32)
        self.sizes = np.array([file.size for file in files], np.int64)
        self._modified = np.array([file.modified for file in files], np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        path = self.path(index)
        return Example(read_image_file(path), int(self.labels[index]), printable(path))

    def path(self, index: int) -> str:
        """Return the path of the file with a number."""
        return os.path.join(self._root, self._paths[index])

    @property
    def fingerprint(self) -> str:
        """A digest of the paths below the directory, the labels and the sizes; a copy elsewhere has the same."""
        digest = hashlib.sha256(b"\0".join(map(os.fsencode, self._paths)))
        digest.update(self.labels.tobytes() + self.sizes.tobytes())
        return digest.hexdigest()

    @property
    def cache_key(self) -> str:
        """A text that also differs if a file has been changed, or is in another place."""
        modified = hashlib.sha256(self._modified.tobytes()).hexdigest()
        return f"{self.fingerprint} {modified} {printable(os.path.abspath(self._root))}"
