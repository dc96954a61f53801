"""The table that a terminal shows while a run trains: the run's status, drawn from the records as they are written."""

import pathlib
from collections.abc import Callable

from ekd_jax.common.progress import Progress
from ekd_jax.runs.checkpoint import Checkpoints
from ekd_jax.runs.metrics import Latest
from ekd_jax.runs.picture import draw
from ekd_jax.runs.status import RUNNING, RunStatus, of_records
from ekd_jax.training.setup import Setup


def live_table(
    setup: Setup, path: pathlib.Path, latest: Latest, checkpoints: Checkpoints
) -> Callable[[Progress, str, int, int], str]:
    """Return a function that draws the table for a `Progress`; it waits for no device.

    Args:
        setup: of the run.
        path: directory of the run.
        latest: the records so far.
        checkpoints: of the run.
    """
    config, shown = setup.config, -1

    def table(progress: Progress, doing: str, width: int, height: int) -> str:
        nonlocal shown
        # a text that comes with new steps is about their speed, which is in the records
        stage, shown = "" if progress.done > shown >= 0 else doing, progress.done
        status = RunStatus(
            str(path),
            RUNNING,
            config.model.name,
            config.method.name,
            setup.data.facts.name,
            config.seed,
            step=progress.done,
            steps=setup.steps,
            epoch=setup.epochs(progress.done),
            epochs=config.train.epochs,
            remaining_seconds=progress.seconds_left() if progress.moves else None,
            checkpoint=max(checkpoints.steps(), default=None),
            **of_records(latest, setup.names),
        )
        return draw(status, width, height, stage)

    return table
