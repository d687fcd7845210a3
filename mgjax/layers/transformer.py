"""Parts of transformers: patches, MLP block, stochastic depth, the block itself."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from mgjax import ops
from mgjax.layers.activations import activation
from mgjax.layers.attention import MultiHeadAttention, dense_init
from mgjax.layers.norm import Norm


def patches(x, block: int):
    """Cuts images into patches: `ops.space_to_depth`, after repeating the last pixels up to a multiple.

    Example:
        >>> patches(jnp.ones((1, 7, 8, 3)), 4).shape
        (1, 2, 2, 48)
    """
    if any(side % block for side in x.shape[1:3]):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, -x.shape[2] % block), (0, 0)), mode="edge")
    return ops.space_to_depth(x, block)


class PatchEmbed(nn.Module):
    """One linear map of every patch: a convolution whose stride is its kernel.

    Dosovitskiy et al. 2020, arXiv:2010.11929. Computed as one matrix product.

    Attributes:
        features: output channels.
        patch: side of a patch; sides of the image that are no multiple repeat their last pixels.
        dtype: of the computation; parameters are float32.

    Example:
        >>> import jax
        >>> PatchEmbed(16, patch=4).init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))[0].shape
        (2, 2, 2, 16)
    """

    features: int
    patch: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x: [B, H, W, C] → [B, ⌈H/patch⌉, ⌈W/patch⌉, features]."""
        shape = (self.patch, self.patch, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        return jnp.dot(patches(x.astype(self.dtype), self.patch), kernel.reshape(-1, self.features)) + bias[None, None, None]


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves out a whole residual branch, example by example.

    Huang et al. 2016, arXiv:1603.09382. What is kept is divided by the probability of keeping it,
    so that nothing changes in evaluation. It draws from the rng `"dropout"`.

    Attributes:
        rate: probability of leaving out, in [0, 1).

    Example:
        >>> DropPath(0.5).apply({}, jnp.ones((2, 3)), train=False).sum().item()
        6.0
    """

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: [B, ...] → the same shape."""
        same = tuple(range(1, x.ndim))  # one draw for all of an example
        return nn.Dropout(self.rate, broadcast_dims=same, deterministic=not train)(x)


class MLPBlock(nn.Module):
    """Two dense layers with an activation between them, position by position.

    Attributes:
        hidden: width between them.
        activation: between them.
        dropout: of both layers' outputs, in training.
        dtype: of the computation; parameters are float32.

    Example:
        >>> import jax
        >>> MLPBlock(32).init_with_output(jax.random.key(0), jnp.ones((2, 4, 8)), train=False)[0].shape
        (2, 4, 8)
    """

    hidden: int
    activation: Callable = activation("gelu")
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: [..., C] → the same shape."""
        drop = lambda y: nn.Dropout(self.dropout, deterministic=not train)(y)
        common = dict(kernel_init=dense_init, dtype=self.dtype)
        y = drop(self.activation(nn.Dense(self.hidden, name="dense1", **common)(x)))
        return drop(nn.Dense(x.shape[-1], name="dense2", **common)(y))


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each on normalised input and added to it (pre-norm).

    Vaswani et al. 2017, arXiv:1706.03762; the norm first as in Dosovitskiy et al. 2020.

    Attributes:
        heads: of the attention.
        mlp_ratio: hidden width of the MLP per channel.
        norm, epsilon: see `mgjax.layers.Norm`.
        activation: of the MLP.
        dropout: of what attention and MLP say.
        drop_path: see `DropPath`.
        dtype: of the computation; parameters are float32.

    Example:
        >>> import jax
        >>> block = TransformerBlock(heads=2)
        >>> block.init_with_output(jax.random.key(0), jnp.ones((1, 5, 8)), train=False)[0].shape
        (1, 5, 8)
    """

    heads: int
    mlp_ratio: float = 4.0
    norm: str = "layer"
    epsilon: float = 1e-6
    activation: Callable = activation("gelu")
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, mask=None, train: bool):
        """x: tokens [B, L, C] or a map [B, H, W, C]; mask: bool, its shape without C → the shape of x.

        Tokens that are masked count as 0, and what the block says at their places means nothing.
        """
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        x = x.astype(self.dtype)
        norm = lambda name, y: Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name=name)(y, train=train)
        add = lambda x, y: x + DropPath(self.drop_path)(y, train=train)
        y = MultiHeadAttention(self.heads, dtype=self.dtype, name="attention")(norm("norm1", x), key_mask=mask)
        x = add(x, nn.Dropout(self.dropout, deterministic=not train)(y))
        mlp = MLPBlock(round(x.shape[-1] * self.mlp_ratio), self.activation, self.dropout, self.dtype, name="mlp")
        return add(x, mlp(norm("norm2", x), train=train))
