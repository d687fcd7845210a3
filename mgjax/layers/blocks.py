"""Blocks of published networks that are built on depthwise convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.errors import InputError
from mgjax.layers.activations import activation
from mgjax.layers.conv import Conv, DepthwiseConv, Pointwise, pads
from mgjax.layers.norm import Norm
from mgjax.layers.transformer import DropPath, MLPBlock


class InvertedResidual(nn.Module):
    """Widens the channels, convolves each alone, and narrows them without activation: MobileNetV2's block.

    Sandler et al. 2018, arXiv:1801.04381: pointwise, depthwise, linear pointwise; the input is added where the stride is 1
    and the result has its shape.

    Attributes:
        features: output channels.
        expansion: channels between the pointwise convolutions per input channel; at 1 the first one is left out.
        kernel, stride, padding: of the depthwise convolution, as in `DepthwiseConv`.
        norm, use_bias, epsilon, dtype: as in `Conv`, of all three convolutions.
        activation: behind all but the last.
        impl: see `mgjax.ops.depthwise_conv`.

    Raises:
        InputError: an expansion that leaves no channel.

    Example:
        >>> import jax
        >>> layer = InvertedResidual(8, expansion=6, stride=2)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=False)[0].shape
        (1, 4, 4, 8)
    """

    features: int
    expansion: float = 6
    kernel: int = 3
    stride: int = 1
    padding: str = "symmetric"
    norm: str = "batch"
    activation: Callable = nn.relu6
    use_bias: bool = False
    epsilon: float = 1e-5
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: floating [B, H, W, C] → [B, ⌈H/stride⌉, ⌈W/stride⌉, features] where padded."""
        common = dict(norm=self.norm, use_bias=self.use_bias, epsilon=self.epsilon, dtype=self.dtype)
        hidden = round(x.shape[-1] * self.expansion)
        if hidden < 1:
            raise InputError(f"an expansion of {self.expansion} leaves nothing of {x.shape[-1]} channels")
        x = y = x.astype(self.dtype)
        if self.expansion != 1:
            y = Pointwise(hidden, activation=self.activation, name="expand", **common)(y, train=train)
        y = DepthwiseConv(
            self.kernel,
            self.stride,
            padding=self.padding,
            use_bias=self.use_bias,
            impl=self.impl,
            dtype=self.dtype,
            name="depthwise",
        )(y)
        y = Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name="norm")(y, train=train)
        y = Pointwise(self.features, activation=None, name="project", **common)(self.activation(y), train=train)
        return x + y if self.stride == 1 and x.shape == y.shape else y


class LinearSeparable(nn.Module):
    """Depthwise, then pointwise convolution with nothing between them; norm and activation come last.

    Chollet 2016, Xception, arXiv:1610.02357, whose figure 10 shows that an activation between the two
    does harm. `SeparableConv` is MobileNet's, which has norm and activation after each.

    Attributes:
        features: output channels.
        kernel, stride, padding, impl: as in `DepthwiseConv`.
        norm, activation, epsilon, dtype: as in `Conv`.

    Example:
        >>> import jax
        >>> LinearSeparable(8, stride=2).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=True)[0].shape
        (1, 4, 4, 8)
    """

    features: int
    kernel: int = 3
    stride: int = 1
    padding: str = "symmetric"
    norm: str = "batch"
    activation: Callable | None = nn.relu
    epsilon: float = 1e-5
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: floating [B, H, W, C] or [B, L, C] → the same with `features` channels, [B, ⌈H/stride⌉, …] where padded."""
        depthwise = DepthwiseConv(
            self.kernel, self.stride, padding=self.padding, impl=self.impl, dtype=self.dtype, name="depthwise"
        )
        common = dict(norm=self.norm, activation=self.activation, epsilon=self.epsilon, dtype=self.dtype)
        return Pointwise(self.features, name="pointwise", **common)(depthwise(x), train=train)


class XceptionBlock(nn.Module):
    """Activation and separable convolution, several times, and max-pooling where it strides; added to its input.

    Chollet 2016, arXiv:1610.02357: nothing between depthwise and pointwise convolution; a strided block
    ends with a 3×3 max-pooling, and its input comes by a strided 1×1 convolution with norm. The sum is
    not activated: the next block begins with that.

    Attributes:
        widths: output channels of the separable convolutions, in order.
        stride: of the pooling and of the shortcut; 1 for none.
        kernel: side of the depthwise kernels.
        preactivate: also activate before the first convolution; False behind a stem, which has done so.
        padding: of the pooling, "SAME" (published) or "symmetric", see `mgjax.layers.conv.pads`.
        drop_path: see `DropPath`.
        norm, activation, dtype: as in `mgjax.layers.Conv`.
        epsilon: of the norms.
        impl: as in `DepthwiseConv`.

    Raises:
        InputError: no widths, or another padding.

    Example:
        >>> import jax
        >>> block = XceptionBlock((8, 16), stride=2)
        >>> block.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=True)[0].shape
        (1, 4, 4, 16)
    """

    widths: Sequence[int]
    stride: int = 1
    kernel: int = 3
    preactivate: bool = True
    padding: str = "SAME"
    drop_path: float = 0.0
    norm: str = "batch"
    activation: Callable = nn.relu
    epsilon: float = 1e-3
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: floating [B, H, W, C] → [B, ⌈H/stride⌉, ⌈W/stride⌉, widths[-1]]."""
        if not self.widths or self.padding not in ("SAME", "symmetric"):
            raise InputError(
                f"an XceptionBlock needs widths, and padding of 'SAME' or 'symmetric'; it has {tuple(self.widths)} "
                f"and '{self.padding}'"
            )
        common = dict(norm=self.norm, activation=None, epsilon=self.epsilon, dtype=self.dtype)
        x = x.astype(self.dtype)
        y = x
        for i, width in enumerate(self.widths):
            if i or self.preactivate:
                y = self.activation(y)
            y = LinearSeparable(width, self.kernel, impl=self.impl, name=f"separable{i + 1}", **common)(y, train=train)
        if self.stride > 1:
            y = nn.max_pool(y, (3, 3), (self.stride,) * 2, padding=pads(self.padding, 3, 1, 2))
        if x.shape != y.shape:
            x = Conv(self.widths[-1], 1, self.stride, name="shortcut", **common)(x, train=train)
        return x + DropPath(self.drop_path)(y, train=train)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, and an MLP over the channels, scaled channel by channel; added to its input.

    Liu et al. 2022, A ConvNet for the 2020s, arXiv:2201.03545. The scale is that of Touvron et al. 2021,
    arXiv:2103.17239.

    Attributes:
        kernel: side of the depthwise kernel, which has a bias.
        mlp_ratio: hidden width of the MLP per channel.
        norm: see `mgjax.layers.Norm`.
        epsilon: of the norm.
        activation: between the dense layers; published is the exact "gelu".
        layer_scale: what the learned scale starts from; 0 for no scale.
        drop_path: see `DropPath`.
        impl: as in `DepthwiseConv`.
        dtype: of the computation; parameters are float32.

    Example:
        >>> import jax
        >>> ConvNeXtBlock().init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=False)[0].shape
        (1, 8, 8, 4)
    """

    kernel: int = 7
    mlp_ratio: float = 4.0
    norm: str = "layer"
    epsilon: float = 1e-6
    activation: Callable = activation("gelu")
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: floating [B, H, W, C] or [B, L, C] → the same shape."""
        x = x.astype(self.dtype)
        channels = x.shape[-1]
        y = DepthwiseConv(self.kernel, use_bias=True, impl=self.impl, dtype=self.dtype, name="depthwise")(x)
        y = Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name="norm")(y, train=train)
        y = MLPBlock(round(channels * self.mlp_ratio), self.activation, dtype=self.dtype, name="mlp")(y, train=train)
        if self.layer_scale:
            scale = self.param("scale", nn.initializers.constant(self.layer_scale), (channels,)).astype(self.dtype)
            y = y * scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return x + DropPath(self.drop_path)(y, train=train)
