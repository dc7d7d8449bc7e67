"""The two tables a backend fills in: array functions and layer primitives.

They are written out method by method in native calls, so that type checkers, completion and
renames work, and so that a missing one fails when the backend is constructed. What can be
composed from these without losing speed is composed once, in `metaframe.ops` and `metaframe.nn`.

Conventions: dtypes are NumPy names; `axis=None` means all axes; images are (N, H, W, C) and
convolution kernels (height, width, channels in, channels out).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from metaframe.backend.required import Required
from metaframe.backend.types import Array

Axis = int | tuple[int, ...] | None
Pads = tuple[tuple[int, int], tuple[int, int]]
"""Zeros added (above, below), (left, right)."""


class OpsTable(Required):
    """Array functions. Each takes and returns arrays of the backend.

    In every method `x` and `y` are arrays of any shape, `xs` is a sequence of them, `shape` holds
    Python integers, and `dtype` is a NumPy name such as "float32". `axis` counts from the end if
    it is negative; None means all axes, which is the default of a reduction. With `keepdims` a
    reduced axis stays, with size 1. `metaframe.ops` has the function of the same name, with its
    kinks and ties.
    """

    # -- creation, on the device of `like` -------------------------------------------------

    @abc.abstractmethod
    def zeros(self, shape: Sequence[int], dtype: str, like: Array) -> Array:
        """Zeros of a shape and dtype, on the device of the array `like`."""

    @abc.abstractmethod
    def ones_like(self, x: Array) -> Array:
        """Ones with the shape, dtype and device of `x`."""

    @abc.abstractmethod
    def zeros_like(self, x: Array) -> Array:
        """Zeros with the shape, dtype and device of `x`."""

    @abc.abstractmethod
    def arange(self, stop: int, dtype: str, like: Array) -> Array:
        """`0, 1, ..., stop - 1`, on the device of the array `like`."""

    @abc.abstractmethod
    def one_hot(self, labels: Array, classes: int, dtype: str) -> Array:
        """Integer `labels` (...) to rows (..., classes) with a one at the label, if there is one.

        The number of `classes` is a Python integer. A label out of range gives a row of zeros.
        """

    @abc.abstractmethod
    def astype(self, x: Array, dtype: str) -> Array:
        """`x` converted to a dtype."""

    # -- elementwise -----------------------------------------------------------------------

    @abc.abstractmethod
    def exp(self, x: Array) -> Array:
        """The exponential function."""

    @abc.abstractmethod
    def expm1(self, x: Array) -> Array:
        """`exp(x) - 1`, accurate near zero."""

    @abc.abstractmethod
    def log(self, x: Array) -> Array:
        """The natural logarithm."""

    @abc.abstractmethod
    def log1p(self, x: Array) -> Array:
        """`log(1 + x)`, accurate near zero."""

    @abc.abstractmethod
    def sqrt(self, x: Array) -> Array:
        """The square root."""

    @abc.abstractmethod
    def square(self, x: Array) -> Array:
        """`x * x`."""

    @abc.abstractmethod
    def abs(self, x: Array) -> Array:
        """The absolute value, with gradient zero at zero."""

    @abc.abstractmethod
    def sign(self, x: Array) -> Array:
        """-1, 0 or 1; NaN for NaN."""

    @abc.abstractmethod
    def sin(self, x: Array) -> Array:
        """The sine."""

    @abc.abstractmethod
    def cos(self, x: Array) -> Array:
        """The cosine."""

    @abc.abstractmethod
    def tanh(self, x: Array) -> Array:
        """The hyperbolic tangent."""

    @abc.abstractmethod
    def sigmoid(self, x: Array) -> Array:
        """`1 / (1 + exp(-x))`."""

    @abc.abstractmethod
    def maximum(self, x: Array, y: Array | float) -> Array:
        """The larger of `x` and `y`, which may be a number; a tie halves the gradient."""

    @abc.abstractmethod
    def minimum(self, x: Array, y: Array | float) -> Array:
        """The smaller of `x` and `y`, which may be a number; a tie halves the gradient."""

    @abc.abstractmethod
    def where(self, condition: Array, x: Array | float, y: Array | float) -> Array:
        """`x` where `condition` is true and `y` elsewhere; one of them may be a number."""

    # -- reductions ------------------------------------------------------------------------

    @abc.abstractmethod
    def sum(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        """The sum along `axis`."""

    @abc.abstractmethod
    def mean(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        """The mean along `axis`, of floating arrays."""

    @abc.abstractmethod
    def max(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        """The largest element along `axis`."""

    @abc.abstractmethod
    def min(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        """The smallest element along `axis`."""

    @abc.abstractmethod
    def argmax(self, x: Array, axis: int) -> Array:
        """The index of the largest element along one `axis`: the first at a tie, the first NaN."""

    @abc.abstractmethod
    def logsumexp(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        """`log(sum(exp(x)))` along `axis`, without overflow."""

    # -- shape -----------------------------------------------------------------------------

    @abc.abstractmethod
    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        """The elements of `x`, last axis fastest, as `shape`; one size may be -1."""

    @abc.abstractmethod
    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """`x` with axis `axes[i]` as axis `i`."""

    @abc.abstractmethod
    def broadcast_to(self, x: Array, shape: Sequence[int]) -> Array:
        """`x` repeated along new axes in front and along axes of size 1."""

    @abc.abstractmethod
    def expand_dims(self, x: Array, axis: int) -> Array:
        """`x` with a new axis of size 1 at position `axis` of the result."""

    @abc.abstractmethod
    def squeeze(self, x: Array, axis: int) -> Array:
        """`x` without `axis`, whose size is 1."""

    @abc.abstractmethod
    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        """Arrays joined along an axis they have."""

    @abc.abstractmethod
    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        """Arrays of one shape joined along a new axis."""

    @abc.abstractmethod
    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        """The slices of `x` at integer `indices` in `[0, size)`, whose axes replace `axis`."""

    @abc.abstractmethod
    def pad(self, x: Array, widths: Sequence[tuple[int, int]]) -> Array:
        """`x` with zeros around it, by `widths`: `(before, after)` for each axis."""

    # -- products --------------------------------------------------------------------------

    @abc.abstractmethod
    def matmul(self, x: Array, y: Array) -> Array:
        """(..., n, k) times (..., k, m) as in NumPy: leading axes broadcast, vectors count."""

    @abc.abstractmethod
    def einsum(self, equation: str, *xs: Array) -> Array:
        """The sum of products that `equation`, such as "ij,jk->ik", spells out."""


class NNTable(Required):
    """Layer primitives whose fast form differs between frameworks.

    In every method `x` is a floating array, `axis` is one axis, from the end if negative, and
    windows and strides are (down, right) in pixels.
    """

    @abc.abstractmethod
    def relu(self, x: Array) -> Array:
        """`max(x, 0)`, with gradient zero at zero."""

    @abc.abstractmethod
    def gelu(self, x: Array) -> Array:
        """`x` times the normal distribution function of `x`, in the exact form."""

    @abc.abstractmethod
    def softmax(self, x: Array, axis: int = -1) -> Array:
        """`exp(x) / sum(exp(x))` along `axis`, without overflow."""

    @abc.abstractmethod
    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        """`x - log(sum(exp(x)))` along `axis`, without overflow."""

    @abc.abstractmethod
    def conv2d(self, x: Array, kernel: Array, stride: tuple[int, int], pads: Pads) -> Array:
        """Cross-correlate images with a kernel.

        Args:
            x: (N, H, W, C in), the images.
            kernel: (height, width, C in, C out).
            stride: pixels between outputs, (down, right).
            pads: zeros added, ((above, below), (left, right)).

        Returns:
            An array of shape (N, H out, W out, C out).
        """

    @abc.abstractmethod
    def max_pool2d(self, x: Array, window: tuple[int, int]) -> Array:
        """The largest pixel of each `window`, (height, width), in (N, H, W, C) images.

        Windows do not overlap. Of equal largest pixels the first, row by row, gets the gradient.
        """

    def batch_norm(
        self, x: Array, scale: Array | None, shift: Array | None, eps: float
    ) -> Array | None:
        """`nn.batch_norm` by the statistics of `x`, where the framework has one operation for it.

        Args:
            x: (..., C).
            scale: (C,), a factor applied after the normalisation, or None for none.
            shift: (C,), added last, or None for none.
            eps: added to the variance.

        Returns:
            An array of the shape of `x`, or None: then it is composed from array functions, which
            is the default.
        """
        del x, scale, shift, eps
        return None
