"""TODO: training.dry_run."""

import json
import pathlib
from typing import Any

from ekd_jax.common import parallel
from ekd_jax.common.text import human
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.config.resolve import fingerprint, to_dict
from ekd_jax.data.feed import placements, resident_bytes
from ekd_jax.data.opening import known_facts
from ekd_jax.runs.describe import as_text, describe, memory
from ekd_jax.runs.teachers import load_teachers
from ekd_jax.training import plans as stages
from ekd_jax.training.optimizer import rate_in_words
from ekd_jax.training.setup import check_batches, steps_in


def dry_run(config: Any, path: pathlib.Path) -> str:
    """What a run would do, as text: configuration, students, steps and memory. Nothing is written.

    Raises:
        UserError: what a run would raise before it starts.
    """
    planned = stages.runs(config, path)
    stages.check(planned)
    parts = []
    for number, (folder, stage) in enumerate(planned.items(), 1):
        name = "" if folder == path else f", {folder.name}"
        title = f"stage {number} of {len(planned)}{name}\n" if len(planned) > 1 else ""
        parts.append(title + _plan(stage, folder, path, later=number > 1))
    return "\n\n".join(parts)


def _plan(config: Any, path: pathlib.Path, workdir: pathlib.Path, later: bool) -> str:
    """One run; with `later` its teachers may come out of runs before it."""
    mesh, known = parallel.make_mesh(fsdp=config.train.fsdp), known_facts(config)
    check_batches(config, mesh, known.train_examples)
    method, classes = make_method(config), known.num_classes
    taught = None
    if not later:
        teachers = load_teachers(method.teacher_sources, workdir, classes, known.input_shape)
        taught = [teacher.shapes() for teacher in teachers]
    trace = make_ensemble(config, classes).trace(known.input_shape)
    description = describe(config, trace, method, taught)
    where = placements(config, known, mesh)
    steps = steps_in(config.train.epochs, config, known.train_examples)
    held_out = f"{known.validation_examples:,} for validation, " if known.validation_examples else ""
    lines = [
        json.dumps(to_dict(config), indent=2),
        as_text(description),
        f"fingerprint {fingerprint(config)}",
        f"{steps:,} steps of {config.train.batch_size} images, {config.train.epochs:g} epochs "
        f"of {known.train_examples:,}, on {mesh.size} x {mesh.devices.flat[0].device_kind}",
        *filter(None, [rate_in_words(config)]),
        f"images: training set {where['train']}; {held_out}{known.test_examples:,} to test on, "
        f"{where['evaluation']}",
    ]
    if taught is not None:
        needed = memory(config, trace, method, description, resident_bytes(config, known, mesh), mesh.size)
        sizes = ", ".join(f"{name} {human(size)}B" for name, size in needed.items())
        lines.append(f"memory of a device, estimated: {human(sum(needed.values()))}B ({sizes})")
    return "\n".join([*lines, f"files go to {path}; nothing was trained"])
