"""Storage that fails: limits, full and unwritable places. Each error is one line, and nothing is left half written."""

import errno
import io
import logging
import os
import pathlib
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from conftest import FORKS, REFERENCE, ROOT, command, fresh_student
from PIL import Image

from ekd_jax.common.cache import Cache
from ekd_jax.common.compilation import keep_compiled_programs
from ekd_jax.common.errors import UserError
from ekd_jax.common.files import replacing, user_cache, write_bytes
from ekd_jax.common.log import to_stderr
from ekd_jax.common.zipped import read_npz
from ekd_jax.data.decode import Reader
from ekd_jax.data.folder import open_folder
from ekd_jax.data.opening import without_corrupt
from ekd_jax.students.class_names import read_class_names
from ekd_jax.students.student import load_student, write_student

DIGITS = f"--config={ROOT}/configs/digits.py"


def everything(folder):
    """Return all paths below a directory, with the contents of files."""
    paths = sorted(folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


# --- one file ------------------------------------------------------------------------------------


def test_a_file_is_written_through_a_link_and_replaces_the_old_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for data in (b"old", b"new"):
        write_bytes(tmp_path / "link", data)
        assert everything(tmp_path / "elsewhere") == {tmp_path / "elsewhere" / "file": data}
    assert (tmp_path / "link").is_symlink()


def test_what_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "device").symlink_to("/dev/full")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    before = everything(tmp_path)
    cases = {"file/below": "Not a directory|File exists", "device": "a device", "folder": "Is a directory"}
    for name, why in cases.items():
        with pytest.raises(OSError, match=why) as error:
            write_bytes(tmp_path / name, b"new")
        assert error.value.filename == str(tmp_path / name)
        assert everything(tmp_path) == before


def begin_and_fail(path, error):
    with replacing(path, 12_345) as partial:
        partial.mkdir()
        (partial / "file").write_bytes(b"half")
        raise error


@pytest.mark.parametrize(
    ("code", "room"),
    [
        (errno.ENOSPC, r"\(12\.3kB needed, \d.*B free\)"),
        (errno.EDQUOT, r"\(12\.3kB needed\)"),
        (errno.EFBIG, r"\(12\.3kB needed\)"),
        (errno.EROFS, ""),
        (errno.EACCES, ""),
    ],
    ids=errno.errorcode.get,
)
def test_whatever_fails_while_writing(tmp_path, code, room):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match=f"{os.strerror(code)}.*{room}") as error:
        begin_and_fail(tmp_path / "new" / "file", OSError(code, os.strerror(code)))
    assert (error.value.errno, error.value.filename) == (code, str(tmp_path / "new" / "file"))
    assert everything(tmp_path) == {tmp_path / "file": b"old"}


def test_an_interruption_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        begin_and_fail(tmp_path / "new" / "folder", KeyboardInterrupt())
    assert not everything(tmp_path)


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    left = tmp_path / f".folder.{os.getpid()}"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
    assert everything(tmp_path) == {tmp_path / "folder": None}


# --- commands ------------------------------------------------------------------------------------


def write_official(folder):
    """Write students of the official code to a directory."""
    import safetensors.numpy

    with np.load(REFERENCE / "model_reference_resnet20.npz") as file:
        reference = dict(file)
    folder.mkdir()
    for name, who in {"BaseNet": "base", **{f"student_{i}": f"student{i}" for i in range(5)}}.items():
        arrays = {n.split("/", 2)[2]: v for n, v in reference.items() if n.split("/")[1:2] == [who]}
        safetensors.numpy.save_file(arrays, folder / f"{name}.pth")


COMMANDS = {
    "preview": ("preview", DIGITS, "--output={}/new/grid.png"),
    "convert": (
        "convert",
        "--model=resnet20",
        "--image_size=32",
        "--weights={}/official",
        "--output={}/new",
    ),
    "train": ("main", DIGITS, "--workdir={}/run"),
}


@pytest.mark.parametrize("name", ["preview", "convert"])
def test_a_limit_on_the_size_of_files(name, tmp_path):
    """The limit is real (RLIMIT_FSIZE): writing fails in the middle of a file."""
    if name == "convert":
        write_official(tmp_path / "official")
    before = everything(tmp_path)
    module, *flags = (part.format(tmp_path) for part in COMMANDS[name])
    done = command(module, *flags, largest_file=4096)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"error: cannot write --output={tmp_path}/new")
    assert "File too large (" in done.stderr
    assert done.stderr.count("\n") == 1
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_is_no_directory(name, tmp_path):
    (tmp_path / "run").write_bytes(b"a file")
    (tmp_path / "new").write_bytes(b"a file")
    before = everything(tmp_path)
    module, *flags = (part.format(tmp_path) for part in COMMANDS[name])
    done = command(module, *flags, *([f"--output={tmp_path}/run/x"] if name != "train" else []))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --")
    assert str(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert everything(tmp_path) == before


def test_what_took_long_is_printed_if_its_file_cannot_be_written(tmp_path):
    write_student(tmp_path / "student", fresh_student(tuple("0123456789")))
    Image.new("L", (8, 8), 40).save(tmp_path / "image.png")
    (tmp_path / "full.csv").symlink_to("/dev/full")
    flags = [f"--student_dir={tmp_path}/student", f"--image={tmp_path}/image.png"]
    done = command("predict", *flags, f"--output={tmp_path}/full.csv")
    assert done.returncode == 2
    assert done.stdout.startswith("image,class_1,probability_1")
    assert done.stderr.startswith(f"error: cannot write --output={tmp_path}/full.csv: ")
    assert done.stderr.count("\n") == 1


def test_a_student_is_whole_or_not_there(tmp_path):
    with FORKS.Pool(1, _limit_files, (4096,)) as pool:
        said = pool.apply(_write_fresh_student, (tmp_path / "students" / "one",))
    assert said.startswith(f"cannot write --output={tmp_path}/students/one: File too large (")
    assert not everything(tmp_path)
    write_student(tmp_path / "students" / "one", fresh_student(("a", "b")))
    assert load_student(tmp_path / "students" / "one").class_names == ("a", "b")


def _limit_files(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _write_fresh_student(path):
    try:
        write_student(path, fresh_student(("a", "b")))
    except UserError as error:
        return str(error)
    return "written"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("asked", [["knobs", "optimizer"], ["--help"], ["--version"]])
def test_standard_output_on_a_full_disk(unbuffered, asked):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ekd_jax", *asked],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device, most likely where standard output goes\n"


def test_a_log_on_a_full_disk_ends_nothing(monkeypatch):
    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        to_stderr("a line that nobody will read\n")
        monkeypatch.undo()


# --- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "home", "expected"),
    [
        ("/caches", "/home/me", "/caches/ekd_jax"),
        ("", "/home/me", "/home/me/.cache/ekd_jax"),
        (None, "/home/me", "/home/me/.cache/ekd_jax"),
        ("relative", "/home/me", "/home/me/.cache/ekd_jax"),
        ("~/caches", "/home/me", "/home/me/.cache/ekd_jax"),
        ("", "no/home", None),
    ],
)
def test_place_of_the_cache(asked, home, expected, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if asked is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", asked)
    monkeypatch.setenv("HOME", home)
    if expected:
        assert user_cache() == pathlib.Path(expected)
    else:
        with pytest.raises(OSError, match="no home directory"):
            user_cache()


@pytest.fixture(params=["no home", "below a file", "read-only", "writable"])
def place(request, monkeypatch, tmp_path):
    """Set where the cache is; return the directory that is worked in, and whether the cache can be written."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "here").mkdir()
    homes = {"no home": "", "below a file": tmp_path / "file", "read-only": "/proc", "writable": tmp_path}
    monkeypatch.setenv("HOME", str(homes[request.param]) or "no/home")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here", request.param == "writable"


def test_corrupt_images_are_left_out_without_a_cache(place, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ekd_jax")
    for number in range(10):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    (tmp_path / "photos" / "a" / "bad.png").write_bytes(b"no image")
    source = open_folder(str(tmp_path / "photos"), "")
    for _ in range(2):
        left = [len(without_corrupt(part, Reader((8, 8, 3)))) for part in (source.train, source.test)]
        assert sum(left) == 10
    here, writable = place
    assert not list(here.iterdir()), "nothing is written into the working directory"
    assert writable == bool(list(tmp_path.glob(".cache/ekd_jax/corrupt-*.npz")))
    said = caplog.text.count("looking for images that cannot be read")
    assert said == (2 if writable else 4), "the second time it is remembered, or found again"


def test_an_entry_that_claims_too_much_counts_as_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = Cache("numbers")
    cache.store("key", {"a": np.arange(4.0)})
    (entry,) = user_cache().glob("*")
    whole = entry.read_bytes()
    entry.write_bytes(whole.replace(b"'shape': (4,), }        ", b"'shape': (9999999999,), }"[:24]))
    assert entry.read_bytes() != whole
    assert cache.load("key") is None


@pytest.mark.parametrize("case", ["shape", "compressed"])
def test_arrays_are_read_only_if_their_headers_fit(case, tmp_path):
    if case == "compressed":
        np.savez_compressed(tmp_path / "file.npz", a=np.zeros(10**6))
        message = "its entries claim 8,000,128 bytes, and the file has"
    else:
        header = io.BytesIO()
        claimed = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(header, claimed)
        with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
            archive.writestr("a.npy", header.getvalue() + bytes(8))
        message = r"a.npy claims the shape \(1000000, 1000000\), and has 136 bytes"
    with pytest.raises(ValueError, match=message):
        read_npz(tmp_path / "file.npz")


@pytest.fixture
def jax_settings():
    """Set JAX's cache of programs back afterward."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_that_were_written_in_part_are_removed(tmp_path, jax_settings):
    """JAX keeps no further program while there is one without the time of its last use."""
    keep_compiled_programs(tmp_path)
    (folder,) = tmp_path.iterdir()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(bytes(8))
    keep_compiled_programs(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["whole-atime", "whole-cache"]


def test_programs_cannot_be_kept_below_a_file(tmp_path, jax_settings):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="Not a directory|File exists"):
        keep_compiled_programs(tmp_path / "file")


def test_class_names_from_a_device_are_never_waited_for(tmp_path):
    (tmp_path / "names.txt").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"names.txt cannot be read: .*a device"):
        read_class_names(tmp_path / "names.txt")
