"""The calls a model makes into torch, caught on their way.

Batch normalisation uses the statistics that the policy names. What has no second derivative or no
batching rule is computed in another form (`_kernels`). What would be wrong without an error is
refused: a parameter that is read from elsewhere than its place, or written to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metaframe.backend.model import Forward
from metaframe.errors import InputError
from metaframe_torch import _kernels, _private, _tape
from metaframe_torch._batch_norm import batch_norm
from metaframe_torch._substitution import WRITES, Substitution, carried

Function = Callable[..., Any]
IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        *("set", "setitem", "delitem"),
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "imatmul"),
    )
)


class Unmapped(Exception):
    """A write to a buffer that differs between mapped tasks, where the buffer does not.

    Attributes:
        name: the buffer's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Exact(TorchFunctionMode):
    """Calls with a second derivative and a batching rule, where torch's own have none."""

    def __init__(self, forms: Mapping[Function, Function]) -> None:
        super().__init__()
        self._forms = forms

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._forms.get(func, func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class InExactForms:
    """`fn`, its calls into torch in exact forms; equal to another around the same function."""

    fn: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of `fn`."""
        with Exact(_kernels.exact()):
            return self.fn(*args, **kwargs)


class ModelCalls(Exact):
    """The calls of one forward pass of a model that has other values.

    With `exact` a second derivative may be taken, or a transform is active.
    """

    def __init__(self, values: Substitution, forward: Forward, exact: bool) -> None:
        super().__init__(_kernels.exact() if exact else _kernels.always())
        self._watched = {**dict.fromkeys(values.unregistered), **values.own}
        self._unregistered = values.unregistered
        self._values = values
        self._parameters = {id(x): name for name, x in values.params.items()}
        self._buffers = {id(x): name for name, x in values.state.items()}
        self._norm, self._repeated = forward.norm, forward.repeated
        self._recording = torch.is_grad_enabled()
        self._constants: dict[int, tuple[Any, Function, tuple[Any, ...]]] = {}
        self._improved: set[int] = set()
        """Identities of buffers that a power iteration wrote to."""
        self._aliases: list[Tensor] = []  # kept, since they are known by their identities
        self.recorded: dict[str, Tensor] = {}
        """Statistics of the examples, by the names of the buffers that they belong to."""
        self.read: set[int] = set()
        """Identities of the tensors in plain attributes that were read."""

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._watched and (name := self._own_among((*args, *kwargs.values()))) is not None:
            _refuse_own(name, func(*args, **kwargs))
        if (own := _OF_MODELS.get(func)) is not None:
            return own(self, func, *args, **kwargs)
        if args and _writes(func):
            return self._write(args[0], func, *args, **kwargs)
        if "out" in kwargs:
            return self._write(kwargs["out"], func, *args, **kwargs)
        return self._forms.get(func, func)(*args, **kwargs)

    def _own_among(self, values: Iterable[Any]) -> str | None:
        """The name of a parameter that another one stands in for, in whatever list or tuple."""
        for x in values:
            if id(x) in self._watched:
                if (name := self._watched[id(x)]) is not None:
                    return name
                self.read.add(id(x))
            if isinstance(x, (list, tuple)) and (name := self._own_among(x)) is not None:
                return name
        return None

    def _write(self, target: Any, func: Function, *args: Any, **kwargs: Any) -> Any:
        """`func`, which changes `target` in place."""
        if (name := self._parameters.get(id(target))) is not None:
            raise InputError(f"the model writes to its parameter {name!r}. {WRITES}")
        if (attribute := self._unregistered.get(id(target))) is not None:
            raise InputError(carried(attribute[1]))
        try:
            return self._forms.get(func, func)(*args, **kwargs)
        except RuntimeError as error:
            if (name := self._buffers.get(id(target))) is None or not _tape.transforming():
                raise
            raise Unmapped(name) from error

    def _alias(self, func: Function, x: Tensor) -> Tensor:
        """The memory of `x` apart from autograd, to write to which is to write to `x`."""
        alias: Tensor = func(x)
        if (name := self._parameters.get(id(x))) is not None:
            self._parameters[id(alias)] = name
            self._aliases.append(alias)
        return alias

    def _dropout(self, func: Function, *args: Any, **kwargs: Any) -> Tensor:
        if self._repeated and _drops(*args, **kwargs):
            raise InputError(
                "dropout draws another mask when an inner step is run again in the backward pass. "
                "Use mode='reverse', or switch dropout off with model.eval()."
            )
        result: Tensor = func(*args, **kwargs)
        return result

    def _constant(self, func: Function, *args: Any, **kwargs: Any) -> Any:
        """A step of a power iteration, which is kept to be taken again with a derivative."""
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled() and not kwargs:
            self._constants[id(result)] = result, func, args
        return result

    def _again(self, x: Any) -> Any:
        """A constant once more, from copies of buffers, which are written to next."""
        if id(x) not in self._constants:
            return x.clone() if id(x) in self._buffers else x
        _, func, args = self._constants[id(x)]
        return func(*map(self._again, args))

    def _clone(self, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A copy, that of an improved vector with its derivative."""
        with torch.set_grad_enabled(torch.is_grad_enabled() or id(x) in self._improved):
            return func(x, *args, **kwargs)

    def _normalize(self, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`F.normalize`, by which spectral normalisation improves vectors among its buffers.

        torch takes these for constants, although they depend on the weight. Here they have a
        derivative, as the cost of a model has that it computes in training mode.
        """
        out = kwargs.pop("out", None)
        if id(out) not in self._buffers:
            return func(x, *args, out=out, **kwargs)
        taken_again = id(x) in self._constants
        if self._recording:
            self._improved.add(id(out))
        with torch.set_grad_enabled(self._recording if taken_again else torch.is_grad_enabled()):
            return self._write(out, torch.Tensor.copy_, out, func(self._again(x), *args, **kwargs))

    def _batch_norm(
        self,
        func: Function,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """The affine part stays apart: `vmap` gets the second derivative of a fused one wrong."""
        del func
        moving = training and self._norm is None
        frozen = not training if self._norm is None else self._norm == "frozen"
        shape = (-1, *[1] * (x.dim() - 2))
        if frozen and running_mean is not None and running_var is not None:
            scale = torch.rsqrt(running_var + eps)
            normal = (x - running_mean.reshape(shape)) * scale.reshape(shape)
        else:
            normal = batch_norm(x, None, None, eps)
            if x.numel() and (moving or self._norm == "record"):
                over = [axis for axis in range(x.dim()) if axis != 1]
                running, count = (running_mean, running_var), x.numel() // x.shape[1]
                self._record(torch.var_mean(x, over, correction=0), running, count, momentum)
        if weight is not None:
            normal = normal * weight.reshape(shape)
        return normal if bias is None else normal + bias.reshape(shape)

    def _record(
        self,
        moments: tuple[Tensor, ...],
        running: tuple[Tensor | None, Tensor | None],
        count: int,
        momentum: float,
    ) -> None:
        """Keep the statistics of the examples, or move the running ones to them, as torch does."""
        (var, mean), (running_mean, running_var) = moments, running
        if running_mean is None or running_var is None:
            return  # a layer that keeps no statistics normalises by the examples' own, always
        if self._norm != "record":
            self._move(running_mean, mean, momentum)
            self._move(running_var, var * (count / (count - 1)), momentum)
            return
        for old, new in ((running_mean, mean), (running_var, var)):
            if (name := self._buffers.get(id(old))) is None:
                raise InputError(STATISTICS_FROM_ELSEWHERE)
            self.recorded[name] = new

    def _move(self, running: Tensor, towards: Tensor, momentum: float) -> None:
        """Move a running statistic, by another tensor in its place if it is a buffer.

        That may differ between mapped tasks, where the buffer does not.
        """
        with torch.no_grad():
            moved = (1 - momentum) * running + momentum * towards.to(running.dtype)
            if (name := self._buffers.get(id(running))) is None:
                if _private.is_view(running):  # of a buffer, such as one of several rows
                    self._write(running, torch.Tensor.copy_, running, moved)
                return  # what is no buffer stays as it is
        self._values.replace_buffer(name, moved)
        self._buffers[id(moved)] = name
        self._aliases.append(moved)

    def _instance_norm(
        self,
        func: Function,
        x: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        own = use_input_stats if self._norm is None else self._norm != "frozen"
        running = running_mean, running_var
        if own or running_mean is None:
            running_mean = running_var = None
            own = True
        result: Tensor = func(x, running_mean, running_var, weight, bias, own, momentum, eps)
        if use_input_stats and self._norm is None and x.numel():
            moments = torch.var_mean(x, [*range(2, x.dim())], correction=0)
            means = tuple(y.mean(0) for y in moments)
            self._record(means, running, math.prod(x.shape[2:]), momentum)
        return result


_OF_MODELS: dict[Function, Callable[..., Any]] = {
    F.batch_norm: ModelCalls._batch_norm,
    F.instance_norm: ModelCalls._instance_norm,
    F.normalize: ModelCalls._normalize,
    torch.mv: ModelCalls._constant,
    torch.Tensor.t: ModelCalls._constant,
    torch.Tensor.H.__get__: ModelCalls._constant,  # type: ignore[attr-defined]
    torch.Tensor.clone: ModelCalls._clone,
    torch.Tensor.detach: ModelCalls._alias,
    torch.detach: ModelCalls._alias,
    torch.Tensor.data.__get__: ModelCalls._alias,  # type: ignore[attr-defined]
    F.dropout: ModelCalls._dropout,
    F.dropout1d: ModelCalls._dropout,
    F.dropout2d: ModelCalls._dropout,
    F.dropout3d: ModelCalls._dropout,
    F.alpha_dropout: ModelCalls._dropout,
    F.feature_alpha_dropout: ModelCalls._dropout,
}


STATISTICS_FROM_ELSEWHERE = (
    "norm='support' needs the statistics of a batch in buffers of the model, and this one hands "
    "torch.nn.functional.batch_norm other tensors, such as a row of a table. Use norm='batch' or "
    "norm='per-step'."
)


@functools.cache
def _writes(func: Function) -> bool:
    """True if `func` changes its first argument in place."""
    name = getattr(func, "__name__", "")
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _drops(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    del x, inplace
    return training and p > 0


def _refuse_own(name: str, result: Any) -> None:
    """A value computed from a parameter that another one stands in for is not the model's."""
    values = result if isinstance(result, (list, tuple)) else (result,)
    if any(isinstance(x, Tensor) for x in values):  # and not a shape or a dtype
        raise InputError(
            f"the model reads its parameter {name!r} from somewhere else than its attributes, "
            "such as a list or a closure, where other values cannot be put. Read it from the "
            "module that holds it, or keep the list as an nn.ParameterList or nn.ModuleList."
        )
