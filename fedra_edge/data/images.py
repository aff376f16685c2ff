"""Reads image files safely and turns images into what a model eats."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from fedra_edge.errors import DataError
from fedra_edge.protocol.models import ImageInput
from fedra_edge.protocol.tensors import FloatArray

MAX_PIXELS: Final = 16 * 10**6
"""Larger images are refused before they are decoded: they would not fit a small machine."""

MAX_SIDE_PX: Final = 20_000
"""Longer images are refused as well: their resizing would take far more than their pixels."""

IMAGE_SUFFIXES: Final = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ENOUGH_PX: Final = 1024
_PROBE_PX: Final = 32
_DEEP_GREY_MODES: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_AVERAGEABLE_MODES: Final = frozenset({"L", "RGB", "RGBX", "CMYK", "YCbCr", "I", "F"})
_MODES_BELOW_ALPHA: Final = {"LA": "L", "RGBA": "RGB"}
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DECODER_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)
"""What decoders are known to raise on damaged files; running out of memory is not among it."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image file upright, as (height, width) grey or (height, width, 3) colour.

    A side of twice ``_ENOUGH_PX`` or more is averaged down, never below ``_ENOUGH_PX``.

    Raises:
        DataError: The file is missing, no image, damaged, or too large.
    """
    return np.asarray(_decoded(path, _ENOUGH_PX), dtype=np.uint8)


def problem_of_image(path: Path) -> str | None:
    """Read a smaller version to find out, at low cost, what is wrong; None when nothing is."""
    try:
        _decoded(path, _PROBE_PX)
    except DataError as error:
        return str(error)
    return None


def prepare_image(image: NDArray[np.uint8], wanted: ImageInput) -> FloatArray:
    """Resize with antialiasing, match the channels, scale to 0..1 and normalise.

    Returns:
        Shape (channels, size_px, size_px).

    Raises:
        DataError: The array is no image.
    """
    picture = _as_picture(image).convert("RGB" if wanted.channels == 3 else "L")  # noqa: PLR2004
    size = (wanted.size_px, wanted.size_px)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    scaled = np.asarray(picture, dtype=np.float32).reshape(*size, wanted.channels) / 255.0
    mean = np.asarray(wanted.mean, dtype=np.float32)
    std = np.asarray(wanted.std, dtype=np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1), dtype=np.float32)


def _decoded(path: Path, enough_px: int) -> Image.Image:
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise DataError("not a regular file" if path.exists() else "file not found")
        with Image.open(path, formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS or max(picture.size) > MAX_SIDE_PX:
                raise DataError("image is too large")
            picture.draft(None, (enough_px, enough_px))
            picture.load()
            turn = _turn(picture)
            small = _shrunk(_eight_bit(_shrunk(picture, enough_px)), enough_px)
            return small if turn is None else small.transpose(turn)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("image is too large") from error
    except _DECODER_ERRORS as error:
        raise DataError("unreadable image") from error


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Say how to turn it upright; when its EXIF data is damaged it is taken to be so."""
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODER_ERRORS:
        return None


def _shrunk(picture: Image.Image, enough_px: int) -> Image.Image:
    """Average down what is far larger than needed, without another copy in full size.

    Modes whose values cannot be averaged are left as they are.
    """
    factors = (max(1, picture.width // enough_px), max(1, picture.height // enough_px))
    if factors == (1, 1):
        return picture
    if picture.mode in _AVERAGEABLE_MODES:
        return picture.reduce(factors)
    if picture.mode in _MODES_BELOW_ALPHA:
        bands = [picture.getchannel(band).reduce(factors) for band in picture.getbands()[:-1]]
        return Image.merge(_MODES_BELOW_ALPHA[picture.mode], bands)
    return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode in _DEEP_GREY_MODES:
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    wanted = "L" if picture.mode in {"1", "L", "LA", "I", "F"} else "RGB"
    return picture if picture.mode == wanted else picture.convert(wanted)


def _as_picture(image: NDArray[np.uint8]) -> Image.Image:
    channels = image.shape[2:] or (1,)
    if image.dtype != np.uint8 or image.ndim not in {2, 3} or channels[0] not in {1, 3, 4}:
        raise DataError(
            f"an image must be uint8 of shape (height, width) or (height, width, 1, 3 or 4), "
            f"not {image.dtype} of shape {image.shape}"
        )
    if 0 in image.shape:
        raise DataError("an image has no pixels")
    return Image.fromarray(image.reshape(image.shape[:2]) if channels[0] == 1 else image)
