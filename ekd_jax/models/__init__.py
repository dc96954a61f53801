"""Network families, one file each. A new one is its file and its line here."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import jax.numpy as jnp

from ekd_jax.models import resnet_cifar
from ekd_jax.models.ensemble import Ensemble

MODELS: dict[str, Callable[..., Ensemble]] = {**resnet_cifar.MODELS}


def build(
    name: str,
    students: Sequence[Fraction],
    no_blocks: int,
    num_classes: int,
    dtype: str = "float32",
    base_gradients: str = "all",
) -> Ensemble:
    """The network `name` as base block and one branch for each width in `students`.

    Args:
        name: a key of `MODELS`.
        students: width multipliers above 0; the first is the pseudo teacher's.
        no_blocks: how many of the branch's blocks, from the last, the multipliers change.
        num_classes: K.
        dtype: what convolutions compute in, "float32" or "bfloat16".
        base_gradients: "all", or "pseudo_teacher" (METHODS.md 1.3).

    Raises:
        UserError: a width that leaves a block without a channel; `no_blocks` out of range.
    """
    return MODELS[name](
        students=students,
        no_blocks=no_blocks,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        base_gradients=base_gradients,
    )
