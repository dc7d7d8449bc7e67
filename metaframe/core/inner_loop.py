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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

from metaframe import arguments, ops, optim, tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import backend_of, convert_neutral, following, is_array
from metaframe.backend.types import Array, Arrays, ArraysFn
from metaframe.core import checks, rates, recompute
from metaframe.core.entrance import entrance
from metaframe.core.update_rule import update_rule

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
        batch: the task's data, any structure of arrays, handed to `cost` as it is.
        steps: number of steps K, 0 or more.
        lr: a number or an array, for all variables, or a structure of them: one for each variable
            that adapts, or for each part of these such as a layer. Arrays are of NumPy or the
            variables' framework, scalars or of the variable's shape, and differentiable. `None` if
            `update` brings its own rate.
        update: an `optim.Optimizer`, on JAX also an optax `GradientTransformation`, or a function
            `update(v, grads, lr, stop_gradients=...)` that returns new variables.
        order: 2, or 1 for gradients that take the adaptation for a constant shift.
        mode: how the loop is differentiated, see the module. With "remat" and "mixed"
            everything differentiable has to be in `v`, `batch` or `lr`.
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
    arguments.integer(steps, "steps", at_least=0)
    leaves, spec = tree.flatten(v)
    batch_leaves, batch_spec = tree.flatten(batch)
    with following(tree.node_types(spec, batch_spec)):
        backend = backend_of(*leaves, *batch_leaves)
        leaves = convert_neutral(leaves, backend)
        # Python numbers in the batch stay what they are.
        arrays = [x for x in batch_leaves if is_array(x)]
        converted = iter(convert_neutral(arrays, backend))
        batch = tree.unflatten(
            batch_spec, [next(converted) if is_array(x) else x for x in batch_leaves]
        )
    data = tree.Packed(batch, backend.owns)
    part = tree.Part(spec, tree.flags(spec, inner_v, keep_inner_v))
    checks.variables(leaves, part, backend, "inner_v")
    params, others = part.divide(leaves)
    loop = InnerLoop(
        backend,
        flat_cost(cost, "cost", backend, part, data.template()),
        part.structure(leaves),
        replace(settings, lr_known=tree.chains(spec) if rates.is_structure(lr) else ()),
    )
    found = loop.run(params, (*others, *data.arrays), steps)
    return tree.unflatten(spec, part.merge(found.params, others))


class FlatCost(Protocol):
    """An inner cost as a function of flat arrays."""

    def __call__(self, params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        """`(scaled cost, (cost,))`, of the arrays that adapt and all others it depends on."""


def flat_cost(
    cost: Cost, name: str, backend: Backend, part: tree.Part, batch: tree.Packed, scale: float = 1
) -> FlatCost:
    """`cost(batch, v)` on flat arrays, with its result checked.

    The context is the variables that do not adapt, and after them the arrays of the batch. `scale`
    multiplies what is differentiated: a cost that averages over a task axis of the variables
    becomes each task's own gradient when it is multiplied by the number of tasks.
    """
    by_keyword = checks.takes_v_by_keyword(cost, name)
    held = part.flags.count(False)

    def scaled_cost(params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        v = tree.unflatten(part.spec, part.merge(params, context[:held]))
        data = batch.unpack(context[held:])
        run = backend.user_function(cost)
        found = checks.scalar(run(data, v=v) if by_keyword else run(data, v), name, backend)
        return found if scale == 1 else found * scale, (found,)

    return scaled_cost


@dataclass(frozen=True)
class InnerSettings:
    """How an inner loop runs, apart from what it runs on. Checked when it is made.

    `context_of_step(context, k)` is the context of step k = 0 .. K-1; by default the context.
    `lr_name` is the argument that `lr` is, for errors, and `lr_known` the variables that do not
    adapt, for which there may be rates too.
    """

    lr: optim.Rate
    update: Any = optim.gradient_descent_update
    order: Order = 2
    mode: Mode = "reverse"
    stop_gradients: bool = False
    context_of_step: Callable[[Arrays, Array], Arrays] | None = None
    lr_name: str = "lr"
    lr_known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        arguments.choice(self.order, "order", (1, 2))
        arguments.choice(self.mode, "mode", MODES)
        object.__setattr__(self, "lr", checks.learning_rate(self.lr, self.lr_name))

    @property
    def recomputes(self) -> bool:
        """Whether steps are run again in the backward pass."""
        return self.mode != "reverse" and self.order == 2


class StepView(NamedTuple):
    """One inner step, as an observer sees it; arrays cover the adapted variables only."""

    cost: Array
    grads: Arrays
    updates: Arrays
    """What the step added to the variables."""


class InnerResult(NamedTuple):
    """The end of an inner loop."""

    params: Arrays
    state: tree.Flat
    """The state of the update rule."""
    total: Arrays
    """What the observer returned, summed over the steps; empty without observer or steps."""


Observer = Callable[[Arrays, StepView | None, Array], Arrays]
"""`(params before the step, the step, its index) -> arrays to add up`. The step is None in the
modes that recompute it, where it is not kept."""


def first_index(like: Array) -> Array:
    """The index of the first step, an integer where `like` is."""
    return ops.astype(ops.sum(ops.zeros_like(like)), "int32")


class _Given(NamedTuple):
    """What the update rule is given besides variables and gradients."""

    state: tree.Packed
    rate: tree.Packed


class InnerLoop:
    """Steps of an update rule on flat arrays. Nothing is kept from one run to the next.

    Args:
        backend: the backend of the arrays.
        cost: what the steps minimise.
        spec: the structure of the params, as the update rule gets them.
        settings: how the steps run.
    """

    def __init__(
        self, backend: Backend, cost: FlatCost, spec: tree.TreeSpec, settings: InnerSettings
    ) -> None:
        self._backend = backend
        self._cost = cost
        self._spec = spec
        self._settings = settings
        self._rule = update_rule(settings.update, stop_gradients=settings.stop_gradients)

    def run(
        self,
        start: Arrays,
        context: Arrays,
        steps: int,
        observe: Observer | None = None,
        *,
        state: Any = None,
        index: Array | None = None,
    ) -> InnerResult:
        """`steps` steps from `start`.

        Args:
            start: the params before the first step.
            context: what else the cost depends on.
            steps: how many.
            observe: what looks at each step.
            state: the state of the update rule to go on from; by default its first.
            index: the number of the first step; by default 0.
        """
        settings, backend = self._settings, self._backend
        first = start if settings.order == 2 else tuple(map(backend.stop_gradient, start))
        given = self._given(start, first, state)
        context = (*given.rate.arrays, *context)
        counted = observe is not None or settings.context_of_step is not None
        at = () if not counted else (first_index(first[0]) if index is None else index,)
        sizes = (len(first), len(given.state.arrays), len(at))
        body = self._body(given, start, context, sizes, observe)
        carry = (*first, *given.state.arrays, *at)
        if steps and settings.recomputes:
            inputs = (first, given.state.arrays, self._context_of(context, *at))
            recompute.check_repeatable(
                backend, partial(self._step, given, self._gradient), inputs, settings.mode
            )
        if steps and (observe is not None or steps == 1):
            # The first step runs outside the loop, so that the totals start from values and not
            # from zeros of a guessed shape and dtype.
            carry, steps = body(carry), steps - 1
        if steps:
            carry = backend.repeat(body, carry, steps, rolled=settings.recomputes)
        params, arrays, _, total = recompute.split(carry, sizes)
        after = tree.Flat(given.state.leaves(arrays), given.state.spec)
        return InnerResult(self._attach(params, start), after, total)

    def _given(self, start: Arrays, first: Arrays, state: Any) -> _Given:
        """The rule's state, its first one where there is none yet, and the rate of each variable.

        `first` are the values of `start` from which the steps run.
        """
        settings, owns = self._settings, self._backend.owns
        v = tree.unflatten(self._spec, start)
        rate = self._rule.rate(settings.lr, v, name=settings.lr_name, known=settings.lr_known)
        if state is None:
            state = self._rule.init(v if first is start else tree.unflatten(self._spec, first))
        return _Given(tree.Packed(state, owns), tree.Packed(rate, owns))

    def _body(
        self,
        given: _Given,
        start: Arrays,
        context: Arrays,
        sizes: Sequence[int],
        observe: Observer | None,
    ) -> ArraysFn:
        """One step, from and to the params, the rule's state, the index and the totals.

        `sizes` are the numbers of arrays of the first three.
        """
        settings, count = self._settings, len(given.rate.arrays)
        recomputed = self._recomputed(given) if settings.recomputes else None

        def body(carry: Arrays) -> Arrays:
            params, state, at, total = recompute.split(carry, sizes)
            view, now = None, self._context_of(context, *at)
            if recomputed is not None:
                after, state = recomputed(params, state, now)
            else:
                _, (cost,), grads = self._gradient_given(now[count:])(params)
                if settings.order == 1:
                    grads = tuple(map(self._backend.stop_gradient, grads))
                after, state, updates = self._update(given, params, grads, state, now[:count])
                view = StepView(cost, grads, updates)
            if observe is not None:
                seen = observe(self._attach(params, start), view, *at)
                total = tuple(a + b for a, b in zip(total, seen, strict=True)) if total else seen
            return (*after, *state, *(i + 1 for i in at), *total)

        return body

    def cost_and_gradient(self, params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        """The cost at `params` and its gradient, scaled like those of the steps."""
        _, (cost,), grads = self._gradient_given(context)(params)
        return cost, grads

    def _gradient_given(self, context: Arrays) -> Callable[[Arrays], tuple[Array, Arrays, Arrays]]:
        return self._backend.value_and_grad(
            partial(self._cost, context=context), checks.cost_ignores_variables
        )

    def _context_of(self, context: Arrays, index: Array | None = None) -> Arrays:
        of_step = self._settings.context_of_step
        return context if of_step is None else of_step(context, index)

    def _recomputed(self, given: _Given) -> recompute.Step:
        """A step that is run again in the backward pass, in the mode of the loop."""

        def scaled_cost(params: Arrays, context: Arrays) -> Array:
            return self._cost(params, context)[0]

        mixed = self._settings.mode == "mixed"
        products = recompute.forward_over_reverse(self._backend, scaled_cost) if mixed else None
        step = partial(self._step, given, products or self._gradient)
        return recompute.rematerialised(self._backend, step)

    def _step(
        self,
        given: _Given,
        gradient: recompute.Gradient,
        params: Arrays,
        arrays: Arrays,
        context: Arrays,
    ) -> tuple[Arrays, Arrays]:
        """New params and the arrays of the rule's new state."""
        count = len(given.rate.arrays)
        grads = gradient(params, context[count:])
        return self._update(given, params, grads, arrays, context[:count])[:2]

    def _gradient(self, params: Arrays, context: Arrays) -> Arrays:
        return self.cost_and_gradient(params, context)[1]

    def _update(
        self, given: _Given, params: Arrays, grads: Arrays, arrays: Arrays, rate: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        """New params, the arrays of the rule's new state, and what was added to the params."""
        state = given.state
        after = self._rule.apply(
            tree.Flat(params, self._spec),
            grads,
            tree.Flat(state.leaves(arrays), state.spec),
            given.rate.unpack(rate),
        )
        return after.params, tuple(after.state[i] for i in state.places), after.updates

    def _attach(self, params: Arrays, start: Arrays) -> Arrays:
        """With order 1, the identity as Jacobian from the start: adds an exact, tracked zero."""
        if self._settings.order == 2:
            return params
        stop = self._backend.stop_gradient
        return tuple(p + (s - stop(s)) for p, s in zip(params, start, strict=True))
