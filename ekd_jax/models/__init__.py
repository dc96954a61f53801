"""Network families, one file each. A new one is its file and its line here."""

import functools
from fractions import Fraction
from typing import Any

import jax.numpy as jnp

from ekd_jax.models import (
    densenet,
    efficientnet,
    mobilenet_v2,
    resnet,
    resnet_cifar,
    shufflenet,
    vgg,
    wide_resnet,
)
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.models.family import Family, Options, assemble
from ekd_jax.models.layers import Mode

MODELS: dict[str, Family] = {
    **resnet_cifar.MODELS,
    **resnet.MODELS,
    **wide_resnet.MODELS,
    **densenet.MODELS,
    **efficientnet.MODELS,
    **mobilenet_v2.MODELS,
    **shufflenet.MODELS,
    **vgg.MODELS,
}


@functools.lru_cache(maxsize=4)  # what was looked at need not be looked at again
def build(
    name: str,
    students: tuple[Fraction, ...],
    num_classes: int,
    dtype: str = "float32",
    *,
    no_blocks: int = 0,
    shared_stages: int = -1,
    last_map: str = "",
    base_gradients: str = "all",
    batch_norm_groups: int = 1,
    batch_norm_epsilon: float = 1e-5,
    **options: Any,
) -> Ensemble:
    """The network `name` as base block and one branch for each width in `students`.

    Args:
        name: a key of `MODELS`.
        students: width multipliers above 0; the first is the pseudo teacher's.
        num_classes: K.
        dtype: what convolutions compute in, "float32" or "bfloat16".
        no_blocks, shared_stages, last_map, base_gradients: how it is cut; see `family.assemble`.
        batch_norm_groups, batch_norm_epsilon: see `layers.Mode`.
        **options: of the network; see `family.Options`.

    Raises:
        UserError: a width that leaves a block without a channel; a cut that the network does not have.
    """
    mode = Mode(dtype=jnp.dtype(dtype), groups=batch_norm_groups, epsilon=batch_norm_epsilon)
    return assemble(
        MODELS[name],
        students,
        Options(num_classes, **options),
        mode,
        no_blocks,
        shared_stages,
        last_map,
        base_gradients,
    )
