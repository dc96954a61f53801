"""Preparation of ImageNet 2012 from its two archives: resumable, and in the memory of one image.

TFDS's builder needs TensorFlow, starts again when it is interrupted, and temporarily takes twice the space on disk.
Here an archive is read once from start to end, to verify its checksum and to note where each image is. Then each
shard is written with its images. The order of the records, the shards and the metadata are those of TFDS. The bytes
of the images are kept, even of the 22 CMYK files and the PNG file, which TFDS encodes again as RGB JPEGs.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters, hashing, naming, splits
from tensorflow_datasets.core.utils import shard_utils

from ekd_jax.common.errors import UserError, reason, writing_failure
from ekd_jax.common.files import replacing, sync
from ekd_jax.common.progress import Progress
from ekd_jax.common.text import megabytes
from ekd_jax.common.zipped import read_npz
from ekd_jax.data.tfds import archives

FORMAT = file_adapters.FileFormat.ARRAY_RECORD
MAX_IMAGE = 64 << 20  # bytes; the published images have a quarter of that at most
SHARD_OVERHEAD = 128 << 10  # upper limit in bytes: array_record's blocks have 64 kB


class Member(NamedTuple):
    """An image in an archive: its bytes are `size` bytes from `offset`."""

    name: str
    label: int
    offset: int
    size: int


def prepare(builder: tfds.core.DatasetBuilder, manual_dir: str) -> None:
    """Write the set to `builder.data_path`, resuming after an interruption.

    Args:
        builder: builder of imagenet2012, which is not prepared yet.
        manual_dir: directory with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.

    Raises:
        UserError: an archive is missing, damaged or a different one, or the disk is full.
    """
    done = pathlib.Path(builder.data_dir)
    work = done.with_name(f"{done.name}.incomplete")  # TFDS ignores it: it is not the name of a version
    sources = {
        "train": (archives.find(manual_dir, "ILSVRC2012_img_train.tar"), _training_images),
        "validation": (archives.find(manual_dir, "ILSVRC2012_img_val.tar"), _validation_images),
    }
    work.mkdir(parents=True, exist_ok=True)
    writers = [_SplitWriter(builder, work, split, *source) for split, source in sources.items()]
    needed, free = sum(writer.missing_bytes() for writer in writers), shutil.disk_usage(work).free
    if free < needed:
        raise UserError(
            f"{work} needs {megabytes(needed)} more, but its disk has {megabytes(free)} free: free some space, or "
            f"pass another --config.data.data_dir"
        )
    builder.info.set_splits(splits.SplitDict([writer.write() for writer in writers]))
    builder.info.write_to_directory(work)
    for left in (*(writer.index_file for writer in writers), *work.glob(".*")):
        left.unlink()  # files that begin with a dot are of a run that was killed
    work.rename(done)


class _SplitWriter:
    """Writes the shards of a split.

    Args:
        builder: defines the features of a record.
        work: directory of the shards, and of the notes on where the images are.
        split: "train" or "validation".
        archive: path of the archive with the images.
        find_images: yields the images in the archive.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        work: pathlib.Path,
        split: str,
        archive: pathlib.Path,
        find_images: "_FindImages",
    ):
        self.split, self.archive = split, archive
        self.features = builder.info.features
        self.serializer = example_serializer.ExampleSerializer(self.features.get_serialized_info())
        self.template = naming.ShardedFileTemplate(
            dataset_name=builder.name, data_dir=work, split=split, filetype_suffix=FORMAT.file_suffix
        )
        self.index_file = work / f"{split}.images.npz"
        self.index = self._inspect(find_images, builder.published_digests()[archive.name])
        self.order = self._record_order()
        count = shard_utils.ShardConfig().get_number_shards(self.index.record_bytes, len(self.order))
        self.ends = shard_utils.get_shard_boundaries(len(self.order), count)
        self.begins = [0, *self.ends[:-1]]
        self.shards = [pathlib.Path(path) for path in self.template.sharded_filepaths(count)]

    def missing_bytes(self) -> int:
        """Return the space that the missing shards will take."""
        missing = sum(not shard.exists() for shard in self.shards)
        return missing * (self.index.record_bytes // len(self.shards) + SHARD_OVERHEAD)

    def write(self) -> splits.SplitInfo:
        """Write all missing shards, and return the split's metadata."""
        lengths = [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]
        there = [length for shard, length in zip(self.shards, lengths, strict=True) if shard.exists()]
        self.progress = Progress(f"imagenet2012 {self.split}", len(self.order), sum(there), "images")
        with open(self.archive, "rb") as archive:
            for shard, begin, end in zip(self.shards, self.begins, self.ends, strict=True):
                if not shard.exists():
                    partial = shard.with_name(f"{shard.name}.partial")
                    self._write_shard(partial, archive, begin, end)
                    sync(partial)
                    partial.rename(shard)
        self.progress.finish()
        return splits.SplitInfo(
            name=self.split,
            shard_lengths=lengths,
            num_bytes=self.index.record_bytes,
            filename_template=self.template,
        )

    def _write_shard(self, path: pathlib.Path, archive: BinaryIO, begin: int, end: int) -> None:
        def records() -> Iterator[tuple[int, bytes]]:
            for position in range(begin, end):
                i = self.order[position]
                image = os.pread(archive.fileno(), self.index.sizes[i], self.index.offsets[i])
                yield i, self._record(image, int(self.index.labels[i]), self.index.names[i].decode())
                self.progress.add(1)

        try:
            file_adapters.ADAPTER_FOR_FORMAT[FORMAT].write_examples(path, records())
        except Exception as error:  # from array_record or the system
            path.unlink(missing_ok=True)
            kept = sum(shard.exists() for shard in self.shards)
            raise UserError(
                f"cannot write {path} ({writing_failure(error)}): {kept} of {len(self.shards)} shards of "
                f"{self.split} are kept; fix this and run the same command again to resume"
            ) from error

    def _record(self, image: bytes, label: int, name: str) -> bytes:
        """Return TFDS's record of an image."""
        example = {"image": image, "label": label, "file_name": name}
        message = self.serializer.get_tf_example(self.features.encode_example(example))
        return message.SerializeToString(deterministic=True)  # otherwise the order of features may vary

    def _record_order(self) -> list[int]:
        """Return the indices of the images in the order of TFDS's records."""
        hasher = hashing.Hasher(self.split)
        keys = [hasher.hash_key(name) for name in self.index.names.tolist()]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for one, other in itertools.pairwise(order):
            if keys[one] == keys[other]:
                raise UserError(
                    f"{self.archive} holds {self.index.names[one].decode()} twice: download it again"
                )
        return order

    def _inspect(self, find_images: "_FindImages", published: str) -> "_Index":
        """Return where the images are in the archive, as noted by an earlier run or found by reading it all."""
        status = self.archive.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        noted = _Index.load(self.index_file)
        index = noted if noted and noted.stamp == stamp else self._scan(find_images, stamp)
        if not noted or noted.sha256 != index.sha256:
            for shard in self.index_file.parent.glob(f"*-{self.split}.*"):  # from another archive
                shard.unlink()
        if index is not noted:
            index.save(self.index_file)
        archives.check(self.archive, index.sha256, published)
        return index

    def _scan(self, find_images: "_FindImages", stamp: tuple[int, int]) -> "_Index":
        """Read the whole archive, and return where its images are."""
        classes: list[str] = self.features["label"].names
        found: list[Member] = []
        record_bytes = 0
        with open(self.archive, "rb") as file:
            progress = Progress(f"verifying {self.archive.name}", stamp[0], unit="bytes")
            reader = _HashingReader(file, self.archive, stamp[0], progress)
            try:
                for member in find_images(reader, self.archive, classes):
                    found.append(member)
                    record_bytes += len(self._record(bytes(member.size), member.label, member.name))
            except tarfile.TarError as error:
                raise UserError(
                    f"{self.archive} is truncated or damaged ({reason(error)}): download it again"
                ) from error
            digest = reader.finish()
        if not found:
            raise UserError(f"{self.archive} holds no images: download it again")
        names, labels, offsets, sizes = zip(*found, strict=True)
        return _Index(
            names=np.array(names, np.bytes_),
            labels=np.array(labels, np.int16),
            offsets=np.array(offsets, np.int64),
            sizes=np.array(sizes, np.int64),
            record_bytes=record_bytes,
            sha256=digest,
            stamp=stamp,
        )


@dataclasses.dataclass(frozen=True)
class _Index:
    """The positions of the images in an archive.

    Attributes:
        names: name of each image, (N,) bytes.
        labels: label of each image, (N,).
        offsets: offset of each image's bytes in the archive, (N,).
        sizes: number of each image's bytes, (N,).
        record_bytes: size of TFDS's records of all images.
        sha256: SHA-256 of the archive.
        stamp: the archive's size and modification time in ns, when it was read.
    """

    names: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    record_bytes: int
    sha256: str
    stamp: tuple[int, int]

    def save(self, path: pathlib.Path) -> None:
        """Write it to a file, whole or not at all."""
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: pathlib.Path) -> "_Index | None":
        """Return what `save` wrote, or None if there is none or it is damaged: then the archive is read again."""
        try:
            values: dict[str, Any] = dict(read_npz(path))
            size, time_ns = values["stamp"].tolist()
            scalars = {"record_bytes": int(values["record_bytes"]), "sha256": str(values["sha256"])}
            return cls(**values | scalars | {"stamp": (size, time_ns)})
        except Exception:  # a damaged file raises many kinds
            return None


def _training_images(file: "_HashingReader", path: pathlib.Path, names: list[str]) -> Iterator[Member]:
    """Yield the images of a tar that holds a tar for each synset."""
    labels = {name: label for label, name in enumerate(names)}
    for _, part in archives.tar_members(file):
        synset = part.name.removesuffix(".tar")
        if synset not in labels:
            raise UserError(
                f"{path} holds {part.name}: no synset of ImageNet 2012 has that name; remove it, or download the "
                f"archive again"
            )
        if problem := archives.problem_of(part):
            raise _wrong_member(path, part.name, problem)
        for _, member in archives.tar_members(
            file
        ):  # of the inner tar, which begins where the reader is now
            if member.offset_data + member.size > part.offset_data + part.size:
                raise tarfile.ReadError(f"{member.name} extends beyond {part.name}")
            if not member.name.endswith(".JPEG"):
                raise UserError(
                    f"{path} holds {member.name} in {part.name}: that is not an image of ImageNet; remove it, or "
                    f"download the archive again"
                )
            _check_image(path, member)
            yield Member(member.name, labels[synset], member.offset_data, member.size)


def _validation_images(file: "_HashingReader", path: pathlib.Path, names: list[str]) -> Iterator[Member]:
    """Yield the images of a tar. The number in the name determines the label, so some images may be missing."""
    listed = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    for _, member in archives.tar_members(file):
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", member.name)
        if not match or not 1 <= int(match[1]) <= len(listed):
            raise UserError(
                f"{path} holds {member.name}: that is not a validation image of ImageNet 2012; remove it, or "
                f"download the archive again"
            )
        _check_image(path, member)
        label = names.index(listed[int(match[1]) - 1])
        yield Member(member.name, label, member.offset_data, member.size)


def _check_image(path: pathlib.Path, member: tarfile.TarInfo) -> None:
    """Raise UserError unless a member is an image of a size that is possible."""
    problem = archives.problem_of(member)
    if member.size > MAX_IMAGE:
        problem = f"claims {member.size:,} bytes, above the limit of {MAX_IMAGE:,} for an image"
    if problem:
        raise _wrong_member(path, member.name, problem)


def _wrong_member(path: pathlib.Path, name: str, problem: str) -> UserError:
    return UserError(f"{path} holds {name}, which {problem}: remove it, or download the archive again")


class _HashingReader(archives.ForwardReader):
    """Reads an archive once from start to end, and hashes all of it."""

    def __init__(self, file: BinaryIO, path: pathlib.Path, size: int, progress: Progress):
        super().__init__(file, path, size)
        self.progress = progress
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Return the next bytes. Only headers are read at once: a longer one is damaged."""
        if size > archives.CHUNK:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        data = super().read(size)
        self.digest.update(data)
        self.progress.add(len(data))
        return data

    def finish(self) -> str:
        """Read the rest, and return the SHA-256 of the whole file."""
        while self.read(archives.CHUNK):
            pass
        self.progress.finish()
        return self.digest.hexdigest()


_FindImages = Callable[[_HashingReader, pathlib.Path, list[str]], Iterator[Member]]
