"""Zip archives as NumPy and PyTorch write them, checked by their headers before memory is taken."""

import math
import os
import zipfile

import numpy as np


def check_stored(archive: zipfile.ZipFile, path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the entries fit in the file.

    They do unless some are compressed or share their bytes, as in a small file that unpacks to terabytes.
    """
    claimed, there = sum(entry.file_size for entry in archive.infolist()), os.path.getsize(path)
    if claimed > there:
        raise ValueError(
            f"its entries claim {claimed:,} bytes, and the file has {there:,}: it is compressed or damaged"
        )


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz file that `numpy.savez` wrote; their checksums are verified.

    Raises:
        ValueError: the entries or their headers claim more than there is.
        Exception: of many kinds, if it cannot be read or is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        check_stored(archive, path)
        entries = archive.infolist()
        return {entry.filename.removesuffix(".npy"): _read_array(archive, entry) for entry in entries}


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read_header:
            raise ValueError(f"{entry.filename} has the unknown version {version}")
        shape, _, dtype = read_header[version](file)
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(
                f"{entry.filename} claims the shape {shape}, and has {entry.file_size:,} bytes"
            )
    with archive.open(entry) as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
