"""Encoded images to RGB arrays."""

from __future__ import annotations

import math

import cv2
import numpy as np

from mgjax.errors import InputError

MAX_PIXELS = 1 << 27  # of a decoded image: 400 MB
_REDUCED = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


class DecodeError(InputError):
    """Bytes that are no image, or not the whole of one."""


def decode_rgb(data: bytes, size: int | None = None) -> np.ndarray:
    """Decodes JPEG, PNG and whatever else OpenCV reads to RGB.

    Grey becomes three equal channels, palettes and CMYK are converted, 16 bits are scaled to 8, alpha is
    dropped, and EXIF's orientation is applied, so that every image has the same form and stands upright.

    Args:
        data: the encoded file.
        size: if given, the shorter side in pixels that is needed: a JPEG that has more than twice as many
            is decoded at a half, a quarter or an eighth, which takes as much less memory.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DecodeError: the bytes are no image that can be decoded, a JPEG, PNG or WebP ends before its
            end marker, or the image has more than `MAX_PIXELS` pixels.
    """
    image, why = None, ""
    shape = _header(data)
    factor = 1
    if shape is not None:
        if size and data[:2] == b"\xff\xd8":
            factor = next(f for f in (8, 4, 2, 1) if f == 1 or min(shape) >= 2 * f * size)
        if math.prod(shape) > MAX_PIXELS * factor**2:
            raise DecodeError(f"an image of {shape[1]:,} × {shape[0]:,} pixels is larger than {MAX_PIXELS:,} pixels")
    if data and not (why := _truncated(data)):
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[factor])
        except cv2.error as error:
            why = error.err or "refused"
    if image is None:
        of = f", of {shape[1]:,} × {shape[0]:,} pixels," if shape is not None else ""
        start = f"{len(data)} bytes starting {bytes(data[:8])!r}{of} do not decode to an image"
        raise DecodeError(f"{start}: {why}" if why else start)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size`, antialiased, and cuts the central square.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    if max(height, width) > 4 * min(height, width):  # what is cut off anyway need not be resized
        image = _centre(image, min(height, 2 * width), min(width, 2 * height))
        height, width = image.shape[:2]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        new = max(size, round(width * scale)), max(size, round(height * scale))
        image = cv2.resize(image, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return _centre(image, size, size)


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _segments(data: bytes):
    """(marker, position of its content) of a JPEG's segments up to the first scan."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:  # stray and fill bytes
            position += 1
            continue
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # markers without content
            position += 2
            continue
        yield marker, position + 4
        if marker == 0xDA:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4])


def _header(data: bytes) -> tuple[int, int] | None:
    """(height, width) as the header of a JPEG or PNG says, None for others."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
    if data[:2] == b"\xff\xd8":
        for marker, at in _segments(data):
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(data) >= at + 5:
                return int.from_bytes(data[at + 1 : at + 3]), int.from_bytes(data[at + 3 : at + 5])
    return None


def _truncated(data: bytes) -> str:
    """Why the bytes are not the whole file; decoders may fill up what is missing without a word."""
    if data[:2] == b"\xff\xd8":
        scan = next((at for marker, at in _segments(data) if marker == 0xDA), len(data))
        # An embedded thumbnail has an end marker too; that of the image comes after its scan.
        return "" if data.find(b"\xff\xd9", scan) >= 0 else "the JPEG is truncated"
    if data[:4] == b"\x89PNG":
        return "" if data.rfind(b"IEND") >= 0 else "the PNG is truncated"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "" if len(data) >= 8 + int.from_bytes(data[4:8], "little") else "the WebP is truncated"
    return ""
