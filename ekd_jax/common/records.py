"""Records as JSON files: dataclasses that are checked against their types when they are read."""

import json
import pathlib
from typing import Any, TypeVar

import msgspec

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import write_json

Record = TypeVar("Record")


def write_record(path: pathlib.Path, record: Any) -> None:
    """Write a dataclass as JSON; the file appears whole or not at all."""
    write_json(path, as_json(record))


def as_json(record: Any) -> Any:
    """Return a dataclass as nested dicts, lists, numbers and strings."""
    return msgspec.to_builtins(record)


def read_record(path: pathlib.Path, kind: type[Record], what: str) -> Record:
    """Read a dataclass from JSON.

    Args:
        path: of the file.
        kind: the dataclass.
        what: the directory of the file ought to be, for the error ("a student's directory").

    Raises:
        UserError: the file is missing, is not JSON, or a field is missing or of another type.
    """
    try:
        return msgspec.convert(json.loads(path.read_bytes()), kind)
    except OSError as error:
        raise UserError(f"{path.parent} is not {what}: {reason(error)}") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise UserError(f"{path} is damaged, or of another version: {reason(error)}") from error
