"""Methods of several stages: runs one after the other, each a run like any other.

The earlier ones live in `stages/<name>` of the run's folder. A complete one is only read, so a run that
was killed goes on where it was, in whichever stage that is.
"""

import pathlib
import sys
from typing import Any

from jax.sharding import Mesh

from ekd_jax import train, workdir
from ekd_jax.config import resolve
from ekd_jax.methods import METHODS
from ekd_jax.workdir import STAGES, SUMMARY

Runs = dict[pathlib.Path, Any]


def runs(config: Any, path: pathlib.Path) -> Runs:
    """All runs that `config` in the folder `path` stands for, in order: folder -> resolved configuration.

    Its own, in `path`, is the last, with what the earlier ones decide as soon as they are complete.
    """
    method = METHODS[config.method.name]
    earlier = {path / STAGES / name: resolve(stage) for name, stage in method.stages(config, path).items()}
    if earlier and all((folder / SUMMARY).exists() for folder in earlier):
        config = resolve(method.settled(config, path))
    return {**earlier, path: config}


def check(planned: Runs) -> None:
    """Raises UserError if a folder holds something else than its run."""
    for folder, config in planned.items():
        workdir.check(folder, config)


def run(config: Any, path: pathlib.Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """Trains all stages, or goes on with them; returns the summary of the last.

    Args and errors as `train.run`.
    """
    *earlier, _ = planned = runs(config, path)
    if not earlier:
        return train.run(config, path, mesh)
    check(planned)
    for number, folder in enumerate(earlier, 1):
        if not (folder / SUMMARY).exists():
            print(f"stage {number} of {len(planned)}: {folder.name}", file=sys.stderr, flush=True)
            train.run(planned[folder], folder, mesh)
    if not (path / SUMMARY).exists():
        print(f"stage {len(planned)} of {len(planned)}", file=sys.stderr, flush=True)
    return train.run(runs(config, path)[path], path, mesh)
