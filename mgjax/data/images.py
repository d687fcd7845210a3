"""Encoded images to RGB arrays."""

from __future__ import annotations

import cv2
import numpy as np

from mgjax.errors import InputError


class DecodeError(InputError):
    """Bytes that are no image."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Decodes JPEG, PNG and whatever else OpenCV reads to RGB.

    Grey becomes three equal channels, CMYK is converted, 16 bits are scaled to 8, and alpha is
    dropped, so that every image has the same form.

    Args:
        data: the encoded file.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DecodeError: the bytes are no image that can be decoded.
    """
    image = None
    if data:
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            image = None
    if image is None:
        raise DecodeError(f"{len(data)} bytes starting {bytes(data[:8])!r} do not decode to an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size`, antialiased, and cuts the central square.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        new = max(size, round(width * scale)), max(size, round(height * scale))
        image = cv2.resize(image, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]
