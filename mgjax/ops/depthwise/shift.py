"""Depthwise convolution as shifted multiply-adds, for CPUs.

XLA's CPU backend makes one vectorised loop of a sum of shifted, scaled maps. It does so only where nothing but
channels runs innermost and no bound is looked at, hence:

* Padding is written out first (the barrier keeps it out of the loop, where it would be a branch for each number).
* A kernel gradient is no reduction for XLA, which would run it number by number with a stride of all channels. It is a
  loop over rows that adds some columns × some rows of products, term by term, to a small sum per tap. Rows, not
  examples: a batch lies on several devices, and a loop over it would gather it.
* An input gradient is made phase by phase, as a strided window leaves it, and each phase is such a sum.
* A sum of too many terms takes long to compile: that of a large window is a loop over some of its rows at a time.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from mgjax.ops.depthwise.geometry import Geometry

TERMS = 16  # products that one loop of a kernel gradient adds at once: more take long to compile
TAPS = 16  # whose kernel gradients are one pass: those of the window, or else of a row of it, or else one by one
TAPS_AT_ONCE = 64  # of a window that is one loop over the map; larger ones are several


def convolve(x, kernel, geometry: Geometry):
    """As `primitive.convolve`."""
    padded = _pad(_expand(x, geometry.multiplier), geometry.padding)
    return _sum(padded, kernel, (0, 0), geometry.dilation, geometry.strides, geometry.out).astype(x.dtype)


def input_gradient(g, kernel, geometry: Geometry):
    """As `primitive.input_gradient`."""
    sizes = tuple(-(-n // s) for n, s in zip(geometry.size, geometry.strides))  # of a phase
    # axis → phase → the taps that fall on it, last first, each with the first output that it reads.
    axes = [
        [[(u, (a + before - u * d) // s) for u in reversed(range(k)) if (a + before - u * d) % s == 0] for a in range(s)]
        for k, s, d, (before, _) in zip(geometry.window, geometry.strides, geometry.dilation, geometry.padding)
    ]
    reach = [[first for phase in axis for _, first in phase] for axis in axes]
    pads = [(-min(r), max(r) + n - m) for r, n, m in zip(reach, sizes, geometry.out)]
    padded = _pad(g, pads)
    phases = []
    for rows in axes[0]:
        for columns in axes[1]:
            if not rows or not columns:  # no window ever looks there
                phases.append(jnp.zeros((g.shape[0], *sizes, g.shape[3]), _total(g)))
                continue
            taps, firsts = zip(*(zip(*axis) for axis in (rows, columns)))
            part = kernel[jnp.array(taps[0])][:, jnp.array(taps[1])] if geometry.strides != (1, 1) else kernel[::-1, ::-1]
            # Taps of a phase are evenly spaced, and so is what they read.
            first = tuple(f[0] + before for f, (before, _) in zip(firsts, pads))
            spacing = tuple(f[1] - f[0] if len(f) > 1 else 1 for f in firsts)
            phases.append(_sum(padded, part, first, spacing, (1, 1), sizes))
    x = phases[0]
    if len(phases) > 1:
        (height, width), (sh, sw) = sizes, geometry.strides
        x = jnp.stack(phases, 3).reshape(g.shape[0], height, width, sh, sw, g.shape[3]).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(g.shape[0], height * sh, width * sw, g.shape[3])[:, : geometry.size[0], : geometry.size[1]]
    if (m := geometry.multiplier) > 1:
        x = x.reshape(*x.shape[:3], g.shape[3] // m, m).sum(-1)
    return x.astype(g.dtype)


def kernel_gradient(x, g, geometry: Geometry):
    """As `primitive.kernel_gradient`."""
    x, pads, turned = _expand(x, geometry.multiplier), geometry.padding, geometry.strides == (1, 1)
    if turned:
        # The window that sees x from g, turned round, sees g from x. This pads g, as the input gradient does, and XLA keeps
        # one of the two; a padded x would be made again, or live from the forward pass to here.
        x, g, pads = g, x, _opposite(geometry)
    (batch, height, width, channels), (kh, kw), total = g.shape, geometry.window, _total(x)
    (sh, sw), (dh, dw) = geometry.strides, geometry.dilation
    x = _pad(x, pads)
    at_once = kh * kw <= TAPS
    columns = _divisor(width, TERMS // 4 if at_once else TERMS // 2)
    rows = _divisor(height, TERMS // columns if at_once else 2)
    block = width // columns

    def add(total_so_far, i, u, v):
        """The products of the rows i, i + 1, … with tap (u, v)."""
        for row in range(rows):
            for column in range(columns):
                at = (0, (i + row) * sh + u * dh, column * block * sw + v * dw, 0)
                seen = lax.dynamic_slice(x, at, (batch, 1, (block - 1) * sw + 1, channels))[:, :, ::sw]
                mine = lax.dynamic_slice(g, (0, i + row, column * block, 0), (batch, 1, block, channels))
                total_so_far = total_so_far + seen.astype(total) * mine.astype(total)
        return total_so_far

    def passed(taps):
        zeros = [jnp.zeros((batch, 1, block, channels), total)] * len(taps)
        more = lambda n, sums: [add(s, n * rows, u, v) for s, (u, v) in zip(sums, taps)]
        return jnp.stack([s.sum((0, 1, 2)) for s in lax.fori_loop(0, height // rows, more, zeros)])

    if at_once:
        gradient = passed(geometry.taps).reshape(kh, kw, channels)
    elif kw <= TAPS:
        gradient = lax.map(lambda u: passed([(u, v) for v in range(kw)]), jnp.arange(kh))
    else:
        gradient = lax.map(lambda n: passed([(n // kw, n % kw)]), jnp.arange(kh * kw)).reshape(kh, kw, channels)
    return (gradient[::-1, ::-1] if turned else gradient).astype(x.dtype)


def _opposite(geometry: Geometry):
    """Padding of the output with which a window of stride 1 leads back to the input."""
    reach = [(k - 1) * d for k, d in zip(geometry.window, geometry.dilation)]
    return tuple((r - before, r - after) for r, (before, after) in zip(reach, geometry.padding))


def _sum(x, kernel, first, spacing, strides, out):
    """y[i, j] = Σ_{u,v} kernel[u, v] · x[first + (u, v)·spacing + (i, j)·strides], in the dtype of sums: [B, *out, C]."""
    (kh, kw), (height, width), total = kernel.shape[:2], out, _total(x)
    span = (x.shape[0], (height - 1) * strides[0] + 1, (width - 1) * strides[1] + 1, x.shape[3])

    def add(y, row, count: int):
        """`y` with what `count` rows of the window add, from `row` on."""
        weights = lax.dynamic_slice_in_dim(kernel, row, count).astype(total)
        for u in range(count):
            for v in range(kw):
                at = (0, first[0] + (row + u) * spacing[0], first[1] + v * spacing[1], 0)
                seen = lax.dynamic_slice(x, at, span)[:, :: strides[0], :: strides[1]]
                y = y + seen.astype(total) * weights[u, v][None, None, None]
        return y

    y = jnp.zeros((), total)
    each = min(kh, max(1, TAPS_AT_ONCE // kw))
    if each == kh:
        return add(y, 0, kh)
    y = add(y, 0, each + kh % each)  # the odd rows, too
    return lax.fori_loop(1, kh // each, lambda n, y: add(y, kh % each + n * each, each), y)


def _total(x):
    """The dtype of sums."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _expand(x, multiplier: int):
    """Every channel as often as it is used."""
    if multiplier == 1:
        return x
    return jnp.broadcast_to(x[..., None], (*x.shape, multiplier)).reshape(*x.shape[:3], x.shape[3] * multiplier)


def _pad(x, pads):
    if not any(p for axis in pads for p in axis):
        return x
    return lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0))))


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`."""
    return max(d for d in range(1, max(1, min(number, most)) + 1) if number % d == 0)
