"""The metrics of a run: one record per line of `metrics.jsonl`, and the same for TensorBoard."""

import json
import logging
import pathlib
from typing import Any

import tensorboardX

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import read_bytes, write_bytes
from ekd_jax.common.log import once

METRICS = "metrics.jsonl"


class MetricWriter:
    """Appends records to metrics.jsonl and TensorBoard.

    Args:
        workdir: the run's directory; None: nothing is written.
        step: the step that the run resumes from. Records of later steps, left by a run that was killed after
            its last checkpoint, are dropped: they will be written again.
        evaluated: the step of the last evaluation; later ones are dropped, too.
    """

    def __init__(self, workdir: pathlib.Path | None, step: int, evaluated: int):
        self._file: Any = None
        self._board: Any = None
        if workdir is None:
            return
        self.path = workdir / METRICS
        records = read_metrics(workdir) if self.path.exists() else []
        last = {"train": step}  # of each split
        kept = [record for record in records if record["step"] <= last.get(record["split"], evaluated)]
        write_bytes(self.path, "".join(map(_as_line, kept)).encode())
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Write one record, `{"step", "epoch", "split", **values}`."""
        if self._file is None:
            return
        record = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
        self._file.write(_as_line(record))
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Close both files."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return all records of a run's metrics.jsonl; damaged lines are left out, with a warning.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    path = workdir / METRICS
    try:
        lines = read_bytes(path).splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    records = [record for record in map(_as_record, lines) if record]
    damaged = len(lines) - len(records)
    if lines and not lines[-1].endswith(
        b"\n"
    ):  # a record that is being written, or was when the run was killed
        damaged -= _as_record(lines[-1]) is None
    if damaged:
        once(logging.WARNING, f"{path}: {damaged:,} of {len(lines):,} lines are damaged and left out")
    return records


def _as_line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _as_record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, None if the line is damaged or not complete."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    complete = isinstance(record, dict) and {"step", "epoch", "split"} <= record.keys()
    return record if complete and isinstance(record["step"], int) and line.endswith(b"\n") else None
