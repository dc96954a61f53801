"""Checkpoints: the only file that uses Orbax.

A checkpoint holds the item `state` (the TrainState as nested dicts) and the item `run`, which is JSON: the
SHA-256 of every array of the state, and whatever else the run must remember. Orbax does not notice flipped
bytes; the digests are checked whenever anything is restored.
"""

import contextlib
import hashlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, reason
from ekd_jax.runs.state import TrainState

FOLDER = "checkpoints"
Tree = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. The latest and the best are kept.

    Args:
        workdir: the run's directory; checkpoints are in `checkpoints/<step>`.
        read_only: change nothing, also while a run is writing there.
    """

    def __init__(self, workdir: pathlib.Path, read_only: bool = False):
        self.directory = workdir.absolute() / FOLDER

        def score(metrics: dict[str, float]) -> float:
            return metrics["ensemble/top1"]

        best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
                read_only=read_only,
                cleanup_tmp_directories=not read_only,  # of a run that was killed while saving
                best_fn=score,  # without it Orbax loses the metrics when the run is resumed
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()},
        )

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def choose(self, step: int | None = None, best_by: str | None = None) -> int:
        """Return the step asked for, or the best of the kept ones by a metric, or the latest.

        Args:
            step: of a kept checkpoint.
            best_by: a metric, such as "student_3/top1"; higher is better.

        Raises:
            UserError: there is no such checkpoint, or none was evaluated.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise UserError(f"--step={step}: the steps kept are {', '.join(map(str, steps))}")
            return step
        if best_by is None:
            return steps[-1]
        evaluated = {s: self._run(s)["evaluation"] for s in steps}
        scores = {s: metrics[best_by] for s, metrics in evaluated.items() if metrics}
        if not scores:
            raise UserError(f"no checkpoint in {self.directory} was evaluated yet: leave out --best")
        return max(scores, key=lambda s: (scores[s], s))

    def save(self, state: TrainState, run: Tree, evaluation: dict[str, float] | None) -> None:
        """Save in the background. The checkpoint before is complete when this returns.

        Args:
            state: arrays; may be donated as soon as this returns.
            run: JSON values to remember.
            evaluation: metrics of this state, if it was evaluated; they decide which checkpoint is best.
        """
        tree = parallel.fetch(_as_tree(state))
        run = {**run, "evaluation": evaluation, "sha256": _digests(tree)}
        with self._saving():
            self._check_room(tree)
            self._manager.save(
                int(tree["step"]),
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree), run=ocp.args.JsonSave(run)),
                metrics=evaluation,
            )

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, Tree]:
        """Restore the whole state, as numpy arrays, and the values that the run remembered.

        Raises:
            UserError: the checkpoint is damaged.
        """
        tree, run = self._restore(_as_tree(like), step)
        fields = {name: tree[name] for name in tree if name != "opt_state"}
        leaves = jax.tree.leaves(tree["opt_state"])
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
        return TrainState(opt_state=opt_state, **fields), run

    def restore_variables(self, like: Tree, step: int) -> tuple[Tree, Tree]:
        """Restore some sub-trees only; nothing else is read from disk.

        Args:
            like: nested dicts of shapes, such as `{"params": {"base": ...}}`; a part of `shapes`.
            step: of the checkpoint.

        Raises:
            UserError: the checkpoint is damaged.
        """
        return self._restore(like, step)

    def shapes(self, step: int) -> Tree:
        """Return the shapes of the arrays of a checkpoint, as nested dicts."""
        with self._reading(step):
            saved = self._manager.item_metadata(step)["state"].tree
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)

    def wait(self) -> None:
        """Wait until everything that was saved is on disk.

        Raises:
            UserError: it could not be written.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """End the background threads; call `wait` first."""
        self._manager.close()

    def _check_room(self, tree: Tree) -> None:
        """Raise OSError if the disk is full: Orbax cleans up after a failed write, but prints pages of tracebacks."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        if free < 1.2 * needed + 2**20:
            raise OSError(f"it needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free")

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a failed background write is raised here, as many kinds of exception
            parallel.await_loss()
            raise UserError(
                f"cannot write a checkpoint to {self.directory}: {reason(error)}; "
                f"make room and run the same command to resume from step {max(self.steps(), default=0)}"
            ) from error

    def _run(self, step: int) -> Tree:
        """Return the values that the run remembered at a step."""
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run

    def _restore(self, like: Tree, step: int) -> tuple[Tree, Tree]:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), like)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        run = self._run(step)
        with self._reading(step):
            args = ocp.args.PyTreeRestore(like, as_numpy, partial_restore=True)
            tree = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
            for path, digest in _digests(tree).items():
                if run["sha256"].get(path) != digest:
                    raise ValueError(f"SHA-256 of {path} differs")
        return tree, run

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            parallel.await_loss()  # then nothing is damaged
            others = ", ".join(str(s) for s in self.steps() if s != step) or "there is none"
            raise UserError(
                f"checkpoint {self.directory / str(step)} is damaged: delete that directory to use "
                f"another one ({others}) ({reason(error)})"
            ) from error


@contextlib.contextmanager
def open_checkpoints(workdir: pathlib.Path) -> Iterator[Checkpoints]:
    """Open the checkpoints of a complete or running run, to read them.

    Raises:
        UserError: there is no complete checkpoint.
    """
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no checkpoints: pass the --workdir of a run")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if not checkpoints.steps():
            raise UserError(f"{workdir} holds no complete checkpoint yet: wait for the run to save one")
        yield checkpoints
    finally:
        checkpoints.close()


def _as_tree(state: TrainState) -> Tree:
    leaves = jax.tree.leaves(state.opt_state)
    width = len(str(len(leaves)))
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": {str(i).zfill(width): leaf for i, leaf in enumerate(leaves)},
        "copies": state.copies,
    }


def _digests(tree: Tree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(
            np.ascontiguousarray(leaf).tobytes()
        ).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
