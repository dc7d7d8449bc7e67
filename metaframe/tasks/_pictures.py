"""Decoding and fitting pictures, by Pillow, which trusts nothing in a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from metaframe import arguments
from metaframe.errors import InputError, MissingDependencyError, nearest

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Mode = Literal["RGB", "L"]

CHANNELS = {"RGB": 3, "L": 1}
"""Of every mode, by Pillow's name for it."""

_LARGEST_SIDE = 8192
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


def fitted(picture: Any, size: int | None, mode: str | None) -> Pixels:
    """A Pillow image as `(height, width, channels)`, by Lanczos' filter as MAML's authors do.

    Raises:
        ValueError: more than 8 bits a pixel.
    """
    if picture.mode in _DEEP:
        raise ValueError(f"mode {picture.mode} has more than 8 bits a pixel; scale it to 8 first")
    colours = picture.convert(mode or ("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    if size is not None and colours.size != (size, size):
        colours = colours.resize((size, size), pillow("resizing").Resampling.LANCZOS)
    pixels: Pixels = np.asarray(colours)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def decoder(
    what: str, size: int, mode: str = "RGB", formats: Sequence[str] = ("JPEG", "PNG")
) -> Callable[[bytes], Pixels]:
    """A function from a file's bytes to `(size, size, channels)`; `what` is what needs it."""
    image = pillow(what)

    def decode(data: bytes) -> Pixels:
        with warnings.catch_warnings(), image.open(_header_checked(data)) as picture:
            return fitted(picture, size, mode)

    def _header_checked(data: bytes) -> io.BytesIO:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image.DecompressionBombWarning)
            try:
                # Reads the header alone.
                with image.open(io.BytesIO(data), formats=formats) as picture:
                    width, height = picture.size
            except image.DecompressionBombError as error:
                raise ValueError(str(error)) from error
        if max(width, height) > _LARGEST_SIDE:
            raise ValueError(f"{width}x{height} pixels, expected at most {_LARGEST_SIDE} a side")
        return io.BytesIO(data)

    return decode
