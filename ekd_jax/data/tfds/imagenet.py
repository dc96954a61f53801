"""ImageNet 2012 from its two archives to what TFDS writes, in one image's memory, and resumable.

TFDS's builder needs TensorFlow, begins anew when it is interrupted, and for a time takes twice the room
on disk. Here an archive is read once from start to end to verify its checksum and to note where every
image lies; then each shard is written with the images that belong in it. The order of the records, the
shards and the metadata are TFDS's own. Images stay the bytes that they are: the 22 CMYK files and the
PNG file among them, which TFDS encodes anew as RGB JPEG, too.
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
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters, hashing, naming, splits
from tensorflow_datasets.core.utils import shard_utils

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.progress import Progress
from ekd_jax.common.text import megabytes
from ekd_jax.data.tfds import archives

FORMAT = file_adapters.FileFormat.ARRAY_RECORD
CHUNK = 4 << 20
SHARD_OVERHEAD = 128 << 10  # bytes, at most: array_record's blocks are 64 kB

Found = tuple[str, int, int, int]  # name of an image, label, where its bytes begin, how many they are


def prepare(builder: Any, manual_dir: str) -> None:
    """Writes the set to `builder.data_path`; what an interrupted run has written is kept.

    Args:
        builder: of imagenet2012, not prepared yet.
        manual_dir: holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.

    Raises:
        UserError: an archive is not there, damaged or another one, or the disk is full.
    """
    done = pathlib.Path(builder.data_dir)
    work = done.with_name(f"{done.name}.incomplete")  # no version's name: TFDS passes it over
    sources = {
        "train": (archives.find(manual_dir, "ILSVRC2012_img_train.tar"), _training),
        "validation": (archives.find(manual_dir, "ILSVRC2012_img_val.tar"), _validation),
    }
    work.mkdir(parents=True, exist_ok=True)
    writers = [_SplitWriter(builder, work, split, *source) for split, source in sources.items()]
    needed, free = sum(writer.missing_bytes() for writer in writers), shutil.disk_usage(work).free
    if free < needed:
        raise UserError(f"{work} needs {megabytes(needed)} more, and its disk has {megabytes(free)} free")
    builder.info.set_splits(splits.SplitDict([writer.write() for writer in writers]))
    builder.info.write_to_directory(work)
    for writer in writers:
        writer.note.unlink()
    work.rename(done)


class _SplitWriter:
    """Writes the shards of a split.

    Args:
        builder: whose features are written.
        work: folder of shards and of the notes on what the archives hold.
        split: "train" or "validation".
        archive: its images.
        members: finds them in it.
    """

    def __init__(
        self,
        builder: Any,
        work: pathlib.Path,
        split: str,
        archive: pathlib.Path,
        members: Callable[["_Once", pathlib.Path, list[str]], Iterator[Found]],
    ):
        self.split, self.archive = split, archive
        self.features = builder.info.features
        self.serializer = example_serializer.ExampleSerializer(self.features.get_serialized_info())
        self.template = naming.ShardedFileTemplate(
            dataset_name=builder.name, data_dir=work, split=split, filetype_suffix=FORMAT.file_suffix
        )
        self.note = work / f"{split}.images.npz"
        self.images = self._look(members, builder.published()[archive.name])
        self.order = self._ordered()
        count = shard_utils.ShardConfig().get_number_shards(self.images.record_bytes, len(self.order))
        self.ends = shard_utils.get_shard_boundaries(len(self.order), count)
        self.begins = [0, *self.ends[:-1]]
        self.shards = [pathlib.Path(path) for path in self.template.sharded_filepaths(count)]

    def missing_bytes(self) -> int:
        """Room that the shards yet to be written take."""
        missing = sum(not shard.exists() for shard in self.shards)
        return missing * (self.images.record_bytes // len(self.shards) + SHARD_OVERHEAD)

    def write(self) -> splits.SplitInfo:
        """Writes all shards that are not there yet."""
        lengths = [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]
        there = [length for shard, length in zip(self.shards, lengths, strict=True) if shard.exists()]
        self.progress = Progress(f"imagenet2012 {self.split}", len(self.order), sum(there), "images")
        with open(self.archive, "rb") as archive:
            for shard, begin, end in zip(self.shards, self.begins, self.ends, strict=True):
                if not shard.exists():
                    partial = shard.with_name(f"{shard.name}.partial")
                    self._write_shard(partial, archive, begin, end)
                    partial.rename(shard)
        self.progress.finish()
        return splits.SplitInfo(
            name=self.split,
            shard_lengths=lengths,
            num_bytes=self.images.record_bytes,
            filename_template=self.template,
        )

    def _write_shard(self, path: pathlib.Path, archive: BinaryIO, begin: int, end: int) -> None:
        def records() -> Iterator[tuple[int, bytes]]:
            for position in range(begin, end):
                i = self.order[position]
                image = os.pread(archive.fileno(), self.images.sizes[i], self.images.offsets[i])
                yield i, self._record(image, int(self.images.labels[i]), self.images.names[i].decode())
                self.progress.add(1)

        try:
            file_adapters.ADAPTER_FOR_FORMAT[FORMAT].write_examples(path, records())
        except Exception as error:  # of array_record or the system
            path.unlink(missing_ok=True)
            kept = sum(shard.exists() for shard in self.shards)
            raise UserError(
                f"cannot write {path} ({why(error)}): {kept} of {len(self.shards)} shards of "
                f"{self.split} are kept; mend it and run the same command again to go on"
            ) from error

    def _record(self, image: bytes, label: int, name: str) -> bytes:
        example = {"image": image, "label": label, "file_name": name}
        message = self.serializer.get_tf_example(self.features.encode_example(example))
        return message.SerializeToString(deterministic=True)  # else the order of features may vary

    def _ordered(self) -> list[int]:
        """Places of images in the order that TFDS gives their records."""
        hasher = hashing.Hasher(self.split)
        keys = [hasher.hash_key(name) for name in self.images.names.tolist()]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for one, other in itertools.pairwise(order):
            if keys[one] == keys[other]:
                raise UserError(f"{self.archive} holds {self.images.names[one].decode()} twice")
        return order

    def _look(self, members: Callable[..., Iterator[Found]], published: str) -> "_Images":
        """What the archive holds: noted by an earlier run, or found by reading it through."""
        status = self.archive.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        noted = _Images.load(self.note) if self.note.exists() else None
        images = noted if noted and noted.stamp == stamp else self._scan(members, stamp)
        if not noted or noted.sha256 != images.sha256:
            for shard in self.note.parent.glob(f"*-{self.split}.*"):  # from another archive
                shard.unlink()
        if images is not noted:
            images.save(self.note)
        archives.check(self.archive, images.sha256, published)
        return images

    def _scan(self, members: Callable[..., Iterator[Found]], stamp: tuple[int, int]) -> "_Images":
        classes: list[str] = self.features["label"].names
        found: list[Found] = []
        record_bytes = 0
        with open(self.archive, "rb") as file:
            once = _Once(file, Progress(f"verifying {self.archive.name}", stamp[0], unit="bytes"))
            try:
                for name, label, offset, size in members(once, self.archive, classes):
                    found.append((name, label, offset, size))
                    record_bytes += len(self._record(bytes(size), label, name))
            except tarfile.TarError as error:
                raise UserError(
                    f"{self.archive} is truncated or damaged ({reason(error)}): download it again"
                ) from error
            digest = once.finish()
        if not found:
            raise UserError(f"{self.archive} holds no images: download it again")
        names, labels, offsets, sizes = zip(*found, strict=True)
        return _Images(
            names=np.array(names, np.bytes_),
            labels=np.array(labels, np.int16),
            offsets=np.array(offsets, np.int64),
            sizes=np.array(sizes, np.int64),
            record_bytes=record_bytes,
            sha256=digest,
            stamp=stamp,
        )


@dataclasses.dataclass(frozen=True)
class _Images:
    """What an archive holds.

    Attributes:
        names: (N,) of the images.
        labels: (N,).
        offsets: (N,), where in the archive their bytes begin.
        sizes: (N,), how many they are.
        record_bytes: of all images as TFDS's records.
        sha256: of the archive.
        stamp: its size and time of change, while it was read.
    """

    names: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    record_bytes: int
    sha256: str
    stamp: tuple[int, int]

    def save(self, path: pathlib.Path) -> None:
        partial = path.with_name(f"{path.stem}.partial.npz")
        np.savez(partial, **vars(self))
        partial.rename(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> "_Images":
        with np.load(path) as file:
            values = {name: file[name] for name in file.files}
        size, time_ns = values["stamp"].tolist()
        scalars = {"record_bytes": int(values["record_bytes"]), "sha256": str(values["sha256"])}
        return cls(**values | scalars | {"stamp": (size, time_ns)})


def _training(file: "_Once", path: pathlib.Path, names: list[str]) -> Iterator[Found]:
    """Images of a tar that holds a tar for every synset."""
    labels = {name: label for label, name in enumerate(names)}
    for part in _members(file):
        synset = part.name.removesuffix(".tar")
        if synset not in labels:
            raise UserError(f"{path} holds {part.name}: no synset of ImageNet 2012 has that name")
        for member in _members(file):  # of the inner tar: it begins where the reader stands now
            if member.offset_data + member.size > part.offset_data + part.size:
                raise tarfile.ReadError(f"{member.name} goes beyond {part.name}")
            if not member.name.endswith(".JPEG"):
                raise UserError(f"{path} holds {member.name} in {part.name}: that is no image of ImageNet")
            yield member.name, labels[synset], member.offset_data, member.size


def _validation(file: "_Once", path: pathlib.Path, names: list[str]) -> Iterator[Found]:
    """Images of a tar; their labels go by the number in the name, so that some may be missing."""
    listed = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    for member in _members(file):
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", member.name)
        if not match or not 1 <= int(match[1]) <= len(listed):
            raise UserError(f"{path} holds {member.name}: that is no validation image of ImageNet 2012")
        yield member.name, names.index(listed[int(match[1]) - 1]), member.offset_data, member.size


def _members(file: "_Once") -> Iterator[tarfile.TarInfo]:
    """Files of a tar that begins where the reader stands; "./" before their names is left out."""
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            if not member.isdir():
                member.name = member.name.removeprefix("./")
                yield member


class _Once:
    """Reads a file once, from start to end, and hashes all of it; to seek is to read on."""

    def __init__(self, file: BinaryIO, progress: Progress):
        self.file, self.progress = file, progress
        self.digest = hashlib.sha256()

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.progress.add(len(data))
        return data

    def seek(self, position: int) -> None:
        if position < self.tell():
            raise tarfile.ReadError("files overlap")
        while (left := position - self.tell()) and self.read(min(left, CHUNK)):
            pass

    def finish(self) -> str:
        """The SHA-256 of the whole file."""
        while self.read(CHUNK):
            pass
        self.progress.finish()
        return self.digest.hexdigest()


def why(error: Exception) -> str:
    """What an exception from writing says: of a full disk, array_record speaks at length."""
    return "the disk is full" if "No space left" in str(error) else reason(error)
