"""Device views: what a granularity sees of a batch, computed inside jit."""

from __future__ import annotations

import math

import jax.numpy as jnp

from mgjax import ops
from mgjax.granularity import View


def apply_view(inputs: dict, view: View, resolution: float = 1.0):
    """Returns one input as a granularity sees it.

    Args:
        inputs: `Batch.inputs`; images are floating [B, H, W, C], already normalised. Anything
            else passes as it is, and only `Identity` fits it.
        view: the granularity's view.
        resolution: further factor on an image's size (`OperatingPoint.resolution`).

    Returns:
        The array or, where there are several modalities, the dict that a branch receives.

    Raises:
        ValueError: a view that changes the resolution of something that is no image.
    """
    scale = view.scale * resolution
    detail = scale if view.detail is None else view.detail * resolution
    if "image" not in inputs:
        if scale != 1:
            raise ValueError(f"{view} at resolution {resolution} needs an image; the batch has {sorted(inputs)}")
        return inputs
    image = inputs["image"]
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"images are normalised to floating point before a view, got {image.dtype} {image.shape}")
    size = lambda factor: [max(1, math.floor(n * factor + 0.5)) for n in image.shape[1:3]]
    return ops.resize(ops.resize(image, *size(detail)), *size(scale))
