"""The private names of torch that this backend uses, and what it does where one is missing.

Importing this module looks none of them up.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metaframe.private import PrivateName

SEEN = ("2.13.0",)

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
WITHOUT_PROXY_MODE = PrivateName(
    "torch.fx.experimental.proxy_tensor:disable_proxy_modes_tracing",
    "forward mode, or a message to other processes, while `metaframe.compile` traces",
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

# Models.
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
REGISTER_NODE = PrivateName(
    "torch.utils:_pytree.register_pytree_node",
    "passing a Container or a Task to a transform of torch.func",
    SEEN,
    "error",
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
    """Is a transform of torch.func active?"""
    if PEEK.found is not None:
        return PEEK.found() is not None
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:  # not inside of one
        return True
    return False


def gradients_active() -> int:
    """How many transforms that differentiate are active; without the names more than there are."""
    if INTERPRETERS.found is None or TRANSFORM_TYPE.found is None:
        return 3 if transforming() else 0
    kinds = (TRANSFORM_TYPE.found.Grad, TRANSFORM_TYPE.found.Jvp)
    return sum(level.key() in kinds for level in INTERPRETERS.found())


def is_wrapped(x: Tensor) -> bool:
    """Does `x` belong to a transform?"""
    if IS_WRAPPED.found is not None:
        return bool(IS_WRAPPED.found(x))
    try:
        return x.layout is torch.strided and x.data_ptr() < 0
    except RuntimeError:  # it has no memory of its own
        return True


def records(x: Tensor) -> bool:
    """Does autograd's tape record `x`, below the transforms that are active?"""
    if UNWRAPPED.found is None:
        return True  # the safe answer, which keeps a graph
    while is_wrapped(x):
        x = UNWRAPPED.found(x)
    return bool(x.requires_grad)


def pull_back_once(pull_back: Callable[..., Any], cotangent: Tensor) -> Any:
    """A pull-back of `torch.func.vjp`, which is used once and not differentiated."""
    return pull_back(cotangent, **_only_once())


@functools.cache
def _only_once() -> dict[str, bool]:
    """The undocumented arguments of a pull-back, as far as it has them; without them, slower."""
    known = inspect.signature(torch.func.vjp(torch.sin, torch.zeros(()))[1]).parameters
    return {name: False for name in ("retain_graph", "create_graph") if name in known}


def tracing() -> bool:
    """Is make_fx recording a graph?"""
    return PROXY_MODE.found is not None and PROXY_MODE.found() is not None


def untraced() -> AbstractContextManager[Any]:
    """A block that make_fx does not record."""
    return WITHOUT_PROXY_MODE.required() if tracing() else nullcontext()


def modes_active() -> bool:
    """Does anything see every operation, default devices left out? True if it cannot be told."""
    if FUNCTION_MODES.found is None or DISPATCH_MODES.found is None:
        return True
    if DISPATCH_MODES.found():
        return True
    default = DEFAULT_DEVICE.found or ()
    return not all(isinstance(mode, default) for mode in FUNCTION_MODES.found())


def may_have_default_device() -> bool:
    """Is a default device set, which torch finds among its function modes?"""
    return FUNCTION_MODES.found is None or bool(FUNCTION_MODES.found())


def hooks_on_saved() -> bool:
    """Are there hooks on what is saved for a backward pass? If it cannot be told, yes."""
    return SAVED_HOOKS.found is None or SAVED_HOOKS.found(False) is not None


def fake_tensors() -> Any:
    """A mode whose tensors have a shape, a dtype and a device, and no memory to read a value of.

    An output may have a shape that depends on values, as that of `x[x > 0]`.
    """
    shapes = SHAPES.required(allow_scalar_outputs=False)
    with FUNCTORCH_CONFIG.required.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        return FAKE_TENSORS.required(allow_non_fake_inputs=True, shape_env=shapes)


def is_fake(x: Tensor) -> bool:
    """Is it a tensor of such a mode, or of a transform?"""
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
    """What two tensors that share memory have in common, those without values too."""
    return STORAGE.required.__get__(x.untyped_storage())


def batch_norm_classes() -> Any:
    """The classes of layers that normalise by batches, for `isinstance`."""
    documented = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    return BATCH_NORM_BASE.found or documented


def refuse_weight_norm(model: nn.Module) -> None:
    """An error where a model normalises weights and torch's function for it cannot be told."""
    if WEIGHT_NORM.found is None and any(map(_normalises_weights, model.modules())):
        _ = WEIGHT_NORM.required


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
    return TRACING.found(TRACING_CONTEXT.found(mode.fake_mode))


def _is_setting(name: str) -> bool:
    try:
        operator.attrgetter(name)(INDUCTOR_CONFIG.found)
    except AttributeError:
        return False
    return True
