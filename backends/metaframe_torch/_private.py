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
from torch.nn.utils import parametrize

from metaframe.private import PrivateName

SEEN = ("2.13.0",)


class OfModules(PrivateName):
    """An attribute of every module."""

    @functools.cached_property
    def found(self) -> Any:
        """What a new module has there."""
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
PROXY_MODE = PrivateName(
    "torch.fx.experimental.proxy_tensor:get_proxy_mode",
    "`metaframe.compile` on torch",
    SEEN,
    "error",
)
WITHOUT_PROXY_MODE = PrivateName(
    "torch.fx.experimental.proxy_tensor:disable_proxy_modes_tracing",
    "forward mode, or a message to other processes, while `metaframe.compile` traces",
    SEEN,
    "error",
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
# These three keep a program for later processes.
FAKE_TENSORS = PrivateName("torch._subclasses:FakeTensorMode", "the program cache", SEEN, "slower")
SHAPES = PrivateName(
    "torch.fx.experimental.symbolic_shapes:ShapeEnv", "the program cache", SEEN, "slower"
)
TRACING = PrivateName("torch._guards:tracing", "the program cache", SEEN, "slower")
TRACING_CONTEXT = PrivateName("torch._guards:TracingContext", "the program cache", SEEN, "slower")

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
PACK_PADDED = PrivateName(
    "torch:_pack_padded_sequence", "packing sequences under `vmap`", SEEN, "error"
)
PAD_PACKED = PrivateName(
    "torch:_pad_packed_sequence", "unpacking sequences under `vmap`", SEEN, "error"
)
LEFT_ALIGNED = PrivateName(
    "torch:_nested_tensor_from_mask_left_aligned",
    "a transformer in eval mode with a padding mask under `vmap`",
    SEEN,
    "error",
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


def function_of(node: Any) -> Any:
    """The `torch.autograd.Function` that a node of the graph is of; None of torch's own."""
    if type(node).__module__ != torch.autograd.Function.__module__:
        return None
    return FUNCTION_OF.required and type(node)._forward_cls


def tracing() -> bool:
    """Is make_fx recording a graph?"""
    return PROXY_MODE.found is not None and PROXY_MODE.found() is not None


def untraced() -> AbstractContextManager[Any]:
    """A block that make_fx does not record."""
    return WITHOUT_PROXY_MODE.required() if tracing() else nullcontext()


def batch_norm_classes() -> Any:
    """The classes of layers that normalise by batches, for `isinstance`."""
    documented = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    return BATCH_NORM_BASE.found or documented


def has_backward_hooks(module: nn.Module) -> bool:
    """Was a hook registered that runs in the backward pass of `module`?"""
    hooks = (BACKWARD_HOOKS, BACKWARD_PRE_HOOKS)
    return any(name.found is not None and _of(module, name) for name in hooks)


def registered(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What is registered in a module: its parameters, its buffers, its modules."""
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


def is_compiled(module: nn.Module) -> bool:
    """Did torch.compile make something of it?"""
    wrapped = "_orig_mod" in registered(module)[2]
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _refuse_cached_parametrizations(model: nn.Module) -> None:
    """An error within `parametrize.cached()`, where what it keeps is not to be found."""
    for module in filter(parametrize.is_parametrized, model.modules()):
        for name in module.parametrizations:
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
    """`graph`, which make_fx made, compiled for tensors like `examples`.

    Settings that this torch lacks are left out. Without inductor's own function `torch.compile`
    does the same more slowly.
    """
    known = {name: value for name, value in settings.items() if _is_setting(name)}
    patched = INDUCTOR_CONFIG.required.patch(known) if known else nullcontext()
    with torch.no_grad(), patched:
        if INDUCTOR.found is None:
            compiled: Any = torch.compile(graph, fullgraph=True, dynamic=False)
            compiled(*examples)
        elif all(x.found is not None for x in (FAKE_TENSORS, SHAPES, TRACING, TRACING_CONTEXT)):
            # Inductor keeps a program for later processes only if shapes have an environment, as
            # those of `torch.compile` do. Here they are all fixed.
            mode = FAKE_TENSORS.found(shape_env=SHAPES.found())
            shapes = [mode.from_tensor(x, static_shapes=True) for x in examples]
            with TRACING.found(TRACING_CONTEXT.found(mode)):
                compiled = INDUCTOR.found(graph, shapes)
        else:
            compiled = INDUCTOR.found(graph, examples)
    result: Callable[..., Any] = compiled
    return result


def _is_setting(name: str) -> bool:
    try:
        operator.attrgetter(name)(INDUCTOR_CONFIG.found)
    except AttributeError:
        return False
    return True
