"""`procedural`: an embedded dataset of three levels, drawn from index and seed alone, no files.

* 4 **forms** (disc, square, triangle, cross): one global silhouette; seen at any resolution.
* 12 **parts**: the form is solid, has a hole, or is cut by a slit; a few pixels wide.
* 36 **textures**: the form's surface alternates from pixel to pixel along rows, along columns or
  as a checkerboard. All three have one mean, so a quarter-resolution view sees the same grey.

Place, size, tilt, colours, contrast, phase of the texture and noise are drawn at random for
each image and say nothing of the class.
"""

from __future__ import annotations

import numpy as np

from mgjax.taxonomy import Taxonomy

FORMS = ("disc", "square", "triangle", "cross")
PARTS = ("solid", "hole", "slit")
TEXTURES = ("rows", "columns", "checks")
SIZE = 32
COUNTS = {"train": 12_000, "validation": 2_160, "test": 3_600}  # multiples of 36, or balanced to one


def taxonomy() -> Taxonomy:
    """form:4 → part:12 → texture:36."""
    parts = [f"{f}-{p}" for f in FORMS for p in PARTS]
    return Taxonomy.from_names(
        {"form": FORMS, "part": parts, "texture": [f"{p}-{t}" for p in parts for t in TEXTURES]},
        {"part": [i // 3 for i in range(12)], "texture": [i // 3 for i in range(36)]},
    )


def _uniform(key: np.ndarray, salt: int) -> np.ndarray:
    """float32 in [0, 1) from uint64 counters: the finaliser of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = key + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


class ProceduralSource:
    """One split of `procedural`.

    Examples hold `image` uint8 [32, 32, 3], the labels `form`, `part` and `texture` int32, `box`
    float32 [4] (y0, x0, y1, x1 in pixels) and `mask` uint8 [32, 32] (1 on the form).

    Args:
        split: "train", "validation" or "test"; they share no image.
        seed: of the images.
        count: number of examples; by default `COUNTS[split]`.
    """

    def __init__(self, split: str, seed: int = 0, count: int | None = None):
        self.name = f"procedural {split}"
        self.count = COUNTS[split] if count is None else count
        self.stream = np.uint64((seed * len(COUNTS) + list(COUNTS).index(split)) % 2**24)

    def __len__(self) -> int:
        return self.count

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.uint64)
        key = (self.stream << np.uint64(40)) | (indices << np.uint64(14))
        draw = lambda salt, low, high: (low + (high - low) * _uniform(key, salt))[:, None, None]
        texture = (indices % np.uint64(36)).astype(np.int32)
        part, form = texture // 3, texture // 9

        # Pixel centres in the form's own frame: rotated, in units of its radius.
        radius, tilt = draw(1, 9.0, 12.5), draw(2, -0.35, 0.35)
        centre_y, centre_x = (draw(s, 0, 1) * (SIZE - 2.2 * radius) + 1.1 * radius for s in (3, 4))
        y, x = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
        dy, dx = (y - centre_y) / radius, (x - centre_x) / radius
        v, u = np.cos(tilt) * dy - np.sin(tilt) * dx, np.sin(tilt) * dy + np.cos(tilt) * dx
        inside = np.select(
            [(form == i)[:, None, None] for i in range(4)],
            [
                v**2 + u**2 < 1.0,
                np.maximum(abs(v), abs(u)) < 0.85,
                (v < 0.75) & (v > 2.0 * abs(u) - 1.05),
                ((abs(v) < 0.32) & (abs(u) < 1.0)) | ((abs(u) < 0.32) & (abs(v) < 1.0)),
            ],
        )
        kind = (part % 3)[:, None, None]
        cut = ((kind == 1) & (v**2 + u**2 < 0.26**2)) | ((kind == 2) & (abs(v - 0.15) < 0.13))
        body = inside & ~cut

        # Alternates from pixel to pixel, mean 0 over any 2 × 2 block.
        row, column = (np.floor(a).astype(np.int64) for a in (y, x))
        phase = (draw(5, 0, 2)).astype(np.int64)
        style = (texture % 3)[:, None, None]
        step = np.where(style == 0, row, np.where(style == 1, column, row + column)) + phase
        surface = draw(6, 0.05, 0.14) * np.where(step % 2 == 0, 1.0, -1.0)

        ground = np.stack([draw(s, 0.15, 0.85) for s in (7, 8, 9)], -1)
        offset = np.where(draw(10, 0, 1) < 0.5, -1.0, 1.0)[..., None] * draw(11, 0.24, 0.4)[..., None]
        ink = np.where((ground + offset > 0.9) | (ground + offset < 0.1), ground - offset, ground + offset)
        pixel = np.arange(SIZE * SIZE * 3, dtype=np.uint64).reshape(SIZE, SIZE, 3)
        noise = (_uniform(key[:, None, None, None] + pixel, 12) - 0.5) * 0.4
        image = np.where(body[..., None], ink + surface[..., None], ground) + noise

        rows, columns = body.any(2), body.any(1)
        box = np.stack(
            [rows.argmax(1), columns.argmax(1), SIZE - rows[:, ::-1].argmax(1), SIZE - columns[:, ::-1].argmax(1)], 1
        )
        return {
            "image": (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8),
            "form": form,
            "part": part,
            "texture": texture,
            "box": box.astype(np.float32),
            "mask": body.astype(np.uint8),
            "valid": np.ones(len(indices), bool),
        }
