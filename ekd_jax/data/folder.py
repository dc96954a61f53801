"""A plain directory of images: DIR/CLASS/image.jpg, or DIR/train/CLASS/... and DIR/test/CLASS/...

Nothing is left out without a word, and a layout that may mean something else is refused.
"""

import contextlib
import hashlib
import logging
import os
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.log import once
from ekd_jax.common.text import UNPRINTABLE, printable
from ekd_jax.data.dataset import Facts, Source
from ekd_jax.data.decode import SUFFIXES
from ekd_jax.data.duplicates import warn_of_duplicates
from ekd_jax.data.image_files import ImageFile, ImageFiles

IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
# Names of the directories of each split, in any case: those of torchvision, Keras, timm, Kaggle and Roboflow.
TRAIN = ("train", "training")
TEST = ("test", "testing")
VALIDATION = ("val", "valid", "validation", "dev", "eval", "evaluation")
LAYOUT = (
    "expected are DIR/CLASS/image.jpg, or DIR/train/CLASS/image.jpg and DIR/test/CLASS/image.jpg, with two or "
    "more classes"
)
TEST_EVERY = 5  # without a directory of test images, every fifth image of a class is one
FORBIDDEN = "files without permission to read them"
# Directories and files that systems and programs leave behind, besides those whose name begins with a dot.
HIDDEN = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "lost+found", "@eadir")


def open_folder(folder: str, test_split: str = "") -> Source:
    """Return the images in a directory as a data set, and say what is left out of it.

    Classes are numbered in the order of the code points of their names: "0", "1", "10", "2", and "Z" before "a".
    Hidden files and directories are skipped at any depth. Links are followed, and each directory is read once per
    class. Without a directory of test images, every fifth image of each class is one, in the order of a hash of
    the paths, beginning with the second; so images stay where they are when others are added, as far as that
    goes.

    Args:
        folder: directory with one directory per class, with image files at any depth; or with a directory named
            `train` or `training` and another one named `test`, `testing`, `val`, `valid`, `validation`, `dev`,
            `eval` or `evaluation`, in any case, each with class directories.
        test_split: name of the directory of test images; empty for `test`, or `val` if there is no `test`.

    Raises:
        UserError: there is no such directory, or it cannot be read; its layout may mean something else; there are
            fewer than two classes; a class has no images; or a test class has no training images.
    """
    listing = list_folder(folder, test_split)
    for level, line in listing.remarks:
        once(level, line)
    warn_of_duplicates(listing.train, listing.test)
    return Source(listing.facts, listing.train, listing.test)


def image_files(places: Sequence[str]) -> list[str]:
    """Return image files; a directory among the places stands for all images in it, at any depth."""
    return [file for place in places for file in (find_images(place) if os.path.isdir(place) else [place])]


def find_images(folder: str) -> list[str]:
    """Return the paths of the image files in a directory, at any depth, in the order of code points.

    What is left out is said, as by `open_folder`.

    Raises:
        UserError: there are none, or a directory cannot be read.
    """
    remarks = _Remarks()
    found = sorted(path for path, _ in _images_below(folder, remarks))
    for level, line in remarks.lines(printable(folder)):
        once(level, line)
    if not found:
        raise UserError(f"{printable(folder)} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


class Listing(NamedTuple):
    """The content of a directory of images, and what there is to say about it, with its log level."""

    facts: Facts
    train: ImageFiles
    test: ImageFiles
    remarks: list[tuple[int, str]]


def list_folder(folder: str, test_split: str = "") -> Listing:
    """Return what `open_folder` reads, without a word; arguments and errors are the same."""
    root = os.path.expanduser(folder).rstrip(os.sep) or os.sep
    if not folder or not os.path.isdir(root):
        raise UserError(
            f"data.data_dir={printable(folder)!r} is not a directory: for data.name=folder, pass the directory "
            f"that holds the class directories"
        )
    remarks = _Remarks()
    splits = _splits(root, test_split, remarks)
    if splits is None:
        classes = _classes(root, remarks)
        train, test = _split(_files(root, classes, remarks))
        train_files, test_files = ImageFiles(root, train), ImageFiles(root, test)
    else:
        train_root, test_root = splits
        classes = _classes(train_root, remarks)
        _check_test_classes(test_root, train_root, classes, remarks)
        train_files = ImageFiles(train_root, _files(train_root, classes, remarks))
        test_files = ImageFiles(test_root, _files(test_root, classes, remarks, may_be_empty=True))
    if not len(test_files):
        raise UserError(
            f"{printable(root)} has no test images: add a directory named test, or at least two images per class"
        )
    _remark_on_classes(classes, train_files, test_files, remarks)
    facts = Facts("folder", (None, None, 3), tuple(classes), len(train_files), len(test_files))
    return Listing(facts, train_files, test_files, remarks.lines(printable(root)))


# --- layout ----------------------------------------------------------------------------------


def _splits(root: str, test_split: str, remarks: "_Remarks") -> tuple[str, str] | None:
    """Return the directories of training and of test images, or None if `root` holds class directories.

    Raises:
        UserError: one of the two is missing, there are several of a kind, or there is none named `test_split`.
    """
    names = _subdirectories(root)
    train, tests, validations = (
        [name for name in names if name.lower() in kind] for kind in (TRAIN, TEST, VALIDATION)
    )
    shown = printable(root)
    if not train:
        if tests or validations:
            raise UserError(
                f"{shown} has a directory {(tests + validations)[0]}, but none named train: {LAYOUT}. Rename it "
                f"if it is a class"
            )
        if test_split:
            raise UserError(f"data.test_split={test_split}: {shown} has no directory train: {LAYOUT}")
        return None
    for kind in (train, tests, validations):
        if len(kind) > 1:
            raise UserError(
                f"{shown} has directories {' and '.join(kind)}, which mean one split: remove one; {LAYOUT}"
            )
    held_out = [*tests, *validations]
    if not held_out:
        raise UserError(
            f"{shown} has a directory {train[0]}, but none named {', '.join((*TEST, *VALIDATION))}: add one, or "
            f"pass {os.path.join(shown, train[0])} itself to hold out every fifth image; {LAYOUT}"
        )
    if test_split and test_split not in held_out:
        raise UserError(
            f"data.test_split={test_split}: {shown} has no such directory{nearest(test_split, held_out)}"
        )
    chosen = test_split or held_out[0]
    for name in names:
        if name not in (train[0], *held_out):
            remarks.add(f"directories beside {train[0]} and {chosen}", os.path.join(root, name))
    for name in held_out:
        if name != chosen:
            unused = sum(1 for _ in _images_below(os.path.join(root, name), _Remarks()))
            remarks.note(
                f"the {unused:,} images in {os.path.join(shown, printable(name))} are not used: pass "
                f"--config.data.test_split={name} to test on them"
            )
    _remark_on_files(root, remarks)
    return os.path.join(root, train[0]), os.path.join(root, chosen)


def _classes(folder: str, remarks: "_Remarks") -> list[str]:
    """Return the names of the class directories in a directory, in the order of their labels.

    Raises:
        UserError: there are fewer than two, a name cannot be used, or the layout is another one.
    """
    classes, shown = _subdirectories(folder), printable(folder)
    direct = _remark_on_files(folder, remarks)
    if not classes:
        images = f", but {direct:,} images that belong to no class" if direct else ""
        raise UserError(f"{shown} holds no class directories{images}: {LAYOUT}")
    for name in classes:
        if UNPRINTABLE.search(name):
            raise UserError(
                f"the class directory {printable(os.path.join(folder, name))} has a name that is not UTF-8 or has "
                f"control characters: rename it"
            )
    if len(classes) == 1:
        raise UserError(_why_one_class_is_not_enough(folder, classes[0]))
    _check_inside(folder, classes, remarks)
    _check_that_names_differ(folder, classes, remarks)
    return classes


def _check_inside(folder: str, classes: list[str], remarks: "_Remarks") -> None:
    """Refuse class directories with splits of their own, and remark on those that all hold the same directories."""
    found = {name: _subdirectories(os.path.join(folder, name)) for name in classes}
    for name, inner in found.items():
        lower = {directory.lower() for directory in inner}
        if not lower.isdisjoint(TRAIN) and not lower.isdisjoint((*TEST, *VALIDATION)):
            place = printable(os.path.join(folder, name))
            raise UserError(f"{place} holds training and test images of one class: {LAYOUT}")
    common = found[classes[0]]
    if len(common) > 1 and all(inner == common for inner in found.values()):
        remarks.note(
            f"{len(classes):,} classes are read from {printable(folder)}, {classes[0]} and others, which all hold the "
            f"directories {printable(common[0])} and {printable(common[1])}; if those are the classes, {LAYOUT}",
            logging.WARNING,
        )


def _why_one_class_is_not_enough(folder: str, name: str) -> str:
    place = os.path.join(folder, name)
    while len(inner := _subdirectories(place)) == 1:
        place = os.path.join(place, inner[0])
    if not inner:
        return f"{printable(folder)} holds one class alone, {name}: {LAYOUT}"
    advice = f"pass --config.data.data_dir={printable(place)} if it holds the class directories"
    if os.path.basename(folder).lower() in (*TRAIN, *TEST, *VALIDATION):
        advice = f"move the directories in {printable(place)} up into {printable(folder)}"
    return f"{printable(folder)} holds one directory alone, {name}: {advice}; {LAYOUT}"


def _check_that_names_differ(folder: str, classes: list[str], remarks: "_Remarks") -> None:
    """Refuse class names that look the same, and remark on those that differ only by case."""
    alike = _alike(classes, lambda name: unicodedata.normalize("NFC", name))
    if alike:
        raise UserError(
            f"{printable(folder)} has the class {alike[0]} {len(alike)} times, in different Unicode "
            f"normalizations: merge these directories"
        )
    by_case = _alike(classes, str.casefold)
    if by_case:
        remarks.note(
            f"the classes {' and '.join(by_case)} in {printable(folder)} differ only by case",
            logging.WARNING,
        )


def _alike(names: list[str], form: Callable[[str], str]) -> list[str]:
    """Return the first names that have one form."""
    groups = defaultdict(list)
    for name in names:
        groups[form(name)].append(name)
    return next((group for group in groups.values() if len(group) > 1), [])


def _check_test_classes(test_root: str, train_root: str, classes: list[str], remarks: "_Remarks") -> None:
    """Raise UserError if there is a test class that is no training class."""
    names = _subdirectories(test_root)
    _remark_on_files(test_root, remarks)
    if not names:
        raise UserError(f"{printable(test_root)} holds no class directories: {LAYOUT}")
    unknown = [name for name in names if name not in classes]
    if not unknown:
        return
    name = unknown[0]
    hint = nearest(name, classes)
    hint = hint if "did you" in hint else ""  # there may be a thousand classes
    if unicodedata.normalize("NFC", name) in {unicodedata.normalize("NFC", known) for known in classes}:
        hint = ", only in another Unicode normalization"
    raise UserError(
        f"the class {printable(os.path.join(test_root, name))} is not in {printable(train_root)}{hint}: rename, "
        f"add or remove it"
    )


# --- files -----------------------------------------------------------------------------------


def _files(
    folder: str, classes: list[str], remarks: "_Remarks", may_be_empty: bool = False
) -> list[ImageFile]:
    """Return every image of the classes, ordered by a hash of its path below `folder`.

    The order is unrelated to the classes, and images keep their order when others are added. `may_be_empty`
    allows classes without images.
    """
    found = []
    prefix = os.path.join(folder, "")
    for label, name in enumerate(classes):
        below = os.path.join(folder, name)
        if may_be_empty and not os.path.isdir(below):
            continue
        own = [
            ImageFile(path.removeprefix(prefix), label, status.st_size, status.st_mtime_ns)
            for path, status in _images_below(below, remarks)
        ]
        if not own and not may_be_empty:
            raise UserError(
                f"the class directory {printable(below)} holds no image ({', '.join(IMAGE_SUFFIXES)}): fill or "
                f"remove it"
            )
        found += own

    def hash_of_path(file: ImageFile) -> bytes:
        return hashlib.md5(os.fsencode(file.path), usedforsecurity=False).digest()

    return sorted(found, key=hash_of_path)


def _split(files: list[ImageFile]) -> tuple[list[ImageFile], list[ImageFile]]:
    """Hold out every fifth image of each class, beginning with the second; return the others, and those."""
    seen: Counter[int] = Counter()
    train: list[ImageFile] = []
    test: list[ImageFile] = []
    for file in files:
        (test if seen[file.label] % TEST_EVERY == 1 else train).append(file)
        seen[file.label] += 1
    return train, test


def _remark_on_classes(
    classes: list[str], train: ImageFiles, test: ImageFiles, remarks: "_Remarks"
) -> None:
    """Name a class that has no test image."""
    tested = {*test.labels.tolist()}
    untested = [label for label in range(len(classes)) if label not in tested]
    if untested:
        first, images = classes[untested[0]], int((train.labels == untested[0]).sum())
        remarks.note(
            f"classes without a test image: {len(untested):,} of {len(classes):,} (the first is {first}, with "
            f"training images: {images:,})",
            logging.WARNING,
        )


def _images_below(top: str, remarks: "_Remarks") -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of each image file at any depth below a directory.

    Each directory is read once, also if several links lead to it, and none above `top`: links may form cycles.
    """
    visited = set()
    for place in (top, *_above(top), *_above(os.path.realpath(top))):
        with contextlib.suppress(OSError):
            visited.add(_identity(os.stat(place)))
    waiting = [top]
    while waiting:
        for entry in _entries(waiting.pop(), remarks):
            status = _status(entry, remarks)
            if status is None:
                continue
            if not stat.S_ISDIR(status.st_mode):
                if _is_image(entry, status, remarks):
                    yield entry.path, status
            elif _identity(status) in visited:
                remarks.add("links to directories that are read already", entry.path)
            else:
                visited.add(_identity(status))
                waiting.append(entry.path)


def _above(path: str) -> Iterator[str]:
    """Yield the directories above a path."""
    path = os.path.abspath(path)
    while path != (parent := os.path.dirname(path)):
        yield (path := parent)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _subdirectories(folder: str) -> list[str]:
    """Return the names of the directories in a directory, in the order of code points."""

    def is_directory(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    return [entry.name for entry in _entries(folder, _Remarks()) if is_directory(entry)]


def _remark_on_files(folder: str, remarks: "_Remarks") -> int:
    """Count what is beside the directories in a directory, and return the number of images among it."""
    images = 0
    for entry in _entries(folder, remarks):
        status = _status(entry, remarks)
        if status is not None and not stat.S_ISDIR(status.st_mode) and _is_image(entry, status, remarks):
            images += 1
            remarks.add("images outside of class directories", entry.path)
    return images


def _entries(folder: str, remarks: "_Remarks") -> list[os.DirEntry[str]]:
    """Return the content of a directory in the order of names, without what is hidden.

    Raises:
        UserError: it cannot be read, so nobody knows how many images would be missing.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"the directory {printable(folder)} cannot be read ({error.strerror}): change its permissions, or "
            f"remove it"
        ) from error
    shown = []
    for entry in found:
        if entry.name[0] == "." or entry.name.lower() in HIDDEN:
            remarks.add("hidden files or directories", entry.path, logging.INFO)
        else:
            shown.append(entry)
    return shown


def _status(entry: os.DirEntry[str], remarks: "_Remarks") -> os.stat_result | None:
    """Return the status of a file, or of the one that a link leads to; None if there is none."""
    try:
        return entry.stat()
    except PermissionError:
        remarks.add(FORBIDDEN, entry.path)
    except OSError:
        remarks.add("links that lead nowhere", entry.path)
    return None


def _is_image(entry: os.DirEntry[str], status: os.stat_result, remarks: "_Remarks") -> bool:
    """Return whether a file is an image by its name, and can be read."""
    if not entry.name.lower().endswith(IMAGE_SUFFIXES):
        suffix = os.path.splitext(entry.name)[1].lower()
        remarks.suffixes[printable(suffix) or "without suffix"] += 1
        return False
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = "pipes, sockets or devices"
    elif not status.st_size:
        problem = "empty files"
    elif status.st_mode & 0o444 != 0o444 and not os.access(entry.path, os.R_OK, effective_ids=True):
        problem = FORBIDDEN
    if problem:
        remarks.add(problem, entry.path)
    return not problem


class _Remarks:
    """Counts what is left out, by kind, with the first example of each."""

    def __init__(self) -> None:
        self.suffixes: Counter[str] = Counter()  # of files that are not images by their names
        self._counts: Counter[str] = Counter()
        self._first: dict[str, tuple[int, str]] = {}  # level and example of each kind
        self._notes: list[tuple[int, str]] = []

    def add(self, kind: str, path: str, level: int = logging.WARNING) -> None:
        """Count a file or directory that is left out."""
        self._counts[kind] += 1
        self._first.setdefault(kind, (level, path))

    def note(self, line: str, level: int = logging.INFO) -> None:
        """Add a line of its own."""
        self._notes.append((level, line))

    def lines(self, root: str) -> list[tuple[int, str]]:
        """Return all lines about the directory `root`, each with its log level."""
        lines = [*self._notes]
        for kind, (level, path) in self._first.items():
            lines.append(
                (
                    level,
                    f"left out of {root}: {kind} ({self._counts[kind]:,}, the first is {printable(path)})",
                )
            )
        if self.suffixes:
            kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in self.suffixes.most_common())
            total = self.suffixes.total()
            files = (
                "1 file that is no image by its name"
                if total == 1
                else (f"{total:,} files that are not images by their names")
            )
            lines.append((logging.INFO, f"left out of {root}: {files} ({kinds})"))
        return lines
