"""Code of others, differentiated where it takes the root of zero.

See `ops.safe_sqrt` for why. The calls are caught on their way into torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaframe.backend.types import Arrays, ArraysFn


def with_finite_roots(fn: ArraysFn) -> ArraysFn:
    """`fn` with a derivative of zero where one of its operations has none."""

    def call(xs: Arrays) -> Arrays:
        with _FiniteRoots():
            return fn(xs)

    return call


def _is_zero(x: Any, *_: Any) -> Any:
    return x == 0


def _is_root_of_zero(x: Any, power: Any) -> Any:
    return (x == 0) & torch.as_tensor(power < 1)


def _is_division_by_zero(_: Any, x: Any) -> Any:
    return x == 0


_PLACES: dict[str, tuple[int, Callable[..., Any]]] = {
    **dict.fromkeys(("sqrt", "rsqrt", "log", "reciprocal", "__rdiv__"), (0, _is_zero)),
    **dict.fromkeys(("pow", "__pow__"), (0, _is_root_of_zero)),
    **dict.fromkeys(("div", "true_divide", "__truediv__"), (1, _is_division_by_zero)),
}
"""Operations without a derivative where one of their operands, at this place, is zero."""


def _functions(suffix: str = "") -> dict[Any, str]:
    found = {getattr(home, n + suffix, None): n for home in (torch, Tensor) for n in _PLACES}
    del found[None]
    return found


_SINGULAR, _IN_PLACE = _functions(), _functions(suffix="_")


class _FiniteRoots(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs or not (func in _SINGULAR or func in _IN_PLACE):
            return func(*args, **kwargs or {})
        if func in _SINGULAR:
            return _finite(func, _SINGULAR[func], args)
        target, name = args[0], _IN_PLACE[func]
        return target.copy_(_finite(getattr(Tensor, name), name, (target.clone(), *args[1:])))


def _finite(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> Any:
    place, singular = _PLACES[name]
    x = args[place]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return func(*args)
    at = singular(*args)
    elsewhere = (*args[:place], torch.where(at, 1.0, x), *args[place + 1 :])
    there = func(*(a.detach() if isinstance(a, Tensor) else a for a in args))
    return torch.where(at, there, func(*elsewhere))
