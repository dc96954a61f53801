"""Sets of TFDS: prepared from archives without TensorFlow, verified, resumable, and read."""

import concurrent.futures
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pathlib
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import urllib.parse
import urllib.request

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from conftest import ROOT
from PIL import Image
from tensorflow_datasets.core.utils import shard_utils

from ekd_jax.common.errors import UserError
from ekd_jax.data.tfds import builders, imagenet, lookup
from ekd_jax.data.tfds import records as prepared

# --- small archives in the layout of the published ones --------------------------------------


def pixels(generator, count, *shape):
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_cifar(folder, generator, coarse=False, labels_below=10):
    prefix = "cifar-100-binary" if coarse else "cifar-10-batches-bin"
    if coarse:
        files = {"test.bin": 10, "train.bin": 30}
        texts = {
            "fine_label_names.txt": [f"fine{i}" for i in range(100)],
            "coarse_label_names.txt": [f"coarse{i}" for i in range(20)],
        }
    else:
        files = {**{f"data_batch_{i}.bin": 6 for i in range(1, 6)}, "test_batch.bin": 10}
        texts = {"batches.meta.txt": [f"class{i}" for i in range(10)]}
    found = {"train": [], "test": []}
    with tarfile.open(folder / f"{'cifar-100' if coarse else 'cifar-10'}-binary.tar.gz", "w:gz") as tar:
        for file, count in files.items():
            images = pixels(generator, count, 32, 32, 3)
            labels = generator.integers(0, 100 if coarse else labels_below, count, dtype=np.uint8)
            planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
            columns = [labels[:, None] // 5, labels[:, None]] if coarse else [labels[:, None]]
            add(tar, f"{prefix}/{file}", np.concatenate([*columns, planes], axis=1).tobytes())
            found["test" if "test" in file else "train"] += zip(images, labels, strict=True)
        for file, names in texts.items():
            add(tar, f"{prefix}/{file}", ("\n".join(names) + "\n").encode())
    return found


def make_cifar100(folder, generator):
    return make_cifar(folder, generator, coarse=True)


def make_svhn(folder, generator, highest=10, splits=("train", "test", "extra")):
    found = {}
    for split in splits:
        images = pixels(generator, 20, 32, 32, 3)
        labels = np.arange(20, dtype=np.uint8) % highest + 1
        file = folder / f"{split}_32x32.mat"
        scipy.io.savemat(
            file, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]}, do_compression=True
        )
        found[split] = list(zip(images, labels % 10, strict=True))
    return found


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes())


def make_mnist(folder, generator, highest=10):
    found = {}
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 10)):
        images, labels = pixels(generator, count, 28, 28), np.arange(count, dtype=np.uint8) % highest
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
        found[split] = list(zip(images, labels, strict=True))
    return found


SYNSETS = ("n01440764", "n01443537", "n15075141")  # labels 0, 1 and 999
VALIDATION = {1: "n01751748", 2: "n09193705", 293: None, 50_000: None}  # number -> synset, from TFDS's list


def make_imagenet(folder, generator):
    found = {"train": [], "test": []}
    names = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for synset in SYNSETS:
            part = io.BytesIO()
            with tarfile.open(fileobj=part, mode="w") as inner:
                for number in range(20):
                    data = pixels(generator, int(generator.integers(100, 3000))).tobytes()
                    add(inner, f"{synset}_{number}.JPEG", data)
                    found["train"].append((data, names.index(synset)))
            add(tar, f"{synset}.tar", part.getvalue())
    listed = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, synset in VALIDATION.items():
            data = pixels(generator, 500 + number).tobytes()
            add(tar, f"ILSVRC2012_val_{number:08}.JPEG", data)
            assert synset in (None, listed[number - 1])
            found["test"].append((data, names.index(listed[number - 1])))
    return found


MAKERS = {
    "cifar10": make_cifar,
    "cifar100": make_cifar100,
    "svhn_cropped": make_svhn,
    "fashion_mnist": make_mnist,
    "imagenet2012": make_imagenet,
}


def vouch(folder):
    """Write SHA256SUMS as `sha256sum` does."""
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in folder.iterdir()
        if file.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def manual(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    return folder


@pytest.fixture(params=MAKERS)
def made(request, manual):
    """Return name, directory of archives that SHA256SUMS vouches for, and their contents."""
    contents = MAKERS[request.param](manual, np.random.default_rng(0))
    vouch(manual)
    return request.param, manual, contents


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", 4096)


def open_set(name, data_dir, manual="", extra=False, test_split=""):
    return prepared.open_set(name, str(data_dir), str(manual), extra, test_split)


def as_set(pairs):
    """Return decoded images with their labels, sorted; those of ImageNet are random bytes here."""

    def key(image, label):
        if isinstance(image, bytes) and image.startswith(b"\x89PNG"):
            image = np.asarray(Image.open(io.BytesIO(image)))
        return (image if isinstance(image, bytes) else image.tobytes()), int(label)

    return sorted(key(*pair) for pair in pairs)


def read(examples):
    return as_set((example.image, example.label) for example in examples)


def versions(data_dir, name):
    """Return the directories that TFDS would take for a complete set."""
    return [path.name for path in (data_dir / name).glob("*") if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]


# --- each set ---------------------------------------------------------------------------------


def test_from_archives_and_from_what_was_prepared(made, tmp_path):
    name, folder, contents = made
    assert prepared.facts(name, str(tmp_path / "tfds"), False, "") is None
    extra = "extra" in contents
    for manual in (folder, ""):  # the second time nothing but the prepared set is there
        source = open_set(name, tmp_path / "tfds", manual, extra)
        assert read(source.train) == as_set(contents["train"] + contents.get("extra", []))
        assert read(source.test) == as_set(contents["test"])
        labels = [example.label for example in source.train]
        assert labels != sorted(labels)
        names = {example.name for example in source.train}
        assert len(names) == len(labels)
        assert all(text.startswith(name) for text in names)
        assert (source.facts.train_examples, source.facts.test_examples) == (len(labels), len(source.test))
        assert prepared.facts(name, str(tmp_path / "tfds"), extra, "") == source.facts
        published = prepared.published_facts(name)
        assert (published.name, published.image_shape) == (name, source.facts.image_shape)
        assert len(published.class_names) == len(source.facts.class_names)
    assert source.train.fingerprint != source.test.fingerprint


def test_standard_tfds_reads_what_was_prepared(made, tmp_path):
    name, folder, contents = made
    open_set(name, tmp_path, folder)
    builder = tfds.builder(name, data_dir=tmp_path)
    assert builder.is_prepared()
    assert builder.info.splits["train"].num_examples == len(contents["train"])
    assert (builder.data_path / "features.json").exists()


def test_tensorflow_is_not_needed(manual, tmp_path):
    make_svhn(manual, np.random.default_rng(0))
    vouch(manual)
    code = (
        "import sys\n"
        "from ekd_jax.data.tfds import records as prepared\n"
        "source = prepared.open_set('svhn_cropped', sys.argv[1], sys.argv[2], True, '')\n"
        "print(len(source.train), source.train[5].name, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, manual], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"40 svhn_cropped train train_\d{6} False\n", done.stdout)


def test_names_and_shapes(manual, tmp_path):
    make_cifar(manual, np.random.default_rng(0))
    make_imagenet(manual, np.random.default_rng(0))
    vouch(manual)
    facts = open_set("cifar10", tmp_path, manual).facts
    assert facts.class_names == tuple(f"class{i}" for i in range(10))
    assert facts.image_shape == (32, 32, 3)
    source = open_set("imagenet2012", tmp_path, manual)
    assert source.facts.image_shape == (None, None, 3)
    assert source.facts.class_names[0] == "n01440764"
    assert re.fullmatch(r"imagenet2012 validation ILSVRC2012_val_\d{8}\.JPEG", source.test[0].name)


def test_published_sizes():
    assert prepared.published_facts("svhn_cropped", extra=True).train_examples == 73_257 + 531_131
    assert prepared.published_facts("imagenet2012").test_examples == 50_000
    assert prepared.published_facts("beans") is None


# --- archives that are not what they should be ------------------------------------------------


def test_another_archive_must_be_vouched_for(made, tmp_path):
    name, folder, _ = made
    (folder / "SHA256SUMS").unlink()
    for _archive in list(folder.iterdir()):  # the message's own advice, once for each
        with pytest.raises(UserError, match="has the SHA-256") as error:
            open_set(name, tmp_path / "tfds", folder)
        assert "\n" not in str(error.value)
        line, sums = re.search(r"add the line '(.*)' to (.*)$", str(error.value)).groups()
        assert not versions(tmp_path / "tfds", name)
        with open(sums, "a") as file:
            file.write(line + "\n")
    open_set(name, tmp_path / "tfds", folder)


def test_the_published_archive_needs_no_vouching(made, tmp_path, monkeypatch):
    name, folder, _ = made
    (folder / "SHA256SUMS").unlink()
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setattr(builders.BUILDERS[name], "published_digests", classmethod(lambda cls: digests))
    open_set(name, tmp_path / "tfds", folder)


def test_published_digests_are_those_of_tfds():
    assert builders.Cifar10.published_digests() == {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    }
    for builder in builders.BUILDERS.values():
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in builder.published_digests().values())


def test_cifar_packed_again_with_the_same_contents(manual, tmp_path, monkeypatch):
    make_cifar(manual, np.random.default_rng(0))
    digest = builders.Cifar10(data_dir=tmp_path)._contents(manual / "cifar-10-binary.tar.gz")
    monkeypatch.setitem(builders.CIFAR_CONTENTS, "cifar10", digest)
    assert len(open_set("cifar10", tmp_path, manual).train) == 30


def test_truncated_and_damaged_archives(made, tmp_path):
    name, folder, _ = made
    for file in [path for path in folder.iterdir() if path.name != "SHA256SUMS"]:
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"not an archive" * 100):
            file.write_bytes(damaged)
            for vouched in (False, True):  # the second time for the damaged file: its format tells
                if vouched:
                    vouch(folder)
                with pytest.raises(UserError, match=r"truncated|damaged|as SVHN|holds") as error:
                    open_set(name, tmp_path / "tfds", folder)
                assert str(file) in str(error.value)
                assert "\n" not in str(error.value)
        file.write_bytes(whole)
        vouch(folder)
    assert not versions(tmp_path / "tfds", name)
    open_set(name, tmp_path / "tfds", folder)


def tar_of(folder, members):
    """Write CIFAR-10's archive with these (header, data), where a header may claim anything."""
    with gzip.open(folder / "cifar-10-binary.tar.gz", "wb") as file:
        for info, data in members:
            file.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))


def header(name, size, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
    info.size, info.type, info.linkname = size, kind, link
    return info


BATCH = header("data_batch_1.bin", 3073), bytes(3073)
MOST, DAMAGED = "has no more|above the limit", "is truncated or damaged"
TARS = {
    "a header that claims terabytes": ([(header("data_batch_1.bin", 2**42), b"")], MOST),
    "a long name that claims terabytes": ([(header("x", 2**42, tarfile.GNUTYPE_LONGNAME), b"")], DAMAGED),
    "an unknown member of too many bytes": ([BATCH, (header("more", 2 * 10**8), bytes(2 * 10**8))], MOST),
    "a negative size": ([(header("data_batch_1.bin", -1), b"")], DAMAGED),
    "a link": ([(header("data_batch_1.bin", 0, tarfile.SYMTYPE, "/etc/passwd"), b"")], "is a link"),
    "a device": ([(header("data_batch_1.bin", 0, tarfile.CHRTYPE), b"")], "a device"),
    "a sparse file": ([(header("data_batch_1.bin", 512, tarfile.GNUTYPE_SPARSE), bytes(512))], "sparse"),
    "a file of 0 bytes": ([(header("data_batch_1.bin", 0), b"")], "data_batch_1.bin is empty"),
    "a name twice": ([BATCH, BATCH], "data_batch_1.bin is there twice"),
    "an absolute name": ([(tarfile.TarInfo("/tmp/data_batch_1.bin"), b"")], "holds no cifar-10-batches"),
}


@pytest.mark.parametrize("case", TARS)
def test_tars_that_claim_what_cannot_be(case, manual, tmp_path):
    """Nothing is unpacked to disk or to memory beyond the size of the set, whoever vouches for the archive."""
    members, message = TARS[case]
    tar_of(manual, members)
    before, _ = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, vouch(manual)
    with pytest.raises(UserError, match=message) as error:
        open_set("cifar10", tmp_path / "tfds", manual)
    assert str(manual / "cifar-10-binary.tar.gz") in str(error.value)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "kB"
    assert not versions(tmp_path / "tfds", "cifar10")


def test_a_gzip_bomb(manual, tmp_path):
    make_mnist(manual, np.random.default_rng(0))
    file = manual / "train-labels-idx1-ubyte.gz"
    file.write_bytes(idx(np.zeros(5_000_000, np.uint8)))
    vouch(manual)
    with pytest.raises(
        UserError, match=f"{file} unpacks to more than 1,108,576 bytes, .* download it again"
    ):
        open_set("fashion_mnist", tmp_path / "tfds", manual)


def test_a_mat_file_with_too_many_images(manual, tmp_path):
    make_svhn(manual, np.random.default_rng(0), splits=("train", "test"))
    many = np.zeros((32, 32, 3, 26_033), np.uint8)
    scipy.io.savemat(manual / "test_32x32.mat", {"X": many, "y": np.ones((26_033, 1))}, do_compression=True)
    vouch(manual)
    with pytest.raises(UserError, match=r"test_32x32.mat unpacks to more than 79,970,304 bytes"):
        open_set("svhn_cropped", tmp_path / "tfds", manual)


def test_checksums_that_cannot_be_read(manual, tmp_path):
    make_mnist(manual, np.random.default_rng(0))
    (manual / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="SHA256SUMS cannot be read .*: write it with sha256sum"):
        open_set("fashion_mnist", tmp_path / "tfds", manual)


def test_missing_archives(made, tmp_path):
    name, folder, _ = made
    for file in sorted(folder.iterdir()):
        if file.name in ("SHA256SUMS", "extra_32x32.mat"):
            continue
        away = file.rename(tmp_path / file.name)
        with pytest.raises(UserError, match=f"data.manual_dir={folder} holds no {file.name}"):
            open_set(name, tmp_path / "tfds", folder)
        away.rename(file)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError) as error:
        open_set("cifar10", tmp_path)
    for way in ("cannot be downloaded", "--config.data.manual_dir=", "configs/digits.py"):
        assert way in str(error.value)
    with pytest.raises(UserError, match="TFDS cannot prepare it"):
        open_set("beans", tmp_path)
    with pytest.raises(UserError, match=r"without an account: pass --config.data.manual_dir"):
        open_set("imagenet2012", tmp_path)


def test_download(manual, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    contents = make_mnist(manual, np.random.default_rng(0))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=manual)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = {
        f"http://127.0.0.1:{server.server_address[1]}/{file.name}": tfds.download.checksums.UrlInfo(
            file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest(), file.name
        )
        for file in manual.iterdir()
    }
    monkeypatch.setattr(builders.FashionMnist, "url_infos", urls)
    file = manual / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(idx(np.zeros(10, np.uint8)))
    with pytest.raises(UserError, match=f"Artifact http.*{file.name}.*has wrong checksum.*manual_dir"):
        open_set("fashion_mnist", tmp_path / "tfds")
    file.write_bytes(whole)
    assert read(open_set("fashion_mnist", tmp_path / "tfds").test) == as_set(contents["test"])
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("cifar10", lambda f, g: make_cifar(f, g, labels_below=200), "holds the label .* has 10 classes"),
        ("svhn_cropped", lambda f, g: make_svhn(f, g, highest=11), "holds the label 11, but .* 1 to 10"),
        (
            "fashion_mnist",
            lambda f, g: make_mnist(f, g, highest=12),
            "holds the label 10, but .* 10 classes",
        ),
    ],
)
def test_labels_out_of_range(name, make, message, manual, tmp_path):
    make(manual, np.random.default_rng(0))
    vouch(manual)
    with pytest.raises(UserError, match=message):
        open_set(name, tmp_path, manual)
    assert not versions(tmp_path, name)


def test_svhn_without_its_extra_images(manual, tmp_path):
    make_svhn(manual, np.random.default_rng(0), splits=("train", "test"))
    vouch(manual)
    assert len(open_set("svhn_cropped", tmp_path, manual).train) == 20
    with pytest.raises(UserError, match=r"has no split extra; .* again with extra_32x32.mat"):
        open_set("svhn_cropped", tmp_path, manual, extra=True)


# --- ImageNet ---------------------------------------------------------------------------------


@pytest.fixture
def imagenet_archives(manual):
    contents = make_imagenet(manual, np.random.default_rng(0))
    vouch(manual)
    return manual, contents


def image_header(number, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(f"ILSVRC2012_val_{number:08}.JPEG")
    info.size, info.type = size, kind
    return info


@pytest.mark.parametrize(
    ("file", "member", "message"),
    [
        ("train", "n00000001.tar", "n00000001.tar: no synset"),
        ("train", "README", "README: no synset"),
        (
            "val",
            "ILSVRC2012_val_00050001.JPEG",
            "ILSVRC2012_val_00050001.JPEG: that is not a validation image",
        ),
        ("val", "ILSVRC2012_val_00000293.JPEG", "ILSVRC2012_val_00000293.JPEG twice"),
        ("val", header("../ILSVRC2012_val_00000003.JPEG", 5), "that is not a validation image"),
        ("val", image_header(3, 0), "ILSVRC2012_val_00000003.JPEG, which is empty"),
        ("val", image_header(3, 0, tarfile.SYMTYPE), "ILSVRC2012_val_00000003.JPEG, which is a link"),
        ("val", image_header(3, 2**42), "claims 4,398,046,511,104 bytes, above the limit"),
        ("val", image_header(3, 2**42, tarfile.GNUTYPE_LONGNAME), "a header claims 4,398,046,511"),
        ("train", image_header(3, 2**42), "no synset|claims 4,398,046,511,104 bytes, above the limit"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_unexpected_members(imagenet_archives, tmp_path, file, member, message):
    folder, _ = imagenet_archives
    with tarfile.open(folder / f"ILSVRC2012_img_{file}.tar", "a") as tar:
        if isinstance(member, str):
            add(tar, member, b"image")
        else:
            tar.fileobj.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(512))
            tar.offset += 1024
    vouch(folder)
    with pytest.raises(UserError, match=message):
        open_set("imagenet2012", tmp_path, folder)


PREPARE = """
import os, signal, sys
from tensorflow_datasets.core.utils import shard_utils
shard_utils.ShardConfig.min_shard_size = 4096
from ekd_jax.data.tfds import imagenet
from ekd_jax.data.tfds import records as prepared

data_dir, manual_dir, images = sys.argv[1:]
left = int(images)

def add(self, amount):
    global left
    left -= self.unit == "images"
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

imagenet.Progress.add = add
print(len(prepared.open_set("imagenet2012", data_dir, manual_dir, False, "").train))
"""


def prepare_imagenet(data_dir, manual_dir, images=-1):
    """Prepare in a process of its own, which is killed after `images` images."""
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, data_dir, manual_dir, str(images)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_killed_and_resumed_is_the_same_as_in_one_go(
    imagenet_archives, tmp_path, small_shards, monkeypatch
):
    folder, contents = imagenet_archives
    open_set("imagenet2012", tmp_path / "whole", folder)
    killed = tmp_path / "killed"
    shards = []
    for images in (3, 30, 34):
        assert prepare_imagenet(killed, folder, images).wait() == -signal.SIGKILL
        assert prepared.facts("imagenet2012", str(killed), False, "") is None
        assert not versions(killed, "imagenet2012")
        shards.append(len(list(killed.rglob("*-of-?????"))))
    assert shards[0] == 0 < shards[1] < shards[2], "complete shards are kept"
    # The archives have been verified: neither is read through again.
    monkeypatch.setattr(imagenet._SplitWriter, "_scan", lambda *arguments: pytest.fail("verified again"))
    source = open_set("imagenet2012", killed, folder)
    assert read(source.train) == as_set(contents["train"])
    assert files(killed) == files(tmp_path / "whole")
    assert len(list(killed.rglob("*-of-?????"))) > 10


def test_shards_of_another_archive_are_dropped(imagenet_archives, tmp_path, small_shards):
    folder, _ = imagenet_archives
    assert prepare_imagenet(tmp_path, folder, 30).wait() == -signal.SIGKILL
    contents = make_imagenet(folder, np.random.default_rng(1))
    vouch(folder)
    assert read(open_set("imagenet2012", tmp_path, folder).train) == as_set(contents["train"])


def test_two_processes_at_once(imagenet_archives, tmp_path):
    folder, _ = imagenet_archives
    both = [prepare_imagenet(tmp_path / "tfds", folder) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["60\n", "60\n"]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 128 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("noticed", ["before", "while"])
def test_a_full_disk(noticed, imagenet_archives, small_disk, monkeypatch, small_shards):
    folder, contents = imagenet_archives
    with monkeypatch.context() as changes:
        if noticed == "while":
            subprocess.run(["mount", "-o", "remount,size=600k", str(small_disk)], check=True)
            changes.setattr(imagenet._SplitWriter, "missing_bytes", lambda self: 0)
        with pytest.raises(
            UserError, match="more, but its disk has|the disk is full.*run the same"
        ) as error:
            open_set("imagenet2012", small_disk, folder)
        assert ("disk is full" in str(error.value)) == (noticed == "while")
    kept = {path.name: path.stat().st_mtime_ns for path in small_disk.rglob("*-of-?????")}
    assert bool(kept) == (noticed == "while")
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert read(open_set("imagenet2012", small_disk, folder).train) == as_set(contents["train"])
    now = {path.name: path.stat().st_mtime_ns for path in small_disk.rglob("*-of-?????")}
    assert kept.items() <= now.items(), "what was written is not written again"


def test_a_full_disk_and_the_other_sets(manual, small_disk):
    make_svhn(manual, np.random.default_rng(0))
    vouch(manual)
    with pytest.raises(UserError, match="cannot prepare svhn_cropped in .*: the disk is full"):
        open_set("svhn_cropped", small_disk, manual)
    assert not versions(small_disk, "svhn_cropped")
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert len(open_set("svhn_cropped", small_disk, manual).train) == 20


def test_another_set_is_killed_and_prepared_again(manual, tmp_path):
    make_cifar(manual, np.random.default_rng(0))
    vouch(manual)
    code = (
        "import os, signal, sys\n"
        "from ekd_jax.data.tfds import builders\n"
        "from ekd_jax.data.tfds import records as prepared\n"
        "encode, left = builders._png, iter(range(35))\n"
        "builders._png = lambda i: encode(i) if next(left, None) is not None else os.kill(os.getpid(), 9)\n"
        "prepared.open_set('cifar10', *sys.argv[1:], False, '')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "tfds", manual], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "tfds").rglob("cifar10-train*")), "killed with one split written"
    assert prepared.facts("cifar10", str(tmp_path / "tfds"), False, "") is None
    assert len(open_set("cifar10", tmp_path / "tfds", manual).test) == 10


# --- reading ----------------------------------------------------------------------------------


@pytest.fixture
def svhn(manual, tmp_path):
    """Return data_dir and version directory of a prepared set."""
    make_svhn(manual, np.random.default_rng(0))
    vouch(manual)
    open_set("svhn_cropped", tmp_path / "tfds", manual)
    (version,) = (tmp_path / "tfds" / "svhn_cropped").glob("3*")
    return tmp_path / "tfds", version


def edit(version, **changes):
    file = version / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_pickled_and_read_by_threads(svhn):
    train = open_set("svhn_cropped", svhn[0], extra=True).train
    expected = [train[i] for i in range(40)]
    copy = pickle.loads(pickle.dumps(train))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(copy.__getitem__, list(range(40)) * 5)) == expected * 5
    assert copy.fingerprint == train.fingerprint
    for index in (-1, 40):
        with pytest.raises(IndexError):
            copy[index]


def test_sets_that_tfds_does_not_shuffle_are_shuffled(svhn):
    before = [example.label for example in open_set("svhn_cropped", svhn[0]).train]
    edit(svhn[1], disableShuffling=True)
    after = [example.label for example in open_set("svhn_cropped", svhn[0]).train]
    assert before != after
    assert sorted(before) == sorted(after)
    assert after == [example.label for example in open_set("svhn_cropped", svhn[0]).train]


def test_sets_that_cannot_be_used(svhn):
    data_dir, version = svhn
    with pytest.raises(UserError, match=r"data.test_split=tset: .* no split tset; did you mean 'test'"):
        prepared.facts("svhn_cropped", str(data_dir), False, "tset")
    assert prepared.facts("svhn_cropped", str(data_dir), False, "extra").test_examples == 20
    shard = next(version.glob("*-test.*"))
    shard.rename(version / "away")
    with pytest.raises(UserError, match=f"1 of 1 files of test are missing, the first is {shard.name}"):
        open_set("svhn_cropped", data_dir)
    edit(version, fileFormat="tfrecord")
    with pytest.raises(
        UserError, match=r"is in tfrecord.*tfds convert_format --dataset_version_dir=\S*3.1.0 "
    ):
        open_set("svhn_cropped", data_dir)
    edit(
        version,
        fileFormat="array_record",
        supervisedKeys={"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "id"}]}},
    )
    with pytest.raises(UserError, match="is not a set of 8-bit images with one class each"):
        prepared.facts("svhn_cropped", str(data_dir), False, "")
    (version / "features.json").unlink()
    with pytest.raises(UserError, match="holds no complete set .* delete it"):
        open_set("svhn_cropped", data_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnst", "did you mean 'fashion_mnist'"),
        ("Digit", "did you mean 'digits'"),
        ("CIFAR-10", "TFDS has no such set.*cifar10"),
        ("cifar10:9.9.9", "cannot prepare cifar10:9.9.9 in "),
        ("qqqq", "choose one of digits, folder, cifar10"),
    ],
)
def test_unknown_names_and_versions(name, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_set(name, tmp_path)
    assert len(str(error.value)) < 300


def test_other_sets_need_tensorflow_once(tmp_path, monkeypatch):
    def builder(*arguments, **options):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(
        UserError, match=r"prepare beans without tensorflow: once, `pip install tensorflow`"
    ):
        open_set("beans", tmp_path)


# --- gs:// ------------------------------------------------------------------------------------


class Bucket(http.server.BaseHTTPRequestHandler):
    """The part of Google Storage's JSON interface that reading needs; `root` is the bucket."""

    protocol_version = "HTTP/1.1"
    root: pathlib.Path

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        options = dict(urllib.parse.parse_qsl(url.query))
        key = urllib.parse.unquote(url.path).partition("/o/")[2]
        path = self.root / key
        if not key:
            self.list(options.get("prefix", ""), options.get("delimiter", ""))
        elif not path.is_file():
            self.answer(404, b"{}")
        elif options.get("alt") != "media":
            self.answer(200, json.dumps(self.about(key)).encode())
        else:
            data = path.read_bytes()
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
            start = int(first) if first else max(0, len(data) - int(last))
            end = min(int(last), len(data) - 1) if first and last else len(data) - 1
            self.answer(206, data[start : end + 1], f"bytes {start}-{end}/{len(data)}")

    def list(self, prefix, delimiter):
        keys = [str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file()]
        items, folders = [], set()
        for rest in (key[len(prefix) :] for key in keys if key.startswith(prefix)):
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.about(prefix + rest))
        self.answer(200, json.dumps({"items": items, "prefixes": sorted(folders)}).encode())

    def about(self, key):
        size = (self.root / key).stat().st_size
        return {"kind": "storage#object", "name": key, "bucket": "bucket", "size": size, "generation": "1"}

    def answer(self, status, data, content_range=""):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        try:
            self.wfile.write(data)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="gcsfs is not installed")
def test_a_set_in_a_bucket(svhn):
    handler = type("Handler", (Bucket,), {"root": svhn[0].parent})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    code = (
        "from ekd_jax.data.tfds import records as prepared\n"
        "source = prepared.open_set('svhn_cropped', 'gs://bucket/tfds', '', True, '')\n"
        "print(sorted(source.train[i].label for i in range(40)), source.facts.test_examples)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"STORAGE_EMULATOR_HOST": address, "CLOUD_STORAGE_EMULATOR_ENDPOINT": address},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    assert done.stdout.strip() == f"{sorted(list(range(10)) * 4)} 20", done.stderr


def test_a_bucket_without_gcsfs(monkeypatch):
    def fails(*arguments, **options):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(lookup.read_only_builder, "builder_from_files", fails)
    with pytest.raises(UserError, match="gs://bucket cannot be read .*: pip install gcsfs"):
        prepared.facts("cifar10", "gs://bucket", False, "")


# --- the full sets, where they are ------------------------------------------------------------

FULL = os.environ.get("EKD_JAX_MANUAL_DIR", "")


def whole(name, tmp_path_factory, extra=False):
    for archive in builders.BUILDERS[name].published_digests():
        if not (pathlib.Path(FULL).expanduser() / archive).is_file():
            pytest.skip(f"EKD_JAX_MANUAL_DIR={FULL} holds no {archive}")
    folder = tmp_path_factory.getbasetemp() / "tfds"
    return open_set(name, folder, FULL, extra)


@pytest.mark.skipif(not FULL, reason="EKD_JAX_MANUAL_DIR names no folder of archives")
@pytest.mark.parametrize(("name", "classes", "mean"), [
    ("cifar10", 10, (0.4914, 0.4822, 0.4465)),
    ("cifar100", 100, (0.5071, 0.4865, 0.4409)),
])  # fmt: skip
def test_the_whole_of_cifar(name, classes, mean, tmp_path_factory):
    source = whole(name, tmp_path_factory)
    images = np.stack([np.asarray(Image.open(io.BytesIO(example.image))) for example in source.train])
    assert np.bincount([e.label for e in source.train]).tolist() == [50_000 // classes] * classes
    assert np.bincount([e.label for e in source.test]).tolist() == [10_000 // classes] * classes
    np.testing.assert_allclose(images.mean((0, 1, 2)) / 255, mean, atol=6e-5)


@pytest.mark.skipif(not FULL, reason="EKD_JAX_MANUAL_DIR names no folder of archives")
def test_the_whole_of_svhn(tmp_path_factory):
    source = whole("svhn_cropped", tmp_path_factory, extra=True)
    expected = np.zeros(10, int)
    for split in ("train", "extra"):
        labels = scipy.io.loadmat(f"{FULL}/{split}_32x32.mat", variable_names="y")["y"]
        expected += np.bincount(labels.reshape(-1) % 10, minlength=10)
    assert np.bincount([e.label for e in source.train]).tolist() == expected.tolist()
    assert source.facts.train_examples == len(source.train) == expected.sum()


@pytest.mark.skipif(not FULL, reason="EKD_JAX_MANUAL_DIR names no folder of archives")
def test_the_whole_of_imagenet(tmp_path_factory):
    source = whole("imagenet2012", tmp_path_factory)
    assert len(source.facts.class_names) == 1000
    counts: dict[str, int] = {}
    with tarfile.open(f"{FULL}/ILSVRC2012_img_train.tar") as tar:
        for part in tar:
            with tarfile.open(fileobj=tar.extractfile(part)) as inner:
                counts[part.name.removesuffix(".tar")] = len(inner.getnames())
    found = np.bincount([example.label for example in source.train], minlength=1000)
    assert {source.facts.class_names[i]: n for i, n in enumerate(found) if n} == counts
    numbers = np.linspace(0, len(source.test) - 1, 100).astype(int)
    assert all(Image.open(io.BytesIO(source.test[int(i)].image)).width for i in numbers)
