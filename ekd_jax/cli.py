"""Flags, configuration, help and one-line errors, shared by all commands."""

import contextlib
import difflib
import math
import os
import pathlib
import re
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TextIO

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ekd_jax.common import parallel
from ekd_jax.common.compilation import keep_compiled_programs
from ekd_jax.common.errors import Interrupted, UserError, nearest, reason
from ekd_jax.common.files import NO_ROOM, why_not_writable
from ekd_jax.common.log import shown
from ekd_jax.common.watch import RESUME, TRY_AGAIN
from ekd_jax.config.knobs import KNOBS, all_knobs
from ekd_jax.config.other_names import find_knob, other_way
from ekd_jax.config.resolve import resolve

FLAGS = flags.FLAGS
MAY_BE_EMPTY = (
    "compilation_cache",
    "data_dir",
    "manual_dir",
    "test_split",
)  # flags for which nothing is a value
KNOBS_HELP = (
    "change a knob of the recipe, as in --config.optimizer.learning_rate=0.05; `ekd knobs` lists them"
)


class Command(Protocol):
    """A module of a command: what it does in its docstring, its flags, and what runs.

    If it has a constant ARGUMENTS, such as "RUN", `main` gets a list of what the command line has besides flags.
    """

    __doc__: str | None

    def define_flags(self) -> None:
        """Define the command's own flags."""

    def main(self, *arguments: Any) -> int | None:
        """Run the command; return its exit code, if it is not 0."""


def define_config() -> None:
    """Define --config=FILE[:argument] and --config.<knob>=value."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "recipe, such as configs/digits.py or configs/resnet_cifar100.py:depth=110",
        lock_config=False,
        accept_new_attributes=True,  # `resolve` refuses unknown knobs, and names the nearest
    )


def config() -> FrozenConfigDict:
    """Return the complete configuration that the command line asks for.

    Raises:
        UserError: no recipe, an unknown knob, a value of the wrong type or out of range.
    """
    return resolve(recipe(), config_flags.get_override_values(FLAGS["config"]))


def recipe(example: str = "configs/digits.py") -> Any:
    """Return what --config names, with the changes of the command line.

    Raises:
        UserError: the flag or the file is missing.
    """
    if FLAGS.config is None:
        raise UserError(f"--config=FILE is missing; for example --config={example}")
    name = config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]
    if not name:
        raise UserError(f"--config= is empty: name a recipe, for example --config={example}")
    path = pathlib.Path(name)
    if not path.is_file():
        others = [str(p) for p in (path.parent.glob("*.py") if path.parent.is_dir() else ())]
        raise UserError(
            f"there is no config file {path}{nearest(str(path), sorted(others)) if others else ''}"
        )
    if not isinstance(FLAGS.config, ConfigDict):
        raise UserError(f"{path} is not a recipe: its function get_config must return a ConfigDict")
    return FLAGS.config


def define_at_once() -> None:
    """Define the flag that says how many runs are trained at a time."""
    flags.DEFINE_integer(
        "at_once", None, "train so many runs at a time, each on its share of the devices", lower_bound=1
    )


def config_name() -> str:
    """Return `digits` for configs/digits.py and `resnet_cifar100-depth=110` for its variant depth=110."""
    path, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    name = os.path.splitext(os.path.basename(path))[0]
    return f"{name}-{argument.replace(',', '-')}" if argument else name


def check_checkpoint_flags() -> None:
    """Raise UserError unless --step and --best make sense together."""
    if FLAGS.step is not None and FLAGS.best:
        raise UserError("pass --step=N or --best, not both")


def output_file(flag: str, suffixes: Sequence[str]) -> pathlib.Path | None:
    """Return the file that a flag names, None if the flag was not given.

    Raises:
        UserError: it has another suffix, is a directory, or its directory does not exist or is not writable.
    """
    given: str | None = FLAGS[flag].value
    if given is None:
        return None
    path = pathlib.Path(given)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--{flag}={given} must end in {' or '.join(suffixes)}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--{flag}={given} must be a file in a directory that exists")
    if why := why_not_writable(path):
        raise UserError(f"--{flag}={given} cannot be written: {why}: choose another")
    return path


def run(command: Command, arguments: Sequence[str] | None = None, name: str = "") -> None:
    """Parse flags, run a command and exit: with its code, or with 2 and one line on standard error.

    Args:
        command: its module.
        arguments: of the command line; those of the process if not given.
        name: how the user called it, for the help text.
    """
    argv = [name or f"python -m {_module_of(command)}", *(sys.argv[1:] if arguments is None else arguments)]
    before = set(FLAGS)
    command.define_flags()
    _define_compilation_cache()
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        text = _help(argv[0], command.__doc__ or "", [f for f in FLAGS if f not in before])
        guarded(lambda: print(text))
        sys.exit(0)
    with shown():
        start = _starting(command.main, hasattr(command, "ARGUMENTS"))
        guarded(
            lambda: app.run(
                start, argv=argv, flags_parser=partial(_parse, more=hasattr(command, "ARGUMENTS"))
            )
        )


def guarded(start: Callable[[], None]) -> None:
    """Run to the end; every error that a user can mend is one line."""
    try:
        _run_and_flush(start)
    except UserError as error:
        leave(2, f"error: {parallel.who()}{error}")
    except Interrupted as interruption:
        leave(128 + interruption.signal, str(interruption), agreed=True)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        _drop(sys.stdout)
        leave(1)
    except OSError as error:  # a full disk, a name that is too long: nothing that a traceback explains
        printed = error.filename is None and error.errno in NO_ROOM  # files that are written have names
        text = f"{error.strerror}, most likely where standard output goes" if printed else reason(error)
        leave(2, f"error: {parallel.who()}{text}")
    except KeyboardInterrupt:
        leave(130, "interrupted; run the same command to resume")
    except Exception as error:
        if not parallel.several():
            raise
        parallel.await_loss()
        if not isinstance(error, jax.errors.JaxRuntimeError):
            leave(1, traceback.format_exc().rstrip())
        failed = f"{parallel.who()}a computation failed ({reason(error)})"
        leave(TRY_AGAIN, f"error: {failed}: {RESUME}")


def leave(code: int, message: str = "", agreed: bool = False) -> None:
    """Print the message and exit. One of several processes exits at once: an orderly exit would wait for the others.

    Args:
        code: exit code.
        message: to print on standard error; empty for none.
        agreed: whether all processes agreed to end; otherwise, the others are told that this one failed.
    """
    with contextlib.suppress(OSError):  # a log on a full disk
        if message:
            print(message, file=sys.stderr, flush=True)
    if parallel.several():
        parallel.farewell(0 if agreed else code)
        os._exit(code)
    _flush_or_drop(sys.stdout)
    _flush_or_drop(sys.stderr)
    if agreed:  # a thread may still be compiling, and would crash an orderly exit
        os._exit(code)
    sys.exit(code)


def _run_and_flush(start: Callable[[], None]) -> None:
    """Run, and write out what was printed: Python itself does that where an error is no longer one line."""
    try:
        start()
    except SystemExit:
        sys.stdout.flush()
        _flush_or_drop(sys.stderr)
        raise
    sys.stdout.flush()


def _flush_or_drop(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        _drop(stream)


def _drop(stream: TextIO) -> None:
    """Send what is left in a stream's buffer, and all that is printed later, to nowhere, so that Python can end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parse(argv: Sequence[str], more: bool = False) -> list[str]:
    try:
        FLAGS.set_gnu_getopt(True)  # flags may come after other arguments, as after `RUN`
        changes = _changed_knobs(argv)
        sys.argv += changes  # where ml_collections looks for the knobs that are set
        rest = FLAGS([*argv, *changes])
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"unknown flag --{error.flagname}{_flag_hint(error, more)}") from error
    except Exception as error:  # a config file is code, which may raise anything
        raise UserError(_about_parsing(argv, error)) from error
    if rest[1:] and not more:
        raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value")
    for name in (
        flag for flag in FLAGS if not flag.startswith("config.")
    ):  # knobs are checked by `resolve`
        value: Any = FLAGS[name].value
        if FLAGS[name].present and value in ("", []) and name not in MAY_BE_EMPTY:
            raise UserError(f"--{name}= is empty: give it a value, or leave it out")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} must be a finite number")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)
    # An error in a thread of Orbax is raised again where the run waits for it: one line is enough.
    threading.excepthook = lambda failed: logging.info("in the background: %s", failed.exc_value)
    sys.unraisablehook = lambda failed: logging.info("in the background: %s", failed.exc_value)
    return list(rest)


def _changed_knobs(argv: Sequence[str]) -> list[str]:
    """Return `--config.KNOB=VALUE` for every `--resume_with=KNOB=VALUE`.

    Raises:
        UserError: one is not of this form, or names no knob.
    """
    if "resume_with" not in FLAGS:
        return []
    changes = []
    for place, argument in enumerate(argv):
        flag, equals, change = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == "resume_with":
            changes.append(change if equals else "".join(argv[place + 1 : place + 2]))
    for change in changes:
        if not re.fullmatch(r"\w+(\.\w+)*=.+", change):
            raise UserError(
                f"--resume_with={change} must be KNOB=VALUE, as in optimizer.learning_rate=0.01"
            )
    return [f"--config.{change}" for change in changes]


def _about_parsing(argv: Sequence[str], error: Exception) -> str:
    """Return what went wrong while flags were parsed and the config file was read, in one line."""
    text = " ".join(str(error).split())
    file = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), "the config file")
    if "no attribute 'get_config'" in text:
        return f"{file} is not a recipe: it has no function get_config"
    if isinstance(error, flags.Error | OSError | KeyError | AttributeError | TypeError) and text:
        return text
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename or file}, line {error.lineno}: {error.msg}"
    return f"{file} fails: {type(error).__name__}: {reason(error)}"


def _flag_hint(error: flags.UnrecognizedFlagError, more: bool) -> str:
    """Return what the user of an unknown flag may mean: a flag or argument of the command, or a knob of the recipe."""
    if more and error.flagname == "workdir":
        return "; this command takes runs without a flag: RUN"
    own = [name for name in FLAGS if not name.startswith("config.")]
    close = difflib.get_close_matches(error.flagname, own, n=1, cutoff=0.8)
    if close:
        return f"; did you mean --{close[0]}?"
    if "config" not in FLAGS:
        return "; --help lists the flags"
    knob = find_knob(error.flagname, all_knobs(KNOBS["method.name"].default))
    if knob:
        return f"; did you mean --config.{knob}=VALUE?"
    return other_way(error.flagname) or "; --help lists the flags, `ekd knobs` the knobs"


def _starting(main: Callable[..., int | None], more: bool) -> Callable[[Sequence[str]], None]:
    def start(argv: Sequence[str]) -> None:
        _use_compilation_cache()
        sys.exit(main(list(argv[1:])) if more else main())

    return start


def _define_compilation_cache() -> None:
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "directory for compiled programs; empty: none; ~/.cache/ekd_jax if not given",
    )
    flags.DEFINE_float(
        "compilation_cache_gb",
        4.0,
        "size limit of that directory; programs that were not used for longest are deleted",
        lower_bound=0.001,
    )


def _use_compilation_cache() -> None:
    """Keep compiled programs as the flags say; $JAX_COMPILATION_CACHE_DIR is JAX's own way to say where."""
    # JAX warns of every program that it cannot keep, as on a full disk; it is compiled again next time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    asked = FLAGS.compilation_cache
    if asked == "" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        keep_compiled_programs(pathlib.Path(asked) if asked else None, FLAGS.compilation_cache_gb)
    except OSError as error:
        if asked:
            raise UserError(f"--compilation_cache={asked}: {reason(error)}") from error
        # a home directory that cannot be written to is no reason not to run


def _help(name: str, doc: str, names: Sequence[str]) -> str:
    """Return what the command does, how it is called, and its flags."""
    rows = []
    for flag in (FLAGS[n] for n in names):
        if flag.name.startswith("config."):
            continue
        value = "" if flag.boolean else f"={'FILE[:argument]' if flag.name == 'config' else 'VALUE'}"
        value_shown = str(flag.default_as_str).strip("'")
        default = "" if flag.value in (None, False, "", []) else f" (default: {value_shown})"
        text = " ".join((flag.help or "").split()).removeprefix("path to config file. ")
        text = text.removesuffix("; repeat this option to specify a list of values").removesuffix(";")
        rows.append((f"--{flag.name}{value}", text + default))
        if flag.name == "config":
            rows.append(("--config.SECTION.KNOB=VALUE", KNOBS_HELP))
    width = max(len(flag) for flag, _ in rows)
    lines = [
        textwrap.fill(text, 100, initial_indent=f"  {flag:<{width}}  ", subsequent_indent=" " * (width + 4))
        for flag, text in rows
    ]
    return f"{name}: {doc.strip()}\n\nflags:\n" + "\n".join(lines)


def _module_of(command: Command) -> str:
    spec = getattr(command, "__spec__", None)
    return spec.name if spec else str(getattr(command, "__name__", "ekd_jax"))
