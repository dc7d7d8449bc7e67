"""torch modules behind the neutral interface.

A module runs on other values through `torch.func.functional_call`. What a module's own code does
that would not survive a second derivative, or `vmap`, is caught on its way into torch: running
statistics written in place, attention kernels and cuDNN cells without double backward.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from metaframe.backend import Array, Arrays, Backend, ObjectiveFn
from metaframe.errors import InputError
from metaframe.models import BatchNorm, Forward, Inputs, ModelAdapter, NamedParameters
from metaframe.models.flags import Flags
from metaframe_torch._batch_norm import batch_norm
from metaframe_torch._parameter_mapping import ParameterMapping
from metaframe_torch._tape import refuse_inference_mode

DROPOUTS = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    }
)
EMBEDDINGS = frozenset({F.embedding, F.embedding_bag})
CHECKPOINTED = (
    "the model checkpoints activations (torch.utils.checkpoint, or other hooks on saved tensors). "
    "In the backward pass it would compute them from its own parameters and not from the adapted "
    "ones. Switch that off in the model; mode='remat' of meta_value_and_grad saves memory instead."
)
READING = (
    "__call__ buffers children extra_repr forward get_buffer get_extra_state get_parameter "
    "get_submodule modules named_buffers named_children named_modules named_parameters parameters "
    "state_dict training"
)
"""Public attributes of every module that change nothing."""
CHANGING = frozenset(name for name in vars(nn.Module) if name[0] != "_") - set(READING.split())
RECURRENCES = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


_lock = threading.RLock()

P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: Callable[P, R]) -> Callable[P, R]:
    """One thread at a time: a call puts other values into the user's module and takes them out.

    For all modules, since the kernels that a call allows are those of the process.
    """

    @functools.wraps(method)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock:
            return method(*args, **kwargs)

    return locked


class TorchAdapter(ModelAdapter):
    """A `torch.nn.Module`; names are those of `named_parameters`."""

    output_first = True
    switchable = True

    def __init__(self, model: nn.Module, backend: Backend) -> None:
        if lazy := [name for name, x in _tensors(model) if is_lazy(x)]:
            raise InputError(
                f"the torch module {type(model).__qualname__} has no weights yet in {lazy}. Call "
                "it once on data."
            )
        self.model = model
        self.backend = backend
        self._flags = Flags()

    @_alone
    def params(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @_alone
    def state(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers())

    @_alone
    def trainable(self) -> tuple[str, ...]:
        return tuple(n for n, p in self.model.named_parameters() if p.requires_grad)

    @_alone
    def aliases(self) -> dict[str, str]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        return {name: names[id(p)] for name, p in every}

    @_alone
    def signature(self) -> Hashable:
        return self._flags.of(self.model.modules)

    @_alone
    def call(
        self, params: dict[str, Tensor], state: dict[str, Tensor], inputs: Inputs
    ) -> tuple[Any, dict[str, Tensor]]:
        # Copies, because a module may write to its buffers; the ones given stay as they are.
        copies = {name: buffer.clone() for name, buffer in state.items()}
        own = {id(p): n for n, p in self.model.named_parameters() if params.get(n) is not p}
        calls, twice = _Calls(inputs.forward, copies, own), inputs.forward.twice
        kernels = _differentiable_twice(self.model) if twice else _as_it_is()
        kept, watched = _attributes_kept(self.model), self._flags.called(self.model.modules)
        mode = _mode(self.model, inputs.forward.training)
        with calls, kernels, _computed_once(), kept, watched, mode:
            named = {id(x): {**params, **copies}[n] for n, x in _tensors(self.model)}
            model = _Called(self.model, inputs.call or (lambda m, *a, **k: m(*a, **k)))
            values = {
                f"{path}.{name}": named[id(x)]
                for path, module in model.named_modules()
                for name, x in (*module._parameters.items(), *module._buffers.items())
                if x is not None
            }
            output = torch.func.functional_call(
                model, values, inputs.args, dict(inputs.kwargs), tie_weights=False
            )
        if inputs.forward.norm == "record":
            return output, {**state, **calls.recorded}
        return output, copies

    def withholds(self, owner: Any, name: str) -> bool:
        return name in CHANGING and getattr(type(owner), name, None) is vars(nn.Module)[name]

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        layers = (
            (f"{path}." if path else "", module)
            for path, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        )
        return tuple(
            BatchNorm(
                f"{path}running_mean",
                f"{path}running_var",
                *((f"{path}weight", f"{path}bias") if module.affine else ()),
            )
            for path, module in layers
        )

    @_alone
    def write(self, params: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(params[name])


class _Called(nn.Module):
    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.model, *args, **kwargs)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


class _Calls(TorchFunctionMode):
    """The calls a module makes that need another form here, caught on their way into torch.

    Batch normalisation uses the statistics the policy names and touches no buffer. The affine part
    stays outside the fused operation: `vmap` gets the second derivative of the fused affine one
    wrong.
    """

    def __init__(self, forward: Forward, state: dict[str, Tensor], own: dict[int, str]) -> None:
        super().__init__()
        self._own = own
        self.recorded: dict[str, Tensor] = {}
        self._norm = forward.norm
        self._repeated = forward.repeated
        self._names = {id(buffer): name for name, buffer in state.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (name := self._own_among((*args, *kwargs.values()))) is not None:
            _refuse_own(name, func(*args, **kwargs))
        if self._repeated and func in DROPOUTS and _drops(*args, **kwargs):
            raise InputError(
                "dropout draws another mask when an inner step is run again in the backward pass. "
                "Use mode='reverse', or switch dropout off with model.eval()."
            )
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is F.instance_norm:
            return self._instance_norm(*args, **kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        if func in EMBEDDINGS:
            args, kwargs = _renormalised(func, args, kwargs)
        if getattr(func, "__name__", None) in RECURRENCES and isinstance(args[2], list):
            args = _with_mapped_state(*args)
        return func(*args, **kwargs)

    def _own_among(self, values: Iterable[Any]) -> str | None:
        """The name of a parameter that another one stands in for, in whatever list or tuple."""
        for x in values:
            if (name := self._own.get(id(x))) is not None:
                return name
            if isinstance(x, (list, tuple)) and (name := self._own_among(x)) is not None:
                return name
        return None

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        del momentum
        frozen = not training if self._norm is None else self._norm == "frozen"
        shape = (-1, *[1] * (x.dim() - 2))
        if frozen and running_mean is not None and running_var is not None:
            scale = torch.rsqrt(running_var + eps)
            normal = (x - running_mean.reshape(shape)) * scale.reshape(shape)
        else:
            normal = batch_norm(x, None, None, eps)
            if self._norm == "record":
                self._record(x, running_mean, running_var)
        if weight is not None:
            normal = normal * weight.reshape(shape)
        return normal if bias is None else normal + bias.reshape(shape)

    def _record(self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
        if running_mean is None or running_var is None:
            return  # a layer that keeps no statistics normalises by the examples' own, always
        over = [axis for axis in range(x.dim()) if axis != 1]
        var, mean = torch.var_mean(x, over, correction=0)
        self.recorded[self._names[id(running_mean)]] = mean
        self.recorded[self._names[id(running_var)]] = var

    def _instance_norm(
        self,
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
        if own or running_mean is None:
            running_mean = running_var = None
            own = True
        return F.instance_norm(x, running_mean, running_var, weight, bias, own, momentum, eps)


def _refuse_own(name: str, result: Any) -> None:
    """A value computed from a parameter that another one stands in for is not the model's."""
    values = result if isinstance(result, (list, tuple)) else (result,)
    if any(isinstance(x, Tensor) for x in values):  # and not a shape or a dtype
        raise InputError(
            f"the model reads its parameter {name!r} from somewhere else than its attributes, "
            "such as a list or a closure, where other values cannot be put. Read it from the "
            "module that holds it, or keep the list as an nn.ParameterList or nn.ModuleList."
        )


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`v` in the length `g`; the second derivative of torch's fused kernel is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _renormalised(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an embedding with rows of at most `max_norm`, which torch writes in place.

    As in torch, up to the derivative: there the new rows are constants.
    """
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    longest, order, rows = given["max_norm"], given["norm_type"], given["weight"]
    if longest is None:
        return args, kwargs
    long = torch.linalg.vector_norm(rows.detach(), order, dim=-1, keepdim=True) > longest
    # A norm has no second derivative at zero, where a padding row is.
    norm = torch.linalg.vector_norm(torch.where(long, rows, 1.0), order, dim=-1, keepdim=True)
    given["weight"] = rows * torch.where(long, longest / (norm + 1e-7), 1.0)
    given["max_norm"] = None
    return bound.args, bound.kwargs


_signature = functools.cache(inspect.signature)


def _drops(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    del x, inplace
    return training and p > 0


def _with_mapped_state(
    x: Tensor, state: Tensor | tuple[Tensor, ...], weights: list[Tensor], *rest: Any
) -> tuple[Any, ...]:
    """The initial state mapped by `vmap` wherever an input is.

    The kernels add to what they compute from the state in place, which fails when the state is the
    same for all tasks and the rest is not.
    """
    zero = sum(torch.zeros_like(t).sum() for t in (x, *weights))
    if isinstance(state, tuple):
        return x, tuple(h + zero for h in state), weights, *rest
    return x, state + zero, weights, *rest


@contextlib.contextmanager
def _differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Kernels that have a second derivative: no fused attention, no cuDNN recurrence."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Tensors that hooks set on a module, such as the old `weight_norm`, put back."""
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    before = [
        (vars(module), name, value)
        for module in hooked
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for attributes, name, value in before:
            attributes[name] = value


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Training or evaluation mode inside, and every module's own again afterwards."""
    before = [] if training is None else [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = bool(training)
        yield
    finally:
        for module, own in before:
            module.training = own


@contextlib.contextmanager
def _computed_once() -> Iterator[None]:
    """No part of a model is run again in a backward pass.

    The model holds its own parameters again by then, and the gradient would be theirs.
    """
    with contextlib.ExitStack() as stack:
        # Hooks that the caller set, such as `save_on_cpu`, compute nothing again. They cannot be
        # switched off either.
        with contextlib.suppress(RuntimeError):
            if torch.is_grad_enabled():  # else nothing is recorded
                refused = torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED)
                stack.enter_context(refused)
        try:
            yield
        except RuntimeError as error:
            if CHECKPOINTED in str(error):
                raise InputError(CHECKPOINTED) from error
            raise


def _as_it_is() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class LearnedAdapter(NamedParameters):
    """Learned values as a module that maps their names to parameters."""

    def __init__(self, values: dict[str, Tensor], backend: Backend) -> None:
        self.model = ParameterMapping(values)
        self.backend = backend

    def params(self) -> dict[str, Tensor]:
        return dict(self.model.items())

    def write(self, params: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.params().items():
                parameter.copy_(params[name])


class KeptAdapter(NamedParameters):
    """Values as the buffers of a module, whose names cannot hold a dot."""

    def __init__(self, values: dict[str, Tensor], backend: Backend) -> None:
        self.model = nn.Module()
        self.backend = backend
        self._names = {name: name.replace(".", "/") for name in values}
        for name, value in values.items():
            self.model.register_buffer(self._names[name], value)

    def params(self) -> dict[str, Tensor]:
        return {name: getattr(self.model, key) for name, key in self._names.items()}

    def write(self, params: dict[str, Tensor]) -> None:
        # Not in place: what `params` returned before stays what it was.
        for name, old in self.params().items():
            setattr(self.model, self._names[name], params[name].to(old))


def tape_gradient(
    loss: Array | ObjectiveFn, xs: Arrays, *, first_order: bool
) -> tuple[Array | None, ...]:
    """Gradients from autograd's record, which reaches from here back to whatever `xs` came from."""
    refuse_inference_mode()
    second = torch.is_grad_enabled() and not first_order
    with torch.enable_grad():
        if callable(loss):
            # Without a record to extend (under no_grad) every step starts from fresh leaves.
            xs = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in xs)
            loss = loss(xs)
        wanted = [i for i, x in enumerate(xs) if x.requires_grad]
        if not (wanted and loss.requires_grad):
            return (None,) * len(xs)
        found = torch.autograd.grad(
            loss, [xs[i] for i in wanted], create_graph=second, allow_unused=True
        )
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(i) for i in range(len(xs)))
