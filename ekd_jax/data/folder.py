"""A plain directory of images: DIR/CLASS/image.jpg, or DIR/train/CLASS/... and DIR/test/CLASS/..."""

import hashlib
import os
import pathlib

from ekd_jax.common.errors import UserError
from ekd_jax.data.dataset import Example, Facts, Source

SUFFIXES = (".jpg", ".jpeg", ".png")
TEST_NAMES = ("test", "val", "validation")
TEST_EVERY = 5  # without a directory of test images, every fifth image is one


class ImageFiles:
    """Image files, given as (path, label)."""

    def __init__(self, files: list[tuple[str, int]]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path, label = self._files[index]
        try:
            with open(path, "rb") as file:
                return Example(file.read(), label, path)
        except OSError as error:
            raise UserError(
                f"the image {path} cannot be read ({error.strerror}): restore or remove it"
            ) from error

    @property
    def fingerprint(self) -> str:
        listing = "\n".join(f"{path} {os.path.getsize(path)}" for path, _ in self._files)
        return hashlib.sha256(listing.encode()).hexdigest()


def open_folder(folder: str) -> Source:
    """Return the images in a directory as a data set.

    Args:
        folder: directory with one directory per class, with .jpg, .jpeg and .png files at any depth; or with
            directories `train` and `test` (or `val`, `validation`), each with class directories. Without a
            directory of test images, every fifth image in the order of a hash of the paths is a test image.

    Raises:
        UserError: there is no such directory or no class directory, a class has no images, or there is a test
            class without training images.
    """
    root = pathlib.Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise UserError(
            f"data.data_dir={folder!r} is not a directory: for data.name=folder, pass the directory that "
            f"holds the class directories"
        )
    tests = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    if (root / "train").is_dir():
        if not tests:
            raise UserError(
                f"{root} has a directory train, but none named {', '.join(TEST_NAMES)}: add one"
            )
        classes = _classes(root / "train")
        unknown = sorted(set(_classes(tests[0])) - set(classes))
        if unknown:
            raise UserError(
                f"the class {tests[0] / unknown[0]} is not in {root / 'train'}: add or remove it"
            )
        train, test = _files(root / "train", classes), _files(tests[0], classes, may_be_empty=True)
    else:
        classes = _classes(root)
        files = _files(root, classes)
        test = files[TEST_EVERY - 1 :: TEST_EVERY]
        train = [file for i, file in enumerate(files) if i % TEST_EVERY != TEST_EVERY - 1]
    if not test:
        raise UserError(
            f"{root} has no test images: add a directory named test, or at least {TEST_EVERY} images in all"
        )
    facts = Facts("folder", (None, None, 3), tuple(classes), len(train), len(test))
    return Source(facts, ImageFiles(train), ImageFiles(test))


def _classes(folder: pathlib.Path) -> list[str]:
    """Return the names of the class directories in a directory."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not classes:
        raise UserError(f"{folder} holds no class directories: put images into {folder}/CLASS/image.jpg")
    return classes


def _files(folder: pathlib.Path, classes: list[str], may_be_empty: bool = False) -> list[tuple[str, int]]:
    """Return (path, label) of every image, ordered by a hash of its path below `folder`.

    The order is unrelated to the classes, and images keep their order when others are added. `may_be_empty`
    allows classes without images.
    """
    found = []
    for label, name in enumerate(classes):
        below = folder / name
        own = [
            os.path.join(place, file)
            for place, _, files in os.walk(below)
            for file in files
            if file.lower().endswith(SUFFIXES) and file[0] != "."
        ]
        if not own and not may_be_empty:
            raise UserError(
                f"the class directory {below} holds no image ({', '.join(SUFFIXES)}): fill or remove it"
            )
        found += [(path, label) for path in own]

    def hash_of_path(file: tuple[str, int]) -> bytes:
        return hashlib.md5(os.path.relpath(file[0], folder).encode(), usedforsecurity=False).digest()

    return sorted(found, key=hash_of_path)


def find_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the image files in a directory, at any depth, in the order of their paths.

    Raises:
        UserError: there are none.
    """
    found = [
        pathlib.Path(place) / file
        for place, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(SUFFIXES) and file[0] != "."
    ]
    if not found:
        raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return sorted(found)
