"""What the commands share: flags, the configuration, and one line for every error."""

import os
import pathlib
import platform
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.common.files import user_cache
from ekd_jax.config.resolve import resolve

FLAGS = flags.FLAGS


def define_config() -> None:
    """Defines --config=FILE[:argument] and --config.<knob>=value."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "recipe, a file of configs/; change any knob with --config.<section>.<knob>=value",
        lock_config=False,
        accept_new_attributes=True,  # `resolve` refuses unknown knobs, and names the nearest
    )


def config() -> Any:
    """The complete configuration that the command line asks for.

    Raises:
        UserError: no recipe, an unknown knob, a value of the wrong type or out of range.
    """
    if FLAGS.config is None:
        raise UserError("--config=FILE is missing; for example --config=configs/digits.py")
    path = pathlib.Path(config_flags.get_config_filename(FLAGS["config"]).partition(":")[0])
    if not path.is_file():
        others = [str(p) for p in (path.parent.glob("*.py") if path.parent.is_dir() else ())]
        raise UserError(
            f"there is no config file {path}{nearest(str(path), sorted(others)) if others else ''}"
        )
    return resolve(FLAGS.config, config_flags.get_override_values(FLAGS["config"]))


def config_name() -> str:
    """`digits` for configs/digits.py; `resnet_cifar100-depth=110` for its variant depth=110."""
    path, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    name = os.path.splitext(os.path.basename(path))[0]
    return f"{name}-{argument.replace(',', '-')}" if argument else name


flags.DEFINE_string(
    "compilation_cache", None, "folder for compiled programs; empty: none; ~/.cache/ekd_jax if not given"
)
flags.DEFINE_float(
    "compilation_cache_gb",
    4.0,
    "its size: what was not used for longest is deleted",
    lower_bound=0.001,
)


def use_compilation_cache() -> None:
    """Programs that took more than a second to compile are kept for the next run; several runs may share
    the folder. $JAX_COMPILATION_CACHE_DIR is JAX's own way to say where."""
    if FLAGS.compilation_cache == "" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = pathlib.Path(FLAGS.compilation_cache or user_cache() / "compiled") / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if FLAGS.compilation_cache:
            raise UserError(f"--compilation_cache={FLAGS.compilation_cache}: {reason(error)}") from error
        return  # a home that cannot be written is no reason not to run
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", int(FLAGS.compilation_cache_gb * 1e9))


def _processor() -> str:
    """Names the processor's instructions: programs for one CPU must not be run on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        known = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        known = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(known.encode()):08x}"


def run(main: Callable[[], int | None]) -> None:
    """Parses flags, runs `main` and exits: with its code, or 2 and one line on standard error."""

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = FLAGS(argv)
        except (flags.Error, OSError, KeyError, AttributeError, TypeError) as error:
            raise UserError(" ".join(str(error).split())) from error
        if rest[1:]:
            raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value")
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)
        # What fails in a thread of Orbax is raised again where the run waits for it: one line is enough.
        threading.excepthook = lambda failed: logging.info("in the background: %s", failed.exc_value)
        sys.unraisablehook = lambda failed: logging.info("in the background: %s", failed.exc_value)
        return rest

    def start(_: list[str]) -> None:
        use_compilation_cache()
        sys.exit(main())

    try:
        app.run(start, flags_parser=parse)
    except UserError as error:
        leave(2, f"error: {parallel.who()}{error}")
    except jax.errors.JaxRuntimeError as error:
        if not parallel.several():
            raise
        lost = f"{parallel.who()}a computation over all processes failed, most likely because one of them"
        leave(1, f"error: {lost} ended ({reason(error)}): run the same command in all of them to go on")
    except KeyboardInterrupt:
        leave(130, "interrupted; run the same command to go on")


def leave(code: int, message: str) -> None:
    """Exits; one of several processes at once, as an orderly exit would wait for the others for ever."""
    print(message, file=sys.stderr, flush=True)
    if parallel.several():
        os._exit(code)
    sys.exit(code)
