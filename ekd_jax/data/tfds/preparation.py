"""Preparation of TFDS sets: written once in array_record, from the user's archives or from a download.

`ekd_jax.data.tfds.builders` prepares well-known sets without TensorFlow. TFDS's own builders, most of which need
TensorFlow, prepare all others.
"""

import contextlib
import os
import pathlib
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from ekd_jax.common.errors import DISK_FULL, UserError, not_written, writing_failure
from ekd_jax.common.files import lock
from ekd_jax.common.log import logger
from ekd_jax.common.text import human
from ekd_jax.data.tfds import imagenet, lookup
from ekd_jax.data.tfds.builders import BUILDERS, most_bytes


def prepare(name: str, data_dir: str, manual_dir: str) -> None:
    """Write a set to `data_dir` as TFDS does, in array_record. If several processes try, one of them does it.

    Args:
        name: name of the set in TFDS, "cifar10" or "emnist/letters".
        data_dir: directory of prepared sets; empty for TFDS's default.
        manual_dir: directory of archives to prepare it from; empty to download them.

    Raises:
        UserError: the set is unknown, an archive is missing or damaged, TensorFlow is needed, there is no
            network, or the disk is full.
    """
    if "://" in data_dir:
        raise UserError(
            f"{name} is not in {data_dir}: prepare it in a local data_dir, then copy that directory there"
        )
    if not data_dir and os.path.expanduser(constants.DATA_DIR).startswith("~"):
        raise UserError(
            f"{name} is not prepared, and there is no home directory to write it to: pass --config.data.data_dir=DIR"
        )
    builder = None
    try:
        builder = _builder(name, data_dir, manual_dir)
        with _locked(pathlib.Path(builder.data_dir).parent), contextlib.redirect_stdout(sys.stderr):
            if lookup.find_prepared(name, data_dir) is not None:
                return  # another process has prepared it meanwhile
            if os.path.exists(builder.data_dir):
                raise UserError(
                    f"{builder.data_dir} holds no complete set (dataset_info.json or features.json is "
                    f"missing): delete it and run the same command again"
                )
            _write(builder, manual_dir)
    except UserError:
        raise
    except ImportError as error:
        missing = error.name or "tensorflow"  # TFDS's own error has no name
        raise UserError(
            f"TFDS cannot prepare {name} without {missing}: once, `pip install {missing}` and run "
            f"the same command again, or point data.data_dir to a prepared copy"
        ) from error
    except Exception as error:  # from TFDS or the disk
        where = lookup.in_words(data_dir)
        why = f"{writing_failure(error)}{_room_in_words(builder, error)}"
        raise UserError(f"cannot prepare {name} in {where}: {why}") from error


def _builder(name: str, data_dir: str, manual_dir: str) -> tfds.core.DatasetBuilder:
    """Return the builder of a set that is not prepared yet."""
    base, options = lookup.parse(name)
    arguments = {"data_dir": lookup.local(data_dir), "file_format": lookup.FORMAT, **options}
    if base in BUILDERS:
        builder = BUILDERS[base](**arguments)
        builder.manual_dir = manual_dir
    else:
        lookup.check_known(name, base, data_dir)
        builder = tfds.builder(base, **arguments)
        lookup.feature_names(builder, name)
    return builder


def _write(builder: tfds.core.DatasetBuilder, manual_dir: str) -> None:
    if builder.name == "imagenet2012":
        if not manual_dir:
            raise UserError(
                f"imagenet2012 is not in {builder.data_dir} and cannot be downloaded without an account: "
                f"pass --config.data.manual_dir=DIR with {' and '.join(builder.published_digests())} in it, "
                f"from https://image-net.org/download-images"
            )
        imagenet.prepare(builder, manual_dir)
        return
    urls = list(builder.url_infos or ())
    from_archives = builder.name in BUILDERS and manual_dir
    if urls and not from_archives:
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
            f"get the archive elsewhere and pass --config.data.manual_dir=DIR"
        ) from error
    except Exception as error:
        if from_archives or not_written(error):
            raise
        raise _download_failure(builder, urls, error) from error


def _check_network(builder: tfds.core.DatasetBuilder, url: str) -> None:
    """Raise UserError if the server cannot be reached; TFDS itself would try for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20).close()
    except urllib.error.HTTPError:
        pass  # the server has answered: the download itself may still work
    except OSError as error:
        raise _download_failure(builder, [url], error) from error


def _download_failure(builder: tfds.core.DatasetBuilder, urls: list[str], error: Exception) -> UserError:
    why = writing_failure(error)
    if builder.name not in BUILDERS:
        return UserError(
            f"{builder.name} is not in {builder.data_dir} and TFDS cannot prepare it ({why}): fix this and run "
            f"the same command again, or point data.data_dir to a prepared copy"
        )
    return UserError(
        f"{builder.name} is not in {builder.data_dir} and cannot be downloaded ({why}): "
        f"run where {urls[0]} can be reached, or pass --config.data.manual_dir=DIR with "
        f"{', '.join(builder.published_digests())} in it (to ekd_jax.evaluate --manual_dir=DIR); "
        f"configs/digits.py needs neither"
    )


def _room_in_words(builder: tfds.core.DatasetBuilder | None, error: Exception) -> str:
    """Return how much room is needed and free, what is left, and what to do, if the disk was the problem."""
    why = not_written(error)
    if builder is None or not why:
        return ""
    needed = most_bytes(builder)
    room = [f"it takes at most {human(needed)}B"] if needed else []
    if why == DISK_FULL:
        with contextlib.suppress(OSError):
            existing = next(p for p in pathlib.Path(builder.data_dir).parents if p.exists())
            room.append(f"{human(shutil.disk_usage(existing).free)}B are free")
    brackets = f" ({', '.join(room)})" if room else ""
    return (
        f"{brackets}; nothing of it is left: fix this and run the same command again, or pass another "
        f"--config.data.data_dir"
    )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Let one process at a time prepare a set; the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            has_locks = lock(file)
        except BlockingIOError:
            logger.info(f"waiting for another process that prepares {folder}")
            has_locks = lock(file, wait=True)
        if not has_locks:
            logger.warning(
                f"warning: the file system of {folder} has no locks: make sure that only one process prepares "
                f"this set"
            )
        yield
