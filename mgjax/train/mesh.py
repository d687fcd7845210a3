"""The device mesh, and where batches and the training state lie on it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from mgjax.config import key
from mgjax.errors import InputError

AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = key(0, "devices along the axis `data`, over which the batch is split (0: all that are left)", low=0)
    fsdp: int = key(1, "devices along the axis `fsdp`, over which batch, parameters and optimiser state are split", low=1)
    shard_above: int = key(65536, "parameters with fewer numbers lie whole on every device", low=0)
    show: bool = key(False, "print where every parameter lies, before training")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence | None = None) -> Mesh:
    """A mesh of the axes `data` and `fsdp` over all devices of all processes.

    Args:
        devices: by default all that JAX sees.

    Raises:
        InputError: the axes do not multiply to the number of devices.

    Example:
        >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1}
    """
    devices = jax.devices() if devices is None else devices
    data = config.data or len(devices) // config.fsdp
    if data * config.fsdp != len(devices):
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise InputError(
            f"a mesh of data={config.data or 'all'} × fsdp={config.fsdp} does not fit {len(devices)} devices: "
            f"--config.mesh.fsdp is one of {divisors}, and --config.mesh.data, if given, {len(devices)} divided by it"
        )
    # Explicit axes, the default, reject sharded convolution kernels.
    return jax.make_mesh((data, config.fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds everything."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every device holds its part of the batch, whichever axis it stands on."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(shape: Sequence[int], mesh: Mesh, shard_above: int = 0) -> NamedSharding:
    """The one rule for parameters, optimiser state and averages.

    The largest dimension that `fsdp` divides (of equals, the last) is split over it; an array with
    fewer than `shard_above` numbers, or without such a dimension, lies whole on every device.
    What has the shape of a parameter lies where the parameter lies.

    Example:
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> tuple(state_sharding((3, 3, 64, 128), mesh).spec)  # nothing to split among one device
        ()
    """
    size = mesh.shape["fsdp"]
    divisible = [i for i, n in enumerate(shape) if n and n % size == 0]
    if size == 1 or not divisible or math.prod(shape) < shard_above:
        return replicated(mesh)
    longest = max(divisible, key=lambda i: (shape[i], i))
    return NamedSharding(mesh, PartitionSpec(*(["fsdp" if i == longest else None for i in range(longest + 1)])))


def sharding_table(params: dict[str, jax.Array]) -> Table:
    """Where every parameter lies: path, shape, split, MB per device, as a table to print.

    Args:
        params: path → array on a mesh.
    """
    table = Table(title="parameters on the mesh")
    for column in ("parameter", "shape", "split", "MB a device"):
        table.add_column(column, justify="right" if column.startswith("MB") else "left", overflow="fold")
    total = 0.0
    for path, x in sorted(params.items()):
        held = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize / 1e6
        total += held
        split = [f"{axis} on dimension {i}" for i, axis in enumerate(x.sharding.spec) if axis]
        table.add_row(path, "×".join(map(str, x.shape)) or "scalar", ", ".join(split) or "whole", f"{held:.4f}")
    table.add_row("all", "", "", f"{total:.4f}")
    return table


def to_device(batch: Any, mesh: Mesh) -> Any:
    """Host arrays, this process's rows of a batch, to one global sharded batch; does not wait for the transfer."""
    return _put(batch, batch_sharding(mesh))


def scalar_to_device(value: float | np.ndarray, mesh: Mesh) -> jax.Array:
    """A float32 scalar, or a few of them, on every device, the same in every process."""
    return _put(np.asarray(value, np.float32), replicated(mesh))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)  # one call for all leaves, at half the cost
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """The tree whole on every device, so that any process may fetch it."""
    return _gather(mesh)(tree)


@functools.cache
def _gather(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
