"""The private names of torch that this backend uses, and what it does where one is missing.

Importing this module looks none of them up.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metaframe.backend.private import PrivateName

SEEN = ("2.13.0",)


class OfModules(PrivateName):
    """An attribute of every module."""

    @functools.cached_property
    def found(self) -> Any:
        """The attribute of a new module."""
        return getattr(nn.Module(), self.path.rpartition(".")[2], None)


# Transforms and traces.
PEEK = PrivateName(
    "torch._C._functorch:peek_interpreter_stack",
    "the quick test for active transforms",
    SEEN,
    "slower",
)
INTERPRETERS = PrivateName(
    "torch._functorch.pyfunctorch:retrieve_all_functorch_interpreters",
    "counting the gradients among the active transforms",
    SEEN,
    "slower",
)
TRANSFORM_TYPE = PrivateName(
    "torch._C._functorch:TransformType",
    "counting the gradients among the active transforms",
    SEEN,
    "slower",
)
IS_WRAPPED = PrivateName(
    "torch._C._functorch:is_functorch_wrapped_tensor",
    "the quick test for tensors of a transform",
    SEEN,
    "public",
)
UNWRAPPED = PrivateName(
    "torch._C._functorch:get_unwrapped",
    "leaving out the graph of a gradient that nobody differentiates",
    SEEN,
    "slower",
)
NORM_EXCEPT_DIM = PrivateName(
    "torch:norm_except_dim", "the norm of a weight norm, to the last bit", SEEN, "public"
)
RUN_AGAIN = 'on torch a mode that runs steps again, every one but "reverse",'
IS_BATCHED = PrivateName("torch._C._functorch:is_batchedtensor", RUN_AGAIN, SEEN, "error")
BATCH_AXIS = PrivateName("torch._C._functorch:maybe_get_bdim", RUN_AGAIN, SEEN, "error")
LEVEL = PrivateName("torch._C._functorch:maybe_get_level", RUN_AGAIN, SEEN, "error")
DISPATCH_MODE = PrivateName(
    "torch.utils._python_dispatch:TorchDispatchMode", RUN_AGAIN, SEEN, "error"
)
PROXY_MODE = PrivateName(
    "torch.fx.experimental.proxy_tensor:get_proxy_mode",
    "`metaframe.compile` on torch",
    SEEN,
    "error",
)
DISPATCH_MODES = PrivateName(
    "torch._C:_len_torch_dispatch_stack",
    "telling whether a mode sees every operation, and compiling where none does,",
    SEEN,
    "slower",
)
FUNCTION_MODES = PrivateName(
    "torch.overrides:_get_current_function_mode_stack",
    "telling whether a mode sees every operation, and compiling where none does,",
    SEEN,
    "slower",
)
DEFAULT_DEVICE = PrivateName(
    "torch.utils._device:DeviceContext", "compiling under a default device", SEEN, "slower"
)
SAVED_HOOKS = PrivateName(
    "torch._C._autograd:_top_saved_tensors_default_hooks",
    "tasks at once where hooks on saved tensors may be active",
    SEEN,
    "slower",
)
FUNCTION_OF = PrivateName(
    "torch.autograd:Function._backward_cls._forward_cls",
    "a model with an autograd.Function, which may be marked with `once_differentiable`,",
    SEEN,
    "error",
)

# Compilation.
MAKE_FX = PrivateName(
    "torch.fx.experimental.proxy_tensor:make_fx", "`metaframe.compile` on torch", SEEN, "error"
)
INDUCTOR = PrivateName(
    "torch._inductor:compile", "compiling a graph without `torch.compile`", SEEN, "slower"
)
INDUCTOR_CONFIG = PrivateName(
    "torch._inductor:config", "our settings of the compiler", SEEN, "slower"
)
FAKE_TENSORS = PrivateName(
    "torch._subclasses:FakeTensorMode", "`metaframe.compile` on torch", SEEN, "error"
)
SHAPES = PrivateName(
    "torch.fx.experimental.symbolic_shapes:ShapeEnv", "`metaframe.compile` on torch", SEEN, "error"
)
FUNCTORCH_CONFIG = PrivateName(
    "torch._functorch:config", "`metaframe.compile` on torch", SEEN, "error"
)
STORAGE = PrivateName("torch:UntypedStorage._cdata", "`metaframe.compile` on torch", SEEN, "error")
# These two keep a program for later processes.
TRACING = PrivateName("torch._guards:tracing", "the program cache", SEEN, "slower")
TRACING_CONTEXT = PrivateName("torch._guards:TracingContext", "the program cache", SEEN, "slower")
FREED = "freeing a compiled program that is dropped"
GRAPH_SOURCES = PrivateName("torch.fx.graph_module:_loader.eval_cache", FREED, SEEN, "slower")
PROGRAM_MODULES = PrivateName(
    "torch._inductor.codecache:PyCodeCache.modules", FREED, SEEN, "slower"
)
SHARED_MODULES = PrivateName(
    "torch._inductor.codecache:PyCodeCache.modules_no_attr", FREED, SEEN, "slower"
)

# Models.
PARAMETERS = OfModules("torch.nn:Module._parameters", "running a model", SEEN, "error")
BUFFERS = OfModules("torch.nn:Module._buffers", "running a model", SEEN, "error")
MODULES = OfModules("torch.nn:Module._modules", "running a model", SEEN, "error")
BACKWARD_HOOKS = OfModules(
    "torch.nn:Module._backward_hooks",
    "refusing backward hooks, which torch.func leaves out or refuses in its own words",
    SEEN,
    "public",
)
BACKWARD_PRE_HOOKS = OfModules(
    "torch.nn:Module._backward_pre_hooks", BACKWARD_HOOKS.use, SEEN, "public"
)
WEIGHT_NORM = PrivateName(
    "torch:_weight_norm",
    "a model with torch's weight norm, whose own second derivative is wrong,",
    SEEN,
    "error",
)
BATCH_NORM_BASE = PrivateName(
    "torch.nn.modules.batchnorm:_BatchNorm",
    "finding layers that derive from no documented batch normalisation",
    SEEN,
    "public",
)
BATCH_NORM = PrivateName("torch:native_batch_norm", "the fused batch normalisation", SEEN, "slower")
BATCH_NORM_BACKWARD = PrivateName(
    "torch:ops.aten.native_batch_norm_backward", "the fused batch normalisation", SEEN, "slower"
)
IS_VIEW = PrivateName(
    "torch:Tensor._is_view", "moving running statistics that are a row of a buffer", SEEN, "error"
)
PACK_PADDED = PrivateName(
    "torch:_pack_padded_sequence", "packing sequences under `vmap`", SEEN, "slower"
)
PAD_PACKED = PrivateName(
    "torch:_pad_packed_sequence", "unpacking sequences under `vmap`", SEEN, "slower"
)
LEFT_ALIGNED = PrivateName(
    "torch:_nested_tensor_from_mask_left_aligned",
    "a transformer in eval mode with a padding mask under `vmap`",
    SEEN,
    "theirs",
)
CACHED_PARAMETRIZATIONS = PrivateName(
    "torch.nn.utils.parametrize:_cache",
    "running a model within `torch.nn.utils.parametrize.cached()`",
    SEEN,
    "error",
)
REGISTER_NODE = PrivateName(
    "torch.utils:_pytree.register_pytree_node",
    "passing a Container or a Task to a transform of torch.func",
    SEEN,
    "theirs",
)

# Several processes.
DEFAULT_STORE = PrivateName(
    "torch.distributed.distributed_c10d:_get_default_store",
    "ending at once, and not at the time limit, when another process fails,",
    SEEN,
    "slower",
)
COLLECTIVES = PrivateName(
    "torch.distributed._functional_collectives:all_reduce",
    "compiling a distributed step",
    SEEN,
    "error",
)


def transforming() -> bool:
    """True if a transform of torch.func is active."""
    if PEEK.found is not None:
        return PEEK.found() is not None
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:  # not inside of one
        return True
    return False


def gradients_active() -> int:
    """The number of active transforms that differentiate; without the names more than there are."""
    if INTERPRETERS.found is None or TRANSFORM_TYPE.found is None:
        return 3 if transforming() else 0
    kinds = (TRANSFORM_TYPE.found.Grad, TRANSFORM_TYPE.found.Jvp)
    return sum(level.key() in kinds for level in INTERPRETERS.found())


def is_wrapped(x: Tensor) -> bool:
    """True if `x` belongs to a transform."""
    if IS_WRAPPED.found is not None:
        return bool(IS_WRAPPED.found(x))
    try:
        return x.layout is torch.strided and x.data_ptr() < 0
    except RuntimeError:  # it has no memory of its own
        return True


def records(x: Tensor) -> bool:
    """True if autograd's tape records `x`, below the transforms that are active."""
    if UNWRAPPED.found is None:
        return True  # the safe answer, which keeps a graph
    while is_wrapped(x):
        x = UNWRAPPED.found(x)
    return bool(x.requires_grad)


def forward_mode_active() -> bool:
    """True if a transform of torch.func in forward mode is active."""
    if INTERPRETERS.found is None or TRANSFORM_TYPE.found is None:
        return False
    return any(level.key() == TRANSFORM_TYPE.found.Jvp for level in INTERPRETERS.found())


def stripped(x: Tensor) -> Tensor:
    """The values of `x` for one element of every batch, detached and of no transform."""
    while is_wrapped(x):
        if IS_BATCHED.required(x):
            x = UNWRAPPED.required(x).select(BATCH_AXIS.required(x), 0)
        else:
            x = UNWRAPPED.required(x)
    return x.detach()


def belongs_to_a_gradient(x: Tensor) -> bool:
    """True if the tape or a transform records `x`, or a batch ties it to one.

    Inside a gradient a rule of our own runs without the transforms, with the batches below it
    numbered anew: a tensor of a batch that is mapped within a gradient would be out of place.
    """
    while is_wrapped(x):
        if x.requires_grad or (IS_BATCHED.required(x) and _gradient_below(LEVEL.required(x))):
            return True
        x = UNWRAPPED.required(x)
    return bool(x.requires_grad)


def _gradient_below(level: int) -> bool:
    kinds = (TRANSFORM_TYPE.required.Grad, TRANSFORM_TYPE.required.Jvp)
    return any(x.key() in kinds and x.level() < level for x in INTERPRETERS.required())


@contextmanager
def writes() -> Iterator[Callable[[], bool]]:
    """A block of code, and whether it wrote into a tensor that it did not make."""
    made: set[int] = set()
    found: list[str] = []

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)}
        named |= kwargs or {}
        before = _memory(named.values())
        if _memory(x for name, x in named.items() if _is_written(func, name, named)) - made:
            found.append(func.name())
        result = func(*args, **(kwargs or {}))
        made.update(
            _memory([result]) - (before - made if "lift_fresh" not in func.name() else set())
        )
        return result

    mode = type("Writes", (DISPATCH_MODE.required,), {"__torch_dispatch__": dispatch})
    with mode():
        yield lambda: bool(found)


def _is_written(func: Any, name: str, named: dict[str, Any]) -> bool:
    if name.startswith("running_"):  # the schemas of batch normalisation do not say so
        return any(named.get(flag) is True for flag in ("train", "training", "use_input_stats"))
    arguments = {a.name: a for a in func._schema.arguments}
    return bool(arguments[name].alias_info and arguments[name].alias_info.is_write)


def _memory(values: Iterable[Any]) -> set[int]:
    """The memory of all tensors in a structure."""
    leaves = _leaves(list(values))
    return {x.untyped_storage()._cdata for x in leaves if isinstance(x, Tensor)}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for x in value for leaf in _leaves(x)]
    return [value]


def pull_back_once(pull_back: Callable[..., Any], cotangent: Tensor) -> Any:
    """A pull-back of `torch.func.vjp`, which is used once and not differentiated."""
    return pull_back(cotangent, **_only_once())


@functools.cache
def _only_once() -> dict[str, bool]:
    """The undocumented arguments of a pull-back, as far as it has them; without them, slower."""
    known = inspect.signature(torch.func.vjp(torch.sin, torch.zeros(()))[1]).parameters
    return {name: False for name in ("retain_graph", "create_graph") if name in known}


def function_of(node: Any) -> Any:
    """The `torch.autograd.Function` that a node of the graph is of; None of torch's own."""
    if type(node).__module__ != torch.autograd.Function.__module__:
        return None
    return FUNCTION_OF.required and type(node)._forward_cls


def tracing() -> bool:
    """True if make_fx is recording a graph."""
    return PROXY_MODE.found is not None and PROXY_MODE.found() is not None


def modes_active() -> bool:
    """True if anything but a default device sees every operation; True if it cannot be told."""
    if FUNCTION_MODES.found is None or DISPATCH_MODES.found is None:
        return True
    if DISPATCH_MODES.found():
        return True
    default = DEFAULT_DEVICE.found or ()
    return not all(isinstance(mode, default) for mode in FUNCTION_MODES.found())


def may_have_default_device() -> bool:
    """True if a default device is set, which torch finds among its function modes."""
    return FUNCTION_MODES.found is None or bool(FUNCTION_MODES.found())


def hooks_on_saved() -> bool:
    """True if there are hooks on what is saved for a backward pass; True if it cannot be told."""
    return SAVED_HOOKS.found is None or SAVED_HOOKS.found(False) is not None


def fake_tensors() -> Any:
    """A mode whose tensors have a shape, a dtype and a device, and no memory to read a value of.

    An output may have a shape that depends on values, as that of `x[x > 0]`.
    """
    shapes = SHAPES.required(allow_scalar_outputs=False)
    with FUNCTORCH_CONFIG.required.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        return FAKE_TENSORS.required(allow_non_fake_inputs=True, shape_env=shapes)


def is_fake(x: Tensor) -> bool:
    """True if it is a tensor of such a mode, or of a transform."""
    return type(x).__name__ == "FakeTensor" or is_wrapped(x)


VALUE_NEEDED = frozenset(
    {
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "GuardOnDataDependentSymNode",
    }
)
"""The errors of tensors without memory where a value is asked for."""


def memory(x: Tensor) -> object:
    """A key that tensors which share memory have in common, those without values too."""
    return STORAGE.required.__get__(x.untyped_storage())


def batch_norm_classes() -> Any:
    """The classes of layers that normalise by batches, for `isinstance`."""
    documented = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    return BATCH_NORM_BASE.found or documented


def has_backward_hooks(module: nn.Module) -> bool:
    """True if a hook was registered that runs in the backward pass of `module`."""
    hooks = (BACKWARD_HOOKS, BACKWARD_PRE_HOOKS)
    return any(name.found is not None and _of(module, name) for name in hooks)


def registered(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The parameters, buffers and modules that are registered in a module."""
    if PARAMETERS.found is None or BUFFERS.found is None or MODULES.found is None:
        _ = PARAMETERS.required, BUFFERS.required, MODULES.required
    return module._parameters, module._buffers, module._modules


def _of(module: nn.Module, name: OfModules) -> Any:
    return getattr(module, name.path.rpartition(".")[2])


def swap_parametrizations(kept: Any) -> Any:
    """Let `parametrize.cached()` have kept these values; what it had."""
    if CACHED_PARAMETRIZATIONS.found is None:
        return kept
    before, parametrize._cache = parametrize._cache, kept
    return before


def is_view(x: Tensor) -> bool:
    """True if `x` is a part of another tensor, or the whole in another shape."""
    return bool(IS_VIEW.required(x))


def is_compiled(module: nn.Module) -> bool:
    """True if torch.compile made something of it."""
    wrapped = "_orig_mod" in registered(module)[2]
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _refuse_cached_parametrizations(model: nn.Module) -> None:
    """An error within `parametrize.cached()`, where what it keeps is not to be found."""
    for module in filter(parametrize.is_parametrized, model.modules()):
        for name in module.parametrizations:  # type: ignore[union-attr]
            if getattr(module, name) is getattr(module, name):
                _ = CACHED_PARAMETRIZATIONS.required


def refuse_missing(model: nn.Module) -> None:
    """An error where a model needs a name that is missing and nothing else would say so.

    One that normalises weights, whose function cannot be told; and one within
    `parametrize.cached()`, where what that keeps is not to be found.
    """
    if WEIGHT_NORM.found is None and any(map(_normalises_weights, model.modules())):
        _ = WEIGHT_NORM.required
    if CACHED_PARAMETRIZATIONS.found is None:
        _refuse_cached_parametrizations(model)


def _normalises_weights(module: nn.Module) -> bool:
    old = any(name.endswith("_g") for name, _ in module.named_parameters(recurse=False))
    return old or type(module).__name__.strip("_") == "WeightNorm"


def inductor(graph: Any, examples: list[Tensor], settings: dict[str, Any]) -> Callable[..., Any]:
    """`graph`, which make_fx made of `examples` without values, compiled.

    Settings that this torch lacks are left out. Without inductor's own function `torch.compile`
    does the same more slowly.
    """
    known = {name: value for name, value in settings.items() if _is_setting(name)}
    patched = INDUCTOR_CONFIG.required.patch(known) if known else nullcontext()
    with torch.no_grad(), patched, _kept_for_later(examples):
        if INDUCTOR.found is None:
            compiled: Any = torch.compile(graph, fullgraph=True, dynamic=False)
        else:
            compiled = INDUCTOR.found(graph, examples)
    result: Callable[..., Any] = compiled
    return result


def _kept_for_later(examples: list[Tensor]) -> AbstractContextManager[Any]:
    """Inductor keeps a program for later processes only if it is told the mode of its shapes."""
    if TRACING.found is None or TRACING_CONTEXT.found is None or not examples:
        return nullcontext()
    mode: Any = examples[0]
    return TRACING.found(TRACING_CONTEXT.found(mode.fake_mode))  # type: ignore[no-any-return]


def _is_setting(name: str) -> bool:
    try:
        operator.attrgetter(name)(INDUCTOR_CONFIG.found)
    except AttributeError:
        return False
    return True


def norm_except_dim(v: Tensor, dim: int) -> Tensor:
    """The Euclidean norm over all axes but `dim`, which stay with length 1; over all for -1."""
    if NORM_EXCEPT_DIM.found is not None and not transforming():  # vmap has no rule for it
        norm: Tensor = NORM_EXCEPT_DIM.found(v, 2, dim)
        return norm
    if dim == -1:
        return torch.linalg.vector_norm(v)  # type: ignore[no-any-return]
    over = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return torch.linalg.vector_norm(v, dim=over, keepdim=True) if over else v.abs()


def with_memory(func: Any) -> Any:
    """`func`, or `torch.zeros` for the operation whose zeros have no memory.

    Forward mode gives them to what has no tangent. A compiled program would read their memory.
    """
    return torch.zeros if str(func) == "aten._efficientzerotensor.default" else func


def zeros_with_memory() -> AbstractContextManager[Any]:
    """A block in which forward mode makes zeros with memory, which an operation may write to."""

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return with_memory(func)(*args, **(kwargs or {}))

    mode: AbstractContextManager[Any] = type(
        "ZerosWithMemory", (DISPATCH_MODE.required,), {"__torch_dispatch__": dispatch}
    )()
    return mode


def schema(func: Any) -> Any:
    """The schema of an operation, which says what it writes to; None if it has none."""
    return getattr(func, "_schema", None)
