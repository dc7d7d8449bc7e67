"""Array functions that mean the same on every backend, for cost functions and models.

A function runs on the framework its arrays belong to. With a backend selected, NumPy arrays and
Python numbers are converted first. What all frameworks write alike is not repeated here: the
arithmetic and comparison operators, `x[...]`, `x.shape`, `x.dtype`.

First and second derivatives at kinks, ties and bounds are the same on every backend; the page
docs/reference/derivatives.md lists them. Operators are the framework's own: where an argument may
be zero, write `ops.abs(x)` and `ops.power(x, n)`, not `abs(x)` and `x**n`.
The examples assume `from metaframe import ops` and a selected backend, whichever it is.
"""

from metaframe.ops._elementwise import abs as abs
from metaframe.ops._elementwise import clip as clip
from metaframe.ops._elementwise import cos as cos
from metaframe.ops._elementwise import exp as exp
from metaframe.ops._elementwise import expm1 as expm1
from metaframe.ops._elementwise import log as log
from metaframe.ops._elementwise import log1p as log1p
from metaframe.ops._elementwise import maximum as maximum
from metaframe.ops._elementwise import minimum as minimum
from metaframe.ops._elementwise import power as power
from metaframe.ops._elementwise import safe_sqrt as safe_sqrt
from metaframe.ops._elementwise import sigmoid as sigmoid
from metaframe.ops._elementwise import sign as sign
from metaframe.ops._elementwise import sin as sin
from metaframe.ops._elementwise import softplus as softplus
from metaframe.ops._elementwise import sqrt as sqrt
from metaframe.ops._elementwise import square as square
from metaframe.ops._elementwise import tanh as tanh
from metaframe.ops._elementwise import where as where
from metaframe.ops._make import arange as arange
from metaframe.ops._make import asarray as asarray
from metaframe.ops._make import astype as astype
from metaframe.ops._make import one_hot as one_hot
from metaframe.ops._make import ones_like as ones_like
from metaframe.ops._make import stop_gradient as stop_gradient
from metaframe.ops._make import to_numpy as to_numpy
from metaframe.ops._make import zeros as zeros
from metaframe.ops._make import zeros_like as zeros_like
from metaframe.ops._reduce import argmax as argmax
from metaframe.ops._reduce import logsumexp as logsumexp
from metaframe.ops._reduce import max as max
from metaframe.ops._reduce import mean as mean
from metaframe.ops._reduce import min as min
from metaframe.ops._reduce import norm as norm
from metaframe.ops._reduce import std as std
from metaframe.ops._reduce import sum as sum
from metaframe.ops._reduce import var as var
from metaframe.ops._shape import broadcast_to as broadcast_to
from metaframe.ops._shape import concat as concat
from metaframe.ops._shape import einsum as einsum
from metaframe.ops._shape import expand_dims as expand_dims
from metaframe.ops._shape import matmul as matmul
from metaframe.ops._shape import pad as pad
from metaframe.ops._shape import reshape as reshape
from metaframe.ops._shape import squeeze as squeeze
from metaframe.ops._shape import stack as stack
from metaframe.ops._shape import take as take
from metaframe.ops._shape import transpose as transpose

__all__ = [
    "abs",
    "arange",
    "argmax",
    "asarray",
    "astype",
    "broadcast_to",
    "clip",
    "concat",
    "cos",
    "einsum",
    "exp",
    "expand_dims",
    "expm1",
    "log",
    "log1p",
    "logsumexp",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "norm",
    "one_hot",
    "ones_like",
    "pad",
    "power",
    "reshape",
    "safe_sqrt",
    "sigmoid",
    "sign",
    "sin",
    "softplus",
    "sqrt",
    "square",
    "squeeze",
    "stack",
    "std",
    "stop_gradient",
    "sum",
    "take",
    "tanh",
    "to_numpy",
    "transpose",
    "var",
    "where",
    "zeros",
    "zeros_like",
]
