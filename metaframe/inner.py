"""The inner loop: adapt variables to one task by K steps of an update rule.

    theta_{k+1} = update(theta_k, grad cost(batch, theta_k)),   k = 0 .. K-1

It is an ordinary differentiable function of the starting variables, the batch and the learning
rate, so a meta-gradient is the gradient of something computed from its result. First and second
order share one path; `order=1` makes two changes to it, both here and nowhere else. The inner
gradients are constants, and the whole loop runs from a constant copy of the starting variables,
to which the result is attached with the identity as Jacobian. The gradient of a cost at the
result is then exactly the gradient at the adapted point, whatever the update rule.

How the loop is differentiated is the `mode`:

- "reverse": plain reverse mode; stores what every step computed.
- "remat": stores theta_k only and recomputes each step in the backward pass.
- "mixed": as "remat", with the Hessian-vector product of the step taken forward over reverse
  (Kemaev et al. 2025, arXiv 2505.00793).

All three give the same numbers.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from metaframe import checks, modes, ops, optim, rates, tree
from metaframe.backend import Array, Arrays, backend_of
from metaframe.entrance import entrance
from metaframe.errors import InputError
from metaframe.inputs import arrays_of
from metaframe.update import update_rule

Cost = Callable[..., Array]
Mode = Literal["reverse", "remat", "mixed"]
MODES: tuple[Mode, ...] = get_args(Mode)
Order = Literal[1, 2]


@entrance
def inner_loop(
    cost: Cost,
    v: tree.Tree,
    batch: tree.Tree,
    *,
    steps: int,
    lr: optim.Rate,
    update: Any = optim.gradient_descent_update,
    order: Order = 2,
    mode: Mode = "reverse",
    inner_v: Any = None,
    keep_inner_v: bool = True,
) -> tree.Tree:
    """Adapt `v` to one task.

    Args:
        cost: `cost(batch, v) -> scalar`, pure.
        v: variables, any structure of floating arrays.
        batch: the task's data, any structure of arrays, handed to `cost` as it is; NumPy arrays
            as arrays of the selected backend.
        steps: number of steps K, 0 or more.
        lr: a number, an array, or a structure that names the adapted variables or parts of them,
            such as layers, with a rate for each; differentiable if it is an array. A rate is taken
            in the dtype of its variable and broadcasts to its shape. `None` if `update` brings its
            own. An `optim.Optimizer` of your own gets it as it is.
        update: an `optim.Optimizer`, on JAX also an optax `GradientTransformation`, or a function
            `update(v, grads, lr, stop_gradients=...)` that returns new variables.
        order: 2, or 1 for gradients that take the adaptation for a constant shift.
        mode: how the loop is differentiated, see the module. With "remat" and "mixed" put
            everything differentiable in `v`, `batch` or `lr`: what `cost` closes over is
            differentiated too on JAX and TensorFlow, and is an error on torch.
        inner_v: which variables adapt, as for `maml_step`; all by default.
        keep_inner_v: False inverts `inner_v`.

    Returns:
        The adapted variables, in the structure of `v`.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    >>> import torch
    >>> def cost(batch, v):
    ...     return ((v["w"] * batch["x"] - batch["y"]) ** 2).mean()
    >>> v = {"w": torch.tensor(1.0)}
    >>> batch = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0, 6.0])}
    >>> inner_loop(cost, v, batch, steps=1, lr=0.1)
    {'w': tensor(2.)}
    """
    settings = InnerSettings(lr, update, order, mode)
    v, batch, _ = arrays_of(v, batch, keep_numbers=True)
    chosen = tree.chosen(v, inner_v, keep_inner_v)
    checks.integer(steps, "steps", at_least=0)
    return InnerLoop(cost, v, batch, chosen, settings).run(steps).variables


BatchOfStep = Callable[[tree.Tree, Array], tree.Tree]


@dataclass(frozen=True)
class InnerSettings:
    """How an inner loop runs, apart from what it runs on. Checked when it is made.

    `scale` multiplies the gradients, not the cost: a cost that averages over a task axis of the
    variables becomes each task's own gradient when it is multiplied by the number of tasks.
    `batch_of_step(batch, k)` is what the cost of step k = 0 .. K-1 gets, in the structure of
    `batch`; by default the batch. `lr_name` is the argument that `lr` is, for errors.
    """

    lr: optim.Rate
    update: Any = optim.gradient_descent_update
    order: Order = 2
    mode: Mode = "reverse"
    scale: float = 1
    stop_gradients: bool = False
    batch_of_step: BatchOfStep | None = None
    lr_name: str = "lr"

    def __post_init__(self) -> None:
        checks.choice(self.order, "order", (1, 2))
        checks.choice(self.mode, "mode", MODES)
        object.__setattr__(self, "lr", checks.learning_rate(self.lr, self.lr_name))


class StepView(NamedTuple):
    """One inner step, as an observer sees it; arrays cover the adapted variables only."""

    cost: Array
    grads: Arrays
    updates: Arrays
    """What the step added to the variables."""


class InnerResult(NamedTuple):
    """The end of an inner loop."""

    variables: tree.Tree
    total: Arrays
    """What the observer returned, summed over the steps; empty without observer or steps."""


Observer = Callable[[tree.Tree, StepView | None, Array], Arrays]
"""`(variables before the step, the step, its index) -> arrays to add up`. The step is None in the
modes that recompute it, where it is not kept."""


def first_index(like: Array) -> Array:
    """The index of the first step, an integer where `like` is."""
    return ops.astype(ops.sum(ops.zeros_like(like)), "int32")


def _global_streams() -> bytes:
    """The random streams that no framework knows of: Python's and NumPy's."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  users' code draws from it
    return pickle.dumps((random.getstate(), numpy))


class InnerLoop:
    """An inner loop over flat arrays, with its arguments checked."""

    def __init__(
        self,
        cost: Cost,
        v: tree.Tree,
        batch: tree.Tree,
        chosen: Sequence[bool],
        settings: InnerSettings,
    ) -> None:
        leaves, self._spec = tree.flatten(v)
        self._backend = backend_of(*leaves, *tree.leaves(batch), *tree.leaves(settings.lr))
        checks.variables(v, chosen, self._backend)
        self._call_cost = checks.scalar_cost(cost, "cost", self._backend)
        self._chosen = tuple(chosen)
        adapted = tree.prune(v, chosen)
        self._inner_spec = tree.structure(adapted)
        self._start, others = self._divide(leaves)
        self._rule = update_rule(settings.update, stop_gradients=settings.stop_gradients)
        known = tree.key_chains(v) if rates.is_structure(settings.lr) else ()
        lr = self._rule.rate(settings.lr, adapted, name=settings.lr_name, known=known)
        self._context = tree.Packed((others, batch, lr), self._backend.owns)
        self._settings = settings

    def run(self, steps: int, observe: Observer | None = None) -> InnerResult:
        """`steps` steps from the starting variables."""
        start = self._start
        if self._settings.order == 1:
            start = tuple(map(self._backend.stop_gradient, start))
        self._state = tree.Packed(
            self._rule.init(tree.unflatten(self._inner_spec, start)), self._backend.owns
        )
        step = self._step()
        counted = observe is not None or self._settings.batch_of_step is not None
        index = (first_index(start[0]),) if counted else ()
        sizes = (len(start), len(self._state.arrays), len(index))

        def body(carry: Arrays) -> Arrays:
            params, state, index, total = modes.split(carry, sizes)
            after, state, view = step(params, state, self._context_of(*index))
            if observe is not None:
                seen = observe(self._variables(self._attach(params)), view, *index)
                total = tuple(a + b for a, b in zip(total, seen, strict=True)) if total else seen
            return (*after, *state, *(i + 1 for i in index), *total)

        if steps and self._recomputes:
            self._check_repeatable(self._context_of(*index))
        carry = (*start, *self._state.arrays, *index)
        if observe is not None and steps:
            # The first step runs outside the loop, so that the totals start from values and not
            # from zeros of a guessed shape and dtype.
            carry, steps = body(carry), steps - 1
        carry = self._backend.repeat(body, carry, steps, rolled=self._recomputes)
        params, _, _, total = modes.split(carry, sizes)
        return InnerResult(self._variables(self._attach(params)), total)

    def advance(self, state: Any, index: Array | None = None) -> tuple[tree.Tree, Any]:
        """One plain step, number `index`, from the starting variables and the rule's `state`.

        Returns:
            All variables after it, and the rule's new state.
        """
        self._state = tree.Packed(state, self._backend.owns)
        after, arrays, _ = self._plain_step(
            self._start, self._state.arrays, self._context_of(index)
        )
        return self._variables(after), self._state.unpack(arrays)

    def cost_and_gradient(self, v: tree.Tree) -> tuple[Array, Arrays]:
        """The inner cost at `v` and its gradient, scaled like those of the steps."""
        return self._cost_and_gradient(self._divide(tree.leaves(v))[0], self._context.arrays)

    @property
    def _recomputes(self) -> bool:
        return self._settings.mode != "reverse" and self._settings.order == 2

    def _context_of(self, index: Array | None = None) -> Arrays:
        batch_of_step = self._settings.batch_of_step
        if batch_of_step is None:
            return self._context.arrays
        others, batch, lr = self._context.unpack(self._context.arrays)
        stepwise = (others, batch_of_step(batch, index), lr)
        return tree.Packed(stepwise, self._backend.owns).arrays

    def _step(self) -> Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays, StepView | None]]:
        if not self._recomputes:
            return self._plain_step
        gradient = self._gradient
        if self._settings.mode == "mixed":
            gradient = modes.forward_over_reverse(self._backend, self._scaled_cost)
        rule = modes.rematerialised(self._backend, gradient, self._apply)
        return lambda params, state, context: (*rule(params, state, context), None)

    def _check_repeatable(self, context: Arrays) -> None:
        """What is not among a step's arguments is lost when it is run again to be differentiated.

        Raises:
            InputError: it is, and the framework would not say so.
        """
        start, state = self._start, self._state.arrays

        def first_step(xs: Arrays) -> Arrays:
            params, state_, context_, _ = modes.split(xs, (len(start), len(state), len(context)))
            after, state_, _ = self._plain_step(params, state_, context_)
            return (*after, *state_)

        before = _global_streams()
        try:
            found = self._backend.hidden_inputs(first_step, (*start, *state, *context))
        except Exception as error:
            if not self._backend.needed_a_value(error):
                raise
            raise InputError(
                f"mode={self._settings.mode!r} traces an inner step, and the inner cost or the "
                "update rule needs the value of an array, which is not known then. Choose with "
                'ops.where, or use mode="reverse".'
            ) from error
        if not found and _global_streams() != before:
            found = "draws random numbers, of which there would be others"
        if found:
            raise InputError(
                f"mode={self._settings.mode!r} runs an inner step again in the backward pass, and "
                f"the inner cost or the update rule {found}. Make it an argument, in the variables "
                'or the batch, or use mode="reverse".'
            )

    def _plain_step(
        self, params: Arrays, state: Arrays, context: Arrays
    ) -> tuple[Arrays, Arrays, StepView]:
        cost, grads = self._cost_and_gradient(params, context)
        if self._settings.order == 1:
            grads = tuple(map(self._backend.stop_gradient, grads))
        after, state, updates = self._update(params, grads, state, context)
        return after, state, StepView(cost, grads, updates)

    def _cost(self, params: Arrays, context: Arrays) -> Array:
        others, batch, _ = self._context.unpack(context)
        return self._call_cost(batch, self._variables(params, others))

    def _scaled_cost(self, params: Arrays, context: Arrays) -> Array:
        return self._scale(self._cost(params, context))

    def _scale(self, cost: Array) -> Array:
        return cost if self._settings.scale == 1 else cost * self._settings.scale

    def _cost_and_gradient(self, params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        def objective(params: Arrays) -> tuple[Array, Arrays]:
            cost = self._cost(params, context)
            return self._scale(cost), (cost,)

        transformed = self._backend.value_and_grad(objective, checks.cost_ignores_variables)
        _, (cost,), grads = transformed(params)
        return cost, grads

    def _gradient(self, params: Arrays, context: Arrays) -> Arrays:
        return self._cost_and_gradient(params, context)[1]

    def _apply(
        self, params: Arrays, grads: Arrays, state: Arrays, context: Arrays
    ) -> tuple[Arrays, Arrays]:
        return self._update(params, grads, state, context)[:2]

    def _update(
        self, params: Arrays, grads: Arrays, state: Arrays, context: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        _, _, lr = self._context.unpack(context)
        spec = self._inner_spec
        after, new_state, updates = self._rule.apply(
            tree.unflatten(spec, params), tree.unflatten(spec, grads), self._state.unpack(state), lr
        )
        new = tree.same_structure(after, spec, what="what the inner update returned")
        return new, tree.Packed(new_state, self._backend.owns).arrays, tree.leaves(updates)

    def _divide(self, leaves: Arrays) -> tuple[Arrays, Arrays]:
        """Adapted leaves, and the others."""
        flagged = list(zip(leaves, self._chosen, strict=True))
        return tuple(x for x, inner in flagged if inner), tuple(
            x for x, inner in flagged if not inner
        )

    def _variables(self, params: Arrays, others: Arrays | None = None) -> tree.Tree:
        """All variables, from the adapted ones and the others (default: as they came)."""
        if others is None:
            others, _, _ = self._context.unpack(self._context.arrays)
        inner, outer = iter(params), iter(others)
        return tree.unflatten(
            self._spec, [next(inner) if chosen else next(outer) for chosen in self._chosen]
        )

    def _attach(self, params: Arrays) -> Arrays:
        """With order 1, the identity as Jacobian from the start: adds an exact, tracked zero."""
        if self._settings.order == 2:
            return params
        stop = self._backend.stop_gradient
        return tuple(p + (s - stop(s)) for p, s in zip(params, self._start, strict=True))
