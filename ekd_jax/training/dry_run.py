"""A dry run: what a run would do, as text."""

import json
import pathlib

from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.text import human
from ekd_jax.config.build import build_networks
from ekd_jax.config.resolve import fingerprint, steps_in, to_dict
from ekd_jax.data.feed import placements, resident_bytes
from ekd_jax.data.labels import check_class_weights
from ekd_jax.data.opening import known_facts
from ekd_jax.runs.describe import as_text, describe, memory
from ekd_jax.runs.history import Permit
from ekd_jax.runs.teachers import load_teachers
from ekd_jax.training import plans, seeds
from ekd_jax.training.optimizer import make_optimizer, rate_in_words
from ekd_jax.training.setup import check_batches, frozen_in_words


def dry_run(config: FrozenConfigDict, path: pathlib.Path, permit: Permit | None = None) -> str:
    """Return what a run would do: configuration, students, steps and memory. Nothing is written.

    Args:
        config: a complete configuration.
        path: directory of the run.
        permit: what of the configuration may be another one than the run was started with.

    Raises:
        UserError: as a run, before it starts.
    """
    if config.seeds:
        first, *others = seeds.check(config, path, permit)[: len(config.seeds)]
        rest = f"; then the same in {', '.join(run.path.name for run in others)}" if others else ""
        return dry_run(first.config, first.path, permit) + rest
    planned = plans.runs(config, path)
    plans.check(planned, permit)
    parts = []
    for number, (directory, run) in enumerate(planned.items(), 1):
        name = "" if directory == path else f", {directory.name}"
        title = f"run {number} of {len(planned)}{name}\n" if len(planned) > 1 else ""
        parts.append(title + _describe_run(run, directory, path, later=number > 1))
    return "\n\n".join(parts)


def _describe_run(
    config: FrozenConfigDict, directory: pathlib.Path, path: pathlib.Path, later: bool
) -> str:
    """Describe one run of a plan; the teachers of a `later` one may come from the runs before it."""
    mesh, known = parallel.make_mesh(fsdp=config.train.fsdp), known_facts(config)
    check_batches(config, mesh, known.train_examples)
    classes, shape = known.num_classes, known.input_shape
    networks = build_networks(config, classes, shape)
    taught = None
    if not later:
        teachers = load_teachers(networks.method.teacher_sources, path, known)
        taught = [teacher.shapes() for teacher in teachers]
    description = describe(networks, config.model.name, taught)
    where = placements(config, known, mesh)
    steps = steps_in(config.train.epochs, config, known.train_examples)
    optimizer = make_optimizer(config, networks.method, steps)
    check_class_weights(config, known)
    held_out = f"{known.validation_examples:,} for validation, " if known.validation_examples else ""
    lines = [
        json.dumps(to_dict(config), indent=2),
        as_text(description),
        f"fingerprint {fingerprint(config)}",
        f"{steps:,} steps of {config.train.batch_size} images, {config.train.epochs:g} epochs "
        f"of {known.train_examples:,}, on {mesh.size} x {mesh.devices.flat[0].device_kind}",
        *filter(None, (rate_in_words(config), frozen_in_words(config))),
        f"images: training set {where.train}; {held_out}{known.test_examples:,} to test on, "
        f"{where.evaluation}",
    ]
    if taught is not None:
        image_bytes = resident_bytes(config, known, mesh)
        needed = memory(networks, optimizer, config, taught, image_bytes, mesh.size)
        sizes = ", ".join(f"{name} {human(size)}B" for name, size in needed.items())
        lines.append(f"memory per device, estimated: {human(sum(needed.values()))}B ({sizes})")
    return "\n".join([*lines, f"the run's directory is {directory}; nothing was trained"])
