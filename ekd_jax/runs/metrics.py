"""The metrics of a run: one record per line of `metrics.jsonl`, and the same for TensorBoard and a tracker."""

import contextlib
import io
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import read_bytes, write_bytes
from ekd_jax.common.log import logger, once
from ekd_jax.runs.tracking import Tracker

METRICS = "metrics.jsonl"
MEMORY = "memory_mb"
MEASURED = ("images/s", "input_wait", MEMORY)  # what differs between two runs that compute the same
Record = dict[str, Any]


class Latest:
    """The latest records of a run, and its best evaluations.

    Attributes:
        train: the latest training record; empty before the first.
        evaluations: split -> the latest evaluation.
        step, epoch: how far the records go.
    """

    def __init__(self) -> None:
        self.train: Record = {}
        self.evaluations: dict[str, Record] = {}
        self._best: dict[str, dict[str, tuple[float, float]]] = {}
        self.step, self.epoch = 0, 0.0

    @property
    def watched(self) -> str:
        """The set that is evaluated while training; the test set, too, at the end, if that is another one."""
        return "validation" if "validation" in self.evaluations else "test"

    @property
    def best(self) -> dict[str, tuple[float, float]]:
        """Name of a predictor -> its best top-1 on the watched set, and the epoch of it."""
        return self._best.get(self.watched, {})

    def add(self, record: Record) -> None:
        """Take note of the next record."""
        if record["step"] >= self.step:
            self.step, self.epoch = record["step"], record["epoch"]
        if record["split"] == "train":
            self.train = record
            return
        self.evaluations[record["split"]] = record
        best = self._best.setdefault(record["split"], {})
        for key, value in record.items():
            name = key.removesuffix("/top1")
            if name != key and isinstance(value, int | float) and value > best.get(name, (-1.0,))[0]:
                best[name] = (float(value), record["epoch"])


class MetricWriter:
    """Appends records to metrics.jsonl and TensorBoard.

    Args:
        workdir: the run's directory; None: nothing is written.
        step: the step that the run resumes from. Records of later steps, left by a run that was killed after
            its last checkpoint, are dropped: they will be written again.
        evaluated: the step of the last evaluation; later ones are dropped, too.
        tracker: gets every record besides.

    Attributes:
        path: the run's directory; None where nothing is written.
        latest: what the records say, those before the run resumed included.
    """

    def __init__(
        self, workdir: pathlib.Path | None, step: int, evaluated: int, tracker: Tracker | None = None
    ):
        self.latest, self._tracker = Latest(), tracker
        self._file: Any = None
        self._board: Any = None
        self.path = workdir
        if workdir is None:
            return
        file = workdir / METRICS
        records = read_metrics(workdir) if file.exists() else []
        last = {"train": step}  # of each split
        kept = [record for record in records if record["step"] <= last.get(record["split"], evaluated)]
        for record in kept:
            self.latest.add(record)
        write_bytes(file, "".join(map(_as_line, kept)).encode())
        self._file = open(file, "a", encoding="utf-8")
        self._board = _Board(workdir / "tensorboard", step)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Write one record, `{"step", "epoch", "split", **values}`."""
        if self._file is None:
            return
        record = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
        self.latest.add(record)
        self._file.write(_as_line(record))
        self._file.flush()
        named = {f"{split}/{name}": value for name, value in values.items()}
        self._board.write(step, named)
        if self._tracker is not None:
            self._tracker.write(step, named)

    def images(self, step: int, images: dict[str, bytes]) -> None:
        """Write images for TensorBoard alone: name -> PNG."""
        if self._board is not None:
            self._board.write(step, images)

    def close(self) -> None:
        """Close the files, and finish the tracker."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # it was said when the record was written
                self._file.close()
            self._board.close()
        if self._tracker is not None:
            self._tracker.close()


class _Board:
    """Writes events for TensorBoard. They repeat metrics.jsonl, so one that cannot be written ends nothing.

    tensorboardX's own `SummaryWriter` writes in a thread, and blocks for ever once that has failed.

    Args:
        folder: of the event files.
        step: the step that the run resumes from; TensorBoard hides later ones of earlier files.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        self._writer: Any = None
        with self._not_essential(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{step}")
            begun = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=begun))

    def write(self, step: int, values: Mapping[str, float | bytes]) -> None:
        """Write metrics of a step, or images, which are PNG."""
        if self._writer is None:
            return
        with self._not_essential(self._writer._file_name):
            for name, value in values.items():
                summary = _image(name, value) if isinstance(value, bytes) else scalar(name, value)
                event = Event(wall_time=time.time(), step=step, summary=summary)
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    @contextlib.contextmanager
    def _not_essential(self, path: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            logger.warning(
                f"{path} cannot be written ({reason(error)}): training goes on without TensorBoard"
            )


def _image(name: str, png: bytes) -> Summary:
    width, height = Image.open(io.BytesIO(png)).size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=name, image=image)])


def read_metrics(workdir: pathlib.Path, quiet: bool = False) -> list[Record]:
    """Return all records of a run's metrics.jsonl; damaged lines are left out, with a warning unless `quiet`.

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
    if damaged and not quiet:
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
    usable = complete and isinstance(record["step"], int) and isinstance(record["epoch"], int | float)
    return record if usable and isinstance(record["split"], str) and line.endswith(b"\n") else None
