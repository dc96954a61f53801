"""The metrics of a run: one record per line of `metrics.jsonl`, and the same for TensorBoard."""

import json
import pathlib
from typing import Any

import tensorboardX

from ekd_jax.common.files import write_bytes

METRICS = "metrics.jsonl"


class MetricWriter:
    """Appends records to metrics.jsonl and TensorBoard.

    Args:
        workdir: the run's directory; None: nothing is written.
        step: the step that the run resumes from. Records of later steps, left by a run that was killed after
            its last checkpoint, are dropped: they will be written again.
    """

    def __init__(self, workdir: pathlib.Path | None, step: int):
        self._file: Any = None
        self._board: Any = None
        if workdir is None:
            return
        self.path = workdir / METRICS
        kept = [line for line in self._complete_lines() if json.loads(line)["step"] <= step]
        write_bytes(self.path, "".join(kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Write one record, `{"step", "epoch", "split", **values}`."""
        if self._file is None:
            return
        record = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Close both files."""
        if self._file is not None:
            self._file.close()
            self._board.close()

    def _complete_lines(self) -> list[str]:
        """Return the lines of the file without a last one that a kill cut short."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return all records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / METRICS).read_text(encoding="utf-8").splitlines()]
