"""Encoded images to RGB arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from mgjax.data.crops import Window
from mgjax.errors import InputError

try:  # an extra: it gives the same pixels as OpenCV, and stops where no more rows are needed
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 1 << 27  # of a decoded image: 400 MB
FACTORS = (8, 4, 2, 1)  # by which a JPEG can be decoded smaller
_REDUCED = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_MCU = 16  # rows of the largest block that is decoded as one, where luma has at most twice the rows of chroma


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
    header = read_header(data)
    factor = 1
    if size and header.jpeg:
        factor = next(f for f in FACTORS if f == 1 or min(header.shape) >= 2 * f * size)
    return _decode(data, header, factor)


def decode_crop(data: bytes, window: Window, size: int, out: np.ndarray | None = None, scaled: bool = True) -> np.ndarray:
    """Decodes as `decode_rgb`, cuts a window and resamples it, antialiased.

    Args:
        window: its edges come to lie on whole pixels of what is decoded.
        size: side of the result, in pixels.
        out: uint8 [size, size, 3] to write to.
        scaled: a JPEG is decoded at a half, a quarter or an eighth where the window has `size` pixels then too.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DecodeError: as `decode_rgb`.
    """
    header = read_header(data)
    factor = crop_factor(header.shape, window, size) if header.jpeg and scaled else 1
    last = window.place(*whole_pixels(header.shape, factor))[2] if header.plain else None
    image = _decode(data, header, factor, last)
    shape = image.shape[:2]
    if header.jpeg:
        grid = whole_pixels(header.shape, factor)
        shape = grid if header.plain or (grid < grid[::-1]) == (shape < shape[::-1]) else grid[::-1]
    y0, x0, y1, x1 = window.place(*shape)
    return resample(image[y0:y1, x0:x1], size, out)


def whole_pixels(shape: tuple[int, int], factor: int) -> tuple[int, int]:
    """(height, width) of what is decoded at a `factor`-th, without a last row or column that only a part fills."""
    height, width = (max(1, side // factor) for side in shape)
    return height, width


def crop_factor(shape: tuple[int, int], window: Window, size: int) -> int:
    """How much smaller a JPEG of (height, width) can be decoded for a window of `size` pixels."""
    height, width = shape
    shorter = min(*window.sides(height, width), *window.sides(width, height))  # EXIF may say that it lies on its side
    return next(f for f in FACTORS if f == 1 or shorter >= f * size)


def resample(image: np.ndarray, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resizes to a square by triangles as wide as the new pixels are apart, as Pillow's BILINEAR does.

    Linear interpolation is the triangle of one old pixel. What it lacks of a wider one, which is of variance
    (scale² − 1) / 6 pixels², is blurred beforehand: three times as fast as the exact filter.

    Args:
        image: uint8 [H, W, 3].
        out: uint8 [size, size, 3] to write to.

    Returns:
        uint8 [size, size, 3].
    """
    sides = [min(side, 2 * size) for side in image.shape[:2]]
    if sides != list(image.shape[:2]):  # what has more than twice the pixels is averaged first
        image = cv2.resize(image, sides[::-1], interpolation=cv2.INTER_AREA)
    if max(sides) > size:
        down, across = (max(0.0, (side / size) ** 2 - 1) / 12 for side in sides)
        image = cv2.sepFilter2D(image, -1, *(np.array([v, 1 - 2 * v, v]) for v in (across, down)))
    return cv2.resize(image, (size, size), out, interpolation=cv2.INTER_LINEAR)


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


class _Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        shape: (height, width), of a JPEG or PNG.
        jpeg: it is a JPEG that says its shape.
        plain: it is a JPEG as nearly all photographs are: baseline, three channels in one scan, upright.
        height_at: where a JPEG says its height.
        scan: where the first scan of a JPEG begins.
    """

    shape: tuple[int, int] | None = None
    jpeg: bool = False
    plain: bool = False
    height_at: int = 0
    scan: int = 0


def _decode(data: bytes, header: _Header, factor: int, last: int | None = None) -> np.ndarray:
    """Decodes at a `factor`-th; of a plain JPEG, rows from `last` on may be missing."""
    shape, image, why = header.shape, None, ""
    if shape is not None and math.prod(shape) > MAX_PIXELS * factor**2:
        raise DecodeError(f"an image of {shape[1]:,} × {shape[0]:,} pixels is larger than {MAX_PIXELS:,} pixels")
    if data and not (why := _truncated(data, header)):
        if simplejpeg is not None and header.plain:
            image = _decode_plain(data, header, factor, last)
        if image is not None:
            return image
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[factor])
        except cv2.error as error:
            why = error.err or "refused"
    if image is None:
        of = f", of {shape[1]:,} × {shape[0]:,} pixels," if shape is not None else ""
        start = f"{len(data)} bytes starting {bytes(data[:8])!r}{of} do not decode to an image"
        raise DecodeError(f"{start}: {why}" if why else start)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_plain(data: bytes, header: _Header, factor: int, last: int | None) -> np.ndarray | None:
    """A plain JPEG without the rows behind `last`, where they take time; None if it is better left to OpenCV."""
    height, width = header.shape
    if last is not None and (rows := (last * factor // _MCU + 1) * _MCU) < height:
        # Told that the image ends there, the decoder does not even read what follows.
        data, height = bytearray(data), rows
        data[header.height_at : header.height_at + 2] = rows.to_bytes(2)
    shape = -(-height // factor), -(-width // factor)
    try:
        image = simplejpeg.decode_jpeg(data, min_height=shape[0], min_width=shape[1], min_factor=factor, strict=False)
    except ValueError:
        return None
    return image if image.shape == (*shape, 3) else None


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


def read_header(data: bytes) -> _Header:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return _Header((int.from_bytes(data[20:24]), int.from_bytes(data[16:20])))
    if data[:2] != b"\xff\xd8":
        return _Header()
    shape, height_at, plain, scan = None, 0, True, len(data)
    for marker, at in _segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if len(data) >= at + 5 and shape is None:
                shape, height_at = (int.from_bytes(data[at + 1 : at + 3]), int.from_bytes(data[at + 3 : at + 5])), at + 1
                plain &= marker in (0xC0, 0xC1) and data[at] == 8 and min(shape) > 0 and data[at + 5 : at + 6] == b"\3"
                plain &= all(sampling & 15 <= 2 for sampling in data[at + 7 : at + 14 : 3])
        elif marker == 0xE1 and data[at : at + 6] == b"Exif\0\0":
            plain &= not _turned(data[at + 6 : at - 2 + int.from_bytes(data[at - 2 : at])])
        elif marker == 0xDA:
            scan = at
            plain &= data[at : at + 1] == b"\3"
    return _Header(shape, shape is not None, plain and shape is not None and scan < len(data), height_at, scan)


def _turned(exif: bytes) -> bool:
    """Whether EXIF says, or might say, that the image does not stand upright."""
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    number = lambda at, size: int.from_bytes(exif[at : at + size], order)
    if order is None or (count := number(start := number(4, 4), 2)) > 256:
        return True
    entries = range(start + 2, start + 2 + 12 * count, 12)
    return any(number(at, 2) == 0x0112 and number(at + 8, 2) != 1 for at in entries)


def _truncated(data: bytes, header: _Header) -> str:
    """Why the bytes are not the whole file; decoders may fill up what is missing without a word."""
    if data[:2] == b"\xff\xd8":
        # An embedded thumbnail has an end marker too; that of the image comes after its scan.
        return "" if data.rfind(b"\xff\xd9") >= header.scan else "the JPEG is truncated"
    if data[:4] == b"\x89PNG":
        return "" if data.rfind(b"IEND") >= 0 else "the PNG is truncated"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "" if len(data) >= 8 + int.from_bytes(data[4:8], "little") else "the WebP is truncated"
    return ""
