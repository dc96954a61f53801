"""Directories of images: which are classes and which are splits, what is left out, and what is said about it."""

import hashlib
import logging
import os
import shutil
import socket
import tempfile
import unicodedata

import numpy as np
import pytest
from conftest import command, tiny_config
from PIL import Image

from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger, once
from ekd_jax.data import resident
from ekd_jax.data.dataset import Source, Subset, cache_key
from ekd_jax.data.folder import IMAGE_SUFFIXES, open_folder
from ekd_jax.data.opening import facts, open_data


def write_image(path, seed):
    """Write a gray image of 8x8 pixels, as PNG whatever the suffix."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    level = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(level).save(path, "png")


def make(root, layout):
    """Write images: {"train/cat": 3} has train/cat/0.png to 2.png, {"a/x.txt": b"..."} a file; return the root."""
    for name, content in layout.items():
        path = os.path.join(root, name)
        if isinstance(content, bytes):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
            continue
        os.makedirs(path, exist_ok=True)
        for i in range(content):
            write_image(os.path.join(path, f"{i}.png"), [*map(ord, name), i])
    return str(root)


def folder_config(root, **changes):
    own = {
        "data__name": "folder",
        "data__data_dir": str(root),
        "data__fit": "stretch",
        "data__image_size": 8,
        "data__train_examples": 0,
        "train__batch_size": 2,
    }
    return tiny_config(**(own | changes))


def names(examples, root):
    return sorted(os.path.relpath(examples[i].name, root) for i in range(len(examples)))


@pytest.fixture(autouse=True)
def lines(caplog):
    """Return a function that gives the lines logged so far; each test begins with none."""
    once.cache_clear()
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


# --- which directories are what --------------------------------------------------------------

FIVE = {"{train}/cat": 3, "{train}/dog": 2, "{test}/cat": 1, "{test}/dog": 2}


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("training", "testing"), ("Train", "Test"), ("TRAIN", "TEST"), ("train", "val"),
     ("train", "valid"), ("Training", "Validation"), ("train", "dev"), ("train", "eval"), ("train", "evaluation")],
)  # fmt: skip
def test_usual_names_of_splits(tmp_path, lines, train, test):
    root = make(tmp_path, {name.format(train=train, test=test): n for name, n in FIVE.items()})
    source = open_folder(root)
    assert source.facts.class_names == ("cat", "dog")
    assert names(source.train, root) == [f"{train}/cat/{i}.png" for i in range(3)] + [
        f"{train}/dog/{i}.png" for i in range(2)
    ]
    assert names(source.test, root) == [f"{test}/cat/0.png", f"{test}/dog/0.png", f"{test}/dog/1.png"]
    assert not lines()


def test_a_third_split_is_counted_or_chosen(tmp_path, lines):
    root = make(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1, "val/a": 3, "val/b": 2})
    data = open_data(folder_config(root))
    assert names(data.test, root) == ["test/a/0.png", "test/b/0.png"]
    assert lines() == [
        f"the 5 images in {root}/val are not used: pass --config.data.test_split=val to test on them"
    ]
    data = open_data(folder_config(root, data__test_split="val"))
    assert (len(data.test), data.facts.test_examples, names(data.test, root)[0]) == (5, 5, "val/a/0.png")
    assert lines()[1:] == [
        f"the 2 images in {root}/test are not used: pass --config.data.test_split=test to test on them"
    ]
    with pytest.raises(
        UserError, match="data.test_split=vall: .* has no such directory; did you mean 'val'"
    ):
        facts(folder_config(root, data__test_split="vall"))


TWO = {"cat": 2, "dog": 2}
SPLIT = {"train/cat": 2, "train/dog": 2, "test/cat": 1}
EXPECTED = "expected are DIR/CLASS/image.jpg, or DIR/train/CLASS/image.jpg and DIR/test/CLASS/image.jpg"
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"train/cat": 2, "train/dog": 2}, "has a directory train, but none named test, testing, val.* pass .*/train"),
        ({"test/cat": 2, "test/dog": 2}, f"has a directory test, but none named train: {EXPECTED}"),
        ({"valid/cat": 2, "valid/dog": 2, "test/cat": 2}, f"has a directory test, but none named train: {EXPECTED}"),
        ({**TWO, "Test": 2}, f"has a directory Test, but none named train: {EXPECTED}.* Rename it if it is a class"),
        ({**SPLIT, "Train/cat": 2}, "has directories Train and train, which mean one split: remove one"),
        ({**SPLIT, "testing/cat": 2}, "has directories test and testing, which mean one split"),
        ({**SPLIT, "val/cat": 2, "valid/cat": 2}, "has directories val and valid, which mean one split"),
        ({"cat/train": 2, "cat/test": 1, "dog/train": 2, "dog/val": 1},
         f"/cat holds training and test images of one class: {EXPECTED}"),
        ({"images/cat": 2, "images/dog": 2},
         "holds one directory alone, images: pass --config.data.data_dir=.*/images if it holds the class dir"),
        ({"a/b/cat": 2, "a/b/dog": 2}, "holds one directory alone, a: pass --config.data.data_dir=.*/a/b if"),
        ({"a/train/cat": 2, "a/test/dog": 2}, "pass --config.data.data_dir=.*/a if"),
        ({"train/images/cat": 2, "train/images/dog": 2, "test/images/cat": 2},
         "train holds one directory alone, images: move the directories in .*train/images up into .*/train"),
        ({"cat": 5}, f"holds one class alone, cat: {EXPECTED}, with two or more classes"),
        ({"train/cat": 5, "test/cat": 1}, "train holds one class alone, cat: "),
        ({"0.png": b"x", "1.jpg": b"x", "2.txt": b"x"},
         f"holds no class directories, but 2 images that belong to no class: {EXPECTED}"),
        ({"train/0.png": b"x", "test/0.png": b"x"}, "train holds no class directories, but 1 images"),
        ({**SPLIT, "test/cats": 1}, "the class .*test/cats is not in .*train; did you mean 'cat'.: rename, add or"),
        ({**SPLIT, "test/Cat": 1}, "the class .*test/Cat is not in .*train; did you mean 'cat'"),
        ({**SPLIT, f"train/{NFC}": 1, f"test/{NFD}": 1}, "is not in .*train, only in another Unicode normalization"),
        ({**TWO, NFC: 1, NFD: 1}, "has the class .* 2 times, in different Unicode normalizations: merge"),
        ({**TWO, "owl": 0}, "the class directory .*owl holds no image .*: fill or remove it"),
        ({**TWO, "owl/x.png": b""}, "the class directory .*owl holds no image"),
        ({**TWO, "ow\nl": 1}, r"/ow\\nl has a name that is not UTF-8 or has control characters: rename it"),
        ({**TWO, os.fsdecode(b"b\xfcro"): 1}, r"/b\\udcfcro has a name that is not UTF-8"),
        ({"cat": 1, "dog": 1}, "has no test images: add a directory named test, or at least two images"),
        ({**SPLIT, "test/cat/0.png": b""}, "has no test images"),
        ({"train/cat": 2, "train/dog": 2, "test": 3}, "/test holds no class directories"),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(tmp_path, layout, message, lines):
    """By everything that reads a directory, with the same line."""
    config = folder_config(make(tmp_path, layout))
    for read in (facts, open_data):
        with pytest.raises(UserError, match=message) as error:
            read(config)
        assert "\n" not in str(error.value)
        str(error.value).encode()
    assert not lines(), "an error alone is enough"


@pytest.mark.parametrize("place", ["", "/nowhere", "~nobody-of-this-name/x", "\0", "file.txt", "caf\udce9"])
def test_no_directory(tmp_path, place):
    (tmp_path / "file.txt").write_text("x")
    path = str(tmp_path / place) if place == "file.txt" else place
    with pytest.raises(
        UserError, match="is not a directory: for data.name=folder, pass the directory"
    ) as error:
        open_folder(path)
    str(error.value).encode()


def test_classes_are_in_the_order_of_code_points(tmp_path):
    root = make(tmp_path, dict.fromkeys(("0", "1", "10", "2", "Zebra", "ant", "Ähre"), 2))
    assert open_folder(root).facts.class_names == ("0", "1", "10", "2", "Zebra", "ant", "Ähre")


def test_classes_that_differ_by_case_are_named(tmp_path, lines):
    root = make(tmp_path, {"a": 3, "A": 3, "b": 3})
    assert open_folder(root).facts.class_names == ("A", "a", "b")
    assert lines() == [f"the classes A and a in {root} differ only by case"]


@pytest.mark.parametrize(
    "module",
    ["prepare", "main", *(pytest.param(m, marks=pytest.mark.slow) for m in ("preview", "describe"))],
)
def test_commands_refuse_a_directory_in_one_line(tmp_path, module):
    root = make(tmp_path / "data", {"images/cat": 2, "images/dog": 2})
    flags = ["--config=configs/digits.py", "--config.data.name=folder", f"--config.data.data_dir={root}"]
    own = {"preview": [f"--output={tmp_path}/grid.png"], "main": [f"--workdir={tmp_path}/run", "--dry_run"]}
    done = command(module, *flags, "--config.data.image_size=8", *own.get(module, []))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert (
        f"{root} holds one directory alone, images: pass --config.data.data_dir={root}/images"
        in done.stderr
    )


def test_classes_that_all_hold_the_same_directories_are_named(tmp_path, lines):
    """They may be splits or folds by other names; or classes whose images are sorted further."""
    root = make(tmp_path, {"trainset/cat": 2, "trainset/dog": 2, "testset/cat": 2, "testset/dog": 2})
    assert open_folder(root).facts.class_names == ("testset", "trainset")
    assert lines() == [
        f"2 classes are read from {root}, testset and others, which all hold the directories cat and dog; if those "
        f"are the classes, {EXPECTED}, with two or more classes"
    ]


def test_a_thousand_classes_are_not_listed(tmp_path):
    layout = dict.fromkeys((f"train/{i:03}" for i in range(100)), 1)
    with pytest.raises(UserError, match="the class .*zebra is not in .*train: rename, add or remove it"):
        open_folder(make(tmp_path, {**layout, "test/zebra": 1}))


@pytest.mark.parametrize("source", [False, True])
def test_a_split_of_a_set_without_splits_is_refused(source):
    """It was ignored."""
    given = open_data(tiny_config())
    given = Source(given.facts, given.train, given.test) if source else None
    for read in (facts, open_data):
        with pytest.raises(UserError, match="data.test_split=val: digits has one set of test images"):
            read(tiny_config(data__test_split="val"), given)


def test_a_set_without_an_image_that_can_be_read(tmp_path):
    root = make(
        tmp_path, {f"train/{name}/{i}.png": b"no image" for name in "ab" for i in range(2)} | {"test/a": 1}
    )
    with pytest.raises(UserError, match="none of the training images of folder can be read"):
        open_data(folder_config(root, data__corrupt="skip"))


# --- which files are images ------------------------------------------------------------------


def test_what_is_left_out_is_counted_and_said(tmp_path, lines):
    """Once per process, and by `open_data` alone."""
    root = make(
        tmp_path,
        SPLIT | {
            "train/cat/.ipynb_checkpoints/0.png": b"x", "train/.ipynb_checkpoints": 3, ".hidden": 2,
            "train/cat/._0.png": b"x", "train/dog/Thumbs.db": b"x", "__MACOSX/train/cat": 1,
            "train/cat/a.txt": b"x", "train/dog/b.TXT": b"x", "labels.csv": b"x", "train/README": b"x",
            "train/dog/empty.jpg": b"", "readme.png": b"x", "train/direct.png": b"x", "cat": 4,
        },
    )  # fmt: skip
    os.symlink("nowhere", f"{root}/train/cat/gone.jpg")
    os.symlink("loop", f"{root}/train/cat/loop")
    os.mkfifo(f"{root}/train/dog/pipe.png")
    os.symlink("/dev/zero", f"{root}/train/dog/zero.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(f"{root}/train/dog", os.O_RDONLY)  # paths of sockets must be short
        server.bind(f"/proc/self/fd/{here}/socket.png")
        os.close(here)
    config = folder_config(root)
    known = facts(config)
    assert (known.train_examples, known.test_examples) == (4, 1)
    assert not lines()
    for _ in range(2):
        data = open_data(config)
    assert names(data.train, root) == [f"train/{name}/{i}.png" for name in ("cat", "dog") for i in (0, 1)]
    left_out = f"left out of {root}: "
    assert sorted(lines()) == [
        "classes without a test image: 1 of 2 (the first is dog, with training images: 2)",
        f"{left_out}4 files that are not images by their names (.txt 2, .csv 1, without suffix 1)",
        f"{left_out}directories beside train and test (1, the first is {root}/cat)",
        f"{left_out}empty files (1, the first is {root}/train/dog/empty.jpg)",
        f"{left_out}hidden files or directories (6, the first is {root}/.hidden)",
        f"{left_out}images outside of class directories (2, the first is {root}/readme.png)",
        f"{left_out}links that lead nowhere (2, the first is {root}/train/cat/gone.jpg)",
        f"{left_out}pipes, sockets or devices (3, the first is {root}/train/dog/pipe.png)",
    ]


def test_every_suffix_in_any_case(tmp_path):
    suffixes = {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".avif",
    }
    assert suffixes <= set(IMAGE_SUFFIXES)
    root = make(tmp_path, TWO)
    for i, suffix in enumerate(IMAGE_SUFFIXES):
        write_image(f"{root}/cat/deep/er/x{i}{suffix if i % 2 else suffix.upper()}", i)
    source = open_folder(root)
    assert len(source.train) + len(source.test) == 4 + len(IMAGE_SUFFIXES)


def test_links_are_followed_and_cycles_end(tmp_path, lines):
    root = make(tmp_path / "data", {"cat": 2, "dog": 2})
    make(tmp_path, {"elsewhere/more/birds": 2, "single": 1})
    os.symlink(tmp_path / "elsewhere", f"{root}/cat/linked")
    os.symlink(tmp_path / "elsewhere/more", f"{root}/cat/again")
    os.symlink(tmp_path / "single/0.png", f"{root}/cat/one.png")
    os.symlink(root, f"{root}/cat/up")
    os.symlink("..", tmp_path / "elsewhere/more/back")
    os.symlink("/", f"{root}/dog/all")
    os.symlink(tmp_path / "elsewhere/more/birds", f"{root}/owl")
    source = open_folder(root)
    assert source.facts.class_names == ("cat", "dog", "owl")
    labels = [e[i].label for e in (source.train, source.test) for i in range(len(e))]
    assert np.bincount(labels).tolist() == [5, 2, 2]
    assert any("links to directories that are read already (" in line for line in lines())


def test_what_may_not_be_read(lines):
    """A file is left out; of a directory nobody knows what is in it."""
    place = tempfile.mkdtemp()
    root = make(f"{place}/data", {"cat": 3, "dog": 3})
    os.chmod(place, 0o755)
    os.chmod(f"{root}/cat/0.png", 0)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # root may read everything
    try:
        assert len(open_folder(root).train) + len(open_folder(root).test) == 5
        assert (
            f"left out of {root}: files without permission to read them (1, the first is {root}/cat/0.png)"
            in lines()
        )
        os.seteuid(user)
        os.chmod(f"{root}/dog", 0)
        os.seteuid(user or 65534)
        with pytest.raises(UserError, match=r"the directory .*/dog cannot be read \(Permission denied\)"):
            open_folder(root)
    finally:
        os.seteuid(user)
        os.chmod(f"{root}/dog", 0o755)
        shutil.rmtree(place)


def test_names_that_are_not_utf8(tmp_path):
    """They are read, and printed with escapes; the order of other names is as before."""
    root = make(tmp_path, {"cat": 6, "dog": 6})
    before = [file.name for file in map(open_folder(root).train.__getitem__, range(8))]
    odd = os.fsencode(root) + b"/cat/b\xfcro\n.png"
    shutil.copy(f"{root}/dog/0.png", odd)
    source = open_folder(root)
    everything = [e[i].name for e in (source.train, source.test) for i in range(len(e))]
    assert f"{root}/cat/b\\udcfcro\\n.png" in everything
    for name in everything:
        name.encode()
    dogs = [name for name in before if "/dog/" in name]
    assert [source.train[i].name for i in range(len(source.train)) if source.train[i].label] == dogs
    assert source.fingerprint != ""
    os.remove(odd)
    with pytest.raises(UserError, match=r"b\\udcfcro\\n.png cannot be read \(No such file"):
        [e[i] for e in (source.train, source.test) for i in range(len(e))]


def test_the_order_is_that_of_a_hash_of_the_paths(tmp_path):
    root = make(tmp_path, {"café/deep": 7, "日本": 6, "a b": 3})
    source = open_folder(f"{root}/")
    found = [os.path.relpath(source.train[i].name, root) for i in range(len(source.train))]
    assert len(found) == 12
    assert found == sorted(found, key=lambda path: hashlib.md5(path.encode()).digest())


# --- the automatic split ---------------------------------------------------------------------


def test_the_split_is_stratified(tmp_path, lines):
    counts = {"c01": 1, "c02": 2, "c06": 6, "c07": 7, "c10": 10, "c25": 25}
    source = open_folder(make(tmp_path, counts))
    found = [
        np.bincount([e[i].label for i in range(len(e))], minlength=6).tolist()
        for e in (source.train, source.test)
    ]
    assert found == [[1, 1, 5, 5, 8, 20], [0, 1, 1, 2, 2, 5]]
    assert lines() == ["classes without a test image: 1 of 6 (the first is c01, with training images: 1)"]


def test_images_of_a_class_stay_where_they_are(tmp_path):
    """Images added to one class move none of another class."""
    root = make(tmp_path, {"cat": 12, "dog": 12})
    before = names(open_folder(root).test, root)
    make(tmp_path, {"cat": 14})
    after = names(open_folder(root).test, root)
    assert [n for n in before if n.startswith("dog")] == [n for n in after if n.startswith("dog")]


# --- duplicates ------------------------------------------------------------------------------


def test_duplicates_are_counted(tmp_path, lines, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make(tmp_path / "data", {"train/cat": 4, "train/dog": 4, "test/cat": 3, "test/dog": 3})
    shutil.copy(f"{root}/train/cat/1.png", f"{root}/test/cat/copy.png")
    shutil.copy(f"{root}/train/dog/2.png", f"{root}/test/dog/copy.png")
    shutil.copy(f"{root}/train/dog/3.png", f"{root}/train/cat/wrong.png")
    large = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    for name, value in (("train/cat/large", 0), ("test/cat/large", 1)):  # equal but for the last bytes
        large[-1] = value
        Image.fromarray(large).save(f"{root}/{name}.bmp")
    source = open_folder(root)
    first = next(source.test[i].name for i in range(9) if "copy" in source.test[i].name)
    twin = f"{root}/train/{'cat/1' if '/cat/' in first else 'dog/2'}.png"
    assert (
        f"test images that are also training images: 2 of 9 (the first is {first}, the same as {twin}), so accuracy "
        f"is overestimated" in lines()
    )
    assert any(
        line.startswith("training images that equal one of another class: 1 of 10 (the first is ")
        for line in lines()
    )
    assert len(list((tmp_path / "cache/ekd_jax").glob("duplicates-*"))) == 1
    once.cache_clear()
    monkeypatch.setattr("ekd_jax.data.duplicates.find_duplicates", None)
    open_folder(root)
    assert len(lines()) == 4, "the second time the cache knows"


# --- identity --------------------------------------------------------------------------------


def test_the_fingerprint_stays_when_a_directory_is_moved(tmp_path):
    root = make(tmp_path / "a", {"cat": 5, "dog": 5, "owl": 5})
    source = open_folder(root)
    shutil.copytree(root, tmp_path / "b/c")
    copy = open_folder(str(tmp_path / "b/c"))
    assert copy.fingerprint == source.fingerprint
    assert cache_key(copy.train) != cache_key(source.train)
    os.utime(f"{root}/cat/0.png", (1, 1))
    os.utime(f"{root}/cat/1.png", (1, 1))
    touched = open_folder(root)
    assert touched.fingerprint == source.fingerprint
    assert cache_key(touched.train) != cache_key(source.train)
    half = [Subset(e.train, np.arange(4)) for e in (source, copy)]
    assert half[0].fingerprint == half[1].fingerprint
    assert cache_key(half[0]) != cache_key(half[1])


@pytest.mark.parametrize(
    "change", ["add", "remove", "rename a file", "rename a class", "longer", "new class"]
)
def test_the_fingerprint_changes_with_the_data(tmp_path, change):
    root = make(tmp_path, {"cat": 5, "dog": 5})
    before = open_folder(root).fingerprint
    match change:
        case "add":
            write_image(f"{root}/cat/new.png", 9)
        case "remove":
            os.remove(f"{root}/cat/0.png")
        case "rename a file":
            os.rename(f"{root}/cat/0.png", f"{root}/cat/x.png")
        case "rename a class":
            os.rename(f"{root}/cat", f"{root}/zebra")
        case "longer":
            with open(f"{root}/cat/0.png", "ab") as file:
                file.write(b"x")
        case "new class":
            make(root, {"ant": 5})
    assert open_folder(root).fingerprint != before


def test_sets_without_a_key_of_their_own_are_cached_by_their_fingerprint():
    data = open_data(tiny_config())
    assert cache_key(data.test) == data.test.fingerprint
    assert cache_key(data.train) == data.train.fingerprint


@pytest.mark.parametrize("corrupt", ["fatal", "skip"])
def test_an_edited_image_of_the_same_size_is_read_again(tmp_path, monkeypatch, corrupt):
    """The pixels in the cache were those before the change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(resident, "CACHE_SECONDS", 0.0)
    root = make(tmp_path / "data", TWO)
    for i in range(2):
        Image.new("RGB", (8, 8), "red").save(f"{root}/cat/{i}.bmp")
    read = []
    for color in ("red", "blue"):
        for i in range(2):
            Image.new("RGB", (8, 8), color).save(f"{root}/cat/{i}.bmp")
        data = open_data(folder_config(root, data__corrupt=corrupt))
        images, labels = resident.read_pixels(data.train, data, range(len(data.train)))
        read.append({tuple(image[0, 0]) for image in images[labels == 0]})
    assert (255, 0, 0) in read[0]
    assert (0, 0, 255) in read[1]
    assert (255, 0, 0) not in read[1]


def test_one_class_alone_is_refused(tmp_path):
    source = open_data(tiny_config())
    alone = Source(
        source.facts.__class__("mine", (8, 8, 1), ("zero",), 200, 898), source.train, source.test
    )
    with pytest.raises(UserError, match=r"mine has one class alone \(zero\)"):
        facts(tiny_config(data__name="mine"), alone)
