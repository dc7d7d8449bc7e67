"""Decoding and fitting pictures, by Pillow, which trusts nothing in a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from metaframe import arguments
from metaframe.errors import InputError, MissingDependencyError, nearest

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Mode = Literal["RGB", "L"]

CHANNELS = {"RGB": 3, "L": 1}
"""Of every mode, by Pillow's name for it."""

_MOST_PIXELS = 24_000_000
"""Of a picture as it is decoded, such as 6000 x 4000: 195 MB, in two copies of 4 bytes each."""
_MOST_OF_WEBP = _MOST_PIXELS // 2
"""Pillow decodes WebP into copies of its own."""
_LARGEST_SIZE = 512
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of over 8 bits a pixel, which it clips to 255 instead of scaling."""


def check_size(size: int) -> int:
    """`size`, a side in pixels."""
    size = arguments.integer(size, "size", at_least=1)
    if size > _LARGEST_SIZE:
        raise InputError(f"size must be at most {_LARGEST_SIZE}, received size={size}.")
    return size


def check_mode(mode: str) -> str:
    """`mode`, if it is one of Pillow's that we know."""
    if mode not in CHANNELS:
        raise InputError(f"no mode called {mode!r}. {nearest(str(mode), CHANNELS)}")
    return mode


def pillow(what: str) -> Any:
    """`PIL.Image`; `what` is what needs it."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError(what, "Pillow", "pip install pillow") from None
    return Image


@contextmanager
def opened(
    data: bytes, what: str, formats: Sequence[str], side: int | None = None
) -> Iterator[Any]:
    """A Pillow image of the bytes of a file, upright, whose pixels may be read.

    Its size is checked before any pixel is decoded. That is the size which Pillow will decode, and
    not the one that the first header announces: a file may have several.

    Args:
        data: the file.
        what: what needs Pillow, for errors.
        formats: Pillow's names of the formats that the file may have.
        side: the width and the height that it has to have; otherwise they are bounded.

    Raises:
        ValueError: another size, or more than 8 bits a pixel.
    """
    image = pillow(what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", image.DecompressionBombWarning)
        try:
            picture = image.open(io.BytesIO(data), formats=formats)
        except image.UnidentifiedImageError as error:
            raise ValueError(f"not a {' or '.join(formats)} image") from error
        except image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        with picture:
            width, height = picture.size
            if side is not None and (width, height) != (side, side):
                raise ValueError(f"{width}x{height} pixels, expected {side}x{side}")
            most = _MOST_OF_WEBP if picture.format == "WEBP" else _MOST_PIXELS
            if width * height > most:
                raise ValueError(
                    f"{width}x{height} pixels, expected at most {most} in all; scale it down first"
                )
            check_depth(picture)
            _turn_upright(picture)
            yield picture


def _turn_upright(picture: Any) -> None:
    """Turn `picture` as its EXIF orientation says it is to be seen."""
    from PIL import ImageOps

    ImageOps.exif_transpose(picture, in_place=True)


def check_depth(picture: Any) -> None:
    """Refuse what Pillow would clip.

    Raises:
        ValueError: more than 8 bits a pixel.
    """
    if picture.mode in _DEEP:
        raise ValueError(f"mode {picture.mode} has more than 8 bits a pixel; scale it to 8 first")


def fitted(picture: Any, size: int | None, mode: str | None) -> Pixels:
    """A Pillow image as `(height, width, channels)`, by Lanczos' filter as MAML's authors do.

    Raises:
        ValueError: more than 8 bits a pixel.
    """
    check_depth(picture)
    mode = mode or ("L" if picture.mode in ("1", "L", "LA") else "RGB")
    colours = picture if picture.mode == mode else picture.convert(mode)  # which may copy
    if size is not None and colours.size != (size, size):
        colours = colours.resize((size, size), pillow("resizing").Resampling.LANCZOS)
    pixels: Pixels = np.asarray(colours)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def decoder(
    what: str, size: int, mode: str = "RGB", formats: Sequence[str] = ("JPEG", "PNG")
) -> Callable[[bytes], Pixels]:
    """A function from a file's bytes to `(size, size, channels)`; `what` is what needs it."""
    pillow(what)  # is it there?

    def decode(data: bytes) -> Pixels:
        with opened(data, what, formats) as picture:
            return fitted(picture, size, mode)

    return decode
