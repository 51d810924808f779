"""Reading picture files: RGB and upright, or an :class:`~vlm_budget.errors.ImageError` that says what is wrong.

A picture is decoded to its last byte here, so that a damaged file fails before a model is loaded for it.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError

# What Pillow's decoders raise on bytes that end early or make no sense.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as a viewer would show it.

    EXIF orientation is applied, transparency is laid on white, 16-bit greys are scaled to 8 bits, and of an animation
    the first frame is taken.

    Args:
        path: A picture file in any format Pillow reads.

    Returns:
        The picture in mode RGB.

    Raises:
        ImageError: Missing, a directory, empty, no picture, damaged or truncated, or so large that Pillow takes it for
            a decompression bomb (``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    file = Path(path).expanduser()
    name = repr(os.fspath(path))
    _require_file(file, name)
    return _decoded(file, name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """A picture from the bytes of its file, as :func:`load_image` would give it.

    Args:
        data: The file's content.
        name: What messages call it.

    Raises:
        ImageError: No picture, damaged or truncated, or too large.
    """
    return _decoded(io.BytesIO(data), repr(name))


def _decoded(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
                return upright_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} is too large: {str(error).split(', could')[0]} (PIL.Image.MAX_IMAGE_PIXELS), as a decompression "
            "bomb would be. Scale it down, or raise the limit if you trust the file."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture in any format that Pillow reads") from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read: permission denied") from error
    except _DAMAGED as error:
        raise ImageError(f"{name} is damaged or truncated: {error}") from error


def _require_file(file: Path, name: str) -> None:
    try:
        if not file.exists():
            raise ImageError(f"there is no file {name}")
        if file.is_dir():
            raise ImageError(f"{name} is a directory; pass picture files, such as {name[1:-1].rstrip(os.sep)}/*.png")
        if not file.is_file():
            raise ImageError(f"{name} is not a regular file")
        if file.stat().st_size == 0:
            raise ImageError(f"{name} is empty: 0 bytes")
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as :func:`load_image` gives it: EXIF orientation applied, transparency on white, 8 bits.

    Raises:
        ValueError: It has no pixels.
    """
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip at 255 and show white.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    return image.convert("RGB")
