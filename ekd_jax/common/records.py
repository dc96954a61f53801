"""Records as JSON files: dataclasses that are checked against their types when they are read."""

import json
import pathlib
from typing import Any, TypeVar

import msgspec

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import read_bytes, write_bytes, write_json

Record = TypeVar("Record")
MAX_BYTES = 256 * 2**20  # of a JSON file; a million class names take a tenth of that


def write_record(path: pathlib.Path, record: Any) -> None:
    """Write a dataclass as JSON; the file appears whole or not at all."""
    write_json(path, as_json(record))


def write_results(file: pathlib.Path, content: Any, document: pathlib.Path, text: str, again: str) -> None:
    """Write results as JSON, for programs, and as a document, for people.

    Args:
        file, content: the JSON file and what it holds.
        document, text: the document and its Markdown.
        again: what is intact and how both are written again, for the error.

    Raises:
        UserError: they cannot be written.
    """
    try:
        write_json(file, content)
        write_bytes(document, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; {again}") from error


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
    return as_record(read_json(path, what), kind, path)


def as_record(value: Any, kind: type[Record], path: pathlib.Path) -> Record:
    """Return nested dicts, lists, numbers and strings as a dataclass; `path` is where they are from, for the error.

    Raises:
        UserError: a field is missing or of another type.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is damaged, or of another version: {reason(error)}") from error


def read_json(path: pathlib.Path, what: str) -> Any:
    """Read a JSON file; for the arguments see `read_record`.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(read_bytes(path, MAX_BYTES))
    except OSError as error:
        raise UserError(f"{path.parent} is not {what}: {reason(error)}") from error
    except RecursionError as error:
        raise UserError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {reason(error)}") from error
