"""Layers whose narrower widths lie inside the full one."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgjax.layers.conv import he_init


class NestedDense(nn.Module):
    """A dense layer that can be asked for fewer inputs and outputs than it has.

    Matryoshka widths (Kusupati et al. 2022, arXiv:2205.13147; Devvrit et al. 2023, MatFormer,
    arXiv:2310.07707): the parameters have full width; a narrower call reads a prefix of them.
    The cut is static, so a narrow call is also a cheap one. n outputs are the first n of all
    outputs; n inputs give what the full inputs would with zeros behind the first n.

    Attributes:
        in_features: inputs at full width.
        features: outputs at full width.
        use_bias: adds a bias.
        kernel_init: of the full kernel [in_features, features].
        dtype: of the computation; parameters are float32.

    Raises:
        ValueError: more inputs or outputs than there are.

    Example:
        >>> layer, x = NestedDense(8, 16), jnp.ones((2, 8))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> layer.apply(variables, x, width=4).shape, layer.apply(variables, x[:, :2]).shape
        ((2, 4), (2, 16))
    """

    in_features: int
    features: int
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, width: int | None = None):
        """x: [..., at most in_features] → [..., width]; width: static, by default all outputs."""
        kernel = self.param("kernel", self.kernel_init, (self.in_features, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        width = _checked(self, x, width)
        y = jnp.dot(x.astype(self.dtype), kernel[: x.shape[-1], :width].astype(self.dtype))
        return y if bias is None else y + _like(bias[:width], y)


class NestedConv(nn.Module):
    """A convolution that can be asked for fewer input and output channels than it has.

    See `NestedDense`. It has no norm: batch statistics differ from width to width, so norms are
    kept per width, or are such that have none (Yu et al. 2019, Slimmable networks,
    arXiv:1812.08928).

    Attributes:
        in_features: input channels at full width.
        features: output channels at full width.
        kernel: side of the kernel.
        stride: step of the kernel.
        use_bias: adds a bias.
        dtype: of the computation; parameters are float32.

    Raises:
        ValueError: more input or output channels than there are.

    Example:
        >>> layer, x = NestedConv(8, 16), jnp.ones((2, 4, 4, 8))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> layer.apply(variables, x[..., :3], width=4).shape
        (2, 4, 4, 4)
    """

    in_features: int
    features: int
    kernel: int = 3
    stride: int = 1
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, width: int | None = None):
        """x: [B, H, W, at most in_features] → [B, ⌈H/stride⌉, ⌈W/stride⌉, width]; width: static."""
        kernel = self.param("kernel", he_init, (self.kernel, self.kernel, self.in_features, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        width = _checked(self, x, width)
        pad = (self.kernel - 1) // 2
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel[:, :, : x.shape[-1], :width].astype(self.dtype),
            (self.stride, self.stride),
            ((pad, self.kernel - 1 - pad),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y if bias is None else y + _like(bias[:width], y)


def _checked(layer, x, width: int | None) -> int:
    """The number of outputs; ValueError for widths that the layer does not have."""
    width = layer.features if width is None else width
    if not 1 <= width <= layer.features or not 1 <= x.shape[-1] <= layer.in_features:
        raise ValueError(
            f"{type(layer).__name__} of {layer.in_features} inputs and {layer.features} outputs was given "
            f"{x.shape[-1]} inputs and asked for {width} outputs"
        )
    return width


def _like(bias, y):
    return bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
