"""Three bilinear primitives that are each other's transposes.

With y the output, x the input and k the kernel of a depthwise convolution, the sum of y · g over all elements is
linear in each of x, k and g. Its three gradients,

    convolve(x, k) → y        input_gradient(g, k) → x        kernel_gradient(x, g) → k,

are bilinear, and the transposes of any are the other two: that gives every order of differentiation, forward and
backward. A primitive, unlike `jax.custom_vjp`, also has a rule for `jvp` and for `vmap`, and is lowered for each
platform by what is fast there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from mgjax.ops.depthwise.geometry import Geometry


class Method(NamedTuple):
    """How a primitive is computed.

    Attributes:
        impl: name of the implementation, or "auto".
        precision: of XLA's own convolution, `jax.default_matmul_precision` where the operation was called.
    """

    impl: str
    precision: str | None


def convolve(x, kernel, geometry: Geometry, method: Method):
    """x [B, *size, C], kernel [*window, C·m] → [B, *out, C·m]."""
    return _bind(convolve_p, x, kernel, geometry, method)


def input_gradient(g, kernel, geometry: Geometry, method: Method):
    """g [B, *out, C·m], kernel [*window, C·m] → [B, *size, C]."""
    return _bind(input_gradient_p, g, kernel, geometry, method)


def kernel_gradient(x, g, geometry: Geometry, method: Method):
    """x [B, *size, C], g [B, *out, C·m] → [*window, C·m]."""
    return _bind(kernel_gradient_p, x, g, geometry, method)


PRIMITIVES = {name: Primitive(f"depthwise_{name}") for name in ("convolve", "input_gradient", "kernel_gradient")}
convolve_p, input_gradient_p, kernel_gradient_p = PRIMITIVES.values()

# A transpose rule gets the operand that is a placeholder of what is linear, and the other one as it is.
ad.defbilinear(
    convolve_p,
    lambda ct, x, k, **how: input_gradient(ct, k, **how),
    lambda ct, x, k, **how: kernel_gradient(x, ct, **how),
)
ad.defbilinear(
    input_gradient_p,
    lambda ct, g, k, **how: convolve(ct, k, **how),
    lambda ct, g, k, **how: kernel_gradient(ct, g, **how),
)
ad.defbilinear(
    kernel_gradient_p,
    lambda ct, x, g, **how: input_gradient(g, ct, **how),
    lambda ct, x, g, **how: convolve(x, ct, **how),
)


# `update` keeps what else an abstract value says, as over which axes of a `shard_map` it varies.
@convolve_p.def_abstract_eval
def _(x, kernel, *, geometry, method):
    return x.update(shape=(x.shape[0], *geometry.out, kernel.shape[2]))


@input_gradient_p.def_abstract_eval
def _(g, kernel, *, geometry, method):
    return g.update(shape=(g.shape[0], *geometry.size, g.shape[3] // geometry.multiplier))


@kernel_gradient_p.def_abstract_eval
def _(x, g, *, geometry, method):
    whole = NamedSharding(x.sharding.mesh, PartitionSpec(None, None, None))
    return x.update(shape=(*geometry.window, g.shape[3]), sharding=whole)


def _bind(primitive, a, b, geometry: Geometry, method: Method):
    # Inside of `shard_map` the kernel is the same on all devices, the maps are not.
    varying = [getattr(getattr(jax.typeof(t), "manual_axis_type", None), "varying", frozenset()) for t in (a, b)]
    a, b = (
        jax.lax.pcast(t, tuple(sorted(missing)), to="varying") if (missing := (varying[0] | varying[1]) - mine) else t
        for t, mine in zip((a, b), varying)
    )
    return primitive.bind(a, b, geometry=geometry, method=method)


@functools.lru_cache(maxsize=4096)
def _compiled(primitive, geometry: Geometry, method: Method):
    return jax.jit(lambda a, b: primitive.bind(a, b, geometry=geometry, method=method))


def _eager(primitive, a, b, *, geometry, method):
    with jax.disable_jit(False):  # else it would come here again
        return _compiled(primitive, geometry, method)(a, b)


for _p in PRIMITIVES.values():
    _p.def_impl(functools.partial(_eager, _p))


def _first(x, axis, size: int):
    """`x` with what is mapped as its first axis, repeated where it is not mapped."""
    return jnp.broadcast_to(x[None], (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)


def _into_channels(x):
    """[V, …, C] → […, V·C]"""
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], x.shape[0] * x.shape[-1])


def _batch(call, args, axes, *, geometry, method):
    """Maps that are mapped become rows of the batch; as soon as kernels are mapped, everything becomes channels."""
    size = next(a.shape[axis] for a, axis in zip(args, axes) if axis is not None)
    if axes[1] is None and call is not kernel_gradient:
        x = jnp.moveaxis(args[0], axes[0], 1)  # behind the examples, which may lie on several devices
        rows = x.shape[0]
        y = call(x.reshape(rows * size, *x.shape[2:]), args[1], geometry, method)
        return y.reshape(rows, size, *y.shape[1:]), 1
    if axes[0] is None and call is not input_gradient:
        # Several kernels, or gradients, for each channel of one map: a multiplier.
        b = jnp.moveaxis(args[1], axes[1], -1)
        channels = b.shape[-2]
        geometry = geometry._replace(multiplier=geometry.multiplier * size)
        y = call(args[0], b.reshape(*b.shape[:-2], channels * size), geometry, method)
        return y.reshape(*y.shape[:-1], channels, size), y.ndim
    a, b = (_first(a, axis, size) for a, axis in zip(args, axes))
    channels = b.shape[-1] // (geometry.multiplier if call is input_gradient else 1)
    y = call(_into_channels(a), _into_channels(b), geometry, method)
    return y.reshape(*y.shape[:-1], size, channels), y.ndim - 1


batching.primitive_batchers[convolve_p] = functools.partial(_batch, convolve)
batching.primitive_batchers[input_gradient_p] = functools.partial(_batch, input_gradient)
batching.primitive_batchers[kernel_gradient_p] = functools.partial(_batch, kernel_gradient)
