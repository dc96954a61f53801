"""What a run keeps and says about itself: its log, its lines on the terminal, its summary."""

import dataclasses
from typing import Any

import jax
import numpy as np

from ekd_jax.common.progress import Progress
from ekd_jax.common.text import clock, human, table
from ekd_jax.config.resolve import identity
from ekd_jax.runs.describe import label
from ekd_jax.training.setup import Job


@dataclasses.dataclass
class Log:
    """What a run remembers beside its state; saved with every checkpoint.

    Attributes:
        sums: the metrics added up since the last training record; on the device while training.
        recorded: step of that record.
        window: seconds of training since then.
        waited: of these, for input.
        last: test metrics of the finished run, or of the last evaluation if that was on the test set.
        best: name -> its best top-1 of all evaluations and the step of it.
        seconds: wall-clock so far.
        execution: how branches run.
    """

    sums: Any
    recorded: int = 0
    window: float = 0.0
    waited: float = 0.0
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    best: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"read": 0.0, "compile": 0.0, "train": 0.0, "evaluate": 0.0}
    )
    execution: str = ""

    @classmethod
    def recall(cls, remembered: dict[str, Any]) -> "Log":
        log = cls(**remembered["log"])
        return dataclasses.replace(log, sums={k: np.float32(v) for k, v in log.sums.items()})

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "sums": {k: float(v) for k, v in jax.device_get(self.sums).items()}}

    def note_best(self, evaluation: dict[str, float], step: int, names: list[str]) -> None:
        for name in names:
            top1 = evaluation[f"{name}/top1"]
            if name not in self.best or top1 > self.best[name]["top1"]:
                self.best[name] = {"top1": top1, "step": step}


def train_line(job: Job, step: int, means: dict[str, float], progress: Progress) -> str:
    """Of the metrics since the last record."""
    top1 = " ".join(f"{means[f'{name}/top1']:.1f}" for name in job.learning)
    return (
        f"step {step:,}/{job.steps:,}  epoch {job.epochs(step):.2f}  loss {means['loss']:.4f}  "
        f"train top-1 {top1}  {means['images/s']:,.0f} images/s  {progress.remaining(step)} left"
    )


def evaluation_line(split: str, epoch: float, evaluation: dict[str, float], names: list[str]) -> str:
    """Of an evaluation."""
    top1 = "  ".join(f"{name} {evaluation[f'{name}/top1']:.2f}" for name in names)
    return f"{split}, epoch {epoch:.2f}  top-1  {top1}"


def summarize(job: Job, log: Log) -> dict[str, Any]:
    """`summary.json` of a run that is complete."""

    def top1(name: str) -> dict[str, float]:
        best = log.best[name]
        return {"top1_last": log.last[f"{name}/top1"], "top1_best": best["top1"], "best_step": best["step"]}

    return {
        **identity(job.config),
        "steps": job.steps,
        "epochs": job.config.train.epochs,
        "seconds": {name: round(value, 1) for name, value in log.seconds.items()},
        "method_parameters": job.students["method_parameters"],
        "best_on": job.watched,
        "students": [{**s, **top1(f"student_{s['student']}")} for s in job.students["students"]],
        "ensemble": top1("ensemble"),
        "others": {n: top1(n) for n in job.names if n != "ensemble" and not n.startswith("student_")},
    }


def summary_table(summary: dict[str, Any]) -> str:
    """The students of a finished run, as text."""

    def row(*cells: str, result: dict[str, float]) -> list[str]:
        return [*cells, f"{result['top1_last']:.2f}", f"{result['top1_best']:.2f}"]

    rows = [
        row(
            str(s["student"]),
            label(s, summary["model"]),
            f"{s['parameters']:,}",
            f"{100 * s['ratio']:.1f}",
            human(s["macs"]),
            result=s,
        )
        for s in summary["students"]
    ]
    for name, result in [("ensemble teacher", summary["ensemble"]), *summary["others"].items()]:
        rows.append(row(name, "", "", "", "", result=result))
    header = ["student", "width", "parameters", "% of 1", "MACs", "top-1 last", "top-1 best"]
    spent = ", ".join(f"{name} {clock(seconds)}" for name, seconds in summary["seconds"].items())
    return (
        f"{table(rows, header)}\n"
        f"top-1: per cent of the test set, after the last epoch; and of the {summary['best_on']} set "
        f"at the best evaluation\n{spent}"
    )
