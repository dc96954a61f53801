"""Devices: one mesh with the axis `data`; batches are split over it, everything else is copied."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ekd_jax.errors import UserError


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, all there are if not given."""
    return Mesh(np.asarray(devices or jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copies host arrays to every device."""
    return jax.device_put(tree, replicated(mesh))


def check_divisible(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of examples."""
    devices = mesh.size
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"{name}={batch_size} cannot be split over {devices} devices; nearest: {nearest}")
