"""Network families, one file each. A new one is its file and its line here."""

import functools
from typing import Any

import jax.numpy as jnp

from ekd_jax.common.errors import UserError, nearest
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
from ekd_jax.models.assemble import Family, Options, assemble
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.models.layers import Mode
from ekd_jax.models.members import Member

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
    students: tuple[Member, ...],
    num_classes: int,
    dtype: str = "float32",
    *,
    sharing: str = "base",
    compressed_stages: int = 0,
    shared_stages: int = -1,
    own_stages: int = 0,
    last_map: str = "",
    base_gradients: str = "all",
    batch_norm_groups: int = 1,
    batch_norm_epsilon: float = 1e-5,
    rematerialize: bool = False,
    execution: str = "separate",
    **options: Any,
) -> Ensemble:
    """The network `name`, or those that the students name, for each of `students`.

    Args:
        name: a key of `MODELS`.
        students: as `parse_students` gives them; the first is the pseudo teacher.
        num_classes: K.
        dtype: what convolutions compute in, "float32" or "bfloat16".
        sharing, compressed_stages, shared_stages, own_stages, last_map, base_gradients: what students have in
            common; see `family.assemble`.
        batch_norm_groups, batch_norm_epsilon, rematerialize: see `layers.Mode`.
        execution: how branches run; see `execution`.
        **options: of the networks; see `family.Options`.

    Raises:
        UserError: an unknown network; a width that leaves a block without a channel; a cut that the
            network does not have; a way to run branches that it does not allow.
    """
    names = [member.network or name for member in students]
    for own in names:
        if own not in MODELS:
            raise UserError(f"model.students: there is no network {own!r}{nearest(own, MODELS)}")
    mode = Mode(
        dtype=jnp.dtype(dtype),
        groups=batch_norm_groups,
        epsilon=batch_norm_epsilon,
        rematerialize=rematerialize,
    )
    return assemble(
        [MODELS[own] for own in names],
        students,
        Options(num_classes, **options),
        mode,
        sharing,
        compressed_stages,
        shared_stages,
        own_stages,
        last_map,
        base_gradients,
        execution,
    )
