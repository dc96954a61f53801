"""TODO: training.comparison_table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ekd_jax.common.errors import UserError
from ekd_jax.common.text import human, table
from ekd_jax.training.comparison import Run

BASELINE = "baseline"


def results(runs: list[Run]) -> dict[str, Any]:
    """What the complete runs have come to.

    Returns:
        `{"model", "data", "epochs", "labels": {label: {"method", "n", "seeds", "seconds", "students":
        [{"student", "network", "width", "parameters", "top1", "mean", "std", "difference"}], "ensemble":
        {"top1", ...}, "others": {name: {...}}}}}`. "top1" are the seeds' accuracies on the test set after
        the last epoch, per cent; "std" is the sample's, None for one seed; "difference" is of the mean, to
        the label "baseline": to its ensemble, or to its student of the same number if that has as many
        parameters, else None. "parameters" are their mean where a method looks for the structure itself.

    Raises:
        UserError: none is complete.
    """
    labels: dict[str, Any] = {}
    for label in dict.fromkeys(run.label for run in runs):
        done = [run for run in runs if run.label == label and run.complete]
        if not done:
            continue
        summaries = [run.summary() for run in done]
        first, each = summaries[0], [s["students"] for s in summaries]
        labels[label] = {
            "method": first["method"],
            "n": len(done),
            "seeds": [run.config.seed for run in done],
            "seconds": [round(run.seconds(), 1) for run in done],
            "students": [
                {
                    **{name: row[0][name] for name in ("student", "network", "width")},
                    "parameters": round(statistics.fmean(s["parameters"] for s in row)),
                    **_statistics(row),
                }
                for row in zip(*each, strict=True)
            ],
            "ensemble": _statistics([s["ensemble"] for s in summaries]),
            "others": {
                name: _statistics([s["others"][name] for s in summaries]) for name in first["others"]
            },
        }
    if not labels:
        folder = runs[0].path.parent.parent
        raise UserError(f"no run in {folder} is complete: train first, without --report")
    if base := labels.get(BASELINE):
        for label, row in labels.items():
            if label != BASELINE:
                _note_differences(row, base)
    config = runs[0].config
    about = {"model": config.model.name, "data": config.data.name, "epochs": config.train.epochs}
    return {**about, "labels": labels}


def _statistics(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one student's results, one a seed."""
    top1 = [result["top1_last"] for result in results]
    return {
        "top1": top1,
        "mean": statistics.fmean(top1),
        "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "difference": None,
    }


def _note_differences(row: dict[str, Any], base: Mapping[str, Any]) -> None:
    pairs = [(row["ensemble"], base["ensemble"])]
    for own, its in zip(row["students"], base["students"], strict=False):
        if own["parameters"] == its["parameters"]:
            pairs.append((own, its))
    for own, its in pairs:
        own["difference"] = own["mean"] - its["mean"]


def rows_and_header(found: Mapping[str, Any], plus_minus: str) -> tuple[list[list[str]], list[str]]:
    """The table's cells."""
    labels = found["labels"]
    students = max(len(row["students"]) for row in labels.values())
    numbers = {row["n"] for row in labels.values()}

    def cell(result: Mapping[str, Any]) -> str:
        spread = "" if result["std"] is None else f" {plus_minus} {result['std']:.2f}"
        change = "" if result["difference"] is None else f" ({result['difference']:+.2f})"
        return f"{result['mean']:.2f}{spread}{change}"

    rows = [
        [
            label if len(numbers) == 1 else f"{label} (n = {row['n']})",
            *map(cell, row["students"]),
            *[""] * (students - len(row["students"])),
            cell(row["ensemble"]),
            " ".join(human(student["parameters"]) for student in row["students"]),
        ]
        for label, row in labels.items()
    ]
    number = f"n = {numbers.pop()}" if len(numbers) == 1 else ""
    return rows, [number, *(f"student {i + 1}" for i in range(students)), "ensemble", "parameters"]


def _explained(found: Mapping[str, Any], plus_minus: str) -> str:
    text = (
        f"{found['model']} on {found['data']}, {found['epochs']:g} epochs: top-1 after the last epoch, per "
        f"cent of the test set"
    )
    if any(row["n"] > 1 for row in found["labels"].values()):
        text += f", mean {plus_minus} standard deviation of n seeds"
    if BASELINE in found["labels"] and len(found["labels"]) > 1:
        text += f"; in brackets what it is more than {BASELINE}'s, of a student of the same number and size"
    return text


def as_text(found: Mapping[str, Any]) -> str:
    """Results as a table for a terminal."""
    return f"{table(*rows_and_header(found, '+-'))}\n{_explained(found, '+-')}"


def as_markdown(found: Mapping[str, Any], command: str) -> str:
    """The same for a document."""
    rows, header = rows_and_header(found, "±")
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_explained(found, '±')}.\n\n```\n{command}\n```\n\n{cells}\n"
