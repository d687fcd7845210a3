"""Arrays in, arrays out; no Flax, no parameters, no state.

`color` and `policy` are modules of their own.
"""

from mgjax.ops.denoise import bilateral, median, non_local_means
from mgjax.ops.depthwise import depthwise_conv
from mgjax.ops.geometry import (
    affine_matrix,
    axis_aligned_matrix,
    compose_matrices,
    invert_matrix,
    linear_map,
    random_window,
    resized_crop,
    transform_boxes,
    warp,
    warp_nearest,
    window_mask,
    window_matrix,
)
from mgjax.ops.jigsaw import jigsaw
from mgjax.ops.mix import cutmix, erase, mixup, swap_pairs, symmetric_beta
from mgjax.ops.resample import center_crop, crop, flip, resize, space_to_depth

__all__ = [
    "affine_matrix",
    "axis_aligned_matrix",
    "bilateral",
    "center_crop",
    "compose_matrices",
    "crop",
    "cutmix",
    "depthwise_conv",
    "erase",
    "flip",
    "invert_matrix",
    "jigsaw",
    "linear_map",
    "median",
    "mixup",
    "non_local_means",
    "random_window",
    "resize",
    "resized_crop",
    "space_to_depth",
    "swap_pairs",
    "symmetric_beta",
    "transform_boxes",
    "warp",
    "warp_nearest",
    "window_mask",
    "window_matrix",
]
