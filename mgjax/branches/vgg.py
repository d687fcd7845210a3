"""Plain deep networks of 3×3 convolutions: VGG."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mgjax.branches.base import Branch, check_image, per_stage, published, scale_width
from mgjax.contracts import FeatureInfo
from mgjax.layers import Conv

GRID = 7  # positions a side that the dense layers see


class VGG(Branch):
    """VGG (Simonyan & Zisserman 2014, arXiv:1409.1556), with or without batch normalisation.

    Convolutions have a bias; a 2×2 max-pooling ends every stage. Taps: `stage1`, `stage2`, …
    behind the pooling and, with `classifier`, `fc1` and `fc2`. `VGG.named("vgg16_bn")` gives the
    published ones.

    Attributes:
        blocks: convolutions per stage.
        widths: channels per stage.
        classifier: also have the two dense layers of the published classifier; they see the last
            map as 7×7 means, whatever its size.
        classifier_width: units of each of them.
        dropout: of their outputs, in training.
        norm, activation, dtype: as in `mgjax.layers.Conv`; published are "none" and "batch".
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Example:
        >>> import jax
        >>> branch = VGG.named("vgg11", width=0.125)
        >>> branch.feature_info["stage5"]
        FeatureInfo(channels=64, reduction=32)
        >>> features, _ = branch.init_with_output(
        ...     jax.random.key(0), jnp.ones((1, 32, 32, 3)), taps=("stage3",), train=False)
        >>> features["stage3"].map.shape
        (1, 4, 4, 32)
    """

    blocks: Sequence[int] = (2, 2, 3, 3, 3)
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    classifier: bool = False
    classifier_width: int = 4096
    dropout: float = 0.5
    norm: str = "none"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def named(cls, name: str, *, width: float = 1.0, **options) -> VGG:
        """ "vgg11", "vgg13", "vgg16" or "vgg19" as published, with "_bn" behind it normalised by batch.

        `width` multiplies the published channels, to multiples of 8; `options` override any attribute.
        """
        attributes = published("VGG", NAMED, name) | {
            "widths": tuple(scale_width(w, width) for w in cls.widths),
            "classifier_width": scale_width(cls.classifier_width, width),
        }
        return cls(**{**attributes, **options})

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        per_stage(self.blocks, self.widths)
        info = {f"stage{i + 1}": FeatureInfo(width, 2 ** (i + 1)) for i, width in enumerate(self.widths)}
        if self.classifier:
            info |= {tap: FeatureInfo(self.classifier_width) for tap in ("fc1", "fc2")}
        return info

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader, info = self.read(taps), self.feature_info
        check_image(x, max(info[t].reduction or 2 ** len(self.widths) for t in taps))
        x = x.astype(self.dtype)
        for i, (count, width) in enumerate(zip(self.blocks, self.widths)):
            for j in range(count):
                name = f"stage{i + 1}_conv{j + 1}"
                conv = Conv(width, 3, norm=self.norm, activation=self.activation, use_bias=True, dtype=self.dtype, name=name)
                x = self.run(conv, x, train=train)
            x = nn.max_pool(x, (2, 2), (2, 2))
            if reader.offer(f"stage{i + 1}", x):
                return reader.features
        x = adaptive_means(x, GRID, GRID)
        x = x.reshape(x.shape[0], -1)
        for tap in ("fc1", "fc2"):
            x = self.activation(nn.Dense(self.classifier_width, dtype=self.dtype, name=tap)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            if reader.offer(tap, x):
                break
        return reader.features


def adaptive_means(x, height: int, width: int):
    """Means over height × width windows that cover the map evenly; they overlap where sizes do not divide.

    Window i of n over a side of s pixels goes from ⌊i·s/n⌋ to ⌈(i + 1)·s/n⌉, also where s < n.

    Args:
        x: floating [B, H, W, C].

    Returns:
        [B, height, width, C].

    Example:
        >>> adaptive_means(jnp.arange(4.0).reshape(1, 1, 4, 1), 1, 2).ravel().tolist()
        [0.5, 2.5]
    """
    rows, columns = (jnp.asarray(_windows(s, n), x.dtype) for s, n in ((x.shape[1], height), (x.shape[2], width)))
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)


def _windows(size: int, count: int) -> np.ndarray:
    """[count, size]; each row the weights of one mean."""
    first = np.arange(count) * size // count
    last = -(-(np.arange(count) + 1) * size // count)
    pixel = np.arange(size)
    inside = (first[:, None] <= pixel[None]) & (pixel[None] < last[:, None])
    return inside / inside.sum(1, keepdims=True)


_BLOCKS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
NAMED = {
    f"{name}{end}": dict(blocks=blocks, norm=norm)
    for end, norm in (("", "none"), ("_bn", "batch"))
    for name, blocks in _BLOCKS.items()
}
