"""Order, augmentation, and sources: exact, and clear when something is wrong."""

import hashlib
import io
import os
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from conftest import tiny_config

from ekd_jax.data import cifar, sources
from ekd_jax.data.augment import augment, normalise
from ekd_jax.data.order import position, two_epochs
from ekd_jax.errors import UserError

KEY = jax.random.key(0)


def test_every_example_once_an_epoch_in_a_fresh_order():
    order = np.asarray(two_epochs(KEY, 3, 101))
    assert sorted(order[:101]) == sorted(order[101:]) == list(range(101))
    assert list(order[:101]) != list(order[101:])
    following = np.asarray(two_epochs(KEY, 4, 101))
    np.testing.assert_array_equal(order[101:], following[:101])


def test_batches_are_cut_from_one_stream():
    """Batches of 32 from 50 examples straddle epochs; three epochs contain each example three times."""
    seen = []
    for step in range(150 // 30):
        epoch, offset = position(step, 30, 50)
        seen += list(np.asarray(two_epochs(KEY, epoch, 50))[offset : offset + 30])
    assert sorted(seen) == sorted(list(range(50)) * 3)
    assert sorted(seen[50:100]) == list(range(50))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_augmentation_is_a_padded_crop_and_a_flip(padding, flip):
    """Every result is one of the crops and flips that NumPy makes, and all of them occur."""
    images = np.random.default_rng(0).integers(1, 255, (400, 6, 6, 3), dtype=np.uint8)
    out = np.asarray(augment(KEY, images, np.arange(400), padding, flip))
    places = set()
    for image, found in zip(images, out, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        fits = [
            (top, left, mirrored)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for mirrored in (False, True)[: 1 + flip]
            if np.array_equal(padded[top : top + 6, left : left + 6][:, :: -1 if mirrored else 1], found)
        ]
        assert len(fits) == 1
        places |= set(fits)
    possible = (2 * padding + 1) ** 2 * (1 + flip)
    assert len(places) > 0.85 * possible


def test_augmentation_depends_on_key_and_example_alone():
    images = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), dtype=np.uint8)
    numbers = np.arange(16) * 7
    out = np.asarray(augment(KEY, images, numbers, 2, True))
    shuffled = np.random.default_rng(1).permutation(16)
    np.testing.assert_array_equal(augment(KEY, images[shuffled], numbers[shuffled], 2, True), out[shuffled])
    assert not np.array_equal(augment(jax.random.key(1), images, numbers, 2, True), out)


def test_normalisation():
    images = np.array([[[[0, 128, 255]]]], np.uint8)
    found = normalise(images, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    np.testing.assert_allclose(found[0, 0, 0], [-0.2, (128 / 255 - 0.2) * 4, 0.35], rtol=1e-6)


def test_digits_are_what_the_package_says():
    dataset = sources.load(tiny_config(data__train_examples=0))
    info = sources.INFO["digits"]
    assert dataset.train_images.shape == (info.train_examples, *info.input_shape)
    assert dataset.test_images.shape == (info.test_examples, *info.input_shape)
    assert dataset.train_images.dtype == np.uint8
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0, 255)
    assert np.bincount(np.concatenate([dataset.train_labels, dataset.test_labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert len(sources.load(tiny_config(data__train_examples=30)).train_labels) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train_examples": 5000}, "digits has 899 training examples"),
        ({"data__mean": (0.1, 0.2, 0.3)}, "one value or 1"),
    ],
)
def test_impossible_data(changes, message):
    with pytest.raises(UserError, match=message):
        sources.info(tiny_config(**changes))


# --- CIFAR from an archive -------------------------------------------------------------------


def write_archive(folder: pathlib.Path, name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A small archive in the layout of the published one; returns what is in it."""
    generator = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    coarse = name == "cifar100"
    prefix = "cifar-100-binary" if coarse else "cifar-10-batches-bin"
    if coarse:
        files = {"train.bin": 30, "test.bin": 10}
        texts = {
            "fine_label_names.txt": [f"fine{i}" for i in range(100)],
            "coarse_label_names.txt": [f"coarse{i}" for i in range(20)],
        }
    else:
        files = {**{f"data_batch_{i}.bin": 6 for i in range(1, 6)}, "test_batch.bin": 10}
        texts = {"batches.meta.txt": [f"class{i}" for i in range(10)]}
    contents, digest = {}, hashlib.sha256()
    with tarfile.open(folder / f"{'cifar-100' if coarse else 'cifar-10'}-binary.tar.gz", "w:gz") as tar:
        for file in sorted(files):
            images = generator.integers(0, 256, (files[file], 32, 32, 3), dtype=np.uint8)
            labels = generator.integers(0, 100 if coarse else 10, files[file], dtype=np.uint8)
            planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
            columns = [labels[:, None] // 5, labels[:, None]] if coarse else [labels[:, None]]
            data = np.concatenate([*columns, planes], axis=1).tobytes()
            contents[file] = (images, labels)
            digest.update(data)
            add(tar, f"{prefix}/{file}", data)
        for file, names in texts.items():
            add(tar, f"{prefix}/{file}", ("\n".join(names) + "\n").encode())
    return contents, digest.hexdigest()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(params=["cifar10", "cifar100"])
def archive(request, tmp_path, monkeypatch):
    """(name, folder, contents) of an archive that counts as the published one."""
    name, folder = request.param, tmp_path / "manual"
    contents, digest = write_archive(folder, name)
    monkeypatch.setitem(cifar.DIGESTS, name, ("0" * 64, digest))
    return name, folder, contents


def as_set(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_cifar_from_an_archive_and_from_what_was_prepared(archive, tmp_path):
    name, folder, contents = archive
    for manual in (str(folder), ""):  # the second time nothing but the prepared set is there
        dataset = cifar.load(name, str(tmp_path / "tfds"), manual, 30)
        train = [v for k, v in contents.items() if "test" not in k]
        test = [v for k, v in contents.items() if "test" in k]
        joined = [
            [np.concatenate(column) for column in zip(*split, strict=True)] for split in (train, test)
        ]
        assert as_set(dataset.train_images, dataset.train_labels) == as_set(*joined[0])
        assert as_set(dataset.test_images, dataset.test_labels) == as_set(*joined[1])
        assert dataset.class_names[3] == ("fine3" if name == "cifar100" else "class3")
    assert len(cifar.load(name, str(tmp_path / "tfds"), "", 7).train_labels) == 7


def test_truncated_and_changed_archives(archive, tmp_path):
    name, folder, _ = archive
    file = next(folder.iterdir())
    whole = file.read_bytes()
    for damaged, message in (
        (whole[: len(whole) // 2], "truncated or damaged"),
        (b"not an archive", "damaged"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=message) as error:
            cifar.load(name, str(tmp_path / "tfds"), str(folder), 30)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
    write_archive(folder, name, seed=1)
    with pytest.raises(UserError, match="contents differ"):
        cifar.load(name, str(tmp_path / "tfds"), str(folder), 30)
    assert not list((tmp_path / "tfds" / name).glob("*")), "nothing that a later run takes for complete"
    file.write_bytes(whole)
    assert len(cifar.load(name, str(tmp_path / "tfds"), str(folder), 30).train_labels) == 30


def test_missing_archive_and_no_network(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no cifar-10-binary.tar.gz"):
        cifar.load("cifar10", str(tmp_path), str(tmp_path / "nowhere"), 1)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError) as error:
        cifar.load("cifar10", str(tmp_path), "", 1)
    for way in ("cannot be downloaded", "--config.data.manual_dir=", "configs/digits.py"):
        assert way in str(error.value)


# --- the full sets, where they are -----------------------------------------------------------

FULL = os.environ.get("EKD_JAX_MANUAL_DIR", "")


@pytest.mark.skipif(not FULL, reason="EKD_JAX_MANUAL_DIR names no folder with the CIFAR archives")
@pytest.mark.parametrize(("name", "classes", "mean"), [
    ("cifar10", 10, (0.4914, 0.4822, 0.4465)),
    ("cifar100", 100, (0.5071, 0.4865, 0.4409)),
])  # fmt: skip
def test_the_whole_of_cifar(name, classes, mean, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "tfds"
    dataset = cifar.load(name, str(folder), FULL, 50_000)
    assert np.bincount(dataset.train_labels).tolist() == [50_000 // classes] * classes
    assert np.bincount(dataset.test_labels).tolist() == [10_000 // classes] * classes
    np.testing.assert_allclose(dataset.train_images.mean((0, 1, 2)) / 255, mean, atol=6e-5)
