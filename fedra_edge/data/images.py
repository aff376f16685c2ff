"""Reads image files safely and turns images into what a model eats."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedra_edge.errors import DataError
from fedra_edge.protocol.models import ImageInput
from fedra_edge.protocol.tensors import FloatArray

MAX_PIXELS: Final = 64 * 10**6
"""Larger images are refused before they are decoded: they would not fit a small machine."""

IMAGE_SUFFIXES: Final = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PROBE_PX: Final = 32
_DEEP_GREY_MODES: Final = ("I;16", "I;16L", "I;16B", "I;16N")


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image file upright, as (height, width) grey or (height, width, 3) colour.

    Raises:
        DataError: The file is missing, no image, damaged, or larger than ``MAX_PIXELS``.
    """
    return np.asarray(_decoded(path, is_probe=False), dtype=np.uint8)


def problem_of_image(path: Path) -> str | None:
    """Decode an image at low cost only to find out whether it can be read; None when it can."""
    try:
        _decoded(path, is_probe=True)
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


def _decoded(path: Path, *, is_probe: bool) -> Image.Image:
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError("image has too many pixels")
            if is_probe:
                picture.draft(None, (_PROBE_PX, _PROBE_PX))
                picture.load()
                return picture
            return _eight_bit(ImageOps.exif_transpose(picture))
    except FileNotFoundError as error:
        raise DataError("file not found") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("image has too many pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, IndexError) as error:
        raise DataError("unreadable image") from error


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode in _DEEP_GREY_MODES:
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    return picture.convert("L" if picture.mode in {"1", "L", "LA", "I", "F"} else "RGB")


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
