"""TODO: runs.extract."""

import pathlib
from typing import Any

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.config.resolve import identity
from ekd_jax.runs import checkpoint
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.restore import architecture
from ekd_jax.runs.state import deployed
from ekd_jax.runs.workdir import read
from ekd_jax.students.student import check_output, write_student
from ekd_jax.version import __version__


def extract(
    workdir: pathlib.Path,
    student: int,
    output: pathlib.Path,
    step: int | None = None,
    best: bool = False,
) -> dict[str, Any]:
    """Writes student `student` (from 1) of a run to the new folder `output`.

    Only what the student is made of is read from the checkpoint.

    Args:
        workdir: of the run.
        student: 1..S.
        output: must not exist, or be an empty folder.
        step: of the checkpoint; the latest if not given.
        best: of the kept checkpoints the one in which this student did best on the test set.

    Returns:
        What student.json says.

    Raises:
        UserError: no such student, step or run; `output` not empty or not writable.
    """
    run = read(workdir)
    config, students = run.config, run.students["students"]
    if not 1 <= student <= len(students):
        raise UserError(f"--student={student}: {workdir} has students 1 to {len(students)}")
    check_output(output)
    ensemble = make_ensemble(config, run.students["num_classes"])
    copy, member = divmod(student - 1, len(ensemble.students))
    with checkpoint.opened(workdir) as checkpoints:
        step = checkpoints.choose(step, f"student_{student}/top1" if best else None)
        shapes = checkpoints.shapes(step)
        networks = deployed(shapes)[copy]
        like = {kind: ensemble.paths(networks[kind], member + 1) for kind in ("params", "batch_stats")}
        kept = bool(make_method(config).number_of_copies)
        where = {"copies": {str(copy + 1): like}} if kept else like
        restored, remembered = checkpoints.restore_variables(where, step)
    variables = restored["copies"][str(copy + 1)] if kept else restored
    own, name = students[student - 1], f"student_{student}/"
    description = {
        "architecture": {**architecture(run, ensemble, member), "channels": own["widths"]},
        "student": student,
        "parameters": own["parameters"],
        "macs": own["macs"],
        "class_names": run.students["class_names"],
        "preprocessing": {
            "formula": "(image / 255 - mean) / std",
            "mean": list(config.data.mean),
            "std": list(config.data.std),
            "fit": config.data.fit,
            "image_size": config.data.image_size,
        },
        "evaluated_on": remembered["evaluated_on"],
        "metrics": {
            key.removeprefix(name): value
            for key, value in (remembered["evaluation"] or {}).items()
            if key.startswith(name)
        },
        "provenance": {
            **identity(config),
            "test_split": config.data.test_split,
            "step": step,
            "epoch": remembered["epoch"],
            "ekd_jax": __version__,
        },
    }
    return write_student(output, ensemble.alone(variables, member + 1), description)


def fitting_student(workdir: pathlib.Path, max_parameters: int) -> int:
    """The student with at most so many parameters that did best in the run's last evaluation.

    Raises:
        UserError: none is small enough.
    """
    students = read(workdir).students["students"]
    small = [s for s in students if s["parameters"] <= max_parameters]
    if not small:
        least = min(s["parameters"] for s in students)
        raise UserError(f"--max_parameters={max_parameters}: the smallest student has {least}")
    records = {record["split"]: record for record in read_metrics(workdir)}  # the last of each
    last: dict[str, Any] = records.get("validation", records.get("test", {}))
    best = max(small, key=lambda s: (last.get(f"student_{s['student']}/top1", 0.0), s["parameters"]))
    return int(best["student"])
