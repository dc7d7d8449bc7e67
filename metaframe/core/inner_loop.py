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
- "replay": as "remat", and of the theta_k it stores only a few times the L-th root of K, for up to
  L further runs of the loop; see `metaframe.core.recompute`.

All give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

from metaframe import arguments, ops, tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import is_neutral
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks, optim, recompute
from metaframe.core.per_step import Stepwise, refuse_marks
from metaframe.core.update_rule import checked_state, update_rule
from metaframe.errors import InputError, InputTypeError

Cost = Callable[..., Array]
Mode = Literal["reverse", "remat", "mixed", "replay"]
MODES: tuple[Mode, ...] = get_args(Mode)
Order = Literal[1, 2]


class FlatCost(Protocol):
    """An inner cost as a function of flat arrays."""

    def __call__(self, params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        """`(scaled cost, (cost, *aux))`, of the arrays that adapt and all others it depends on."""


def flat_cost(
    cost: Cost,
    name: str,
    backend: Backend,
    part: tree.Part,
    batch: tree.Packed,
    scale: float = 1,
    aux: tree.Returned | None = None,
) -> FlatCost:
    """`cost(batch, v)` on flat arrays, with its result checked.

    The context is the variables that do not adapt, and after them the arrays of the batch. `scale`
    multiplies what is differentiated: a cost that averages over a task axis of the variables
    becomes each task's own gradient when it is multiplied by the number of tasks. With `aux` the
    cost is `cost(batch, v) -> (scalar, aux)`, and the structure of its aux is noted there.
    """
    by_keyword = checks.takes_v_by_keyword(cost, name)
    held = part.flags.count(False)
    kept = None if aux is None else _Kept(aux, name, backend)

    def scaled_cost(params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        v = tree.unflatten(part.spec, part.merge(params, context[:held]))
        data = batch.unpack(context[held:])
        run = backend.user_function(cost)
        result = run(data, v=v) if by_keyword else run(data, v)
        result, seen = (result, ()) if kept is None else checks.with_aux(result, name)
        found = checks.scalar(result, name, backend)
        rest = () if kept is None else kept.arrays(seen)
        return found if scale == 1 else found * scale, (found, *rest)

    return scaled_cost


class _Kept:
    """The aux of a cost, as arrays that can be stacked over the steps."""

    def __init__(self, aux: tree.Returned, name: str, backend: Backend) -> None:
        self._aux, self._name, self._backend = aux, name, backend
        self._form: Any = None

    def arrays(self, aux: tree.Tree) -> Arrays:
        """The leaves of `aux`, numbers as arrays.

        Raises:
            InputTypeError: a leaf is neither an array nor a number.
            InputError: another structure, shape or dtype than at an earlier step.
        """
        leaves = tuple(self._array(x) for x in self._aux.flatten(aux))
        form = tree.structure(aux), [(tuple(x.shape), self._backend.dtype_name(x)) for x in leaves]
        if self._form is not None and form != self._form:
            raise InputError(
                f"the aux of {self._name} differs from step to step: {self._form[1]}, then "
                f"{form[1]}. It is stacked, and needs one structure, with one shape and dtype for "
                "each array."
            )
        self._form = form
        return leaves

    def _array(self, x: Any) -> Array:
        if self._backend.owns(x):
            return x
        if isinstance(x, str) or not is_neutral(x):
            raise InputTypeError(
                f"the aux of {self._name} has {type(x).__name__}, which cannot be stacked over the "
                "steps. Return arrays and numbers."
            )
        return self._backend.asarray(x)


def in_order(cost: FlatCost, held: int, data: Stepwise) -> FlatCost:
    """`cost` with the context in the order of a loop: the rows of a step come last.

    `held` is the number of arrays before the batch.
    """
    if data.steps is None:
        return cost
    fixed = held + len(data.fixed)

    def call(params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        arrays = data.at(context[fixed:], context[held:fixed])
        return cost(params, (*context[:held], *arrays))

    return call


@dataclass(frozen=True)
class InnerSettings:
    """The settings of an inner loop, apart from what it runs on. Checked when it is made.

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
        if not isinstance(self.lr, (int, float)):
            refuse_marks(self.lr, self.lr_name, "Rates of each step are for unroll and inner_loop.")
        object.__setattr__(self, "lr", checks.learning_rate(self.lr, self.lr_name))

    @property
    def recomputes(self) -> bool:
        """True if steps are run again in the backward pass."""
        return self.mode != "reverse" and self.order == 2


class StepView(NamedTuple):
    """One inner step, as an observer sees it; arrays cover the adapted variables only."""

    cost: Array
    grads: Arrays
    updates: Arrays
    """The change that the step made to the variables."""


class InnerResult(NamedTuple):
    """The end of an inner loop."""

    params: Arrays
    state: tree.Flat
    """The state of the update rule."""
    total: Arrays
    """The observer's results, summed over the steps; empty without observer or steps."""
    seen: Arrays = ()
    """The cost's results at each step, with a leading step axis; empty unless kept."""


Observer = Callable[[Arrays, StepView | None, Array], Arrays]
"""`(params before the step, the step, its index) -> arrays to add up`. The step is None in the
modes that recompute it, where it is not kept."""


def first_index(like: Array) -> Array:
    """The index of the first step, an integer where `like` is."""
    return ops.astype(ops.sum(ops.zeros_like(like)), "int32")


class Rows(NamedTuple):
    """Arrays with a leading step axis, of which every step gets its row."""

    arrays: Arrays
    """Those of the learning rate, and after them those of the batch."""
    rates: int = 0
    """The number of those that are the learning rate's."""
    rate_at: Callable[[Arrays], optim.Rate] | None = None
    """The learning rate of a step, from its arrays."""


class _Given(NamedTuple):
    """The state and the rates that the update rule is given."""

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
        rows: Rows | None = None,
        keeps: bool = False,
    ) -> InnerResult:
        """`steps` steps from `start`.

        Args:
            start: the params before the first step.
            context: what else the cost depends on.
            steps: how many.
            observe: what looks at each step.
            state: the state of the update rule to go on from; by default its first.
            index: the number of the first step; by default 0.
            rows: what changes from step to step; for the cost, that comes after the context.
            keeps: return what the cost returned at each step.
        """
        settings, backend = self._settings, self._backend
        first = start if settings.order == 2 else tuple(map(backend.stop_gradient, start))
        given = self._given(start, first, state)
        context = (*given.rate.arrays, *context)
        counted = observe is not None or settings.context_of_step is not None
        at = () if not counted else (first_index(first[0]) if index is None else index,)
        sizes = (len(first), len(given.state.arrays), len(at))
        body = self._body(given, start, sizes, observe, rows, keeps)
        carry = (*first, *given.state.arrays, *at)
        if steps and settings.recomputes:
            row = tuple(x[0] for x in rows.arrays) if rows else ()
            now = self._context_at(given, start, context, at, row, rows)
            step = partial(self._step, given, self._gradient, keeps=keeps)
            recompute.check_repeatable(
                backend,
                step,
                (first, given.state.arrays, now),
                f"mode={settings.mode!r} runs an inner step again in the backward pass",
            )
        over: Arrays = rows.arrays if rows else ()
        seen: Arrays = ()
        if steps and (observe is not None or steps == 1):
            # The first step runs outside the loop, so that the totals start from values and not
            # from zeros of a guessed shape and dtype.
            carry, seen = body(carry, context, tuple(x[0] for x in over))
            seen = tuple(backend.ops.expand_dims(x, 0) for x in seen)
            over, steps = tuple(x[1:] for x in over), steps - 1
        if steps:
            if settings.mode == "replay" and settings.recomputes:
                carry, seen = recompute.replayed(backend, body, carry, context, steps, over)
            else:
                carry, seen = backend.repeat(
                    lambda carry, row: body(carry, context, row),
                    carry,
                    steps,
                    rows=over,
                    rolled=settings.recomputes,
                )
        params, arrays, _, total = recompute.split(carry, sizes)
        after = tree.Flat(given.state.leaves(arrays), given.state.spec)
        return InnerResult(self._attach(params, start), after, total, seen)

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
        sizes: Sequence[int],
        observe: Observer | None,
        rows: Rows | None,
        keeps: bool,
    ) -> recompute.Body:
        """One step, from and to the params, the rule's state, the index and the totals.

        `sizes` are the numbers of arrays of the first three.
        """
        settings, count = self._settings, len(given.rate.arrays)
        recomputed = self._recomputed(given, keeps) if settings.recomputes else None

        def body(carry: Arrays, context: Arrays, row: Arrays) -> tuple[Arrays, Arrays]:
            params, state, at, total = recompute.split(carry, sizes)
            view, now = None, self._context_at(given, params, context, at, row, rows)
            if recomputed is not None:
                after, state, seen = recomputed(params, state, now)
            else:
                # With order 1 and what is kept of the cost, that is attached to the start too.
                where = self._attach(params, start) if keeps else params
                _, seen, grads = self._gradient_given(now[count:])(where)
                if settings.order == 1:
                    grads = tuple(map(self._backend.stop_gradient, grads))
                after, state, updates = self._update(given, params, grads, state, now[:count])
                view = StepView(seen[0], grads, updates)
            if observe is not None:
                more = observe(self._attach(params, start), view, *at)
                total = tuple(a + b for a, b in zip(total, more, strict=True)) if total else more
            return (*after, *state, *(i + 1 for i in at), *total), seen if keeps else ()

        return body

    def _context_at(
        self,
        given: _Given,
        params: Arrays,
        context: Arrays,
        at: Arrays,
        row: Arrays,
        rows: Rows | None,
    ) -> Arrays:
        """The rates and the context of one step."""
        of_step, count = self._settings.context_of_step, len(given.rate.arrays)
        now = context if of_step is None else of_step(context, *at)
        if rows is None:
            return now
        rates_, row = row[: rows.rates], row[rows.rates :]
        if rows.rate_at is None:
            return (*now, *row)
        settings, v = self._settings, tree.unflatten(self._spec, params)
        rate = self._rule.rate(
            rows.rate_at(rates_), v, name=settings.lr_name, known=settings.lr_known
        )
        return (*tree.Packed(rate, self._backend.owns).arrays, *now[count:], *row)

    def checked_state(self, state: tree.Tree, params: Arrays) -> tree.Tree:
        """A state of the update rule that was given, after checking that it fits `params`.

        Raises:
            InputError: another structure, shape or dtype than the rule's first state.
        """
        first = tree.Flat.of(self._rule.init(tree.unflatten(self._spec, params)))
        owns = self._backend.owns
        leaves = tree.same_structure(state, first.spec, what="state")
        given = [
            self._backend.asarray(x) if owns(like) and not owns(x) else x
            for x, like in zip(leaves, first.arrays, strict=True)
        ]
        return first.build(checked_state(first.build(given), first, "state"))

    def cost_and_gradient(self, params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        """The cost at `params` and its gradient, scaled like those of the steps."""
        _, seen, grads = self._gradient_given(context)(params)
        return seen[0], grads

    def _gradient_given(self, context: Arrays) -> Callable[[Arrays], tuple[Array, Arrays, Arrays]]:
        return self._backend.value_and_grad(
            partial(self._cost, context=context), checks.cost_ignores_variables
        )

    def _recomputed(self, given: _Given, keeps: bool) -> recompute.Step:
        """A step that is run again in the backward pass, in the mode of the loop."""

        def scaled_cost(params: Arrays, context: Arrays) -> Array:
            return self._cost(params, context)[0]

        gradient = self._gradient
        if self._settings.mode == "mixed":
            products = recompute.forward_over_reverse(self._backend, scaled_cost)

            def gradient(params: Arrays, context: Arrays) -> tuple[Arrays, Arrays]:
                seen = self._cost(params, context)[1] if keeps else ()
                return products(params, context), seen

        return recompute.rematerialised(
            self._backend, partial(self._step, given, gradient, keeps=keeps)
        )

    def _step(
        self,
        given: _Given,
        gradient: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]],
        params: Arrays,
        arrays: Arrays,
        context: Arrays,
        keeps: bool = False,
    ) -> tuple[Arrays, Arrays, Arrays]:
        """New params, the arrays of the rule's new state, and what is kept of the cost."""
        count = len(given.rate.arrays)
        grads, seen = gradient(params, context[count:])
        after, state, _ = self._update(given, params, grads, arrays, context[:count])
        return after, state, seen if keeps else ()

    def _gradient(self, params: Arrays, context: Arrays) -> tuple[Arrays, Arrays]:
        _, seen, grads = self._gradient_given(context)(params)
        return grads, seen

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
