"""Device views: what a granularity sees of a batch, computed inside jit.

Preprocessing is per view and knows no chance. Augmentation is drawn once per example, before any
view (`mgjax.data.augment`), so that all views of an example show the same crop and colours.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from mgjax import ops
from mgjax.granularity import Columns, Compose, Denoise, Encoded, Fields, Grey, Identity, Region, Resize, Sentence, View
from mgjax.ops import color

_FULL = Resize(1.0)


def apply_view(inputs: dict, view: View, resolution: float = 1.0):
    """Returns one input as a granularity sees it.

    Args:
        inputs: `Batch.inputs`; images are floating [B, H, W, C], already normalised. Anything
            else passes as it is, and only `Identity` fits it.
        view: the granularity's view.
        resolution: further factor on an image's size; what is no image has one size (`OperatingPoint.resolution`). It is taken
            last: by the view's last step if that is a `Resize`, else by a step of its own.

    Returns:
        The array or, where there are several modalities, the dict that a branch receives.

    Raises:
        ValueError: a view that changes something that is no image, or an image of integers.

    Example:
        >>> near = Compose((Region.central(0.5), Denoise("median")))
        >>> apply_view({"image": jnp.ones((2, 32, 32, 3))}, near, resolution=0.5).shape
        (2, 8, 8, 3)
    """
    if isinstance(view, Columns):
        return {kind: inputs[f"{view.key}/{kind}"] for kind in ("numbers", "categories")}
    if isinstance(view, Sentence) and view.weighed:
        return {kind: inputs[f"{view.key}/{kind}"] for kind in ("ids", "weights")}
    if isinstance(view, Fields):
        if lacking := [n for n in view.names if n not in inputs]:
            raise ValueError(f"{view} needs the input '{lacking[0]}'; the batch has {sorted(inputs)}")
        return {name: inputs[name] for name in view.names}
    if isinstance(view, Encoded):
        if view.key not in inputs:
            raise ValueError(f"{view} needs the input '{view.key}'; the batch has {sorted(inputs)}")
        return inputs[view.key]
    steps = [s for s in (view.views if isinstance(view, Compose) else (view,)) if s != Identity()]
    if "image" not in inputs:
        if resolution != 1 or any(s != _FULL for s in steps):
            raise ValueError(f"{view} at resolution {resolution} needs an image; the batch has {sorted(inputs)}")
        return inputs
    image = inputs["image"]
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"images are normalised to floating point before a view, got {image.dtype} {image.shape}")
    last = steps.pop() if steps and isinstance(steps[-1], Resize) else _FULL
    for step in steps:
        image = _apply(image, step)
    return _apply(image, last, resolution)


def _apply(image, step: View, resolution: float = 1.0):
    match step:
        case Resize(scale, detail):
            detail = scale if detail is None else detail
            small, size = (_size(image, share * resolution, share * resolution) for share in (detail, scale))
            return ops.resize(ops.resize(image, *small), *size)
        case Region():
            height, width = _size(image, step.height, step.width)
            top, left = (min(_round(n * s), n - m) for n, s, m in zip(image.shape[1:3], (step.top, step.left), (height, width)))
            return image[:, top : top + height, left : left + width]
        case Grey():
            return jnp.broadcast_to(color.grey(image), image.shape)
        case Denoise("median"):
            return ops.median(image, step.size)
        case Denoise("bilateral"):
            return ops.bilateral(image, step.size, step.strength, step.reach or step.size / 3)
        case Denoise("nlm"):
            return ops.non_local_means(image, step.size, int(step.reach) or 7, step.strength, step.noise)
    raise ValueError(f"{step} is no view")


def _size(image, height: float, width: float) -> list[int]:
    return [scaled(n, share) for n, share in zip(image.shape[1:3], (height, width))]


def scaled(side: int, share: float) -> int:
    """Pixels of a side that is seen at `share` times its size; at least one."""
    return max(1, _round(side * share))


def _round(x: float) -> int:
    return math.floor(x + 0.5)
