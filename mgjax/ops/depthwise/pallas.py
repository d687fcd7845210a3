"""Depthwise convolution for GPUs: Pallas kernels, lowered by Triton.

A depthwise convolution does few operations per number, so memory sets its pace. Channels lie side by side, in memory
as in a warp. A program loads what it needs of a row once, and adds it to all the rows of its tile that use it; what
columns share comes out of the first-level cache. What strides leave out is left out when the kernel is traced: rows
and columns of an input gradient are made phase by phase, each with its own taps. Sums are float32, or float64 for
float64. A kernel gradient is summed in two steps of fixed order, so it is the same in every run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mgjax.ops.depthwise.geometry import Geometry

PROGRAMS = 1024  # of a kernel gradient: some for each of a hundred multiprocessors


def convolve(x, kernel, geometry: Geometry, *, interpret: bool = False):
    """As `primitive.convolve`."""
    (sh, sw), (dh, dw), ((top, _), (left, _)) = geometry.strides, geometry.dilation, geometry.padding
    rows, m = _rows(geometry, geometry.out[0]), geometry.multiplier
    uses = defaultdict(list)
    for a in range(rows):
        for u, v in geometry.taps:
            uses[a * sh + u * dh - top, v * dw - left, 0].append((a, 0, u, v))
    return _gather(
        x,
        kernel,
        (*geometry.out, kernel.shape[2]),
        uses,
        tile=(rows, 1),
        step=(rows * sh, sw),
        channels=(lambda c, _: c // m, lambda c, _: c),
        name="depthwise_convolve",
        interpret=interpret,
    )


def input_gradient(g, kernel, geometry: Geometry, *, interpret: bool = False):
    """As `primitive.input_gradient`."""
    (sh, sw), (dh, dw), ((top, _), (left, _)) = geometry.strides, geometry.dilation, geometry.padding
    m = geometry.multiplier
    rows = -(-_rows(geometry, geometry.size[0]) // sh) * sh
    uses = defaultdict(list)
    for a in range(rows):
        for q in range(sw):
            for u, v in geometry.taps:
                (row, odd), (column, out_of_step) = divmod(a + top - u * dh, sh), divmod(q + left - v * dw, sw)
                if not odd and not out_of_step:
                    for i in range(m):
                        uses[row, column, i].append((a, q, u, v))
    mine = lambda c, i: c * m + i
    return _gather(
        g,
        kernel,
        (*geometry.size, kernel.shape[2] // m),
        uses,
        tile=(rows, sw),
        step=(rows // sh, 1),
        channels=(mine, mine),
        name="depthwise_input_gradient",
        interpret=interpret,
    )


def kernel_gradient(x, g, geometry: Geometry, *, interpret: bool = False):
    """As `primitive.kernel_gradient`."""
    (sh, sw), (dh, dw), ((top, _), (left, _)) = geometry.strides, geometry.dilation, geometry.padding
    (batch, height, width, channels), m, (kh, kw) = g.shape, geometry.multiplier, geometry.window
    kinds = min(kh, max(1, 16 // kw))  # rows of the window per program: every tap has a sum in registers
    block, lanes = _block(x.dtype, width, channels, 1024 if kinds * kw <= 16 else 256)
    rows = min(height, 4)
    places = batch * pl.cdiv(height, rows) * pl.cdiv(width, block)
    groups, parts = pl.cdiv(kh, kinds), pl.cdiv(channels, lanes)
    splits = min(places, max(1, PROGRAMS // (groups * parts)))
    each = pl.cdiv(places, splits)
    total = jnp.promote_types(x.dtype, jnp.float32)

    def body(x_ref, g_ref, out_ref):
        n = pl.program_id(0)
        n, part = n // parts, n % parts
        split, group = n // groups, n % groups
        c = part * lanes + jnp.arange(lanes)
        first = group * kinds  # row of the window

        def place(n, sums):
            n, j = n // pl.cdiv(width, block), n % pl.cdiv(width, block) * block + jnp.arange(block)
            b, i = n // pl.cdiv(height, rows), n % pl.cdiv(height, rows) * rows
            seen = [_load(g_ref, b, i + a, j, c, total) for a in range(rows)]
            uses = defaultdict(list)
            for a in range(rows):
                for u in range(kinds):
                    for v in range(kw):
                        uses[a * sh + u * dh, v].append((a, u))
            sums = list(sums)
            for (row, v), users in uses.items():
                here = _load(x_ref, b, i * sh + first * dh + row - top, j * sw + v * dw - left, c // m, total)
                for a, u in users:
                    sums[u * kw + v] += here * seen[a]
            return tuple(sums)

        zero = jnp.zeros((block, lanes), total)
        sums = jax.lax.fori_loop(split * each, jnp.minimum((split + 1) * each, places), place, (zero,) * (kinds * kw))
        for n, one in enumerate(sums):
            u, v = first + n // kw, n % kw
            plgpu.store(out_ref.at[split, u, v, c], one.sum(0), mask=(c < channels) & (u < kh))

    shape = _shape((splits, kh, kw, channels), total, like=x)
    run = _call(body, splits * groups * parts, shape, block * lanes, "depthwise_kernel_gradient", interpret)
    return run(x, g).sum(0).astype(x.dtype)


def _gather(
    source,
    kernel,
    shape: tuple[int, int, int],
    uses: dict,
    *,
    tile: tuple[int, int],
    step: tuple[int, int],
    channels: tuple[Callable, Callable],
    name: str,
    interpret: bool,
):
    """Every number of a map is a sum over taps of the kernel times what lies somewhere in `source`.

    Args:
        shape: (height, width, channels) of the result.
        uses: (row, column, i) of the source, counted from where a tile begins → (row a of the tile, phase q of the
            column, tap u, tap v) of all that it counts for.
        tile: rows, and phases of columns, that a program makes.
        step: rows of the source per tile, and columns of the source per column.
        channels: of the source and of the kernel, as functions of (channel of the result, i).
    """
    height, width, count = shape
    rows, phases = tile
    block, lanes = _block(source.dtype, pl.cdiv(width, phases), count, 1024)
    down, across, parts = pl.cdiv(height, rows), pl.cdiv(width, block * phases), pl.cdiv(count, lanes)
    total = jnp.promote_types(source.dtype, jnp.float32)

    def body(source_ref, kernel_ref, out_ref):
        n = pl.program_id(0)
        n, part = n // parts, n % parts
        n, j = n // across, n % across * block + jnp.arange(block)
        b, i = n // down, n % down
        c = part * lanes + jnp.arange(lanes)
        sums = {(a, q): jnp.zeros((block, lanes), total) for a in range(rows) for q in range(phases)}
        for (row, column, k), users in uses.items():
            here = _load(source_ref, b, i * step[0] + row, j * step[1] + column, channels[0](c, k), total)
            for a, q, u, v in users:
                at = kernel_ref.at[u, v, channels[1](c, k)]
                sums[a, q] += here * plgpu.load(at, mask=c < count, other=0).astype(total)[None]
        for (a, q), one in sums.items():
            row, column = i * rows + a, j * phases + q
            there = ((row < height) & (column < width))[:, None] & (c < count)[None]
            plgpu.store(out_ref.at[b, row, column[:, None], c[None]], one.astype(source.dtype), mask=there)

    out = _shape((source.shape[0], *shape), source.dtype, like=source)
    return _call(body, source.shape[0] * down * across * parts, out, block * lanes, name, interpret)(source, kernel)


def _rows(geometry: Geometry, height: int) -> int:
    """Rows per program: they share what they load, the more so the taller the window, and each costs registers."""
    return min(height, 4 if geometry.window[0] > 3 else 2)


def _block(dtype, width: int, channels: int, most: int) -> tuple[int, int]:
    """Columns and channels per program, powers of 2: 128 bytes of channels where there are as many."""
    lanes = min(pl.next_power_of_2(channels), max(32, 128 // dtype.itemsize))
    return min(pl.next_power_of_2(width), most // lanes), lanes


def _load(ref, b, row, columns, channels, dtype):
    """[columns, channels] of a row; 0 outside of the map."""
    _, height, width, count = ref.shape
    inside = (row >= 0) & (row < height) & (columns >= 0) & (columns < width)
    there = inside[:, None] & (channels < count)[None]
    return plgpu.load(ref.at[b, row, columns[:, None], channels[None]], mask=there, other=0).astype(dtype)


def _shape(shape, dtype, like):
    # Within a `shard_map`, Pallas asks over which axes a result varies.
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _call(body, programs: int, out, numbers: int, name: str, interpret: bool):
    return pl.pallas_call(
        body,
        out,
        grid=(programs,),
        in_specs=[pl.no_block_spec, pl.no_block_spec],
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(4, numbers // 256)), num_stages=2),
        interpret=interpret,
        name=name,
    )
