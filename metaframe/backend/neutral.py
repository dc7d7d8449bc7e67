"""NumPy's arrays as frameworks take them: plain numbers in the byte order of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from metaframe.errors import InputTypeError


def numbers(x: Any, name: str = "") -> np.ndarray[Any, Any]:
    """`x`, an array or a number of NumPy, as an array of numbers in native byte order.

    Args:
        x: the array or number.
        name: what it is, for errors.

    Raises:
        InputTypeError: it holds no numbers, or has a mask, which frameworks would drop.

    >>> numbers(np.array([1.0], ">f8")).dtype.isnative
    True
    >>> numbers(np.array(["a"]), "batch['x']")
    Traceback (most recent call last):
    metaframe.errors.InputTypeError: batch['x'] is a NumPy array of <U1, which holds no numbers...
    """
    what = f"{name} is" if name else "received"
    if isinstance(x, np.ma.MaskedArray):
        raise InputTypeError(
            f"{what} a masked array, whose mask no framework keeps. Fill it, as in "
            "x.filled(0.0), and pass numpy.ma.getmaskarray(x) as an array of its own for the "
            "function to use."
        )
    values = np.asarray(x)
    # The number types that other packages add have a kind of their own, and no fields.
    if values.dtype.kind not in "biufc" and (
        values.dtype.kind != "V" or values.dtype.type is np.void
    ):
        raise InputTypeError(
            f"{what} a NumPy array of {values.dtype}, which holds no numbers. Convert it, as in "
            "x.astype(numpy.float32), or leave it out."
        )
    native = values.dtype.isnative
    return values if native else values.astype(values.dtype.newbyteorder("="))


def at_most_64_bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`x` without the digits that no framework has: long double as float64.

    >>> at_most_64_bits(np.ones(1, np.longdouble)).dtype
    dtype('float64')
    """
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:
        return x.astype(np.float64)
    return x.astype(np.complex128) if x.dtype.kind == "c" and x.dtype.itemsize > 16 else x


def plain(x: Any) -> Any:
    """`x` as what a framework makes an array of: NumPy's as plain numbers, others as they are.

    Raises:
        InputTypeError: see `numbers`; or text.

    >>> plain(np.float32(1.5)), plain([1, 2])
    (array(1.5, dtype=float32), [1, 2])
    """
    if isinstance(x, (np.ndarray, np.generic, str, bytes)):
        return at_most_64_bits(numbers(x))
    return x
