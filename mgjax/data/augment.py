"""Augmentation and normalisation on the device, inside jit.

Augmentation is drawn once per example and shared by all views: image, boxes and masks move
together. What differs between granularities is preprocessing without chance (`mgjax.views`).
Nothing crosses the batch axis but the neighbours of a pair in mixing, so that a sharded batch
stays where it is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mgjax import ops
from mgjax.config import key
from mgjax.contracts import Batch
from mgjax.data.sources import DataError
from mgjax.ops import color, policy


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """The keys of `Augment.from_config`; the attributes of `Augment` say more of each."""

    flip: bool = key(True, "mirror training images at random")
    padding: int = key(4, "pixels by which training images are shifted at random", low=0)
    size: int = key(0, "side that is cut from the images, the centre in evaluation; 0 = all", low=0)
    crop: tuple[float, ...] = key(
        (), "smallest, largest share of a random resized crop, in place of the shift", low=0.01, high=1
    )
    rotate: float = key(0.0, "degrees by which images are turned at most, either way", low=0, high=180)
    zoom: float = key(0.0, "factor 1 + zoom by which images grow or shrink at most", low=0, high=1)
    shear: float = key(0.0, "pixels per pixel by which images are sheared at most, either way", low=0, high=1)
    jitter: float = key(0.0, "brightness, contrast and saturation change by factors 1 ± jitter at most", low=0, high=1)
    layers: int = key(0, "operations of RandAugment per image", low=0, high=8)
    magnitude: float = key(9.0, "of RandAugment's operations", low=0, high=10)
    erase: float = key(0.0, "probability that a random window is erased", low=0, high=1)
    mixup: float = key(0.0, "α of mixup; 0 = none. With cutmix, either is taken by half", low=0)
    cutmix: float = key(0.0, "α of cutmix; 0 = none", low=0)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of the training images, then normalisation.

    In this order: flip; shift or resized crop; one affine warp (rotation, zoom, shear, and the
    geometric part of RandAugment); colours; erasing; mixing. Images are uint8 [B, H, W, C] before
    and float32 [B, size, size, C] afterwards. Masks go with the nearest pixel and are 0 beyond
    the borders of the image; boxes become the boxes around their moved corners, cut at the
    borders, and all zeros where nothing is left (`ops.transform_boxes`).

    Mixing pairs the rows 2k and 2k + 1, of the rest of the batch it sees nothing. It fills
    `Batch.partner` and `Batch.share`. A masked row is not mixed, nor is its neighbour. Every
    device needs an even number of rows: with an odd one pairs would lie across devices.

    Attributes:
        mean, std: per channel, in the units of the uint8 image.
        flip: mirror left and right with probability ½.
        padding: reflect so many pixels at each border, then cut at random. No shift with `crop`.
        size: side of what is cut from the image; None = all of it.
        crop: smallest and largest share of the area of a window that is resampled to the size
            (Szegedy et al. 2014, arXiv:1409.4842), of proportions 3 : 4 to 4 : 3.
        rotate: degrees, at most and either way.
        zoom: images grow or shrink by a factor of 1 + zoom at most.
        shear: pixels per pixel along both axes, at most and either way.
        jitter: brightness, contrast and saturation are blended by 1 ± jitter at most.
        randaugment: (operations per image, magnitude from 0 to 10); see `ops.policy`.
        erase: probability that a window of 2 % to 33 % of the area takes the mean colour
            (Zhong et al. 2017, arXiv:1708.04896).
        mixup: α of Beta(α, α), from which λ is drawn per row (Zhang et al. 2017,
            arXiv:1710.09412); 0 = none.
        cutmix: α likewise (Yun et al. 2019, arXiv:1905.04899); λ is the exact share of pixels.
            With both, each row takes either with probability ½.

    Raises:
        DataError: a value out of its bounds.

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
    size: int | None = None
    crop: tuple[float, float] | None = None
    rotate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    jitter: float = 0.0
    randaugment: tuple[int, float] | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        def need(name: str, fits: bool, what: str):
            if not fits:
                raise DataError(f"augment.{name} is {getattr(self, name)}; {what}")

        for name in ("padding", "rotate", "zoom", "shear", "mixup", "cutmix"):
            need(name, getattr(self, name) >= 0, "it is at least 0")
        for name in ("jitter", "erase"):
            need(name, 0 <= getattr(self, name) <= 1, "it lies between 0 and 1")
        need("size", self.size is None or self.size >= 1, "it is at least 1 pixel")
        crop, layers = self.crop, self.randaugment
        need(
            "crop",
            crop is None or (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1),
            "two shares are needed, 0 < smallest <= largest <= 1",
        )
        need(
            "randaugment",
            layers is None or (layers[0] >= 1 and 0 <= layers[1] <= 10),
            "it is (operations, at least 1; magnitude, 0 to 10)",
        )

    @classmethod
    def from_config(cls, config: AugmentConfig, mean, std, image_shape: tuple[int, int, int]) -> Augment:
        """The augmentation of a config, for images [height, width, channels].

        Raises:
            DataError: a value out of its bounds, or a size larger than the images.
        """
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        layers, magnitude = values.pop("layers"), values.pop("magnitude")
        values |= {"size": config.size or None, "crop": config.crop or None}
        augment = cls(tuple(mean), tuple(std), **values, randaugment=(layers, magnitude) if layers else None)
        augment._sizes(image_shape)
        return augment

    def normalise(self, batch: Batch) -> Batch:
        """uint8 images → float32, mean 0 and standard deviation 1 per channel; the centre, with a `size`."""
        image, targets = batch.inputs["image"], dict(batch.targets)
        height, width = self._sizes(image.shape[1:])
        if (height, width) != image.shape[1:3]:
            corner = [jnp.full(image.shape[:1], (n - m) // 2) for n, m in zip(image.shape[1:3], (height, width))]
            matrix = _shift(*corner)
            targets = _move(targets, matrix, height, width, lambda mask: ops.center_crop(mask, height, width))
            image = ops.center_crop(image, height, width)
        return self._finish(batch, image, targets)

    def __call__(self, batch: Batch, rng: jax.Array, strength: float = 1.0, pieces: int = 1) -> Batch:
        """Augments and normalises.

        Args:
            strength: static, 0 to 1. 0 is `normalise`. Below 1, the shift in pixels, the angles,
                zoom, shear, jitter and RandAugment's magnitude shrink in proportion, the
                proportions of a resized crop towards 1 and its area towards the whole image;
                erasing and mixing hit fewer rows. The flip stays.
            pieces: static; last of all, images are cut into pieces × pieces patches, which are put together in a random
                order, one per example (`ops.jigsaw`); 1 leaves them whole. Boxes and masks stay as they are, and then
                mean nothing: such batches are for labels.

        Raises:
            DataError: a strength out of its bounds, a size larger than the images, mixing of
                an odd number of rows, or pieces that do not divide the images.
        """
        batch = self._augmented(batch, rng, strength)
        if pieces == 1:
            return batch
        image = batch.inputs["image"]
        if any(n % pieces for n in image.shape[1:3]):
            raise DataError(f"images of {image.shape[1]} × {image.shape[2]} pixels cannot be cut into {pieces} pieces a side")
        image = ops.jigsaw(jax.random.fold_in(rng, 3), image, pieces)
        return batch.replace(inputs=batch.inputs | {"image": image})

    def _augmented(self, batch: Batch, rng: jax.Array, strength: float) -> Batch:
        if not 0 <= strength <= 1:
            raise DataError(f"the strength of the augmentation is {strength}; it lies between 0 and 1")
        if strength == 0:
            return self.normalise(batch)
        image, targets = batch.inputs["image"], dict(batch.targets)
        flip_key, place_key = jax.random.split(rng)
        more = dict(zip(("warp", "color", "erase", "mix"), jax.random.split(jax.random.fold_in(rng, 2), 4)))
        if self.flip:
            image, targets = self._flip(image, targets, flip_key)
        place = self._resized_crop if self.crop else self._shift
        image, targets = place(image, targets, place_key, strength)
        drawn = None
        if self.randaugment:
            layers_key, more["warp"] = jax.random.split(more["warp"])
            drawn = policy.draw_policy(layers_key, self.randaugment[0], image.shape[0])
        image, targets = self._warp(image, targets, more["warp"], strength, drawn)
        image = self._colors(image, more["color"], strength, drawn)
        if self.erase:
            image = self._erase(image, more["erase"], strength)
        if self.mixup or self.cutmix:
            image, batch = self._mix(image, batch.replace(targets=targets), more["mix"], strength)
        return self._finish(batch, image, targets)

    def _sizes(self, shape) -> tuple[int, int]:
        """Height and width of what comes out."""
        if self.size is not None and self.size > min(shape[:2]):
            raise DataError(
                f"augment.size is {self.size}; the images are only {shape[0]} × {shape[1]}: give a smaller "
                "--config.augment.size (0: the whole image)"
            )
        return (shape[0], shape[1]) if self.size is None else (self.size, self.size)

    def _finish(self, batch: Batch, image, targets: dict) -> Batch:
        mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (self.mean, self.std))
        image = (image.astype(jnp.float32) - mean) / std
        return batch.replace(inputs=batch.inputs | {"image": image}, targets=targets)

    # -- where things lie

    def _flip(self, image, targets: dict, rng):
        height, width = image.shape[1:3]
        mirrored = jax.random.bernoulli(rng, 0.5, image.shape[:1])
        one, zero = jnp.ones(image.shape[0]), jnp.zeros(image.shape[0])
        matrix = ops.axis_aligned_matrix(one, jnp.where(mirrored, -one, one), zero, jnp.where(mirrored, width, zero))
        return ops.flip(image, mirrored), _move(targets, matrix, height, width, lambda mask: ops.flip(mask, mirrored))

    def _shift(self, image, targets: dict, rng, strength: float):
        """The central window, moved by up to `padding` pixels."""
        (height, width), reach = self._sizes(image.shape[1:]), round(self.padding * strength)
        if not reach and (height, width) == image.shape[1:3]:
            return image, targets
        start = [(n - m) // 2 for n, m in zip(image.shape[1:3], (height, width))]
        border = [max(0, reach - s) for s in start]  # only as far as windows may reach beyond the image
        pads = ((0, 0), (border[0], border[0]), (border[1], border[1]))
        moved = jax.random.randint(rng, (2, image.shape[0]), 0, 2 * reach + 1)
        top, left = (m + (s + b - reach) for m, s, b in zip(moved, start, border))
        cut = lambda x: ops.crop(x, top, left, height, width)
        matrix = _shift(top - border[0], left - border[1])
        targets = _move(targets, matrix, height, width, lambda mask: cut(jnp.pad(mask, pads)))
        return cut(jnp.pad(image, (*pads, (0, 0)), mode="reflect")), targets

    def _resized_crop(self, image, targets: dict, rng, strength: float):
        rows, (height, width) = image.shape[0], self._sizes(image.shape[1:])
        share_key, ratio_key, place_key = jax.random.split(rng, 3)
        least, most = (1 - strength * (1 - share) for share in self.crop)
        share = jax.random.uniform(share_key, (rows,), minval=least, maxval=most)
        ratio = (4 / 3) ** (strength * jax.random.uniform(ratio_key, (rows,), minval=-1.0))
        window = ops.random_window(place_key, share, ratio, *image.shape[1:3])
        matrix = ops.window_matrix(window, height, width)
        targets = _move(targets, matrix, height, width)
        return ops.resized_crop(image.astype(jnp.float32), window, height, width), targets

    def _warp(self, image, targets: dict, rng, strength: float, drawn):
        if not (self.rotate or self.zoom or self.shear or drawn):
            return image, targets
        rows, height, width = image.shape[:3]
        turn, grow, down, right = jax.random.uniform(rng, (4, rows), minval=-strength, maxval=strength)
        linear = ops.linear_map(self.rotate * turn, (1 + self.zoom) ** grow, self.shear * down, self.shear * right)
        matrix = ops.affine_matrix(linear, jnp.zeros((rows, 2)), height, width)
        if drawn:
            matrix = ops.compose_matrices(policy.policy_matrix(*drawn, self._magnitude(strength), height, width), matrix)
        return ops.warp(image, matrix, height, width), _move(targets, matrix, height, width)

    # -- what they look like

    def _magnitude(self, strength: float) -> float:
        return strength * self.randaugment[1] / 10

    def _colors(self, image, rng, strength: float, drawn):
        if not (self.jitter or drawn):
            return image
        image = image.astype(jnp.float32)
        if self.jitter:
            reach = strength * self.jitter
            factors = jax.random.uniform(rng, (3, image.shape[0]), minval=1 - reach, maxval=1 + reach)
            for change, factor in zip((color.brightness, color.contrast, color.saturation), factors):
                image = change(image, factor)
        return policy.policy_colors(image, *drawn, self._magnitude(strength)) if drawn else image

    def _erase(self, image, rng, strength: float):
        rows, height, width = image.shape[:3]
        share_key, ratio_key, place_key, hit_key = jax.random.split(rng, 4)
        share = jax.random.uniform(share_key, (rows,), minval=0.02, maxval=0.33)
        ratio = 3.0 ** jax.random.uniform(ratio_key, (rows,), minval=-1.0)
        window = jnp.round(ops.random_window(place_key, share, ratio, height, width))
        hit = jax.random.bernoulli(hit_key, strength * self.erase, (rows,))
        window = jnp.where(hit[:, None], window, 0.0)
        return ops.erase(image.astype(jnp.float32), window, jnp.asarray(self.mean, jnp.float32))

    def _mix(self, image, batch: Batch, rng, strength: float):
        image, rows = image.astype(jnp.float32), image.shape[0]
        if rows % 2:
            raise DataError(f"mixup and cutmix pair the rows of a batch, and {rows} cannot be paired; use an even batch size")
        hit_key, which_key, share_key, place_key = jax.random.split(rng, 4)
        both = batch.mask & ops.swap_pairs(batch.mask)
        mixed = both & jax.random.bernoulli(hit_key, strength, (rows,))
        pasted = (
            jax.random.bernoulli(which_key, 0.5, (rows,)) if self.mixup and self.cutmix else jnp.full(rows, bool(self.cutmix))
        )
        partner, share = ops.swap_pairs(image), jnp.ones(rows)
        if self.mixup:
            share = jnp.where(mixed & ~pasted, ops.symmetric_beta(share_key, self.mixup, rows), 1.0)
            image = ops.mixup(image, partner, share)
        if self.cutmix:
            # A row is either blended or pasted into: of the two shares one is 1.
            window = jnp.where(mixed & pasted, ops.symmetric_beta(share_key, self.cutmix, rows), 1.0)
            image, own = ops.cutmix(place_key, image, partner, window)
            share = share * own
        swapped = lambda arrays: {k: ops.swap_pairs(v) for k, v in arrays.items()}
        batch = batch.replace(
            partner=swapped(batch.targets),
            share=share,
            partner_weights=swapped(batch.weights),
            partner_index=ops.swap_pairs(batch.index),
        )
        return image, batch


def _shift(top, left):
    """The matrix of a window whose upper left corner is (top, left), int [B]."""
    one = jnp.ones(top.shape)
    return ops.axis_aligned_matrix(one, one, -top.astype(jnp.float32), -left.astype(jnp.float32))


def _move(targets: dict, matrix, height: int, width: int, move_mask=None) -> dict:
    """Boxes and masks moved by a matrix; `move_mask` does the same to a mask, and exactly."""
    move_mask = move_mask or (lambda mask: ops.warp_nearest(mask, matrix, height, width))
    moves = {"mask": move_mask, "box": lambda box: ops.transform_boxes(box, matrix, height, width)}
    return {k: moves[k](v) if k in moves else v for k, v in targets.items()}
