"""Names of TFDS sets, and TFDS's builders of sets that are prepared already."""

import difflib
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, file_adapters, naming, read_only_builder, registered

from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.data import registry

FORMAT = file_adapters.FileFormat.ARRAY_RECORD


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """Return the base name and {config, version} of a set's full name, such as `emnist/letters:3.1.0`."""
    try:
        base, options = naming.parse_builder_name_kwargs(name)
    except ValueError as error:
        raise _unknown(name, name) from error
    return str(base), options


def check_known(name: str, base: str, data_dir: str = "") -> None:
    """Raise UserError unless TFDS has a set by this base name; `data_dir` is where it is not prepared."""
    if base not in tfds.list_builders(with_community_datasets=False):
        raise _unknown(name, base, f", and it is not prepared in {data_dir}" if data_dir else "")


def find_prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder | None:
    """Return TFDS's builder of a prepared set, or None if the set is not prepared.

    Raises:
        UserError: the set cannot be read.
    """
    parse(name)
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=local(data_dir))
    except registered.DatasetNotFoundError:
        return None
    except ImportError as error:  # from epath, for gs:// and the like
        raise UserError(
            f"data.data_dir={data_dir} cannot be read ({reason(error)}): pip install gcsfs"
        ) from error
    except Exception as error:  # from TFDS, the network or the disk
        raise UserError(f"{name} in {in_words(data_dir)} cannot be read: {reason(error)}") from error
    if FORMAT not in builder.info.available_file_formats():
        raise UserError(
            f"{builder.data_dir} is in {builder.info.file_format.value}, not in array_record: convert it "
            f"once with `pip install tensorflow apache-beam mlcroissant` and `tfds convert_format "
            f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record`, "
            f"or delete it to prepare it again"
        )
    return builder


def feature_names(builder: tfds.core.DatasetBuilder, name: str) -> tuple[str, str]:
    """Return the names of a set's features for image and label.

    Raises:
        UserError: it is not a set of 8-bit images with one class each.
    """
    features, keys = builder.info.features, builder.info.supervised_keys
    image, label = keys if isinstance(keys, tuple) and len(keys) == 2 else (None, None)

    def is_a(key: object, kind: type) -> bool:
        return isinstance(key, str) and key in features and type(features[key]) is kind

    usable = is_a(image, tfds.features.Image) and is_a(label, tfds.features.ClassLabel)
    if not usable or features[image].np_dtype != np.uint8:
        raise UserError(
            f"data.name={name} is not a set of 8-bit images with one class each: choose another set"
        )
    return str(image), str(label)


def local(data_dir: str) -> str | None:
    """Return the path of a data directory, or None for TFDS's default."""
    return os.path.expanduser(data_dir) or None


def in_words(data_dir: str) -> str:
    """Return the name of a data directory for messages."""
    return data_dir or f"TFDS's data_dir {constants.DATA_DIR}"


def _unknown(name: str, base: str, addition: str = "") -> UserError:
    listed = registry.list_datasets()
    names = [*listed, *tfds.list_builders(with_community_datasets=False)]
    similar = difflib.get_close_matches(base.lower(), names, cutoff=0.5)
    hint = nearest(base.lower(), similar or listed)
    return UserError(f"data.name={name}: TFDS has no such set{addition}{hint}")
