"""CIFAR-10 and CIFAR-100 through TFDS, prepared without TensorFlow.

TFDS's own builders need TensorFlow to unpack an archive and to encode images. The builders here are
theirs with those two steps replaced; what they write (array_record, the same features, version and
place) is what TFDS writes, and a set that TFDS prepared in array_record is read as it is.
"""

import hashlib
import io
import pathlib
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar as standard

from ekd_jax.data.dataset import Dataset
from ekd_jax.errors import UserError, reason

# SHA-256 of the published archive, and of its .bin members in order of their names: an archive that
# was packed again, with the same contents, is as good.
DIGESTS = {
    "cifar10": (
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522",
    ),
    "cifar100": (
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "c963f1a2e2c344fd7045056095ea0659afca4c4099db589dbd05ed256b4fa1f5",
    ),
}


class _FromArchive:
    """Replaces what the standard builders do with TensorFlow."""

    archive: pathlib.Path | None = None

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        layout = self._cifar_info  # type: ignore[attr-defined]
        path = self.archive or pathlib.Path(dl_manager.download(layout.url))
        members = read_archive(path, self.name)  # type: ignore[attr-defined]

        def find(name: str) -> bytes:
            if layout.prefix + name not in members:
                raise UserError(f"{path} holds no {layout.prefix}{name}: it is not the {self.name} archive")  # type: ignore[attr-defined]
            return members[layout.prefix + name]

        for key, file in zip(layout.label_keys, layout.label_files, strict=True):
            self.info.features[key].names = find(file).decode().split()  # type: ignore[attr-defined]
        return {
            split: self._generate_examples(f"{split}_", [find(file) for file in files])
            for split, files in (("train", layout.train_files), ("test", layout.test_files))
        }

    def _generate_examples(self, prefix: str, files: list[bytes]) -> Iterator[tuple[int, Any]]:
        keys = self._cifar_info.label_keys  # type: ignore[attr-defined]
        index = 0
        for data in files:
            records = np.frombuffer(data, np.uint8).reshape(-1, len(keys) + 3072)
            for record in records:
                image = record[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                labels = {key: int(value) for key, value in zip(keys, record, strict=False)}
                yield index, {"id": f"{prefix}{index:05d}", "image": png.getvalue(), **labels}
                index += 1


with tfds.core.registered.skip_registration():

    class Cifar10(_FromArchive, standard.Cifar10):
        """CIFAR-10 (Krizhevsky 2009)."""

    class Cifar100(_FromArchive, standard.Cifar100):
        """CIFAR-100 (Krizhevsky 2009)."""


BUILDERS: dict[str, Any] = {"cifar10": Cifar10, "cifar100": Cifar100}


def load(name: str, data_dir: str, manual_dir: str, train_examples: int) -> Dataset:
    """Reads CIFAR, preparing it first from `manual_dir` or a download if need be.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: where TFDS keeps prepared sets; empty for TFDS's default.
        manual_dir: a folder that holds the binary archive; empty to download it.
        train_examples: how many of the training set to read.

    Raises:
        UserError: no archive, a damaged one, or no way to download it.
    """
    builder = BUILDERS[name](data_dir=data_dir or None, file_format="array_record")
    if not builder.is_prepared():
        _prepare(builder, manual_dir)
    train = _read(builder, "train", train_examples)
    test = _read(builder, "test", builder.info.splits["test"].num_examples)
    return Dataset(*train, *test, class_names=tuple(builder.info.features["label"].names))


def _prepare(builder: Any, manual_dir: str) -> None:
    url = builder._cifar_info.url
    file = url.rsplit("/", 1)[1]
    try:
        if manual_dir:
            builder.archive = pathlib.Path(manual_dir).expanduser() / file
            if not builder.archive.is_file():
                raise UserError(f"data.manual_dir={manual_dir} holds no {file}")
        else:  # TFDS itself would try for minutes
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20).close()
        builder.download_and_prepare()
    except UserError:
        raise
    except Exception as error:  # whatever TFDS, the network or the disk say
        if manual_dir:
            raise UserError(
                f"cannot prepare {builder.name} in {builder.data_dir}: {reason(error)}"
            ) from error
        raise UserError(
            f"{builder.name} is not in {builder.data_dir} and cannot be downloaded ({reason(error)}): "
            f"run where {url} can be reached, or pass --config.data.manual_dir=FOLDER with {file} in it "
            f"(to ekd_jax.evaluate --manual_dir=FOLDER); "
            f"configs/digits.py needs neither"
        ) from error


def read_archive(path: pathlib.Path, name: str) -> dict[str, bytes]:
    """All files of a .tar.gz, checked against the known digests.

    Raises:
        UserError: the archive is truncated, damaged or another one.
    """
    published, contents = DIGESTS[name]
    try:
        with open(path, "rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged ({reason(error)}): download it again") from error
    digest = hashlib.sha256()
    for member in sorted(members):
        if member.endswith(".bin"):
            digest.update(members[member])
    if own != published and digest.hexdigest() != contents:
        raise UserError(
            f"{path} is not the published {name} archive: its SHA-256 is {own}, expected {published}, "
            f"and its contents differ too: download it again"
        )
    return members


def _read(builder: Any, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images (N, 32, 32, 3) uint8 and labels (N,) int32 of a split."""
    encoded = {"image": tfds.decode.SkipDecoding()}  # a third faster than TFDS's own decoding
    source = builder.as_data_source(split=split, decoders=encoded)
    images = np.empty((count, 32, 32, 3), np.uint8)
    labels = np.empty(count, np.int32)
    for i in range(count):
        example = source[i]
        images[i] = np.asarray(Image.open(io.BytesIO(example["image"])))
        labels[i] = example["label"]
    return images, labels
