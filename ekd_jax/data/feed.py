"""Batches on the devices: from a set that lives there, or streamed from disk.

Whichever it is, the batch of a step is the same: the order is one function of (seed, epoch), and what
is random in reading an image one of (seed, place in the order). Each process reads its own part of
the batches alone.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.data.opening import Data, Facts
from ekd_jax.data.resident import Resident, ResidentEvaluation, on_devices
from ekd_jax.data.stream import Streamed, StreamedEvaluation

Array = jax.Array


class Feed(Protocol):
    """Training batches by step."""

    def most(self) -> int:
        """How many steps one dispatch may take."""

    def ready(self, step: int) -> bool:
        """Whether `at` need not wait."""

    def at(self, step: int) -> Any:
        """Arrays on the devices that hold the batches from `step` on; waits for them."""

    def pick(self, held: Any, i: Array) -> tuple[Array, Array, Array]:
        """Batch `i`, from 0, of what `at` gave, traced: images (B, H, W, C) uint8, labels (B,) int32
        and numbers of the examples (B,) int32."""

    @property
    def shapes(self) -> Any:
        """What `at` gives, or arrays or shapes of the same kind; for compiling."""

    def close(self) -> None:
        """Ends threads and processes."""


class EvaluationSet(Protocol):
    """Examples to measure on, each exactly once.

    Attributes:
        name: "test" or "validation".
        examples: how many.
    """

    name: str
    examples: int

    def chunks(self) -> Iterator[tuple[Array, Array, int]]:
        """Images (N, H, W, C) uint8, labels (N,) int32, and how many of them count."""

    @property
    def shapes(self) -> Any:
        """Images and labels of a chunk, or their shapes; for compiling."""


def placements(config: Any, facts: Facts, mesh: Mesh) -> dict[str, str]:
    """ "replicated", "sharded" or "stream" for the training set and for what is measured on.

    `data.placement=auto` takes the first that fits `data.device_share` of a device's memory. Training
    images that are cut anew in every epoch (`data.fit=crop`) can only be streamed.

    Raises:
        UserError: `data.placement` asks for what is not possible.
    """
    data, bytes_each = config.data, math.prod(facts.input_shape)
    asked = data.placement
    if data.fit == "crop" and asked in ("replicated", "sharded"):
        raise UserError(
            f"data.placement={asked} keeps images as they are, but data.fit=crop cuts them anew in every "
            f"epoch: pass --config.data.placement=stream, or --config.data.fit=stretch"
        )
    room = data.device_share * parallel.device_memory(mesh)
    chosen = {}
    sizes = {
        "train": facts.train_examples * bytes_each,
        "evaluation": (facts.validation_examples + facts.test_examples) * bytes_each,
    }
    for name, size in sizes.items():
        if asked != "auto":
            chosen[name] = asked
        elif name == "train" and data.fit == "crop":
            chosen[name] = "stream"
        elif size <= room:
            chosen[name] = "replicated"
        elif size <= room * mesh.size:
            chosen[name] = "sharded"
        else:
            chosen[name] = "stream"
        room -= {"replicated": size, "sharded": size / mesh.size, "stream": 0}[chosen[name]]
    return chosen


def training_feed(config: Any, data: Data, mesh: Mesh, steps: int) -> Feed:
    """Batches of the training set.

    Args:
        config: resolved.
        data: opened.
        mesh: devices that share a batch.
        steps: of the whole run.

    Raises:
        UserError: an image cannot be read, a label is out of range, an impossible placement.
    """
    placement = placements(config, data.facts, mesh)["train"]
    if placement == "stream":
        return Streamed(config, data, mesh, steps)
    return Resident(config, data, mesh, placement)


def evaluation_set(config: Any, data: Data, mesh: Mesh, name: str) -> EvaluationSet:
    """The examples named "test" or "validation"; other arguments and errors as there."""
    examples = data.validation if name == "validation" else data.test
    assert examples is not None, "nothing is held out for validation"
    placement = placements(config, data.facts, mesh)["evaluation"]
    if placement == "stream":
        return StreamedEvaluation(config, data, examples, mesh, name)
    images, labels = on_devices(examples, data, mesh, placement)
    return ResidentEvaluation(name, len(examples), images, labels)


def resident_bytes(config: Any, facts: Facts, mesh: Mesh) -> int:
    """What the images on one device take of its memory."""
    sizes = {"train": facts.train_examples, "evaluation": facts.validation_examples + facts.test_examples}
    share = {"replicated": 1.0, "sharded": 1 / mesh.size, "stream": 0.0}
    where = placements(config, facts, mesh)
    return sum(int(sizes[name] * share[where[name]]) * math.prod(facts.input_shape) for name in sizes)
