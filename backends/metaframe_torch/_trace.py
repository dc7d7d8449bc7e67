"""One run of a function, recorded as a graph: on tensors that have shapes and no values.

No way of reading a value, by NumPy, a list, a pointer, finds one, so that none can become part of
the program unseen. Nothing is computed, no random number is drawn, and nothing that the function
changes in place is changed; what a program would not do again at each call is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from metaframe.backend.types import Array, ArraysFn
from metaframe.errors import CompileError
from metaframe_torch import _private
from metaframe_torch._ambient import outside
from metaframe_torch._left import taken_away


class Traced(NamedTuple):
    """A function as a graph, recorded on tensors like those that it gets."""

    graph: GraphModule
    examples: list[Array]
    """The inputs that it was traced with, without values."""
    recorded: bool
    """Would autograd record a result, by a tensor that the function closes over?"""


def traced(fn: ArraysFn, like: Sequence[Array]) -> Traced:
    """The graph of `fn` for tensors like `like`.

    Raises:
        CompileError: it does what a program would not do again at each call.
    """
    outputs: list[Array] = []
    fake = _private.fake_tensors()
    examples = [fake.from_tensor(x, static_shapes=True) for x in like]

    def flat(*xs: Array) -> list[Array]:
        with _Knowing(), _Pure(xs, fake):
            outputs[:] = fn(xs)
        return list(outputs)

    _ = _private.PROXY_MODE.required  # our own functions ask whether they are recorded
    with taken_away(), fake:
        graph = _private.MAKE_FX.required(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(
            *examples
        )
    return Traced(graph, examples, any(y.requires_grad for y in outputs))


NO_VALUE = "is asked of a tensor that is being traced"


class _Knowing(TorchFunctionMode):
    """Tensors that a function closes over may be read: their values are known."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING and not _private.is_fake(args[0]):
            return outside(func, *args)
        if name in _OF_MEMORY or name == "__format__":
            # torch would say something else in each transform that may be active.
            raise RuntimeError(f"{name} {NO_VALUE}")
        return func(*args, **(kwargs or {}))


_OF_MEMORY = frozenset({"__array__", "__dlpack__", "__reduce_ex__", "data_ptr", "numpy", "tolist"})
"""The methods of a tensor that look at its memory."""
_READING = _OF_MEMORY | {
    "__bool__",
    "__complex__",
    "__contains__",
    "__float__",
    "__format__",
    "__index__",
    "__int__",
    "__repr__",
    "item",
}
"""The methods of a tensor that return something of its values, and no tensor."""


_Dispatch: Any = _private.DISPATCH_MODE.required


class _Pure(_Dispatch):  # type: ignore[misc]
    """Sees each operation, and refuses what is no function of the inputs alone."""

    supports_higher_order_operators = True

    def __init__(self, inputs: Sequence[Array], fake: Any) -> None:
        super().__init__()
        self._inputs = set(map(_private.memory, inputs))
        self._closed: set[object] = set()
        self._fake = fake
        self._random = _random_state()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in args:
            if isinstance(x, torch.Tensor) and not _private.is_fake(x):
                # What it is represented by, and of which a view is no real tensor any more.
                self._closed.add(_private.memory(self._fake.from_tensor(x, static_shapes=True)))
        schema = _private.schema(func)
        if schema is not None and schema.is_mutable:
            for argument, value in zip(schema.arguments, args, strict=False):
                if argument.is_write:
                    self._check_changed(func, value)
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            if kwargs.get("generator") is not None:
                raise CompileError(_GENERATOR)
            if _random_state() != self._random:
                raise CompileError(_SEED)
        return _private.with_memory(func)(*args, **kwargs)

    def _check_changed(self, func: Any, x: object) -> None:
        if isinstance(x, torch.Tensor):
            known = not _private.is_fake(x) or _private.memory(x) in self._closed
            if known or _private.memory(x) in self._inputs:
                whose = "closes over" if known else "was given"
                raise CompileError(_CHANGED.format(whose=whose, name=func))


_CHANGED = (
    "a compiled function changes a tensor in place that it {whose} ({name}), and would not do so "
    "at each call. Return a new tensor, or call the function without compile."
)
_GENERATOR = (
    "a compiled function draws from a torch.Generator of its own, which is no part of a program. "
    "Draw outside and pass the numbers, or draw from torch's own generator."
)
_SEED = (
    "a compiled function sets the state of torch's random generator and draws from it, and would "
    "not set it at each call. Set it outside, or pass the numbers."
)


def _random_state() -> bytes:
    return outside(lambda: torch.get_rng_state().numpy().tobytes())
