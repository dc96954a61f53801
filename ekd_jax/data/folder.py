"""A plain folder of images: FOLDER/CLASS/image.jpg, or FOLDER/train/CLASS/... and FOLDER/test/CLASS/..."""

import hashlib
import os
import pathlib

from ekd_jax.common.errors import UserError
from ekd_jax.data.dataset import Example, Facts, Source

SUFFIXES = (".jpg", ".jpeg", ".png")
TEST_NAMES = ("test", "val", "validation")
TEST_SHARE = 5  # without a folder of test images, every fifth image is one


class Files:
    """The images of several class folders, ordered by a hash of their paths.

    The order has nothing to do with the classes, and an image keeps its neighbors when others come.
    """

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
            raise UserError(f"the image {path} cannot be read ({error.strerror})") from error

    @property
    def fingerprint(self) -> str:
        listing = "\n".join(f"{path} {os.path.getsize(path)}" for path, _ in self._files)
        return hashlib.sha256(listing.encode()).hexdigest()


def open_folder(folder: str) -> Source:
    """The images below a folder.

    Args:
        folder: holds one folder a class, with .jpg, .jpeg and .png files at any depth; or `train` and
            `test` (or `val`, `validation`) with the same class folders each. Without a folder of test
            images, every fifth image by the hash of its path is for testing.

    Raises:
        UserError: no such folder, no class folder, a class without images, test classes that training
            does not have.
    """
    root = pathlib.Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise UserError(
            f"data.data_dir={folder!r} is no folder: with data.name=folder it holds the class folders"
        )
    tests = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    if (root / "train").is_dir():
        if not tests:
            raise UserError(f"{root} has a folder train, but none named {', '.join(TEST_NAMES)}")
        classes = _classes(root / "train")
        unknown = sorted(set(_classes(tests[0])) - set(classes))
        if unknown:
            raise UserError(f"{tests[0] / unknown[0]} is a class that {root / 'train'} does not have")
        train, test = _files(root / "train", classes), _files(tests[0], classes, may_miss=True)
    else:
        classes = _classes(root)
        files = _files(root, classes)
        test = files[TEST_SHARE - 1 :: TEST_SHARE]
        train = [file for i, file in enumerate(files) if i % TEST_SHARE != TEST_SHARE - 1]
    if not test:
        raise UserError(f"{root} has too few images to test on: at least {TEST_SHARE}, or a folder test")
    facts = Facts("folder", (None, None, 3), tuple(classes), len(train), len(test))
    return Source(facts, Files(train), Files(test))


def _classes(folder: pathlib.Path) -> list[str]:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not classes:
        raise UserError(f"{folder} holds no class folders: images lie in {folder}/CLASS/image.jpg")
    return classes


def _files(folder: pathlib.Path, classes: list[str], may_miss: bool = False) -> list[tuple[str, int]]:
    """(path, label) of every image, ordered by a hash of the path below `folder`."""
    found = []
    for label, name in enumerate(classes):
        below = folder / name
        own = [
            os.path.join(place, file)
            for place, _, files in os.walk(below)
            for file in files
            if file.lower().endswith(SUFFIXES) and file[0] != "."
        ]
        if not own and not may_miss:
            raise UserError(
                f"the class folder {below} holds no image ({', '.join(SUFFIXES)}): fill or remove it"
            )
        found += [(path, label) for path in own]

    def mixed(file: tuple[str, int]) -> bytes:
        return hashlib.md5(os.path.relpath(file[0], folder).encode(), usedforsecurity=False).digest()

    return sorted(found, key=mixed)
