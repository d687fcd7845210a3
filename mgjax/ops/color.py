"""Colour operations on image batches: float32 [B, H, W, C] with values 0 to 255, not rounded.

A strength has one value per example. On whole grey levels the results are those of Pillow's
ImageOps and ImageEnhance up to its rounding to whole levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def grey(x):
    """Brightness [B, H, W, 1]: BT.601 luma of three channels, the mean of any other number."""
    if x.shape[3] != len(LUMA):
        return x.mean(3, keepdims=True)
    return sum(weight * x[..., i : i + 1] for i, weight in enumerate(LUMA))


def blend(base, x, factor):
    """base + factor · (x − base), cut to 0…255; 1 leaves `x`. factor: [B]."""
    return jnp.clip(base + _each(factor) * (x - base), 0.0, 255.0)


def brightness(x, factor):
    """Blends with black."""
    return blend(jnp.zeros_like(x), x, factor)


def contrast(x, factor):
    """Blends with the image's mean brightness."""
    return blend(jnp.broadcast_to(grey(x).mean((1, 2), keepdims=True), x.shape), x, factor)


def saturation(x, factor):
    """Blends with the grey image."""
    return blend(jnp.broadcast_to(grey(x), x.shape), x, factor)


def sharpness(x, factor):
    """Blends with the image smoothed by [1 1 1; 1 5 1; 1 1 1] / 13; the border stays."""
    h, w = x.shape[1:3]
    if min(h, w) < 3:  # nothing but border
        return x
    rows = x[:, : h - 2] + x[:, 1 : h - 1] + x[:, 2:]
    smooth = (rows[:, :, : w - 2] + rows[:, :, 1 : w - 1] + rows[:, :, 2:] + 4 * x[:, 1 : h - 1, 1 : w - 1]) / 13
    inner = ((0, 0), (1, 1), (1, 1), (0, 0))
    inside = jnp.pad(jnp.ones((1, h - 2, w - 2, 1), bool), inner)
    return blend(jnp.where(inside, jnp.pad(smooth, inner), x), x, factor)


def posterize(x, bits):
    """Keeps the highest `bits` [B] of eight."""
    step = _each(2.0 ** (8 - bits))
    return jnp.floor(x / step) * step


def solarize(x, threshold):
    """Inverts what is at least `threshold` [B]."""
    return jnp.where(x < _each(threshold), x, 255.0 - x)


def solarize_add(x, amount):
    """Adds `amount` [B] to what is below 128."""
    return jnp.where(x < 128, jnp.clip(x + _each(amount), 0.0, 255.0), x)


def autocontrast(x):
    """Stretches every channel to 0…255; one of a single value stays."""
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    scale = 255.0 / jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, (x - low) * scale, x)


def equalize(x):
    """Makes the histogram of every channel flat; whole grey levels. One of a single value stays."""
    b, h, w, c = x.shape
    level = jnp.clip(jnp.round(x), 0, 255).astype(jnp.int32).reshape(b, h * w, c).transpose(0, 2, 1)

    def one(level):
        count = jnp.zeros(256, jnp.int32).at[level].add(1, mode="promise_in_bounds")
        step = (level.size - jnp.sum(level == level.max())) // 255
        table = (step // 2 + jnp.cumsum(count) - count) // jnp.maximum(step, 1)
        table = jnp.where(step > 0, table, jnp.arange(256))
        return table.at[level].get(mode="promise_in_bounds")

    # One histogram per channel of an example; nothing crosses the batch.
    level = jax.vmap(jax.vmap(one))(level)
    return level.transpose(0, 2, 1).reshape(x.shape).astype(x.dtype)


def _each(value):
    return value[:, None, None, None]
