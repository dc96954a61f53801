"""TFDS's builders of well-known sets, without TensorFlow.

TFDS's own builders need TensorFlow to unpack archives and to encode images. The builders here are theirs with these
two steps replaced. They write the same files as TFDS does in its format array_record: the same features, version,
order and location.
"""

import gzip
import hashlib
import io
import math
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.datasets.svhn_cropped import svhn_cropped_dataset_builder
from tensorflow_datasets.image_classification import cifar, mnist

from ekd_jax.common.errors import UserError, reason
from ekd_jax.data.tfds import archives

# SHA-256 of the .bin members in the order of their names: an archive that was packed again with the same contents
# is as good as the published one.
CIFAR_CONTENTS = {
    "cifar10": "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522",
    "cifar100": "c963f1a2e2c344fd7045056095ea0659afca4c4099db589dbd05ed256b4fa1f5",
}

# Published numbers of examples per split, which TFDS's package does not contain.
SIZES = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "svhn_cropped": {"train": 73_257, "test": 26_032, "extra": 531_131},
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "kmnist": {"train": 60_000, "test": 10_000},
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
}
TEXTS = 2**20  # bytes of what is beside the images: names of classes, headers

Examples = Iterator[tuple[int, dict[str, Any]]]  # TFDS's key and features of each example


class _FromArchives:
    """Finds and verifies a set's archives; a base class in front of TFDS's own builder."""

    manual_dir = ""
    name: str
    url_infos: dict[str, tfds.download.checksums.UrlInfo]
    info: tfds.core.DatasetInfo

    @classmethod
    def published_digests(cls) -> dict[str, str]:
        """Return the SHA-256 of each archive by its file name, as TFDS states them."""
        return {_file(url): info.checksum for url, info in cls.url_infos.items()}

    def _archives(self, dl_manager: tfds.download.DownloadManager) -> dict[str, pathlib.Path]:
        """Return the path of each archive: in `manual_dir`, or where TFDS downloads and verifies it."""
        if not self.manual_dir:
            urls = {_file(url): url for url in self.url_infos}
            return {file: pathlib.Path(path) for file, path in dl_manager.download(urls).items()}
        paths = {file: archives.find(self.manual_dir, file) for file in self._archives_to_use()}
        for file, path in paths.items():
            self._verify(path, self.published_digests()[file])
        return paths

    def _archives_to_use(self) -> list[str]:
        """Return the names of the archives to look for in `manual_dir`."""
        return list(self.published_digests())

    def _verify(self, path: pathlib.Path, published: str) -> None:
        """Raise UserError unless the archive has the published SHA-256 or the user vouches for it."""
        archives.check(path, archives.sha256(path), published)

    def _checked_label(self, label: int, path: pathlib.Path, key: str = "label") -> int:
        """Return the label; raise UserError if it is out of range."""
        classes = self.info.features[key].num_classes
        if not 0 <= label < classes:
            raise UserError(
                f"{path} holds the {key} {label}, but {self.name} has {classes} classes, counted from 0: "
                f"download it again"
            )
        return label


class _Cifar(_FromArchives):
    def _verify(self, path: pathlib.Path, published: str) -> None:
        found = archives.sha256(path)
        if found != published and self._contents(path) != CIFAR_CONTENTS[self.name]:
            archives.check(path, found, published)

    def _contents(self, path: pathlib.Path) -> str:
        """Return the SHA-256 of the .bin members in the order of their names."""
        members = self._unpack(path)
        digest = hashlib.sha256()
        for member in sorted(members):
            if member.endswith(".bin"):
                digest.update(members[member])
        return digest.hexdigest()

    def _unpack(self, path: pathlib.Path) -> dict[str, bytes]:
        """Return the contents of the files of the set in the archive, by name."""
        layout = self._cifar_info  # type: ignore[attr-defined]
        files = (*layout.label_files, *layout.train_files, *layout.test_files)
        record = len(layout.label_keys) + 3072
        limit = sum(SIZES[self.name].values()) * record + TEXTS
        return _unpack(path, {layout.prefix + file for file in files}, limit)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        layout = self._cifar_info  # type: ignore[attr-defined]
        (path,) = self._archives(dl_manager).values()
        members = self._unpack(path)

        def find(name: str) -> bytes:
            if layout.prefix + name not in members:
                raise UserError(
                    f"{path} holds no {layout.prefix}{name}: it is not the archive of {self.name}, download "
                    f"that again"
                )
            return members[layout.prefix + name]

        for key, file in zip(layout.label_keys, layout.label_files, strict=True):
            self.info.features[key].names = find(file).decode().split()
        return {
            split: self._generate_examples(path, f"{split}_", b"".join(map(find, files)))
            for split, files in (("train", layout.train_files), ("test", layout.test_files))
        }

    def _generate_examples(self, path: pathlib.Path, prefix: str, data: bytes) -> Examples:
        keys = self._cifar_info.label_keys  # type: ignore[attr-defined]
        length = len(keys) + 3072
        if len(data) % length:
            raise UserError(
                f"{path} is damaged ({len(data)} bytes are no multiple of {length}): download it again"
            )
        for index, record in enumerate(np.frombuffer(data, np.uint8).reshape(-1, length)):
            image = record[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
            labels = {k: self._checked_label(int(v), path, k) for k, v in zip(keys, record, strict=False)}
            yield index, {"id": f"{prefix}{index:05d}", "image": _png(image), **labels}


class _Svhn(_FromArchives):
    def _archives_to_use(self) -> list[str]:
        """Return all archives, without that of the split `extra`, the largest one, if it is missing."""
        extra = "extra_32x32.mat"
        there = (pathlib.Path(self.manual_dir).expanduser() / extra).is_file()
        return [file for file in self.published_digests() if file != extra or there]

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        paths = self._archives(dl_manager)
        named = {split: paths.get(f"{split}_32x32.mat") for split in ("train", "test", "extra")}
        return {split: self._generate_examples(path, split) for split, path in named.items() if path}

    def _generate_examples(self, path: pathlib.Path, split: str) -> Examples:
        most = SIZES[self.name][split]
        try:
            shapes = {name: shape for name, shape, _ in scipy.io.whosmat(path)}  # from headers alone
            if max(math.prod(shapes[name]) for name in ("X", "y")) > most * 3072:
                raise archives.too_large(path, most * 3072)
            arrays = scipy.io.loadmat(path, variable_names=("X", "y"))
            images, labels = arrays["X"], arrays["y"].reshape(-1)
        except UserError:
            raise
        except Exception as error:  # for a damaged file, loadmat raises anything
            raise _damaged(path, error) from error
        if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
            raise UserError(
                f"{path} holds X {images.shape} {images.dtype}, not (32, 32, 3, N) uint8 as SVHN does: "
                f"download it again"
            )
        for index, label in enumerate(labels):
            if not 1 <= label <= 10:
                raise UserError(
                    f"{path} holds the label {label}, but those of SVHN are 1 to 10 (digit 0): download it again"
                )
            features = {"image": _png(images[..., index]), "label": int(label) % 10}
            yield index, {"id": f"{split}_{index:06d}", **features}


class _Mnist(_FromArchives):
    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        paths = self._archives(dl_manager)
        return {
            split: self._generate_examples(
                paths[f"{prefix}-images-idx3-ubyte.gz"],
                paths[f"{prefix}-labels-idx1-ubyte.gz"],
                SIZES[self.name][split],
            )
            for split, prefix in (("train", "train"), ("test", "t10k"))
        }

    def _generate_examples(
        self, images_path: pathlib.Path, labels_path: pathlib.Path, most: int
    ) -> Examples:
        images, labels = _idx(images_path, most * 28 * 28), _idx(labels_path, most)
        if images.shape != (len(labels), 28, 28) or labels.ndim != 1:
            raise UserError(
                f"{images_path} holds {images.shape} and {labels_path} {labels.shape}, "
                f"not N images of 28 x 28 and N labels: download them again"
            )
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": _png(image), "label": self._checked_label(int(label), labels_path)}


with tfds.core.registered.skip_registration():

    class Cifar10(_Cifar, cifar.Cifar10):
        """CIFAR-10 (Krizhevsky 2009)."""

        url_infos = cifar.Cifar10.url_infos

    class Cifar100(_Cifar, cifar.Cifar100):
        """CIFAR-100 (Krizhevsky 2009)."""

        url_infos = cifar.Cifar100.url_infos

    class SvhnCropped(_Svhn, svhn_cropped_dataset_builder.Builder):
        """Street View House Numbers (Netzer et al. 2011), cropped to single digits."""

        url_infos = svhn_cropped_dataset_builder.Builder.url_infos
        pkg_dir_path = tfds.core.tfds_path("datasets/svhn_cropped")

    class Mnist(_Mnist, mnist.MNIST):
        """MNIST (LeCun et al. 1998)."""

        url_infos = mnist.MNIST.url_infos

    class FashionMnist(_Mnist, mnist.FashionMNIST):
        """Fashion-MNIST (Xiao et al. 2017)."""

        url_infos = mnist.FashionMNIST.url_infos

    class Kmnist(_Mnist, mnist.KMNIST):
        """Kuzushiji-MNIST (Clanuwat et al. 2018)."""

        url_infos = mnist.KMNIST.url_infos

    class Imagenet2012(_FromArchives, imagenet2012_dataset_builder.Builder):
        """ImageNet (ILSVRC 2012); `ekd_jax.data.tfds.imagenet` prepares it."""

        url_infos = imagenet2012_dataset_builder.Builder.url_infos
        pkg_dir_path = tfds.core.tfds_path("datasets/imagenet2012")


BUILDERS: dict[str, Any] = {
    builder.name: builder
    for builder in (Cifar10, Cifar100, SvhnCropped, Mnist, FashionMnist, Kmnist, Imagenet2012)
}


def most_bytes(builder: tfds.core.DatasetBuilder) -> int:
    """Return an upper limit of what a published set takes on disk once it is prepared; 0 if it is not known."""
    pixels = builder.info.features["image"].shape if builder.name in SIZES else (None,)
    if None in pixels:
        return 0
    # A PNG file of noise is a little larger than its pixels, and a record has names, too.
    return sum(SIZES[builder.name].values()) * (math.prod(pixels) + 512)


def _file(url: str) -> str:
    return url.rsplit("/", 1)[1]


def _png(image: np.ndarray) -> bytes:
    """Return pixels (H, W, 3) or (H, W) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"{path} is truncated or damaged ({reason(error)}): download it again")


def _unpack(path: pathlib.Path, names: set[str], limit: int) -> dict[str, bytes]:
    """Return the contents of files in a .tar.gz by name; nothing is written to disk.

    Args:
        path: of the archive; one that a download has unpacked to a .tar is read, too.
        names: of the files; all others are left out.
        limit: the most bytes that the whole archive may unpack to.

    Raises:
        UserError: it unpacks to more, is damaged, or one of the files is twice in it or is a link.
    """
    found: dict[str, bytes] = {}
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            for tar, member in archives.tar_members(archives.ForwardReader(file, path, limit)):  # type: ignore[arg-type]
                if member.name in names:
                    problem = "is there twice" if member.name in found else archives.problem_of(member)
                    if problem:
                        raise UserError(f"{path} is damaged: {member.name} {problem}: download it again")
                    found[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, error) from error
    return found


def _idx(path: pathlib.Path, limit: int) -> np.ndarray:
    """Return the uint8 array of a gzipped IDX file (http://yann.lecun.com/exdb/mnist/, "file format").

    Args:
        path: of the file.
        limit: the most bytes that the array may have.

    Raises:
        UserError: it is damaged, or has more bytes.
    """
    try:
        data = archives.gunzip(path, limit + TEXTS)
        zero, kind, rank = int.from_bytes(data[:2], "big"), data[2], data[3]
        if (zero, kind) != (0, 8):
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(data, ">u4", rank, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (EOFError, OSError, zlib.error, ValueError, IndexError) as error:
        raise _damaged(path, error) from error
