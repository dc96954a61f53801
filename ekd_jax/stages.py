"""Methods of several stages: runs one after the other, each a run like any other.

The earlier ones live in `stages/<name>` of the run's folder. A complete one is only read, so a run that
was killed goes on where it was, in whichever stage that is.
"""

import pathlib
import sys
from typing import Any

from jax.sharding import Mesh

from ekd_jax import train
from ekd_jax.config import resolve
from ekd_jax.methods import METHODS
from ekd_jax.workdir import STAGES, SUMMARY, check


def before(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """The runs that come before that of `config`, in order: name -> resolved configuration."""
    earlier = METHODS[config.method.name].stages(config, workdir)
    return {name: resolve(stage) for name, stage in earlier.items()}


def settled(config: Any, workdir: pathlib.Path) -> Any:
    """The configuration with what the earlier runs decide; as it is while they are not complete."""
    earlier = before(config, workdir)
    if not earlier or not all((workdir / STAGES / name / SUMMARY).exists() for name in earlier):
        return config
    return resolve(METHODS[config.method.name].settled(config, workdir))


def run(config: Any, path: pathlib.Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """Trains all stages, or goes on with them; returns the summary of the last.

    Args and errors as `train.run`.
    """
    earlier = before(config, path)
    if not earlier:
        return train.run(config, path, mesh)
    folders = {name: path / STAGES / name for name in earlier}
    check(path, settled(config, path))
    for name, stage in earlier.items():
        check(folders[name], stage)
    for number, (name, stage) in enumerate(earlier.items(), 1):
        if not (folders[name] / SUMMARY).exists():
            print(f"stage {number} of {len(earlier) + 1}: {name}", file=sys.stderr, flush=True)
            train.run(stage, folders[name], mesh)
    if not (path / SUMMARY).exists():
        print(f"stage {len(earlier) + 1} of {len(earlier) + 1}", file=sys.stderr, flush=True)
    return train.run(settled(config, path), path, mesh)
