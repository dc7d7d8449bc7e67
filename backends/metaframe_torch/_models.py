"""torch modules behind the neutral interface.

A module runs on other values in its own places (`_substitution`), and what its code does on the way
that would not survive a second derivative, or `vmap`, is caught (`_calls`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from metaframe import tree
from metaframe.backend.contract import Backend
from metaframe.backend.model import BatchNorm, Inputs, ModelAdapter, NamedParameters
from metaframe.backend.types import Array, Arrays, ObjectiveFn
from metaframe.errors import InputError
from metaframe.models.attributes import Flags
from metaframe_torch import _private, _tape
from metaframe_torch._calls import ModelCalls, Unmapped
from metaframe_torch._parameter_mapping import ParameterMapping
from metaframe_torch._recurrent import mapped_as
from metaframe_torch._refusals import explained, refuse_once_differentiable
from metaframe_torch._substitution import Substitution

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
NO_WEIGHTS = UninitializedParameter, UninitializedBuffer


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
        _refuse_unfit(model)
        self.model = model
        self.backend = backend
        self._flags = Flags()
        self._examined = False
        self._written: frozenset[str] = frozenset()
        """Buffers that the model writes what differs between tasks to."""

    @_alone
    def params(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @_alone
    def state(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers())

    @_alone
    def trainable(self) -> tuple[str, ...]:
        return tuple(name for name, p in self.model.named_parameters() if p.requires_grad)

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
        _private.refuse_missing(self.model)
        while True:
            try:
                return self._called(params, state, inputs)
            except Unmapped as buffer:
                if buffer.name in self._written:
                    raise
                self._written |= {buffer.name}
            except (RuntimeError, AttributeError) as error:
                if (ours := explained(error, self.model)) is None:
                    raise
                raise ours from error

    def _called(
        self, params: dict[str, Tensor], state: dict[str, Tensor], inputs: Inputs
    ) -> tuple[Any, dict[str, Tensor]]:
        forward, transforming = inputs.forward, _tape.transforming()
        exact = forward.twice or transforming
        values = Substitution(self.model, params, self._copies(params, state, inputs))
        if transforming:
            _refuse_backward_hooks(values.modules)
        calls = ModelCalls(values, forward, exact)
        run = self.model if inputs.call is None else functools.partial(inputs.call, self.model)
        watched = self._flags.called(self.model.modules)
        mode = _mode(values.modules, forward.training)
        with values, calls, _surroundings(values.modules, exact), watched, mode:
            output = run(*inputs.args, **inputs.kwargs)
            values.refuse_carried(calls.read)
        if forward.twice and not self._examined:
            given = tree.leaves((params, inputs.args))
            self._examined = refuse_once_differentiable(tree.leaves(output), given)
        kept = state if forward.norm == "record" else values.state
        return output, {**kept, **calls.recorded}

    def _copies(
        self, params: dict[str, Tensor], state: dict[str, Tensor], inputs: Inputs
    ) -> dict[str, Tensor]:
        """Copies of the buffers, because a module may write to them."""
        copies = {name: buffer.clone() for name, buffer in state.items()}
        if self._written and _tape.transforming():
            given = tree.leaves((inputs.args, dict(inputs.kwargs)))
            tensors = [x for x in (*params.values(), *given) if isinstance(x, Tensor)]
            for name in self._written:
                copies[name] = mapped_as(copies[name], tensors)
        return copies

    def withholds(self, owner: Any, name: str) -> bool:
        return name in CHANGING and getattr(type(owner), name, None) is vars(nn.Module)[name]

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        layers = (
            (f"{path}." if path else "", module)
            for path, module in self.model.named_modules()
            if isinstance(module, _private.batch_norm_classes()) and module.running_mean is not None
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


def _refuse_unfit(model: nn.Module) -> None:
    """An error for a module that cannot have other values, which says what can."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if lazy := [name for name, x in tensors if isinstance(x, NO_WEIGHTS)]:
        raise InputError(
            f"the torch module {type(model).__qualname__} has no weights yet in {lazy}. Call "
            "it once on data."
        )
    for path, module in model.named_modules():
        if (instead := _unfit(module)) is not None:
            raise InputError(
                f"the torch module {path or 'given'!r} ({type(module).__qualname__}) cannot be "
                f"adapted: {instead}"
            )


def _unfit(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule) and any(
        True for _ in itertools.chain(module.parameters(), module.buffers())
    ):
        return "TorchScript has its own values in it. Pass the module that it was made from."
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return (
            "its gradients are averaged in a backward pass that an adaptation has many of. Pass "
            "its `module`, and distributed=True to meta_value_and_grad or MetaTrainer."
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return "it runs in several threads. Pass its `module`."
    if isinstance(module, nn.CrossMapLRN2d):
        return "it has no second derivative. Use nn.LocalResponseNorm."
    return None


@contextlib.contextmanager
def _mode(modules: Sequence[nn.Module], training: bool | None) -> Iterator[None]:
    """Training or evaluation mode inside, and every module's own again afterwards."""
    before = [] if training is None else [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = bool(training)
        yield
    finally:
        for module, own in before:
            module.training = own


@contextlib.contextmanager
def _surroundings(modules: Sequence[nn.Module], exact: bool) -> Iterator[None]:
    """The state of autograd and of torch's settings around a model while it runs."""
    with contextlib.ExitStack() as stack:
        if torch.is_grad_enabled():  # else nothing is recorded
            # Hooks that the caller set, such as `save_on_cpu`, compute nothing again. They cannot
            # be switched off either.
            with contextlib.suppress(RuntimeError):
                stack.enter_context(disable_saved_tensors_hooks(CHECKPOINTED))
        if exact and torch.backends.cudnn.is_available() and any(map(_is_recurrent, modules)):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if any(map(_private.is_compiled, modules)):
            # What torch.compile made of it has no second derivative, and would be made anew.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        kept = _private.swap_parametrizations({})
        try:
            yield
        except RuntimeError as error:
            if CHECKPOINTED in str(error):
                raise InputError(CHECKPOINTED) from error
            raise
        finally:
            _private.swap_parametrizations(kept)


def _refuse_backward_hooks(modules: Sequence[nn.Module]) -> None:
    for module in filter(_private.has_backward_hooks, modules):
        raise InputError(
            f"a layer ({type(module).__qualname__}) has a backward hook, which does not run where "
            'tasks are vectorised. Run them one after the other, task_map="loop", or remove it.'
        )


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase)


class LearnedAdapter(NamedParameters):
    """Learned values as a module that maps their names to parameters."""

    def __init__(self, values: dict[str, Tensor], backend: Backend) -> None:
        self.model = ParameterMapping(values)
        self.backend = backend

    def params(self) -> dict[str, Tensor]:
        return dict(self.model.items())

    def trainable(self) -> tuple[str, ...]:
        return tuple(name for name, p in self.params().items() if p.requires_grad)

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
    _tape.refuse_inference_mode()
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
