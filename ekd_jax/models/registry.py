"""All networks by name, and how an ensemble of one is built."""

import fnmatch
import re
from typing import Any

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
from ekd_jax.models.assemble import EnsembleSpec, assemble
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.models.family import Family
from ekd_jax.models.members import parse_students

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


def register_network(name: str, family: Family) -> None:
    """Make a network available under a name, for example as `--config.model.name=NAME`.

    Args:
        name: a letter, followed by letters, digits, "_", "-" or ".".
        family: the network: a `Family` of the parts in this package, or the result of `linen_network`.

    Raises:
        UserError: the name is taken or has other characters.
    """
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        raise UserError(
            f"register_network: {name!r} is not a valid name: use a letter, then letters, digits, '_', '-', '.'"
        )
    if not isinstance(family, Family):
        raise UserError(
            f"register_network: network {name!r} must be a Family, as linen_network returns, not {family!r}"
        )
    if name in MODELS:
        raise UserError(f"register_network: there is a network {name!r} already: choose another name")
    MODELS[name] = family


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all networks that match a shell pattern such as "resnet*", sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def find_network(name: str) -> Family:
    """Return the network of a name.

    Raises:
        UserError: there is none.
    """
    if name not in MODELS:
        raise UserError(
            f"there is no network {name!r}{nearest(name, MODELS)} (a network of your own exists once the "
            f"module that registers it is imported)"
        )
    return MODELS[name]


def build(spec: EnsembleSpec) -> Ensemble:
    """Build the ensemble that `spec` describes. Nothing is computed or compiled.

    Raises:
        UserError: an unknown network, a width that leaves a block without channels, a cut that the network
            does not have, or an execution that these networks do not allow.
    """
    return assemble(spec, [find_network(member.network or spec.name) for member in spec.students])


def build_ensemble(
    name: str = "resnet20", students: Any = 5, num_classes: int = 10, **settings: Any
) -> Ensemble:
    """Build an ensemble.

    Args:
        name: the network, see `list_models`.
        students: their number, or a list of widths, as `parse_students` takes it.
        num_classes: number of classes K.
        **settings: other fields of `EnsembleSpec`.

    Raises:
        UserError: see `build` and `parse_students`.
    """
    return build(EnsembleSpec(name, parse_students(students), num_classes, **settings))
