"""The same run with several random seeds, and their mean and standard deviation.

The folder has a directory for each seed, `seed0`, `seed1`, ..., as a label of a comparison has. Each holds the run
that `--config.seed` would train alone, bit for bit. `seeds.json` and `seeds.md` are written at the end, of all complete
runs.
"""

import pathlib

from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.records import as_json, write_results
from ekd_jax.data.dataset import Source
from ekd_jax.runs import workdir
from ekd_jax.runs.history import Permit
from ekd_jax.runs.records import CONFIG
from ekd_jax.training.comparison import Entry
from ekd_jax.training.comparison_table import Comparison, as_markdown, compare
from ekd_jax.training.several import train_all

JSON, MARKDOWN = "seeds.json", "seeds.md"


def _entry(config: FrozenConfigDict, path: pathlib.Path, seed: int) -> Entry:
    own = ConfigDict(config)
    own.seed, own.seeds = seed, ()
    return Entry(path.name, workdir.seed_directory(path, seed), FrozenConfigDict(own), {})


def check(config: FrozenConfigDict, path: pathlib.Path, permit: Permit | None = None) -> list[Entry]:
    """Return the runs of a configuration with several seeds, and those that are there from before.

    Args:
        config: a complete configuration.
        path: directory of all.
        permit: what of the configuration may be another one than the runs have; nothing if not given.

    Returns:
        First the runs of `config.seeds` in their order, then those of other seeds.

    Raises:
        UserError: the folder holds something else, or a run that differs in more than its seed.
    """
    if (path / CONFIG).exists():
        raise UserError(
            f"--workdir={path} holds a run of one seed: choose another directory for config.seeds={config.seeds}"
        )
    there = workdir.seed_runs(path)
    if path.is_dir():
        own = {".lock", JSON, MARKDOWN, *(run.name for run in there.values())}
        others = sorted(file.name for file in path.iterdir() if file.name not in own)
        others = [name for name in others if not (name.startswith(".seeds.") or name in _started(config))]
        if others:
            raise UserError(
                f"--workdir={path} holds other files ({', '.join(others[:3])}): choose an empty or new directory"
            )
    runs = [_entry(config, path, seed) for seed in dict.fromkeys([*config.seeds, *there])]
    for run in runs:
        run.check(permit)
    return runs


def _started(config: FrozenConfigDict) -> set[str]:
    """Return names of directories in which a run may have been killed before it wrote anything."""
    return {workdir.seed_directory(pathlib.Path(), seed).name for seed in config.seeds}


def run(
    config: FrozenConfigDict,
    path: pathlib.Path,
    mesh: Mesh | None = None,
    source: Source | None = None,
    permit: Permit | None = None,
    at_once: int = 1,
) -> Comparison:
    """Train or resume the runs of all seeds, and return the statistics of all that are complete in the folder.

    For the arguments and errors see `single.run` and `several.train_all`.
    """
    parallel.shares(at_once, mesh)
    runs = check(config, path, permit)
    parallel.gathered(0)  # all processes have looked
    path.mkdir(parents=True, exist_ok=True)
    with workdir.locked(path):
        train_all(runs[: len(config.seeds)], mesh, source, permit, at_once)
        found = compare(runs)
        if parallel.is_main():
            text = as_markdown(found, f"python -m ekd_jax.compare --runs={path}")
            again = "complete runs are intact: run the same command to write it again"
            write_results(path / JSON, as_json(found), path / MARKDOWN, text, again)
    return found
