"""What XLA is told of kernels that it cannot look into, or looks into badly, when arrays lie on several devices.

XLA gathers the operands of a custom call, and those of some grouped convolutions. All three operations can be done by
each device alone for its examples and its channels; only a kernel gradient is then summed over the examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mgjax.ops.depthwise.geometry import Geometry
from mgjax.ops.depthwise.primitive import PRIMITIVES

# A program is lowered without its devices unless it says that it wants them. `custom_partitioning` says so itself, but is
# inside of these where JAX looks, and there is no public way. Only "xla" and "pallas" on several devices need it.
with contextlib.suppress(ImportError):
    from jax._src.dispatch import prim_requires_devices_during_lowering

    prim_requires_devices_during_lowering.update(PRIMITIVES.values())

# operand, operand → result of each operation; C channels of x, D = C·m of y.
RULES = {
    "convolve": ("b h w C", "u v D", "b i j D"),
    "input_gradient": ("b i j D", "u v D", "b h w C"),
    "kernel_gradient": ("b h w C", "b i j D", "u v D"),
}


def partitioned(name: str, run: Callable, geometry: Geometry) -> Callable:
    """`run(a, b)`, one of the three operations, that stays on the devices of its examples and channels."""
    terms = [term.split() for term in RULES[name]]

    def axes_of(shapes) -> dict[str, tuple[str, ...]]:
        """Over which axes of the mesh examples ("b") and channels ("C") lie, where these divide them evenly."""
        found: dict[str, tuple[str, ...]] = {"b": (), "C": ()}
        for shape, term in zip(shapes, terms):
            spec = (*getattr(shape.sharding, "spec", ()), *(None,) * len(term))
            for size, letter, axes in zip(shape.shape, term, spec):
                key = "b" if letter == "b" else "C" if letter in "CD" else None
                axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
                taken = {a for other, mine in found.items() if other != key for a in mine}
                count = 1
                for a in axes:
                    count *= shape.sharding.mesh.shape[a]
                channels = size // (geometry.multiplier if letter == "D" else 1)
                if key and axes and not found[key] and not taken & set(axes) and channels % count == 0:
                    found[key] = axes
        return found

    def shardings(mesh, axes):
        over = {"b": axes["b"] or None, "C": axes["C"] or None, "D": axes["C"] or None}
        return [NamedSharding(mesh, PartitionSpec(*(over.get(letter) for letter in term))) for term in terms]

    def infer(mesh, shapes, result):
        return shardings(mesh, axes_of(shapes))[2]

    def partition(mesh, shapes, result):
        axes = axes_of(shapes)
        *operands, out = shardings(mesh, axes)

        def local(a, b):
            y = run(a, b)
            return jax.lax.psum(y, axes["b"]) if name == "kernel_gradient" and axes["b"] else y

        return mesh, local, out, tuple(operands)

    letter = lambda l: "c" if l == "C" else l if l != "D" else "c" if geometry.multiplier == 1 else "(c m)"
    written = [" ".join(letter(l) for l in term) for term in terms]
    wrapped = custom_partitioning(lambda a, b: run(a, b))
    wrapped.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{written[0]}, {written[1]} -> {written[2]}",
        **({"m": geometry.multiplier} if geometry.multiplier > 1 else {}),
    )
    return wrapped
