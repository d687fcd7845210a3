"""Depthwise convolution: one function, three implementations, every transformation of JAX.

`primitive.py` has what JAX is told, `shift.py`, `xla.py` and `pallas.py` are ways to compute it, each of them three
functions of arrays and a `Geometry`; this file checks what comes in and chooses.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from mgjax.errors import InputError
from mgjax.ops.depthwise import pallas, primitive, shift, xla
from mgjax.ops.depthwise.geometry import Geometry
from mgjax.ops.depthwise.partition import partitioned

IMPLEMENTATIONS = {"xla": xla, "shift": shift, "pallas": pallas}
PHASES = 16  # positions of a stride, each with a sum of its own in the input gradient of "shift"


def depthwise_conv(
    x,
    kernel,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence = "SAME",
    dilation: int | Sequence[int] = 1,
    impl: str = "auto",
):
    """Convolves every channel with kernels of its own, in two dimensions or in one.

    y[b, i, j, c·m + n] = Σ_{u,v} x[b, i·s + u·d − p, j·s + v·d − p, c] · kernel[u, v, 0, c·m + n]

    What `jax.lax.conv_general_dilated` does with `feature_group_count=C`, many times faster on a CPU. It can be
    differentiated to any order, forward and backward, and mapped, whatever the implementation. Where examples or channels
    lie on several devices, nothing is gathered.

    Args:
        x: floating [B, H, W, C] or [B, L, C].
        kernel: [kh, kw, 1, C·m] or [k, 1, C·m], as lax's HWIO; m is the channel multiplier. It is computed
            in the wider dtype of the two.
        strides: of the windows, one number or one per axis.
        padding: "SAME", as TensorFlow has it: ⌈H / s⌉ outputs, the odd zero behind; "VALID": none; "CAUSAL": all
            before, so that no output sees what comes after it; a number of zeros on every side; or (before, after)
            of each axis, where a number below 0 cuts.
        dilation: distance of the taps of a window, one number or one per axis.
        impl: "xla" (`lax.conv_general_dilated`), "shift" (shifted multiply-adds, for CPUs), "pallas" (Triton
            kernels for NVIDIA GPUs; anywhere else they are interpreted, which is slow and for tests) or "auto", which
            chooses by platform and strides: see `choose`.

    Returns:
        [B, H', W', C·m] or [B, L', C·m]; sums are made in float32, or in float64 for float64.

    Raises:
        InputError: shapes that do not fit, a kernel larger than the padded input, an even kernel with causal
            padding, an input that is not floating, an unknown padding or implementation.

    Example:
        >>> depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), strides=2).shape
        (1, 2, 2, 2)
        >>> depthwise_conv(jnp.ones((1, 9, 2)), jnp.ones((3, 1, 4)), padding="causal", dilation=2).shape
        (1, 9, 4)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    axes = x.ndim - 2
    shapes = f"x {x.shape}, kernel {kernel.shape}"
    if axes not in (1, 2) or kernel.ndim != x.ndim or kernel.shape[-2] != 1 or 0 in kernel.shape:
        raise InputError(f"depthwise_conv needs x [B,H,W,C] and kernel [kh,kw,1,C·m], or [B,L,C] and [k,1,C·m], got {shapes}")
    channels = x.shape[-1]
    if not channels or kernel.shape[-1] % channels:
        raise InputError(
            f"depthwise_conv: {kernel.shape[-1]} channels of the kernel are no multiple of the {channels} of x; got {shapes}"
        )
    for name, array in (("x", x), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"depthwise_conv needs a floating {name}, not {array.dtype}; got {shapes}. Convert it by astype")
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise InputError(f"depthwise_conv knows the implementations {['auto', *IMPLEMENTATIONS]}, not '{impl}'; got {shapes}")
    size, window = x.shape[1:-1], kernel.shape[:-2]
    strides = _per_axis("strides", strides, axes, shapes)
    dilation = _per_axis("dilation", dilation, axes, shapes)
    pads = _pads(padding, size, window, strides, dilation, shapes)
    geometry = Geometry(*(_two(t, fill) for t, fill in ((size, 1), (window, 1), (strides, 1), (pads, (0, 0)), (dilation, 1))),
                        kernel.shape[-1] // channels)  # fmt: skip
    if min(geometry.out) < 1:
        padded = tuple(n + a + b for n, (a, b) in zip(size, pads))
        reach = tuple((k - 1) * d + 1 for k, d in zip(window, dilation))
        raise InputError(f"depthwise_conv: the kernel reaches over {reach}, more than the padded input {padded}; got {shapes}")
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if axes == 1:
        x, kernel = x[:, :, None], kernel[:, None]
    method = primitive.Method(impl, jax.config.jax_default_matmul_precision)
    y = primitive.convolve(x, kernel[:, :, 0], geometry, method)
    return y[:, :, 0] if axes == 1 else y


def choose(platform: str, geometry: Geometry) -> str:
    """The implementation that "auto" takes.

    "shift" on a CPU, where it is many times faster than XLA's grouped convolution in every shape of
    `experiments.benchmarks.depthwise`, but for strides of more than `PHASES` positions, whose input gradient would take long
    to compile; "xla" elsewhere, since "pallas" has not been measured on a GPU.
    """
    return "shift" if platform == "cpu" and math.prod(geometry.strides) <= PHASES else "xla"


def _pads(padding, size, window, strides, dilation, shapes: str) -> tuple[tuple[int, int], ...]:
    """(before, after) of every axis."""
    reach = [(k - 1) * d for k, d in zip(window, dilation)]
    if not isinstance(padding, str):
        try:
            if isinstance(padding, numbers.Number):
                return ((operator.index(padding), operator.index(padding)),) * len(size)
            pads = tuple((operator.index(a), operator.index(b)) for a, b in padding)
        except (TypeError, ValueError):
            pads = ()
        if len(pads) != len(size):
            raise InputError(f"depthwise_conv: padding {padding!r} is not (before, after) of {len(size)} axes; got {shapes}")
        return pads
    kind = padding.upper()
    if kind == "VALID":
        return ((0, 0),) * len(size)
    if kind == "SAME":
        total = [max((math.ceil(n / s) - 1) * s + r + 1 - n, 0) for n, s, r in zip(size, strides, reach)]
        return tuple((t // 2, t - t // 2) for t in total)
    if kind == "CAUSAL":
        if any(k % 2 == 0 for k in window):
            explicit = tuple((r, 0) for r in reach)
            raise InputError(
                f"depthwise_conv: causal padding is for kernels of odd size; got {shapes}. Say padding={explicit} to mean it"
            )
        return tuple((r, 0) for r in reach)
    raise InputError(f"depthwise_conv: padding '{padding}' is none of SAME, VALID and CAUSAL; got {shapes}")


def _per_axis(name: str, given, axes: int, shapes: str) -> tuple[int, ...]:
    try:
        values = (given,) * axes if isinstance(given, numbers.Number) else tuple(given)
        values = tuple(operator.index(v) for v in values)
    except TypeError:
        values = ()
    if len(values) != axes or any(v < 1 for v in values):
        raise InputError(f"depthwise_conv: {name} {given!r} are not {axes} whole numbers above 0, or one for all; got {shapes}")
    return values


def _two(values, fill):
    return (*values, fill) if len(values) == 1 else tuple(values)


def _lower(name: str, platform: str | None) -> None:
    def rule(ctx, a, b, *, geometry: Geometry, method: primitive.Method):
        impl = choose(platform or "", geometry) if method.impl == "auto" else method.impl
        # Off a GPU the kernels are interpreted, for tests.
        how = {"pallas": {"interpret": platform != "cuda"}, "xla": {"precision": method.precision}}.get(impl, {})

        def compute(a, b):
            if 0 in (*a.shape, *b.shape):
                return jnp.zeros(ctx.avals_out[0].shape, a.dtype)
            run = lambda a, b: getattr(IMPLEMENTATIONS[impl], name)(a, b, geometry, **how)
            return (run if impl == "shift" else partitioned(name, run, geometry))(a, b)

        # Within a `shard_map` each device computes for itself; over which axes a value varies is no matter here.
        inner = ctx.replace(avals_in=[jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in])
        return mlir.lower_fun(compute, multiple_results=False)(inner, a, b)

    mlir.register_lowering(primitive.PRIMITIVES[name], rule, platform=platform)


for _name in primitive.PRIMITIVES:
    for _platform in ("cpu", "cuda", None):
        _lower(_name, _platform)
