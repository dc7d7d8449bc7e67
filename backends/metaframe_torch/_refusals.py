"""torch's errors about operations that it cannot differentiate or map, in our words.

torch has no classes for them, only texts.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metaframe.errors import BackendError, MetaframeError
from metaframe_torch import _private, _tape

NOT_TWICE = (
    r"derivative for '?(?:aten::)?(?P<name>\w+)'? is not implemented",
    r"trying to differentiate twice a function that was marked with @once_differentiable",
    r"with out=\.\.\. arguments don't support automatic differentiation",
)
NOT_MAPPED = (
    r"(?:Batching rule not implemented for|vmap: we do not yet support) (?:aten::)?(?P<name>\w+)",
    r"^vmap: ",
    r"override the setup_context staticmethod",
    r"We do not support batching operators that can support dynamic shape",
)
NOT_MAPPED_IN_A_TRANSFORM = (
    r"Cannot access data pointer of Tensor that doesn't have storage",
    r"inside of a function being transformed by a functorch transform",
    r"Cannot set version_counter for inference tensor",
    r"output with shape .* doesn't match the broadcast shape",
    r"from the 'Sparse\w+' backend",
)


def explained(
    error: Exception, model: nn.Module | None = None, *, mapped: bool | None = None
) -> BackendError | None:
    """`error` in our words, if it is one of these; with the layer of `model` that raised it.

    Args:
        error: torch's.
        model: the model whose call raised it.
        mapped: whether it comes from a `vmap`; by default, whether a transform is active.
    """
    if isinstance(error, MetaframeError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = "" if model is None else _layer_among(reversed(frames), model)
    where = f"{where or 'the model or the loss'} uses"
    text = str(error)
    if text.endswith("is not an nn.Parameter"):
        return BackendError(
            "get_parameter() finds parameters alone, and a model that is adapted runs with other "
            f"tensors in their place: {_first(text)} Read it as an attribute, self.layer.weight."
        )
    if (found := _among(NOT_TWICE, text)) is not None:
        return BackendError(
            f"torch has no second derivative of {_operation(found)}, which {where}: "
            f"{_first(text)} Use another operation, or adapt in first order (first_order=True, or "
            "order=1)."
        )
    mapped = _tape.transforming() if mapped is None else mapped
    patterns = (*NOT_MAPPED, *(NOT_MAPPED_IN_A_TRANSFORM if mapped else ()))
    if (found := _among(patterns, text)) is not None:
        return BackendError(
            f"torch cannot vectorise {_operation(found)} over tasks, which {where}: "
            f'{_first(text)} Run the tasks one after the other, task_map="loop", or use another '
            "operation."
        )
    return None


@contextmanager
def in_our_words(*, mapped: bool | None = None) -> Iterator[None]:
    """A block whose errors are `explained`."""
    try:
        yield
    except RuntimeError as error:
        if (ours := explained(error, mapped=mapped)) is None:
            raise
        raise ours from error


def refuse_once_differentiable(outputs: Iterable[object], inputs: Iterable[object]) -> bool:
    """Raise an error if `outputs` come from `inputs` by what was marked with `once_differentiable`.

    torch has an error for that, and drops it along with the second derivative where gradients are
    taken with respect to given tensors.

    Returns:
        Whether autograd recorded how `outputs` were computed, so that this can be said.
    """
    seen = {x.grad_fn for x in inputs if isinstance(x, Tensor)}
    ahead = [x.grad_fn for x in outputs if isinstance(x, Tensor)]
    recorded = any(ahead)
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
        function = _private.function_of(node)
        if function is not None and (name := _once_differentiable(function)):
            raise BackendError(
                f"{name} is marked with once_differentiable, and has no second "
                "derivative. Write its backward pass in differentiable operations, or adapt in "
                "first order (first_order=True, or order=1)."
            )
    return recorded


_ONCE = once_differentiable(lambda ctx: None).__code__


def _once_differentiable(function: Any) -> str:
    """The name of what is marked so: `function`, or what torch.func made it of."""
    if getattr(function.backward, "__code__", None) is _ONCE:
        return str(function.__qualname__)
    inner = (cell.cell_contents for cell in getattr(function.backward, "__closure__", None) or ())
    functions = (x for x in inner if isinstance(x, type) and issubclass(x, torch.autograd.Function))
    return next(filter(None, map(_once_differentiable, functions)), "")


def _layer_among(frames: Iterable[FrameType], model: nn.Module) -> str:
    """The layer of `model` that one of `frames`, innermost first, is in; empty if none is."""
    paths = {id(module): path for path, module in model.named_modules()}
    for frame in frames:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in paths:
            path, kind = paths[id(module)], type(module).__qualname__
            return f"layer {path!r} ({kind})" if path else f"the model ({kind})"
    return ""


def _among(patterns: Iterable[str], text: str) -> re.Match[str] | None:
    return next((found for p in patterns if (found := re.search(p, text, re.MULTILINE))), None)


def _operation(found: re.Match[str]) -> str:
    return found.groupdict().get("name") or "an operation"


def _first(text: str) -> str:
    """The first sentence of torch's text."""
    return text.splitlines()[0].partition(". ")[0].rstrip(".") + "."
