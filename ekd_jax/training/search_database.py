"""The database of a search: Optuna's, in one SQLite file, which is opened with care and whose errors are one line."""

import contextlib
import importlib.util
import json
import pathlib
import sqlite3
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import Any

from ekd_jax.common.errors import UserError, not_written, reason
from ekd_jax.common.files import replacing
from ekd_jax.config.knobs import KNOBS
from ekd_jax.config.resolve import flatten

DATABASE = "search.db"
STUDY = "ekd_jax"  # its name in the database
SETTINGS = "settings"  # the study's attribute that says what is searched
WAIT_SECONDS = 60.0  # for another process that writes
FULL = "database or disk is full"


def check_optuna() -> None:
    """Raise UserError if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("ekd search needs the package optuna: pip install 'ekd_jax[search]'")


@contextlib.contextmanager
def plain_errors(path: pathlib.Path) -> Iterator[None]:
    """Raise UserError with one line for what Optuna, SQLAlchemy and SQLite raise about the database `path`."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError, sqlite3.Error, json.JSONDecodeError) as error:
        cause: BaseException | None = error
        texts = []
        while cause is not None:
            texts.append(str(getattr(cause, "orig", None) or cause))
            cause = cause.__cause__
        said = texts[-1]
        if FULL in said:
            said = "the disk is full"
        elif "locked" in said:
            said = f"another process has locked it for {WAIT_SECONDS:g} seconds"
        elif any(
            sign in said for sign in ("not a database", "malformed", "no such table", "no such column")
        ):
            said = f"it is damaged ({said})"
        raise UserError(
            f"{path}: {not_written(error) or reason(Exception(said))}; {_after(said)}"
        ) from error


def _after(said: str) -> str:
    if "damaged" in said:
        return "put a copy of it back, or choose another --workdir"
    return "what was written before is intact: run the same command to resume"


def create(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Write the database of a new search; it appears whole or not at all.

    Raises:
        OSError, UserError: it cannot be written.
    """
    import optuna

    with replacing(path) as partial, plain_errors(path):
        partial.touch()
        study = optuna.create_study(storage=_storage(partial), study_name=STUDY, direction="maximize")
        study.set_user_attr(SETTINGS, settings)
        _close(study)


def load(path: pathlib.Path) -> Any:
    """Return the study in a database.

    Raises:
        UserError: it is damaged, of another program, or of another version of Optuna.
    """
    import optuna

    if not path.is_file():
        raise UserError(f"{path} is not a file: choose another --workdir")
    with plain_errors(path):
        _check_file(path)
        try:
            return optuna.load_study(study_name=STUDY, storage=_storage(path))
        except RuntimeError as error:  # its tables are those of another version
            raise UserError(
                f"{path} cannot be read with Optuna {optuna.__version__}: {reason(error)}"
            ) from error
        except KeyError as error:
            raise UserError(f"{path} is damaged: it has no study; choose another --workdir") from error


def check_settings(study: Any, settings: dict[str, Any], path: pathlib.Path) -> None:
    """Raise UserError unless a search that goes on asks for the same as when it began."""
    there, now = _flat(study.user_attrs.get(SETTINGS, {})), _flat(json.loads(json.dumps(settings)))
    # A knob that the search does not have is newer than the search, and changes nothing at its default.
    newer = {name: KNOBS[name].default for name in now.keys() - there.keys() if name in KNOBS}
    there |= json.loads(json.dumps(newer))
    changed = [
        f"{name}: {there.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"--workdir={path} holds another search ({'; '.join(changed)}): choose another --workdir, or ask for "
            f"the same; only --trials and --prune may change"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return knobs and the other settings by name; what the space says of a knob is one value."""
    space = {f"space of {knob}": values for knob, values in settings.get("space", {}).items()}
    rest = {name: value for name, value in settings.items() if name not in ("config", "space")}
    return {**flatten(settings.get("config", {})), **space, **rest}


def _check_file(path: pathlib.Path) -> None:
    """Raise UserError if a file is a damaged database or that of another program; nothing is written."""
    with contextlib.closing(_connect(path)) as database:
        (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(f"malformed: {said}")
        tables = {
            name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        own = {"studies", "study_user_attributes", "trials", "trial_params"} <= tables
        names = [name for (name,) in database.execute("SELECT study_name FROM studies")] if own else []
    if names != [STUDY]:
        what = f"studies of another program ({', '.join(names[:3])})" if names else "no search of ekd_jax"
        raise UserError(f"{path} holds {what}: choose another --workdir")


def _connect(path: pathlib.Path) -> sqlite3.Connection:
    """Connect to a file that exists."""
    name = f"file:{urllib.parse.quote(str(path.absolute()))}?mode=rw"
    return sqlite3.connect(name, uri=True, timeout=WAIT_SECONDS, check_same_thread=False)


def _storage(path: pathlib.Path) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # The URL only says that it is a file; the connection is made by us, whatever characters the path has.
    return optuna.storages.RDBStorage(
        f"sqlite:///{DATABASE}", engine_kwargs={"creator": lambda: _connect(path)}
    )


def _close(study: Any) -> None:
    """Close all connections, before the file is moved."""
    storage = study._storage
    getattr(storage, "_backend", storage).engine.dispose()
