"""Trains a family of students: python -m ekd_jax.main --config=configs/digits.py [--workdir=DIR]

Run the same command again to go on after an interruption. `--dry_run` prints what would happen.

Several processes, each on its own devices, train together: started by Slurm, Open MPI, GKE or on a Cloud
TPU pod they find each other; elsewhere --coordinator, --num_processes and --process_id tell them.
"""

import contextlib
import json
import os
import pathlib
from typing import Any

from absl import flags

from ekd_jax import commands, parallel, report, stages
from ekd_jax.config import fingerprint, make_method, to_dict
from ekd_jax.data.feed import placements, resident_bytes
from ekd_jax.data.sources import known_facts
from ekd_jax.describe import as_text, describe, human, memory
from ekd_jax.job import check_batches, steps_in
from ekd_jax.optimizer import rate_in_words
from ekd_jax.teachers import load_teachers

FLAGS = flags.FLAGS


def main() -> None:
    """The command."""
    config = commands.config()
    parallel.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.coordinator_timeout)
    with contextlib.ExitStack() as stack:
        if not parallel.is_main():
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        _main(config)


def _main(config: Any) -> None:
    path = pathlib.Path(FLAGS.workdir or f"runs/{commands.config_name()}")
    if FLAGS.dry_run:
        print(dry_run(config, path))
        return
    summary = stages.run(config, path)
    print(report.summary_table(summary))
    print(f"everything is in {path}; take a student out with python -m ekd_jax.extract --workdir={path}")


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
    description = describe(config, known.input_shape, classes, taught)
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
        needed = memory(config, description, resident_bytes(config, known, mesh), mesh.size)
        sizes = ", ".join(f"{name} {human(size)}B" for name, size in needed.items())
        lines.append(f"memory of a device, estimated: {human(sum(needed.values()))}B ({sizes})")
    return "\n".join([*lines, f"files go to {path}; nothing was trained"])


if __name__ == "__main__":
    commands.define_config()
    flags.DEFINE_string("workdir", None, "folder of the run; runs/<name of the config> if not given")
    flags.DEFINE_boolean("dry_run", False, "print configuration, students, steps and memory; train nothing")
    flags.DEFINE_string("coordinator", None, "HOST:PORT that process 0 listens at, for several processes")
    flags.DEFINE_integer("num_processes", None, "how many processes train together", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
    flags.DEFINE_integer("coordinator_timeout", 300, "seconds to wait for the others", lower_bound=1)
    commands.run(main)
