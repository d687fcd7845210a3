"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719): some operations per example, all of one magnitude.

Every example draws its own operations. The geometric ones among them become one affine map, so
that an image is resampled once however many there are; they come before the colours. Each layer of
colours is computed whole and selected per example, which XLA fuses into one pass over the image;
only the histogram of `equalize` costs more.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mgjax.ops import color
from mgjax.ops.geometry import affine_matrix, compose_matrices, linear_map

# The published list with solarize_add; full magnitudes as in its authors' code.
TURN, SHEAR, TRANSLATE, ENHANCE, BITS, ADD = 30.0, 0.3, 0.45, 0.9, 4, 110.0
OPERATIONS = (
    "identity",
    "rotate",
    "shear_y",
    "shear_x",
    "translate_y",
    "translate_x",
    "autocontrast",
    "equalize",
    "posterize",
    "solarize",
    "solarize_add",
    "saturation",
    "contrast",
    "brightness",
    "sharpness",
)


def draw_policy(key, layers: int, rows: int):
    """Operations as int32 [layers, rows] into `OPERATIONS`, and their signs, ±1, float32."""
    which, sign = jax.random.split(key)
    chosen = jax.random.randint(which, (layers, rows), 0, len(OPERATIONS))
    return chosen, jax.random.rademacher(sign, (layers, rows), jnp.float32)


def policy_matrix(chosen, sign, magnitude: float, height: int, width: int):
    """The geometric operations of all layers as one matrix [B, 2, 3].

    Args:
        chosen, sign: of `draw_policy`.
        magnitude: 0 to 1. Full: rotation by 30°, shear by 0.3, translation by 0.45 of a side.
    """
    rows = chosen.shape[1]
    amounts = magnitude * sign
    amount = lambda name, full: jnp.where(chosen == OPERATIONS.index(name), full * amounts, 0.0)
    turn, down, right = amount("rotate", TURN), amount("shear_y", SHEAR), amount("shear_x", SHEAR)
    shifts = jnp.stack([amount("translate_y", TRANSLATE * height), amount("translate_x", TRANSLATE * width)], -1)
    layers = [
        affine_matrix(linear_map(turn[i], jnp.ones(rows), down[i], right[i]), shifts[i], height, width)
        for i in range(chosen.shape[0])
    ]
    return functools.reduce(lambda first, second: compose_matrices(second, first), layers)


def policy_colors(x, chosen, sign, magnitude: float):
    """The colour operations, layer after layer.

    Args:
        x: float32 [B, H, W, C], 0 to 255.
        chosen, sign: of `draw_policy`.
        magnitude: 0 to 1. Full: posterize to 4 bits, solarize all, add 110 to the dark half,
            blend with a factor of 1 ± 0.9; autocontrast and equalize know no magnitude.
    """
    full = jnp.ones(x.shape[0])
    for which, factor in zip(chosen, 1 + ENHANCE * magnitude * sign):
        results = {
            "autocontrast": color.autocontrast(x),
            "equalize": color.equalize(x),
            "posterize": color.posterize(x, full * (8 - round(BITS * magnitude))),
            "solarize": color.solarize(x, full * 256 * (1 - magnitude)),
            "solarize_add": color.solarize_add(x, full * ADD * magnitude),
            "saturation": color.saturation(x, factor),
            "contrast": color.contrast(x, factor),
            "brightness": color.brightness(x, factor),
            "sharpness": color.sharpness(x, factor),
        }
        for name, result in results.items():
            x = jnp.where((which == OPERATIONS.index(name))[:, None, None, None], result, x)
    return x
