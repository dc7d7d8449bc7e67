"""Meta-Curvature: learned transformations of gradients (Park & Oliva 2019, arXiv 1902.03356)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

from metaframe import ops
from metaframe.backend.selection import backend_of
from metaframe.backend.types import Array
from metaframe.core import checks
from metaframe.core.optim import Grads, Optimizer, Params, Rate, State
from metaframe.errors import InputTypeError
from metaframe.learners.maml import MAML
from metaframe.learners.norms import Norm
from metaframe.learners.registry import Algorithm, register_algorithm
from metaframe.models.lookup import adapter_of

MODES = ("out", "in", "window")
Modes = tuple[int, int, int]
"""The sizes of a weight's modes: outputs, inputs, and the window of a convolution."""


class MetaCurvature(MAML):
    """MAML with a learned linear transformation of every gradient: MC2 of the paper.

        theta' = theta - alpha * MC(grad L_support(theta))
        MC(G) = G x_3 M_f x_2 M_i x_1 M_o,   (G x_n M)[.., j, ..] = sum_i M[j, i] G[.., i, ..]

    A weight is a tensor of outputs, inputs and window (the height and width of a convolution in
    one; 1 for a dense layer); a bias has outputs alone. Each mode of each adapted parameter has a
    square matrix, which starts at the identity, so that training starts at MAML. The matrices are
    meta-parameters "learned/<name>/out", ".../in" and ".../window"; modes of size 1 have none,
    except that a parameter of a single number has "out".

    The paper writes the product out for weights. A bias is its case of one mode, so it gets a
    whole matrix; implementations that give biases a vector of factors are the diagonal of that.

    Args:
        module: see `MAML`. A pair `(apply, params)` lays out its weights as `metaframe.nn` does,
            (*window, inputs, outputs).
        inner_lr: alpha, one number.
        inner_steps: see `MAML`.
        first_order: see `MAML`. With one inner step the matrices get their
            exact gradient either way; with more the part that goes through later gradients is
            dropped for them too.
        adapt_names: see `MAML`.
        allow_unused: see `MAML`.
        norm: see `MAML`.

    >>> import torch
    >>> maml = MetaCurvature(torch.nn.Conv2d(3, 8, 5))
    >>> {name: tuple(p.shape) for name, p in maml.meta_parameters().items() if "learned" in name}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'learned/weight/out': (8, 8), 'learned/weight/in': (3, 3),
     'learned/weight/window': (25, 25), 'learned/bias/out': (8, 8)}
    """

    def __init__(
        self,
        module: Any,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
    ) -> None:
        inner_lr = checks.learning_rate(inner_lr, "inner_lr")
        if not isinstance(inner_lr, int | float):
            raise InputTypeError(
                f"inner_lr of MetaCurvature is one number for all, received {inner_lr!r}. Its "
                "matrices learn what differs between parameters."
            )
        adapter = adapter_of(module)
        super().__init__(
            adapter,
            None,
            inner_steps,
            first_order,
            adapt_names,
            allow_unused,
            norm=norm,
            update=curved(inner_lr, adapter.output_first),
        )
        params, first = adapter.params(), adapter.output_first
        self.matrices = self._learn(
            {
                f"{name}/{mode}": _identity(size, params[name])
                for name in self.config.names
                for mode, size in zip(MODES, _modes(params[name], first), strict=True)
                if size > 1 or (mode == "out" and math.prod(params[name].shape) == 1)
            }
        )


def curved(inner_lr: float, output_first: bool) -> Optimizer:
    """Gradient descent on transformed gradients; the matrices come as its learning rate."""
    update = functools.partial(_curved_step, rate=inner_lr, output_first=output_first)
    return Optimizer(_no_state, update)


def _no_state(params: Params) -> State:
    del params
    return ()


def _curved_step(
    grads: Grads,
    state: State,
    params: Params = None,
    lr: Rate = None,
    *,
    rate: float,
    output_first: bool,
) -> tuple[Params, State]:
    del params
    steps = {name: -rate * transformed(g, name, lr, output_first) for name, g in grads.items()}
    return steps, state


def transformed(g: Array, name: str, matrices: dict[str, Array], output_first: bool) -> Array:
    """The gradient with each of its modes multiplied by its matrix."""
    sizes, axes = _modes(g, output_first), "oiw"
    stored = axes if output_first else axes[::-1]
    folded = ops.reshape(g, [sizes[axes.index(axis)] for axis in stored])
    for axis, mode in zip(axes, MODES, strict=True):
        matrix = matrices.get(f"{name}/{mode}")
        if matrix is not None:
            product = f"j{axis},{stored}->{stored.replace(axis, 'j')}"
            folded = ops.einsum(product, matrix, folded)
    return ops.reshape(folded, tuple(g.shape))


def _modes(x: Array, output_first: bool) -> Modes:
    shape = tuple(x.shape) if output_first else tuple(x.shape)[::-1]
    outputs, inputs, *window = (*shape, 1, 1)
    return outputs, inputs, math.prod(window)


def _identity(size: int, like: Array) -> Array:
    return ops.one_hot(ops.arange(size, like=like), size, backend_of(like).dtype_name(like))


register_algorithm(
    Algorithm(
        "metacurvature",
        "learns a transformation of the inner gradients (arXiv 1902.03356)",
        lambda model, c: MetaCurvature(model, c.inner_lr, c.inner_steps, norm=c.norm),
    )
)
