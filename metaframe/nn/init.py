"""Initial values: NumPy numbers drawn for a seed and a name, so the same on every backend.

Each array has a stream of its own, keyed by the seed and the parameter's key chain. Adding,
removing or reordering parameters leaves the others' values alone. Values are drawn in float64;
`ops.asarray` rounds them once to the dtype in use.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metaframe import ops
from metaframe.backend.types import Array
from metaframe.errors import InputError

Values = np.ndarray[Any, np.dtype[np.float64]]
Initializer = Callable[[int, str, Sequence[int]], Values]
"""`(seed, name, shape) -> values`."""


def stream(seed: int, name: str) -> np.random.Generator:
    """The random numbers that belong to `name` under `seed`.

    Only its `random` is used, the top bits of Philox's output: NumPy may change how it makes
    other distributions of them.

    >>> float(stream(0, "head/w").random()) == float(stream(0, "head/w").random())
    True
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed needs to be in [0, 2**64), received {seed}.")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    key = np.array([seed, int.from_bytes(digest, "little")], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def zeros(seed: int, name: str, shape: Sequence[int]) -> Values:
    """Zeros.

    Args:
        seed: unused; every initialiser has the same arguments.
        name: unused.
        shape: the shape of the parameter.

    Returns:
        A float64 NumPy array of that shape.

    >>> zeros(0, "b", (2,)).tolist()
    [0.0, 0.0]
    """
    del seed, name
    return np.zeros(tuple(shape))


def ones(seed: int, name: str, shape: Sequence[int]) -> Values:
    """Ones.

    Args:
        seed: unused; every initialiser has the same arguments.
        name: unused.
        shape: the shape of the parameter.

    Returns:
        A float64 NumPy array of that shape.

    >>> ones(0, "scale", (2,)).tolist()
    [1.0, 1.0]
    """
    del seed, name
    return np.ones(tuple(shape))


def glorot_uniform(seed: int, name: str, shape: Sequence[int]) -> Values:
    """Uniform on ±sqrt(6 / (fan in + fan out)) (Glorot and Bengio, 2010).

    Args:
        seed: an integer in `[0, 2**64)`.
        name: the parameter's key chain, such as "layer1/w". Each name has its own random numbers.
        shape: (..., inputs, outputs). Fan in and fan out are inputs and outputs times the sizes
            in front, which are height and width for a convolution kernel.

    Returns:
        A float64 NumPy array of that shape.

    Raises:
        InputError: `shape` has fewer than two axes, or `seed` is out of range.

    >>> bool((abs(glorot_uniform(0, "w", (3, 3))) <= 1).all())
    True
    """
    limit = math.sqrt(6.0 / sum(_fans(shape)))
    return (2.0 * stream(seed, name).random(tuple(shape)) - 1.0) * limit


def he_normal(seed: int, name: str, shape: Sequence[int]) -> Values:
    """Normal with variance 2 / fan in (He et al., 2015).

    Args:
        seed: an integer in `[0, 2**64)`.
        name: the parameter's key chain, such as "layer1/w". Each name has its own random numbers.
        shape: (..., inputs, outputs). Fan in is inputs times the sizes in front, which are height
            and width for a convolution kernel.

    Returns:
        A float64 NumPy array of that shape.

    Raises:
        InputError: `shape` has fewer than two axes, or `seed` is out of range.

    >>> he_normal(0, "w", (3, 4)).shape
    (3, 4)
    """
    return _normal(stream(seed, name), shape) * math.sqrt(2.0 / _fans(shape)[0])


def truncated_normal(seed: int, name: str, shape: Sequence[int], stddev: float = 0.01) -> Values:
    """Normal, with values beyond two standard deviations drawn again.

    Args:
        seed: an integer in `[0, 2**64)`.
        name: the parameter's key chain, such as "layer1/w". Each name has its own random numbers.
        shape: the shape of the parameter.
        stddev: the standard deviation before the truncation.

    Returns:
        A float64 NumPy array of that shape.

    Raises:
        InputError: `seed` is out of range.

    >>> bool((abs(truncated_normal(0, "w", (100,), stddev=0.5)) <= 1).all())
    True
    """
    numbers = stream(seed, name)
    values = _normal(numbers, shape)
    while (beyond := np.abs(values) > 2.0).any():
        values[beyond] = _normal(numbers, (int(beyond.sum()),))
    return values * stddev


def dropout_mask(seed: int, name: str, shape: Sequence[int], rate: float) -> Array:
    """Booleans for `dropout`, on the selected backend.

    Args:
        seed: an integer in `[0, 2**64)`.
        name: what the mask is for, such as "step 1". Each name has its own random numbers.
        shape: the shape of the mask, usually that of the input of `dropout`.
        rate: the probability of false, which drops the element.

    Returns:
        An array of booleans of that shape.

    Raises:
        InputError: `seed` is out of range.
        BackendError: no backend is selected.

    >>> ops.to_numpy(nn.dropout_mask(0, "step 1", (3,), rate=0.0)).tolist()
    [True, True, True]
    """
    return ops.asarray(stream(seed, name).random(tuple(shape)) >= rate)


def _normal(numbers: np.random.Generator, shape: Sequence[int]) -> Values:
    """Standard normal numbers (Box and Muller, 1958)."""
    u, v = numbers.random((2, *shape))
    return np.asarray(np.sqrt(-2.0 * np.log1p(-u)) * np.cos(2.0 * math.pi * v))


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    """Inputs and outputs of one unit of a dense or convolution kernel."""
    if len(shape) < 2:
        raise InputError(f"fan in and fan out need at least two axes, received shape {shape}.")
    area = math.prod(shape[:-2])
    return area * shape[-2], area * shape[-1]
