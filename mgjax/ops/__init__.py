"""Arrays in, arrays out; no Flax, no parameters, no state."""

from mgjax.ops.depthwise import depthwise_conv
from mgjax.ops.resample import crop, flip, resize, space_to_depth

__all__ = ["crop", "depthwise_conv", "flip", "resize", "space_to_depth"]
