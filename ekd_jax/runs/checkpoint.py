"""Checkpoints: the only file that uses Orbax.

A checkpoint holds the item `state` (the TrainState as nested dicts) and the item `run`, which is JSON: the
SHA-256 of every array of the state and of these values, and whatever else the run must remember. Orbax does not
notice flipped bytes; the digests are checked whenever anything is restored.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, reason, writing_failure
from ekd_jax.common.log import logger
from ekd_jax.runs.state import TrainState

FOLDER, DAMAGED = "checkpoints", "damaged"
LATEST = 2  # checkpoints that are kept besides the best, so that one is left if a disk damages the last
BEST_BY = "ensemble/top1"
Tree = dict[str, Any]


class _LatestAndBest:
    """The policy that tells Orbax which checkpoints to keep: the latest ones and the best.

    Attributes:
        best: step of the best one; None if none was evaluated.
        score: of that one.
    """

    best: int | None = None
    score = float("-inf")

    def note(self, step: int, evaluation: dict[str, float] | None) -> None:
        """Take note of a checkpoint; of equally good ones the first is the best."""
        if evaluation and evaluation[BEST_BY] > self.score:
            self.best, self.score = step, evaluation[BEST_BY]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return which checkpoints are kept, in the order of `checkpoints`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-LATEST:], self.best}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run. The two latest and the best are kept.

    Args:
        workdir: the run's directory; checkpoints are in `checkpoints/<step>`.
        read_only: change nothing, also while a run is writing there.
    """

    def __init__(self, workdir: pathlib.Path, read_only: bool = False):
        self.directory = workdir.absolute() / FOLDER
        self._read_only = read_only
        self._kept = _LatestAndBest()
        with _without_warnings() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._kept,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,  # of a run that was killed while saving
                    # Orbax numbers savings process-wide: of two runs that save at a time, one would wait for
                    # the other's directories, and not find its own
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
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
            run: JSON values to remember; may change as soon as this returns.
            evaluation: metrics of this state, if it was evaluated; they decide which checkpoint is best.
        """
        tree = parallel.fetch(_as_tree(state))
        run = {**run, "evaluation": evaluation, "sha256": _digests(tree)}
        run = json.loads(json.dumps(run))  # a copy: Orbax writes in the background, while the run goes on
        run["own_sha256"] = _digest_of_json(run)
        step = int(tree["step"])
        self._kept.note(step, evaluation)
        with self._saving():
            self._check_room(tree)
            if step in self.steps():  # it was saved before it was evaluated
                self.discard(step)
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree), run=ocp.args.JsonSave(run))
            )

    def recover(self, like: TrainState) -> tuple[TrainState, Tree] | None:
        """Restore the newest checkpoint that is whole, to train on from it; newer ones are damaged, and set aside.

        Returns:
            The whole state, as numpy arrays, and the values that the run remembered; None if nothing was saved.

        Raises:
            UserError: all checkpoints are damaged.
        """
        damaged: dict[int, str] = {}
        if self.steps() and (different := self.differences(like, self.steps()[-1])):
            raise UserError(
                f"the checkpoints in {self.directory} are of another version of ekd_jax, whose state has other "
                f"arrays ({different}): train on with that version"
            )
        for step in reversed(self.steps()):
            try:
                restored, problem = self.restore(like, step), ""
            except UserError as error:
                problem = str(error)
            if parallel.gathered(np.bool_(problem)).any():  # processes must go on from the same step
                damaged[step] = problem or f"checkpoint {self.directory / str(step)} is damaged"
                continue
            for newer, why in damaged.items():
                logger.warning(f"{why}: moved to {self._set_aside(newer)}, going on from step {step:,}")
            for other in self.steps():
                with contextlib.suppress(UserError):  # a damaged one is never the best
                    self._kept.note(other, self._run(other)["evaluation"])
            return restored
        if damaged:
            raise UserError(
                f"all checkpoints in {self.directory} are damaged ({', '.join(map(str, sorted(damaged)))}; "
                f"{next(iter(damaged.values()))}): put back a copy, or train in another --workdir"
            )
        return None

    def differences(self, like: TrainState, step: int) -> str:
        """Return in what the arrays of a checkpoint differ from those of a state, "" if in nothing.

        A checkpoint that cannot be read differs in nothing: that is for `recover` to find out.
        """
        wanted = {path: np.shape(leaf) for path, leaf in _leaves(_as_tree(like))}
        try:
            saved = {path: tuple(leaf.shape) for path, leaf in _leaves(self.shapes(step))}
        except UserError:
            return ""
        for path in sorted(wanted.keys() | saved.keys()):
            if wanted.get(path) != saved.get(path):
                return f"{path}: {saved.get(path, 'none')} there, {wanted.get(path, 'none')} now"
        return ""

    def _set_aside(self, step: int) -> pathlib.Path:
        """Move a checkpoint out of the way, so that this step can be saved again; return where it is then."""
        place = self.directory.parent / DAMAGED / str(step)
        if parallel.is_main():
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)  # one that was damaged before
            (self.directory / str(step)).rename(place)
        parallel.gathered(0)  # others wait until it is gone
        self._manager.reload()
        return place

    def discard(self, step: int) -> None:
        """Delete a checkpoint from which training cannot go on."""
        self.wait()
        self._manager.delete(step)

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
                f"cannot write a checkpoint to {self.directory}: {writing_failure(error)}; "
                f"make room and run the same command to resume from step {max(self.steps(), default=0)}"
            ) from error

    def _run(self, step: int) -> Tree:
        """Return the values that the run remembered at a step."""
        with self._reading(step):
            run: Tree = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
            if run.pop("own_sha256", "") != _digest_of_json(run):
                raise ValueError("SHA-256 of the values that the run remembered differs")
            return run

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
            others = [str(other) for other in self.steps() if other != step]
            hint = f": pass --step={' or --step='.join(others)}" if self._read_only and others else ""
            raise UserError(
                f"checkpoint {self.directory / str(step)} is damaged ({reason(error)}){hint}"
            ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Orbax from warning, three times, that what is opened to be read is read only."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run, in order; nothing is opened."""
    names = [path.name for path in (workdir / FOLDER).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


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


def _digest_of_json(values: Tree) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digests(tree: Tree) -> dict[str, str]:
    return {
        path: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        for path, leaf in _leaves(tree)
    }


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Return the arrays of a tree with their paths, such as `params/base/conv/kernel`."""
    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in with_paths]
