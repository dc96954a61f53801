"""Networks of plain Linen modules, from outside this package.

    register_network(
        "mynet",
        linen_network(
            stem=lambda: Stem(32),
            stages=[lambda width: Stage(int(64 * width)), lambda width: Stage(int(128 * width))],
            head=lambda num_classes: Head(num_classes),
        ),
    )

A part is any `flax.linen.Module` called as `module(x)` or `module(x, train=...)`. The stem maps images
(B, H, W, C) to a feature map, a stage maps a feature map (B, H, W, C) to another one, and the head maps the
last one to logits (B, K). `nn.BatchNorm` and `nn.Dropout` work as usual: batch statistics are kept, and the
"dropout" key is a function of (seed, step, student). A part's variables are those of its module, under
"stem", "stage1", "stage2", ... and "head".

Such networks have any number of students of any width and work with every method and command. They
cannot be packed (`train.execution=packed`), because only layers of this package are known to compute the
same with block-diagonal kernels. Their layers choose their own dtype, normalization and dropout, so
`train.dtype`, `model.batch_norm`, `model.dropout` and the like do not change them.

A network whose head depends on the width, for example, is a `Family` of `linen_part` and `linen_head`.
docs/extending.md has a complete example.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.models.blocks import Part
from ekd_jax.models.family import Architecture, Family, NetworkOptions
from ekd_jax.models.layers import Array, Mode

UNPACKABLE = "it is made of plain Linen modules, which this package cannot put side by side"


@dataclasses.dataclass(frozen=True)
class Module:
    """A plain module, wrapped so that Linen does not name it after the attribute that holds it."""

    module: nn.Module

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise UserError(f"linen_network: a part must be a flax.linen.Module, not {self.module!r}")


class LinenPart(nn.Module):
    """A stem or a stage: a plain Linen module, whose variables are the part's own."""

    module: Module

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        y = _run(self, self.module, x, mode)
        if y.ndim != 4 or len(y) != len(x):
            raise UserError(
                f"{self.name} of a network gives an array of shape {y.shape} for {x.shape}: a stem or "
                f"stage must give a feature map (B, H, W, C)"
            )
        return y


class LinenHead(nn.Module):
    """A head: a plain Linen module from (B, H, W, C) to logits (B, K). It also returns the map it read."""

    module: Module
    num_classes: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        logits = _run(self, self.module, x, mode)
        if logits.shape != (len(x), self.num_classes):
            raise UserError(
                f"the head of a network gives an array of shape {logits.shape} for {len(x)} images of "
                f"{self.num_classes} classes: it must give logits (B, K)"
            )
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), x


def _run(part: nn.Module, wrapped: Module, x: Array, mode: Mode) -> Array:
    """Call a plain module in the scope of `part`, with `train` if it takes that."""
    module = wrapped.module.clone(parent=part, name="linen")
    nn.share_scope(part, module)
    takes_train = "train" in inspect.signature(module.__call__).parameters
    y: Array = module(x, train=mode.train) if takes_train else module(x)
    return y


def linen_part(module: nn.Module) -> Part:
    """Return a plain Linen module as a stem or a stage of an `Architecture`."""
    return partial(LinenPart, Module(module))


def linen_head(module: nn.Module, num_classes: int) -> Part:
    """Return a plain Linen module as the head of an `Architecture`."""
    return partial(LinenHead, Module(module), num_classes)


def linen_network(
    *,
    stem: Callable[[], nn.Module],
    stages: Sequence[Callable[[Fraction], nn.Module]],
    head: Callable[[int], nn.Module],
    shared_stages: int = 0,
) -> Family:
    """Return a network of plain Linen modules, for `register_network`.

    Args:
        stem: returns the stem.
        stages: functions of the width multiplier, a `Fraction`, that return the stages. Channels are
            `int(64 * width)`, or `scale_channels(64, width)` for an error message if none is left.
        head: function of the number of classes that returns the head.
        shared_stages: number of stages in the base block by default; the stem always belongs to it.
    """
    if not 0 <= shared_stages < len(stages):
        raise UserError(
            f"linen_network: shared_stages={shared_stages} must leave at least one of {len(stages)} stages"
        )

    def build(widths: Sequence[Fraction], options: NetworkOptions) -> Architecture:
        return Architecture(
            stem=linen_part(stem()),
            stages=[linen_part(stage(width)) for stage, width in zip(stages, widths, strict=True)],
            head=linen_head(head(options.num_classes), options.num_classes),
            unpackable=UNPACKABLE,
        )

    return Family(build, stages=len(stages), shared=shared_stages)
