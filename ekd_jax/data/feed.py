"""Batches on the devices, from a set that stays there or streamed from disk.

Either way the batch of a step is the same: the order is a function of (seed, epoch), and the random numbers for
reading an image are a function of (seed, position in the order). Each process reads only its own part of the
batches.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.data.dataset import Facts
from ekd_jax.data.opening import Data
from ekd_jax.data.resident import Resident, ResidentEvaluation, place_on_devices
from ekd_jax.data.stream import Streamed, StreamedEvaluation

Array = jax.Array
Placement = Literal["replicated", "sharded", "stream"]
Shapes = tuple[Array | jax.ShapeDtypeStruct, ...]


class Feed(Protocol):
    """Training batches by step."""

    def max_steps(self) -> int:
        """Return the largest number of steps that one dispatch may take."""

    def is_ready(self, step: int) -> bool:
        """Return whether `load` will return at once."""

    def load(self, step: int) -> tuple[Array, ...]:
        """Return arrays on the devices that hold the batches from `step` on; waits for them."""

    def select_batch(self, loaded: tuple[Array, ...], i: Array) -> tuple[Array, Array, Array]:
        """Return batch `i`, counted from 0, of the arrays that `load` returned.

        This is traced as part of the training program.

        Returns:
            Images (B, H, W, C) uint8, labels (B,) int32, and numbers of the examples (B,) int32.
        """

    @property
    def shapes(self) -> Shapes:
        """Arrays like those that `load` returns, or their shapes; for compiling."""

    def close(self) -> None:
        """End threads and processes."""


class EvaluationSet(Protocol):
    """Examples to evaluate on, each exactly once.

    Attributes:
        name: "test" or "validation".
        examples: number of examples.
    """

    name: str
    examples: int

    def chunks(self) -> Iterator[tuple[Array, Array, int]]:
        """Yield images (N, H, W, C) uint8, labels (N,) int32, and how many of these N count."""

    @property
    def shapes(self) -> Shapes:
        """Images and labels of a chunk, or their shapes; for compiling."""


class Placements(NamedTuple):
    """The images of a run: whole on every device, divided over the devices, or streamed from disk.

    Attributes:
        train: images to train on.
        evaluation: images to validate and test on.
    """

    train: Placement
    evaluation: Placement


def placements(config: FrozenConfigDict, facts: Facts, mesh: Mesh) -> Placements:
    """Choose where the images of a run are.

    With data.placement=auto it is the first placement that fits in `data.device_share` of a device's memory.
    Training images that are cropped anew in every epoch (data.fit=crop) can only be streamed.

    Raises:
        UserError: `data.placement` asks for something impossible.
    """
    section = config.data
    asked: Placement | Literal["auto"] = section.placement
    if section.fit == "crop" and asked in ("replicated", "sharded"):
        raise UserError(
            f"data.placement={asked} keeps images as they are, but data.fit=crop cuts them anew in every "
            f"epoch: pass --config.data.placement=stream, or --config.data.fit=stretch"
        )
    available = section.device_share * parallel.device_memory(mesh)

    def choose(size: int) -> Placement:
        if asked != "auto":
            return asked
        if size <= available:
            return "replicated"
        return "sharded" if size <= available * mesh.size else "stream"

    sizes = _image_bytes(facts)
    train: Placement = "stream" if section.fit == "crop" else choose(sizes.train)
    available -= sizes.train * _share_per_device(train, mesh)
    return Placements(train, choose(sizes.evaluation))


def training_feed(config: FrozenConfigDict, data: Data, mesh: Mesh, steps: int) -> Feed:
    """Return the batches of the training set.

    Args:
        config: resolved configuration.
        data: the opened data set.
        mesh: devices that share a batch.
        steps: number of steps of the whole run.

    Raises:
        UserError: an image cannot be read, a label is out of range, or the placement is impossible.
    """
    placement = placements(config, data.facts, mesh).train
    if placement == "stream":
        return Streamed(config, data, mesh, steps)
    return Resident(config, data, mesh, placement)


def evaluation_set(config: FrozenConfigDict, data: Data, mesh: Mesh, name: str) -> EvaluationSet:
    """Return the examples named "test" or "validation"; arguments and errors are those of `training_feed`."""
    examples = data.validation if name == "validation" else data.test
    assert examples is not None, "nothing is held out for validation"
    placement = placements(config, data.facts, mesh).evaluation
    if placement == "stream":
        return StreamedEvaluation(config, data, examples, mesh, name)
    images, labels = place_on_devices(examples, data, mesh, placement)
    return ResidentEvaluation(name, len(examples), images, labels)


def resident_bytes(config: FrozenConfigDict, facts: Facts, mesh: Mesh) -> int:
    """Return how many bytes of a device's memory the images take."""
    pairs = zip(_image_bytes(facts), placements(config, facts, mesh), strict=True)
    return sum(int(size * _share_per_device(placement, mesh)) for size, placement in pairs)


class _ImageBytes(NamedTuple):
    train: int
    evaluation: int


def _image_bytes(facts: Facts) -> _ImageBytes:
    """Return the size of all images to train on, and of all to evaluate on."""
    each = math.prod(facts.input_shape)
    return _ImageBytes(
        facts.train_examples * each, (facts.validation_examples + facts.test_examples) * each
    )


def _share_per_device(placement: Placement, mesh: Mesh) -> float:
    """Return the part of a set that each device holds."""
    return {"replicated": 1.0, "sharded": 1 / mesh.size, "stream": 0.0}[placement]
