"""Depthwise convolution by XLA's own grouped convolution."""

from __future__ import annotations

import jax

from mgjax.ops.depthwise.geometry import Geometry

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, geometry: Geometry, precision: str | None = None):
    """As `primitive.convolve`."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=x.shape[3],
        precision=precision,
    )


def input_gradient(g, kernel, geometry: Geometry, precision: str | None = None):
    """As `primitive.input_gradient`."""
    x = jax.ShapeDtypeStruct((g.shape[0], *geometry.size, g.shape[3] // geometry.multiplier), g.dtype)
    return jax.linear_transpose(lambda x: convolve(x, kernel, geometry, precision), x)(g)[0]


def kernel_gradient(x, g, geometry: Geometry, precision: str | None = None):
    """As `primitive.kernel_gradient`."""
    kernel = jax.ShapeDtypeStruct((*geometry.window, g.shape[3]), x.dtype)
    return jax.linear_transpose(lambda kernel: convolve(x, kernel, geometry, precision), kernel)(g)[0]
