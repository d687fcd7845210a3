"""Convolutions with norm and activation, dense and depthwise-separable."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from mgjax import ops
from mgjax.errors import InputError
from mgjax.layers.norm import Norm

# He et al. 2015, arXiv:1502.01852, over the outputs: keeps the gradient's variance.
he_init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def pads(padding: str, kernel: int, dilation: int, axes: int, depthwise: bool = False):
    """What `lax` is told of a layer's padding.

    Args:
        padding: "symmetric", ⌊(k − 1)·dilation / 2⌋ zeros before and the rest after, as published PyTorch models have it;
            "SAME", as TensorFlow's have it, which pads a strided window unevenly; "VALID"; or, of a depthwise convolution,
            "causal".
        kernel, dilation: of the layer.
        axes: spatial ones.
        depthwise: whether the layer is.

    Raises:
        InputError: another padding.
    """
    kind = padding.lower() if isinstance(padding, str) else padding
    known = ("symmetric", "same", "valid", "causal") if depthwise else ("symmetric", "same", "valid")
    if kind not in known:
        raise InputError(f"padding '{padding}' is none of {known}")
    if kind != "symmetric":
        return kind.upper()
    reach = (kernel - 1) * dilation
    return ((reach // 2, reach - reach // 2),) * axes


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
        padding: see `pads`.
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
    padding: str = "symmetric"

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: [B, H, W, C] → [B, ⌈H/stride⌉, ⌈W/stride⌉, features]."""
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=pads(self.padding, self.kernel, 1, 2),
            use_bias=self.use_bias,
            kernel_init=he_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        norm = Norm(self.norm, epsilon=self.epsilon, zero_scale=self.zero_scale, dtype=self.dtype, name="norm")
        x = norm(x, train=train)
        return self.activation(x) if self.activation else x


class DepthwiseConv(nn.Module):
    """Depthwise convolution: kernels for every channel alone, in two dimensions or in one.

    Attributes:
        kernel: side of the kernel.
        stride: step of the kernel.
        dilation: distance of the kernel's taps.
        multiplier: output channels per input channel.
        padding: see `pads`.
        use_bias: without one by default, since a norm that follows has a shift of its own.
        impl: see `mgjax.ops.depthwise_conv`.
        dtype: of the computation; parameters are float32.

    Example:
        >>> import jax
        >>> DepthwiseConv(5, padding="causal").init_with_output(jax.random.key(0), jnp.ones((1, 8, 4)))[0].shape
        (1, 8, 4)
    """

    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    padding: str = "symmetric"
    use_bias: bool = False
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x: [B, H, W, C] or [B, L, C] → the same with C·multiplier channels, [B, ⌈H/stride⌉, …] where padded."""
        axes = x.ndim - 2
        # Every output sees kernel^axes inputs, whatever the number of channels.
        init = nn.initializers.normal((2.0 / self.kernel**axes) ** 0.5)
        channels = x.shape[-1] * self.multiplier
        kernel = self.param("kernel", init, (*(self.kernel,) * axes, 1, channels))
        x = ops.depthwise_conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=self.stride,
            padding=pads(self.padding, self.kernel, self.dilation, axes, depthwise=True),
            dilation=self.dilation,
            impl=self.impl,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (channels,)).astype(self.dtype)
            x = x + bias.reshape((1,) * (x.ndim - 1) + (-1,))
        return x


class SeparableConv(nn.Module):
    """Depthwise, then pointwise convolution, each with norm and activation; in two dimensions or in one.

    Howard et al. 2017, MobileNets, arXiv:1704.04861.

    Attributes:
        features: output channels.
        kernel, stride, dilation, multiplier, padding, impl: as in `DepthwiseConv`.
        norm, activation, use_bias, epsilon, dtype: as in `Conv`, of both convolutions.

    Example:
        >>> import jax
        >>> layer = SeparableConv(8, stride=2)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=True)[0].shape
        (1, 4, 4, 8)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 4)), train=True)[0].shape
        (1, 4, 8)
    """

    features: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    padding: str = "symmetric"
    norm: str = "batch"
    activation: Callable | None = nn.relu
    use_bias: bool = False
    epsilon: float = 1e-5
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: [B, H, W, C] or [B, L, C] → the same with `features` channels, [B, ⌈H/stride⌉, …] where padded."""
        depthwise = DepthwiseConv(
            self.kernel,
            self.stride,
            self.dilation,
            self.multiplier,
            self.padding,
            self.use_bias,
            self.impl,
            self.dtype,
            name="depthwise",
        )
        x = Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name="norm")(depthwise(x), train=train)
        pointwise = Pointwise(
            self.features, self.norm, self.activation, self.use_bias, self.epsilon, self.dtype, name="pointwise"
        )
        return pointwise(self.activation(x) if self.activation else x, train=train)


class Pointwise(nn.Module):
    """A linear map of the channels of every position, norm, activation.

    Attributes:
        features: output channels.
        norm, activation, use_bias, epsilon, dtype: as in `Conv`.
    """

    features: int
    norm: str = "batch"
    activation: Callable | None = nn.relu
    use_bias: bool = False
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: [B, …, C] → [B, …, features]."""
        x = nn.Dense(self.features, use_bias=self.use_bias, kernel_init=he_init, dtype=self.dtype, name="dense")(x)
        x = Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name="norm")(x, train=train)
        return self.activation(x) if self.activation else x


class Projection(nn.Module):
    """Brings features to the width of a granularity by a separable convolution; what a model of mgjax projects with is
    `mgjax.projection.GranularityProjection`, which is built on it.

    Of a map or of tokens, a depthwise convolution with norm, then a linear map of the channels, norm and activation; of a
    vector, or with a kernel of 1, the linear map alone.

    Attributes:
        features: output channels.
        kernel: side of the depthwise kernel.
        norm, activation, epsilon, dtype: as in `Conv`; convolutions have a bias where there is no norm.
        impl: as in `DepthwiseConv`.

    Example:
        >>> import jax
        >>> layer = Projection(8)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 16)), train=True)[0].shape
        (2, 4, 4, 8)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 16)), train=True)[0].shape
        (2, 8)
    """

    features: int
    kernel: int = 3
    norm: str = "batch"
    activation: Callable | None = nn.relu
    epsilon: float = 1e-5
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: a map [B, H, W, C], tokens [B, L, C] or a vector [B, C] → the same with `features` channels."""
        common = dict(norm=self.norm, use_bias=self.norm == "none", epsilon=self.epsilon, dtype=self.dtype)
        if x.ndim == 2 or self.kernel == 1:
            return Pointwise(self.features, activation=self.activation, name="pointwise", **common)(x, train=train)
        x = DepthwiseConv(self.kernel, use_bias=self.norm == "none", impl=self.impl, dtype=self.dtype, name="depthwise")(x)
        x = Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name="norm")(x, train=train)
        return Pointwise(self.features, activation=self.activation, name="pointwise", **common)(x, train=train)


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
