"""Convolutions with norm and activation, dense and depthwise-separable."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from mgjax import ops
from mgjax.layers.norm import Norm

# He et al. 2015, arXiv:1502.01852, over the outputs: keeps the gradient's variance.
he_init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class Conv(nn.Module):
    """Convolution, norm, activation.

    Attributes:
        features: output channels.
        kernel: side of the kernel.
        stride: step of the kernel.
        norm: see `mgjax.layers.Norm`.
        activation: applied last; None for none.
        zero_scale, epsilon: see `Norm`.
        dtype: of the computation; parameters are float32.
        use_bias: of the convolution; without one by default, since a norm has a shift of its own.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    norm: str = "batch"
    activation: Callable | None = nn.relu
    zero_scale: bool = False
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: [B, H, W, C] → [B, ⌈H/stride⌉, ⌈W/stride⌉, features]."""
        # Symmetric padding, as published models have it; "SAME" pads a strided window unevenly.
        pad = (self.kernel - 1) // 2
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=((pad, self.kernel - 1 - pad),) * 2,
            use_bias=self.use_bias,
            kernel_init=he_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        norm = Norm(self.norm, epsilon=self.epsilon, zero_scale=self.zero_scale, dtype=self.dtype, name="norm")
        x = norm(x, train=train)
        return self.activation(x) if self.activation else x


class DepthwiseConv(nn.Module):
    """Depthwise convolution without bias: one kernel per channel.

    Attributes:
        kernel: side of the kernel.
        stride: step of the kernel.
        impl: see `mgjax.ops.depthwise_conv`.
        dtype: of the computation.
    """

    kernel: int = 3
    stride: int = 1
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x: [B, H, W, C] → [B, ⌈H/stride⌉, ⌈W/stride⌉, C]."""
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        # Every output sees kernel² inputs, whatever the number of channels.
        weights = self.param("kernel", nn.initializers.normal((2.0 / self.kernel**2) ** 0.5), shape)
        pad = (self.kernel - 1) // 2
        return ops.depthwise_conv(
            x.astype(self.dtype),
            weights.astype(self.dtype),
            strides=(self.stride, self.stride),
            padding=((pad, self.kernel - 1 - pad),) * 2,
            impl=self.impl,
        )


class SeparableConv(nn.Module):
    """Depthwise, then pointwise convolution, each with norm and activation.

    Howard et al. 2017, MobileNets, arXiv:1704.04861.

    Attributes:
        features: output channels.
        kernel, stride, norm, activation, dtype: as in `Conv`.

    Example:
        >>> import jax
        >>> layer = SeparableConv(8, stride=2)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=True)[0].shape
        (1, 4, 4, 8)
    """

    features: int
    kernel: int = 3
    stride: int = 1
    norm: str = "batch"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: [B, H, W, C] → [B, ⌈H/stride⌉, ⌈W/stride⌉, features]."""
        x = DepthwiseConv(self.kernel, self.stride, dtype=self.dtype, name="depthwise")(x)
        x = self.activation(Norm(self.norm, dtype=self.dtype, name="norm")(x, train=train))
        return Conv(self.features, 1, norm=self.norm, activation=self.activation, dtype=self.dtype, name="pointwise")(
            x, train=train
        )


class Projection(nn.Module):
    """Brings features to the width of a granularity: pointwise linear, norm, activation.

    Attributes:
        features: output channels.
        norm, activation, dtype: as in `Conv`; the linear map has a bias where there is no norm.

    Example:
        >>> import jax
        >>> layer = Projection(8)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 16)), train=True)[0].shape
        (2, 4, 4, 8)
    """

    features: int
    norm: str = "batch"
    activation: Callable | None = nn.relu
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: a map [B, H, W, C], tokens [B, L, C] or a vector [B, C] → the same with `features` channels."""
        x = nn.Dense(self.features, use_bias=self.norm == "none", kernel_init=he_init, dtype=self.dtype, name="dense")(x)
        x = Norm(self.norm, dtype=self.dtype, name="norm")(x, train=train)
        return self.activation(x) if self.activation else x


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate that has seen the mean of the whole map.

    Hu et al. 2018, arXiv:1709.01507: x · σ(W₂ · activation(W₁ · mean(x))).

    Attributes:
        ratio: input channels per channel of the bottleneck, which has at least one.
        activation: of the bottleneck.
        dtype: of the computation; parameters are float32.

    Example:
        >>> import jax
        >>> SqueezeExcite(4).init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 16)))[0].shape
        (2, 8, 8, 16)
    """

    ratio: int = 16
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x: a map [B, H, W, C] or tokens [B, L, C] → the same shape."""
        channels = x.shape[-1]
        x = x.astype(self.dtype)
        gate = x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        gate = nn.Dense(max(1, channels // self.ratio), dtype=self.dtype, name="squeeze")(gate)
        gate = nn.Dense(channels, dtype=self.dtype, name="excite")(self.activation(gate))
        return x * nn.sigmoid(gate)
