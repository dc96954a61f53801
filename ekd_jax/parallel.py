"""Devices: one mesh with the axis `data`; batches are split over it, everything else is copied."""

import os
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


def own_rows(sharding: NamedSharding, count: int) -> slice:
    """Which of `count` rows this process's devices hold; they lie together."""
    places = sharding.addressable_devices_indices_map((count,)).values()
    held = [place[0].indices(count) for place in places if place is not None]
    return slice(min(first for first, _, _ in held), max(last for _, last, _ in held))


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory of a device; for CPU devices their share of the machine's."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)


def check_divisible(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of examples."""
    devices = mesh.size
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"{name}={batch_size} cannot be split over {devices} devices; nearest: {nearest}")
