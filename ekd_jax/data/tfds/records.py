"""Sets of TFDS, read record by record without TensorFlow.

A set is read from TFDS's own location, DATA_DIR/NAME/VERSION, in a directory or a gs:// bucket. If it is not there,
it is prepared first.
"""

import dataclasses
import hashlib
import os

import numpy as np
import tensorflow_datasets as tfds

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.data.dataset import Example, Examples, Facts, Joined, Source
from ekd_jax.data.tfds import lookup
from ekd_jax.data.tfds.builders import BUILDERS, SIZES
from ekd_jax.data.tfds.preparation import prepare

# Sets in whose test split every label is -1.
UNLABELED_TEST = (
    "imagenet2012",
    "imagenet2012_subset",
    "i_naturalist2018",
    "i_naturalist2021",
    "visual_domain_decathlon",
)
# Features that name a record; the first that a set has is used.
RECORD_NAMES = ("file_name", "id", "image/filename")


def published_facts(name: str, extra: bool = False, test_split: str = "") -> Facts | None:
    """Return the published facts about a well-known set, or None for other sets; nothing is read.

    Args:
        name, extra, test_split: as for `facts`.

    Raises:
        UserError: TFDS has no such set, or the set has no such split.
    """
    if name not in SIZES:
        lookup.check_known(name, lookup.parse(name)[0])
        return None
    builder = BUILDERS[name](data_dir=os.devnull)  # only for its features
    splits = _choose_splits(name, SIZES[name], f"the published {name}", extra, test_split)
    return _facts(builder, name, SIZES[name], splits)


def facts(name: str, data_dir: str, extra: bool, test_split: str) -> Facts | None:
    """Return the facts in the metadata of a prepared set, or None if it is not prepared; no image is read.

    Args:
        name: name of the set in TFDS, "cifar10" or "emnist/letters".
        data_dir: directory of prepared sets; empty for TFDS's default.
        extra: also train on the split `extra`.
        test_split: split to test on; empty for `test`, or `validation` if `test` has no labels.

    Raises:
        UserError: it is not a set of images with one class each, is not in array_record, or has no such split.
    """
    builder = lookup.find_prepared(name, data_dir)
    if builder is None:
        return None
    sizes = _sizes(builder)
    return _facts(builder, name, sizes, _choose_splits(name, sizes, builder.data_dir, extra, test_split))


def open_set(name: str, data_dir: str, manual_dir: str, extra: bool, test_split: str) -> Source:
    """Return a set to read from; it is prepared first if necessary.

    Args:
        name, data_dir, extra, test_split: as for `facts`.
        manual_dir: directory of archives to prepare it from; empty to download them.

    Raises:
        UserError: like `facts` and `prepare`; or files of the set are missing.
    """
    builder = lookup.find_prepared(name, data_dir)
    if builder is None:
        prepare(name, data_dir, manual_dir)
        builder = lookup.find_prepared(name, data_dir)
    assert builder is not None
    sizes = _sizes(builder)
    splits = _choose_splits(name, sizes, builder.data_dir, extra, test_split)
    parts = [_Records(builder, name, split) for split in splits.train]
    train: Examples = Joined(parts) if len(parts) > 1 else parts[0]
    return Source(_facts(builder, name, sizes, splits), train, _Records(builder, name, splits.test))


@dataclasses.dataclass(frozen=True)
class _Splits:
    """The splits to train on, and the one to test on."""

    train: tuple[str, ...]
    test: str


def _choose_splits(name: str, sizes: dict[str, int], where: str, extra: bool, test_split: str) -> _Splits:
    """Return the splits to use of a set with these `sizes`; `where` is what an error calls the set."""
    labeled = "test" in sizes and lookup.parse(name)[0] not in UNLABELED_TEST
    test = test_split or ("test" if labeled or "validation" not in sizes else "validation")
    train = ("train", "extra") if extra else ("train",)
    for split in (*train, test):
        if split not in sizes:
            knob = {"extra": "data.extra: ", test_split: f"data.test_split={test_split}: "}.get(split, "")
            hint = nearest(split, sizes)
            if split == "extra" and name == "svhn_cropped":
                hint = "; delete it to prepare it again with extra_32x32.mat"
            raise UserError(f"{knob}{where} has no split {split}{hint}")
    return _Splits(train, test)


def _sizes(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """Return the number of examples of each split."""
    return {split: found.num_examples for split, found in builder.info.splits.items()}


def _facts(builder: tfds.core.DatasetBuilder, name: str, sizes: dict[str, int], splits: _Splits) -> Facts:
    image, label = lookup.feature_names(builder, name)
    features = builder.info.features
    return Facts(
        name=name,
        image_shape=tuple(features[image].shape),
        class_names=tuple(features[label].names),
        train_examples=sum(sizes[split] for split in splits.train),
        test_examples=sizes[splits.test],
    )


class _Records:
    """The examples of a split.

    Raises:
        UserError: files are missing.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, name: str, split: str):
        self.name = f"{name} {split}"
        self.image, self.label = lookup.feature_names(builder, name)
        features = builder.info.features
        self.record_name = next((key for key in RECORD_NAMES if key in features), "")
        encoded = {
            key: tfds.decode.SkipDecoding()
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self.source = builder.as_data_source(split, decoders=encoded, file_format=lookup.FORMAT)
        files = [path.name for path in builder.info.splits[split].filepaths]
        there = {path.name for path in builder.data_path.iterdir()}
        if missing := [file for file in files if file not in there]:
            raise UserError(
                f"{builder.data_dir} is incomplete: {len(missing)} of {len(files)} files of {split} are "
                f"missing, the first is {missing[0]}: copy it again, or delete it to prepare it again"
            )
        written = builder.info.splits[split]
        facts = f"{builder.info.full_name} {split} {written.shard_lengths} {written.num_bytes}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        # A set that TFDS has not shuffled may be sorted by class.
        unshuffled = builder.info.disable_shuffling
        self.order = np.random.RandomState(0).permutation(len(self)) if unshuffled else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = index if self.order is None else int(self.order[index])
        record = self.source[position]
        name = record[self.record_name].decode() if self.record_name else f"[{position}]"
        return Example(record[self.image], int(record[self.label]), f"{self.name} {name}")
