"""What a run writes while it goes on: console, metrics.jsonl, TensorBoard; and whole files safely."""

import json
import os
import pathlib
import sys
import time
from typing import Any, TextIO

import tensorboardX

METRICS = "metrics.jsonl"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes the file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class MetricWriter:
    """Appends records to metrics.jsonl and TensorBoard.

    Args:
        workdir: of the run.
        step: that the run goes on from. Records of later steps, left by a run that was killed after
            its last checkpoint, are dropped: they will be written again.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self.path = workdir / METRICS
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_bytes(self.path, "".join(kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """One record: `{"step", "epoch", "split", ...values}`, one line."""
        record = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _lines(self) -> list[str]:
        """Complete lines; a last one that a kill cut short is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """All records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / METRICS).read_text(encoding="utf-8").splitlines()]


class Progress:
    """Steps done, speed and time left: a line that renews itself on a terminal, none elsewhere.

    Args:
        total: steps of the run.
        start: step it goes on from.
        stream: where to.
    """

    def __init__(self, total: int, start: int, stream: TextIO = sys.stderr):
        self.total, self.start, self.stream = total, start, stream
        self._width = 0
        self.begin()

    def begin(self) -> None:
        """The time left is reckoned from now on."""
        self._began = time.monotonic()

    def remaining(self, step: int) -> str:
        """Time left at the speed so far, as h:mm:ss."""
        done = step - self.start
        seconds = (time.monotonic() - self._began) / max(done, 1) * (self.total - step)
        return clock(seconds)

    def update(self, step: int, text: str) -> None:
        if self.stream.isatty():
            left = f"  {self.remaining(step)} left" if step > self.start else ""
            line = f"step {step:,}/{self.total:,}  {text}{left}"
            self.stream.write("\r" + line.ljust(self._width))
            self.stream.flush()
            self._width = len(line)

    def line(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def clear(self) -> None:
        """Wipes the line that renews itself."""
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0


def clock(seconds: float) -> str:
    """75 -> "0:01:15"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def table(rows: list[list[Any]], header: list[str]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    cells = [header, *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
