"""Sets of TensorFlow Datasets: prepared if need be, then read record by record, without TensorFlow.

A set is read where TFDS keeps it: DATA_DIR/NAME/VERSION, a folder or a gs:// bucket. If it is not there
it is prepared: from the archives in `manual_dir`, or from a download. `ekd_jax.data.builders` prepares
the sets it knows without TensorFlow; TFDS's own builders, which mostly need it, all others.
"""

import bisect
import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import itertools
import os
import pathlib
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters, naming, read_only_builder, registered
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.common.log import logger
from ekd_jax.data import registry
from ekd_jax.data.dataset import Example, Facts, Source
from ekd_jax.data.dataset import Examples as ExamplesLike
from ekd_jax.data.tfds import imagenet
from ekd_jax.data.tfds.builders import BUILDERS

FORMAT = file_adapters.FileFormat.ARRAY_RECORD

# Examples of each split as published; TFDS's package does not say.
SIZES = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "svhn_cropped": {"train": 73_257, "test": 26_032, "extra": 531_131},
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "kmnist": {"train": 60_000, "test": 10_000},
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
}
# Sets of TFDS in whose test split every label is -1.
UNLABELLED_TEST = (
    "imagenet2012",
    "imagenet2012_subset",
    "i_naturalist2018",
    "i_naturalist2021",
    "visual_domain_decathlon",
)
# Features that name a record, the first that there is.
RECORD_NAMES = ("file_name", "id", "image/filename")


def published_facts(name: str, extra: bool = False, test_split: str = "") -> Facts | None:
    """What is published about a well-known set; reads nothing. None for other sets.

    Raises:
        UserError: TFDS knows no such set, or it has no such split.
    """
    if name not in SIZES:
        _check_known(name, _parse(name)[0], "")
        return None
    builder = BUILDERS[name](data_dir=os.devnull)  # for its features alone
    return _facts(builder, name, SIZES[name], f"the published {name}", extra, test_split)


def facts(name: str, data_dir: str, extra: bool, test_split: str) -> Facts | None:
    """What the metadata of a prepared set say, None if it is not prepared; reads no images.

    Args:
        name: as TFDS has it, "cifar10" or "emnist/letters".
        data_dir: where TFDS keeps prepared sets; empty for TFDS's default.
        extra: train on the split `extra`, too.
        test_split: to measure on; empty for `test`, or `validation` where that has no labels.

    Raises:
        UserError: it is no set of classified images, not in array_record, or has no such split.
    """
    builder = _find(name, data_dir)
    return builder and _facts(builder, name, _sizes(builder), builder.data_dir, extra, test_split)


def open_set(name: str, data_dir: str, manual_dir: str, extra: bool, test_split: str) -> Source:
    """A set to read from; it is prepared first if need be.

    Args:
        name, data_dir, extra, test_split: as for `info`.
        manual_dir: a folder of archives to prepare it from; empty to download them.

    Raises:
        UserError: as `info` and `prepare`; or files of the set are missing.
    """
    builder = _find(name, data_dir)
    if builder is None:
        prepare(name, data_dir, manual_dir)
        builder = _find(name, data_dir)
    assert builder is not None
    found = _facts(builder, name, _sizes(builder), builder.data_dir, extra, test_split)
    train: ExamplesLike = _Records(builder, name, "train")
    if extra:
        train = _Joined([train, _Records(builder, name, "extra")])
    return Source(found, train, _Records(builder, name, _test_split(name, _sizes(builder), test_split)))


def prepare(name: str, data_dir: str, manual_dir: str) -> None:
    """Writes a set to `data_dir` as TFDS does, in array_record; of several processes one does it.

    Args:
        name, data_dir: as for `info`.
        manual_dir: as for `open`.

    Raises:
        UserError: the set is unknown, an archive is missing or damaged, TensorFlow is needed, there is
            no network, or the disk is full.
    """
    base, options = _parse(name)
    if "://" in data_dir:
        raise UserError(
            f"{name} is not in {data_dir}: prepare it in a local data_dir, then copy that folder there"
        )
    try:
        arguments = {"data_dir": _local(data_dir), "file_format": FORMAT, **options}
        if base in BUILDERS:
            builder = BUILDERS[base](**arguments)
            builder.manual_dir = manual_dir
        else:
            _check_known(name, base, data_dir)
            builder = tfds.builder(base, **arguments)
            _keys(builder, name)
        with _alone(pathlib.Path(builder.data_dir).parent), contextlib.redirect_stdout(sys.stderr):
            if _find(name, data_dir) is not None:
                return  # another process has done it meanwhile
            if os.path.exists(builder.data_dir):
                raise UserError(
                    f"{builder.data_dir} holds no complete set (dataset_info.json and features.json are "
                    f"not both there): delete it and run the same command again"
                )
            _prepare(builder, manual_dir)
    except UserError:
        raise
    except ImportError as error:
        missing = error.name or "tensorflow"  # TFDS's own message has no name
        raise UserError(
            f"TFDS cannot prepare {name} without {missing}: once, `pip install {missing}` and run "
            f"the same command again, or point data.data_dir to a prepared copy"
        ) from error
    except Exception as error:  # whatever TFDS or the disk say
        raise UserError(f"cannot prepare {name} in {_place(data_dir)}: {imagenet.why(error)}") from error


def _prepare(builder: Any, manual_dir: str) -> None:
    if builder.name == "imagenet2012":
        if not manual_dir:
            raise UserError(
                f"imagenet2012 is not in {builder.data_dir} and cannot be downloaded without an account: "
                f"pass --config.data.manual_dir=FOLDER with {' and '.join(builder.published())} in it, "
                f"from https://image-net.org/download-images"
            )
        imagenet.prepare(builder, manual_dir)
        return
    urls = list(builder.url_infos or ())
    own = builder.name in BUILDERS
    if urls and not (own and manual_dir):
        _check_network(builder, urls[0])
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=os.path.expanduser(manual_dir) or None)
    try:
        builder.download_and_prepare(download_config=config)
    except (UserError, ImportError):
        raise
    except NonMatchingChecksumError as error:
        what = str(error).partition(":\n")[0]  # "Artifact URL, downloaded to PATH, has wrong checksum"
        raise UserError(
            f"{what}: it was cut short or is no longer what TFDS expects: run the same command again, or "
            f"get the archive elsewhere and pass --config.data.manual_dir=FOLDER"
        ) from error
    except Exception as error:
        if own and manual_dir:
            raise
        raise _no_download(builder, urls, error) from error


def _check_network(builder: Any, url: str) -> None:
    """Without a network, TFDS itself would try for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20).close()
    except urllib.error.HTTPError:
        pass  # a server has answered: TFDS may fare better than with HEAD
    except OSError as error:
        raise _no_download(builder, [url], error) from error


def _no_download(builder: Any, urls: list[str], error: Exception) -> UserError:
    if builder.name not in BUILDERS:
        return UserError(
            f"{builder.name} is not in {builder.data_dir} and TFDS cannot prepare it "
            f"({imagenet.why(error)}): mend that and run the same command again, or point data.data_dir "
            f"to a prepared copy"
        )
    return UserError(
        f"{builder.name} is not in {builder.data_dir} and cannot be downloaded ({imagenet.why(error)}): "
        f"run where {urls[0]} can be reached, or pass --config.data.manual_dir=FOLDER with "
        f"{', '.join(builder.published())} in it (to ekd_jax.evaluate --manual_dir=FOLDER); "
        f"configs/digits.py needs neither"
    )


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """One process at a time prepares a set; the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(f"waiting for another process that prepares {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    """`emnist/letters:3.1.0` -> emnist and {config, version}."""
    try:
        parsed, options = naming.parse_builder_name_kwargs(name)
    except ValueError as error:
        raise _unknown(name, name) from error
    return str(parsed), options


def _check_known(name: str, base: str, data_dir: str) -> None:
    if base not in tfds.list_builders(with_community_datasets=False):
        raise _unknown(name, base, f"; nor is it prepared in {data_dir}" if data_dir else "")


def _unknown(name: str, base: str, more: str = "") -> UserError:
    listed = registry.list_datasets()
    names = [*listed, *tfds.list_builders(with_community_datasets=False)]
    similar = difflib.get_close_matches(base.lower(), names, cutoff=0.5)
    return UserError(
        f"data.name={name}: TFDS has no such set{more}{nearest(base.lower(), similar or listed)}"
    )


def _local(data_dir: str) -> str | None:
    return os.path.expanduser(data_dir) or None


def _place(data_dir: str) -> str:
    return data_dir or "TFDS's data_dir"


def _find(name: str, data_dir: str) -> Any:
    """TFDS's builder of a prepared set, None if it is not prepared.

    Raises:
        UserError: it cannot be read.
    """
    _parse(name)
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=_local(data_dir))
    except registered.DatasetNotFoundError:
        return None
    except ImportError as error:  # of epath, for gs:// and the like
        raise UserError(
            f"data.data_dir={data_dir} cannot be read ({reason(error)}): pip install gcsfs"
        ) from error
    except Exception as error:  # whatever TFDS, the network or the disk say
        raise UserError(f"{name} in {_place(data_dir)} cannot be read: {reason(error)}") from error
    if FORMAT not in builder.info.available_file_formats():
        raise UserError(
            f"{builder.data_dir} is in {builder.info.file_format.value}, not in array_record: convert it "
            f"once with `pip install tensorflow apache-beam mlcroissant` and `tfds convert_format "
            f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record`, "
            f"or delete it to prepare it anew"
        )
    return builder


def _sizes(builder: Any) -> dict[str, int]:
    return {split: found.num_examples for split, found in builder.info.splits.items()}


def _facts(
    builder: Any, name: str, sizes: dict[str, int], where: str, extra: bool, test_split: str
) -> Facts:
    image, label = _keys(builder, name)
    test = _test_split(name, sizes, test_split)
    for split in ("train", *(["extra"] if extra else []), test):
        if split not in sizes:
            knob = {"extra": "data.extra: ", test_split: f"data.test_split={test_split}: "}.get(split, "")
            again = "; delete it to prepare it anew with extra_32x32.mat" if name == "svhn_cropped" else ""
            hint = again if split == "extra" else nearest(split, sizes)
            raise UserError(f"{knob}{where} has no split {split}{hint}")
    features = builder.info.features
    return Facts(
        name=name,
        image_shape=tuple(features[image].shape),
        class_names=tuple(features[label].names),
        train_examples=sizes["train"] + (sizes["extra"] if extra else 0),
        test_examples=sizes[test],
    )


def _test_split(name: str, sizes: dict[str, int], test_split: str) -> str:
    labeled = "test" in sizes and _parse(name)[0] not in UNLABELLED_TEST
    return test_split or ("test" if labeled or "validation" not in sizes else "validation")


def _keys(builder: Any, name: str) -> tuple[str, str]:
    """The names of the image's and the label's features.

    Raises:
        UserError: there are no such two.
    """
    features, keys = builder.info.features, builder.info.supervised_keys
    image, label = keys if isinstance(keys, tuple) and len(keys) == 2 else (None, None)

    def is_a(key: Any, kind: type) -> bool:
        return isinstance(key, str) and key in features and type(features[key]) is kind

    known = is_a(image, tfds.features.Image) and is_a(label, tfds.features.ClassLabel)
    if not known or features[image].np_dtype != np.uint8:
        raise UserError(
            f"data.name={name}: it is not a set of 8-bit images with one class each, as TFDS describes it"
        )
    return str(image), str(label)


class _Records:
    """`ekd_jax.data.dataset.Examples` of a split.

    Raises:
        UserError: files are missing.
    """

    def __init__(self, builder: Any, name: str, split: str):
        self.name = f"{name} {split}"
        self.image, self.label = _keys(builder, name)
        features = builder.info.features
        self.record_name = next((key for key in RECORD_NAMES if key in features), "")
        encoded = {
            key: tfds.decode.SkipDecoding()
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self.source = builder.as_data_source(split, decoders=encoded, file_format=FORMAT)
        files = [path.name for path in builder.info.splits[split].filepaths]
        there = {path.name for path in builder.data_path.iterdir()}
        if missing := [file for file in files if file not in there]:
            raise UserError(
                f"{builder.data_dir} is incomplete: {len(missing)} of {len(files)} files of {split} are "
                f"missing, {missing[0]} the first: copy it again, or delete it to prepare it anew"
            )
        written = builder.info.splits[split]
        facts = f"{builder.info.full_name} {split} {written.shard_lengths} {written.num_bytes}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        # Not shuffled by TFDS, examples may be sorted by their classes.
        sorted_by_class = builder.info.disable_shuffling
        self.order = np.random.RandomState(0).permutation(len(self)) if sorted_by_class else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index if self.order is None else int(self.order[index])
        record = self.source[place]
        name = record[self.record_name].decode() if self.record_name else f"[{place}]"
        return Example(record[self.image], int(record[self.label]), f"{self.name} {name}")


@dataclasses.dataclass(frozen=True)
class _Joined:
    """`ekd_jax.data.dataset.Examples` of several, one after the other."""

    parts: list[ExamplesLike]

    @property
    def fingerprint(self) -> str:
        return " ".join(part.fingerprint for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Example:
        begins = [0, *itertools.accumulate(map(len, self.parts))]
        part = bisect.bisect_right(begins, index) - 1
        if not 0 <= part < len(self.parts):
            raise IndexError(index)
        return self.parts[part][index - begins[part]]
