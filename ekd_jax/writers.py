"""What a run writes while it goes on: console, metrics.jsonl, TensorBoard; and whole files safely."""

import json
import os
import pathlib
import sys
import time
from typing import Any, TextIO

import tensorboardX

METRICS = "metrics.jsonl"


def user_cache() -> pathlib.Path:
    """Where things are kept that can be made again: ~/.cache/ekd_jax, or below $XDG_CACHE_HOME."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ekd_jax"


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
        workdir: of the run; None: nothing is written.
        step: that the run goes on from. Records of later steps, left by a run that was killed after
            its last checkpoint, are dropped: they will be written again.
    """

    def __init__(self, workdir: pathlib.Path | None, step: int):
        self._file: Any = None
        self._board: Any = None
        if workdir is None:
            return
        self.path = workdir / METRICS
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_bytes(self.path, "".join(kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """One record: `{"step", "epoch", "split", ...values}`, one line."""
        if self._file is None:
            return
        record = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        if self._file is not None:
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
        stream: where to; standard error if not given.
    """

    def __init__(self, total: int, start: int, stream: TextIO | None = None):
        self.total, self.start, self.stream = total, start, stream or sys.stderr
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


class TaskProgress:
    """How much of some work is done: a line that renews itself on a terminal, one a minute elsewhere.

    Args:
        what: is done.
        total: how much there is.
        start: how much was done before.
        unit: what is counted; "bytes" are shown as MB.
    """

    def __init__(self, what: str, total: int, start: int, unit: str):
        self.what, self.total, self.start, self.unit = what, total, start, unit
        self.done, self.began = start, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.next = self.began + 1

    def add(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now >= self.next:
            self.next = now + (0.5 if self.terminal else 60)
            speed = max(self.done - self.start, 1) / (now - self.began)
            left = clock((self.total - self.done) / speed)
            self._write(f"{self._count()}, {self._amount(speed)} a second, {left} left")

    def end(self) -> None:
        self._write(self._count(), "\n" if self.terminal else "")

    def _count(self) -> str:
        done = self._amount(self.done).removesuffix(f" {self.unit}")
        return f"{self.what}: {done} of {self._amount(self.total)}"

    def _amount(self, value: float) -> str:
        return megabytes(value) if self.unit == "bytes" else f"{value:,.0f} {self.unit}"

    def _write(self, text: str, after: str = "") -> None:
        line = f"\r{text:<100}" if self.terminal else f"{text}\n"
        sys.stderr.write(line + after)
        sys.stderr.flush()


def megabytes(count: float) -> str:
    """12 MB"""
    return f"{count / 1e6:,.0f} MB"


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
