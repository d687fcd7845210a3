"""Depthwise convolution, by XLA's own path or by shifted multiply-adds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def depthwise_conv(x, kernel, *, strides=(1, 1), padding="SAME", impl: str = "auto"):
    """Convolves every channel with kernels of its own.

    y[b, i, j, c·m + k] = Σ_{u,v} x[b, i·s + u − p, j·s + v − p, c] · kernel[u, v, 0, c·m + k]

    Args:
        x: floating [B, H, W, C].
        kernel: [kh, kw, 1, C·m] as lax's HWIO; m is the channel multiplier.
        strides: (vertical, horizontal).
        padding: "SAME", "VALID" or ((top, bottom), (left, right)).
        impl: "xla" (`lax.conv_general_dilated`), "shift" (kh·kw shifted multiply-adds, many
            times faster on a CPU, where XLA has no fast grouped convolution) or "auto":
            "shift" on a CPU, "xla" elsewhere.

    Returns:
        [B, H', W', C·m] in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit, an integer input, an unknown `impl`.

    Example:
        >>> depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))).shape
        (1, 4, 4, 2)
    """
    if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[2] != 1 or kernel.shape[3] % x.shape[3]:
        raise ValueError(f"depthwise_conv needs x [B,H,W,C] and kernel [kh,kw,1,C·m], got {x.shape} and {kernel.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"depthwise_conv needs a floating x, got {x.dtype} {x.shape}")
    if impl == "auto":
        impl = "shift" if jax.default_backend() == "cpu" else "xla"
    window, strides = kernel.shape[:2], tuple(strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    if impl == "xla":
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=DIMENSIONS, feature_group_count=x.shape[3]
        )
    if impl != "shift":
        raise ValueError(f"depthwise_conv knows the implementations 'auto', 'xla' and 'shift', not '{impl}'")

    if kernel.shape[3] != x.shape[3]:
        x = jnp.repeat(x, kernel.shape[3] // x.shape[3], axis=3)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:3], window, strides)]
    if min(size) < 1:
        raise ValueError(f"the kernel {kernel.shape} is larger than the padded input {x.shape}")
    total = 0
    for u in range(window[0]):
        for v in range(window[1]):
            part = x[
                :,
                u : u + (size[0] - 1) * strides[0] + 1 : strides[0],
                v : v + (size[1] - 1) * strides[1] + 1 : strides[1],
            ]
            total = total + part * kernel[u, v, 0][None, None, None]
    return total
