"""Image files that are in a set more than once, byte for byte."""

import concurrent.futures
import functools
import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Hashable

import numpy as np

from ekd_jax.common import parallel
from ekd_jax.common.cache import Cache
from ekd_jax.common.log import once
from ekd_jax.common.progress import Progress
from ekd_jax.common.text import printable
from ekd_jax.data.image_files import ImageFiles

DUPLICATES = Cache("duplicates")
FILES_PER_TASK = 64  # that a thread reads in one go
SAMPLE_BYTES = 4096  # of the middle of a file; different images rarely agree in them

Groups = list[list[int]]


def warn_of_duplicates(train: ImageFiles, test: ImageFiles) -> None:
    """Log how many test images are also training images, and how many training images have several classes."""
    if not parallel.is_main():
        return
    key = f"{train.cache_key} {test.cache_key}"
    found = DUPLICATES.load(key)
    if found is None:
        found = find_duplicates(train, test)
        DUPLICATES.store(key, found)
    if len(found["shared"]):
        first, twin = found["shared"][0]
        once(
            logging.WARNING,
            f"test images that are also training images: {len(found['shared']):,} of {len(test):,} (the first is "
            f"{printable(test.path(first))}, the same as {printable(train.path(twin))}), so accuracy is overestimated",
        )
    if len(found["contradicting"]):
        first, twin = found["contradicting"][0]
        once(
            logging.WARNING,
            f"training images that equal one of another class: {len(found['contradicting']):,} of {len(train):,} "
            f"(the first is {printable(train.path(first))}, the same as {printable(train.path(twin))})",
        )


def find_duplicates(train: ImageFiles, test: ImageFiles) -> dict[str, np.ndarray]:
    """Return pairs of equal files, by their numbers.

    Files of one size are compared by a sample of their bytes, and those that agree in it by all of them.

    Returns:
        shared: (N, 2) int64, a test image and the first training image that equals it.
        contradicting: (M, 2) int64, a training image and the first one that equals it and has another label.
    """
    count = len(train)  # test images are numbered after those
    sizes = np.concatenate([train.sizes, test.sizes]).tolist()

    def matters(group: list[int]) -> bool:
        labels = {int(train.labels[i]) if i < count else -1 for i in group}
        return len(labels) > 1  # so there is a training image, and a test image or one of another label

    def digest(i: int, whole: bool) -> Hashable:
        path = train.path(i) if i < count else test.path(i - count)
        try:
            with open(path, "rb") as file:
                if whole:
                    return hashlib.file_digest(file, "sha256").digest()
                file.seek(max(0, sizes[i] - SAMPLE_BYTES) // 2)
                return hashlib.sha256(file.read(SAMPLE_BYTES)).digest()
        except OSError:
            return i  # it equals no other; reading it later says why

    groups = _divide([list(range(len(sizes)))], sizes.__getitem__, matters)
    for whole in (False, True):
        groups = _divide_by_content(groups, functools.partial(digest, whole=whole), matters)
    shared, contradicting = [], []
    for group in groups:
        first, *others = group
        shared += [(i - count, first) for i in others if i >= count]
        contradicting += [
            (i, first) for i in others if i < count and train.labels[i] != train.labels[first]
        ]
    return {
        "shared": np.array(sorted(shared), np.int64).reshape(-1, 2),
        "contradicting": np.array(sorted(contradicting), np.int64).reshape(-1, 2),
    }


def _divide(groups: Groups, key: Callable[[int], Hashable], matters: Callable[[list[int]], bool]) -> Groups:
    """Divide groups by a key, and return the parts that matter."""
    parts: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        for member in group:
            parts[number, key(member)].append(member)
    return [part for part in parts.values() if len(part) > 1 and matters(part)]


def _divide_by_content(
    groups: Groups, digest: Callable[[int], Hashable], matters: Callable[[list[int]], bool]
) -> Groups:
    """Divide groups by a digest of each file, which several threads compute."""
    members = [member for group in groups for member in group]
    progress = Progress("looking for images that are there twice", len(members), unit="images")
    digests: dict[int, Hashable] = {}

    def digest_some(start: int) -> list[tuple[int, Hashable]]:
        return [(member, digest(member)) for member in members[start : start + FILES_PER_TASK]]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for found in threads.map(digest_some, range(0, len(members), FILES_PER_TASK)):
            digests.update(found)
            progress.add(len(found))
    progress.clear()
    return _divide(groups, digests.__getitem__, matters)
