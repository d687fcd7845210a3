"""Augmentation and normalisation on the device, inside jit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mgjax import ops
from mgjax.contracts import Batch


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random flip and crop, then normalisation. Drawn once per example: image, boxes and masks
    move together.

    Attributes:
        mean, std: per channel, in the units of the uint8 image.
        flip: mirror left and right with probability ½.
        padding: reflect so many pixels at each border, then cut the image's own size at random.

    Example:
        >>> import numpy as np
        >>> batch = Batch({"image": np.zeros((2, 8, 8, 3), np.uint8)}, {}, np.ones(2, bool), np.arange(2))
        >>> Augment((0.0,) * 3, (1.0,) * 3, padding=2)(batch, jax.random.key(0)).inputs["image"].shape
        (2, 8, 8, 3)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    padding: int = 4

    def normalise(self, batch: Batch) -> Batch:
        """uint8 images → float32, mean 0 and standard deviation 1 per channel."""
        mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (self.mean, self.std))
        image = (batch.inputs["image"].astype(jnp.float32) - mean) / std
        return batch.replace(inputs=batch.inputs | {"image": image})

    def __call__(self, batch: Batch, rng: jax.Array, strength: float = 1.0) -> Batch:
        """Augments and normalises; `strength` (static) scales the padding, 0 switches all off."""
        image, targets = batch.inputs["image"], dict(batch.targets)
        b, height, width = image.shape[:3]
        flip_key, crop_key = jax.random.split(rng)
        if self.flip and strength:
            mirrored = jax.random.bernoulli(flip_key, 0.5, (b,))
            image = ops.flip(image, mirrored)
            if "mask" in targets:
                targets["mask"] = ops.flip(targets["mask"], mirrored)
            if "box" in targets:
                y0, x0, y1, x1 = targets["box"].T
                turned = jnp.stack([y0, width - x1, y1, width - x0], 1)
                targets["box"] = jnp.where(mirrored[:, None], turned, targets["box"])
        if padding := round(self.padding * strength):
            top, left = jax.random.randint(crop_key, (2, b), 0, 2 * padding + 1)
            border = ((0, 0), (padding, padding), (padding, padding))
            image = ops.crop(jnp.pad(image, (*border, (0, 0)), mode="reflect"), top, left, height, width)
            if "mask" in targets:
                targets["mask"] = ops.crop(jnp.pad(targets["mask"], border), top, left, height, width)
            if "box" in targets:
                shift = jnp.stack([top, left, top, left], 1) - padding
                limit = jnp.asarray([height, width, height, width], jnp.float32)[None]
                targets["box"] = jnp.clip(targets["box"] - shift, 0.0, limit)
        return self.normalise(batch.replace(inputs=batch.inputs | {"image": image}, targets=targets))
