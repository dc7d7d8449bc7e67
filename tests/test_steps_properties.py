"""Properties of every problem: random structures, shapes, dtypes, tasks and choices.

Each example runs a step eagerly, which is quick on torch; the others take a tenth
of the examples, in the slow tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frameworks import require
from metaframe import (
    Container,
    fomaml_step,
    inner_loop,
    maml_step,
    ops,
    reptile_step,
    tree,
    use_backend,
)
from metaframe.backend import Backend
from metaframe.testing.conformance.closed_form import assert_close

Call = Callable[..., Any]

TOLERANCE = {"float64": 1e-12, "float32": 2e-6}


@pytest.fixture(
    params=[
        "torch",
        pytest.param("jax", marks=pytest.mark.slow),
        pytest.param("tensorflow", marks=pytest.mark.slow),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    require(request.param)
    with use_backend(request.param, dtype="float64") as selected:
        yield selected


# -- random problems -------------------------------------------------------------------------

SHAPES = st.sampled_from([(), (1,), (2,), (3, 1)])
KEYS = st.sampled_from(["a", "b", "w", "z_1"])
STRUCTURES = st.recursive(
    SHAPES.map(lambda shape: np.zeros(shape)),
    lambda inner: (
        st.dictionaries(KEYS, inner, min_size=1, max_size=3)
        | st.dictionaries(KEYS, inner, min_size=1, max_size=2).map(Container)
        | st.lists(inner, min_size=1, max_size=2).map(tuple)
        | st.lists(inner, min_size=1, max_size=2)
    ),
    max_leaves=4,
)


@dataclass(frozen=True)
class Example:
    """Variables of a random structure and tasks that pull each of them somewhere."""

    variables: Any
    tasks: Any
    """In the structure of the variables, each leaf with a leading task axis."""
    count: int
    steps: int
    dtype: str

    def on(self, backend: Backend) -> tuple[Any, Any]:
        """Tasks and variables as arrays."""
        return tree.map(lambda x: backend.asarray(x, self.dtype), (self.tasks, self.variables))

    def close(self, found: Any, expected: Any, backend: Backend) -> None:
        found, expected = (
            [backend.to_numpy(x) for x in tree.leaves(result)] for result in (found, expected)
        )
        # Tasks may cancel, so the scale is that of the numbers that went in.
        scale = [np.ones_like(x) for x in expected]
        assert_close([*found, scale], [*expected, scale], TOLERANCE[self.dtype])


@st.composite
def examples(draw: st.DrawFn, structure: Any = STRUCTURES) -> Example:
    node = draw(structure)
    count = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Example(
        tree.map(lambda x: rng.normal(size=x.shape), node),
        tree.map(lambda x: rng.normal(size=(count, *x.shape)), node),
        count,
        draw(st.integers(1, 2)),
        draw(st.sampled_from(["float64", "float32"])),
    )


LAYOUTS = st.sampled_from(["vmap", "scan"])
MAPPINGS = st.dictionaries(
    KEYS,
    st.dictionaries(KEYS, SHAPES.map(lambda shape: np.zeros(shape)), min_size=1, max_size=2),
    min_size=1,
    max_size=3,
)


def cost(task: Any, v: Any) -> Any:
    """Smooth, not quadratic, and coupled: every variable matters to every gradient."""
    off = [
        ops.sum(ops.square(x - target))
        for x, target in zip(tree.leaves(v), tree.leaves(task), strict=True)
    ]
    return ops.log1p(sum(off))


def holds_for(**strategies: Any) -> Callable[[Call], Call]:
    """The decorated check, as a test of random examples on every backend."""

    def decorate(check: Call) -> Call:
        def test(backend: Backend) -> None:
            run = given(**strategies)(check)
            if backend.name != "torch":
                run = settings(max_examples=settings.default.max_examples // 10)(run)
            run(backend)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


# -- properties ---------------------------------------------------------------------------------


@holds_for(example=examples(), batched=LAYOUTS, data=st.data())
def test_the_order_of_tasks_does_not_matter(
    backend: Backend, example: Example, batched: Any, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(example.count)))
    tasks, v = example.on(backend)
    shuffled = tree.map(lambda x: backend.asarray(x[order], example.dtype), example.tasks)
    how = {"batched": batched, "return_inner_v": "all"}
    first = maml_step(tasks, cost, None, v, example.steps, 0.1, **how)
    second = maml_step(shuffled, cost, None, v, example.steps, 0.1, **how)
    example.close(second[:2], first[:2], backend)
    rows = tree.map(lambda x: backend.asarray(backend.to_numpy(x)[order]), first[2])
    example.close(second[2], rows, backend)


@holds_for(example=examples(), batched=LAYOUTS, factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_the_cost_is_scaling_the_rate(
    backend: Backend, example: Example, batched: Any, factor: float
) -> None:
    """`factor * cost` with `rate / factor` takes the same path and scales the result."""
    tasks, v = example.on(backend)

    def scaled(task: Any, v: Any) -> Any:
        return factor * cost(task, v)

    args, how = (v, example.steps), {"batched": batched, "return_inner_v": "all"}
    value, grads, inner = maml_step(tasks, cost, None, *args, 0.1, **how)
    expected = factor * value, tree.map(lambda g: factor * g, grads), inner
    example.close(maml_step(tasks, scaled, None, *args, 0.1 / factor, **how), expected, backend)


@holds_for(example=examples(), batched=LAYOUTS, average=st.booleans())
def test_a_rate_of_zero_is_no_adaptation(
    backend: Backend, example: Example, batched: Any, average: bool
) -> None:
    tasks, v = example.on(backend)
    how = {"batched": batched, "average_across_steps": average}
    plain = maml_step(tasks, cost, None, v, 0, 0.1, batched=batched)
    for step in (maml_step, fomaml_step):
        found = step(tasks, cost, None, v, example.steps, 0.0, **how)
        example.close(found[:2], plain[:2], backend)


@holds_for(example=examples(), batched=LAYOUTS)
def test_results_look_like_what_went_in(backend: Backend, example: Example, batched: Any) -> None:
    tasks, v = example.on(backend)
    how = {"batched": batched, "return_inner_v": "all"}
    for cost_value, grads, inner in (
        maml_step(tasks, cost, None, v, example.steps, 0.1, **how),
        fomaml_step(tasks, cost, None, v, example.steps, 0.1, **how),
        reptile_step(tasks, cost, v, example.steps, 0.1, **how),
    ):
        assert tuple(cost_value.shape) == ()
        assert tree.structure(grads) == tree.structure(inner) == tree.structure(v)
        for x, g, rows in zip(*map(tree.leaves, (v, grads, inner)), strict=True):
            assert tuple(g.shape) == tuple(x.shape)
            assert tuple(rows.shape) == (example.count, *x.shape)
            assert backend.dtype_name(g) == backend.dtype_name(rows) == example.dtype


@holds_for(example=examples(MAPPINGS), data=st.data())
def test_keeping_some_is_dropping_the_others(
    backend: Backend, example: Example, data: st.DataObject
) -> None:
    chains = tree.key_chains(example.variables)
    inner = data.draw(st.lists(st.sampled_from(chains), min_size=1, unique=True))
    outer = data.draw(st.lists(st.sampled_from(chains), min_size=1, unique=True))
    tasks, v = example.on(backend)
    args = (tasks, cost, None, v, example.steps, 0.1)
    how = {"batched": "vmap", "return_inner_v": "all"}
    rest = [chain for chain in chains if chain not in inner]

    value, everything, adapted = maml_step(*args, **how, inner_v=inner)
    dropped = maml_step(*args, **how, inner_v=rest, keep_inner_v=False)
    example.close(dropped, (value, everything, adapted), backend)

    _, part, _ = maml_step(*args, **how, inner_v=inner, outer_v=outer)
    assert set(tree.key_chains(part)) == set(outer)
    whole = dict(zip(chains, tree.leaves(everything), strict=True))
    example.close(tree.leaves(part), [whole[c] for c in tree.key_chains(part)], backend)

    before = dict(zip(chains, tree.leaves(v), strict=True))
    for chain, rows in zip(chains, tree.leaves(adapted), strict=True):
        if chain in rest:
            example.close([rows[0]], [before[chain]], backend)


@holds_for(example=examples(), mode=st.sampled_from(["remat", "mixed"]), batched=LAYOUTS)
def test_every_mode_gives_the_same(
    backend: Backend, example: Example, mode: Any, batched: Any
) -> None:
    tasks, v = example.on(backend)
    args = (tasks, cost, None, v, example.steps, 0.1)
    found = maml_step(*args, batched=batched, mode=mode)[:2]
    example.close(found, maml_step(*args, batched=batched)[:2], backend)


@holds_for(example=examples())
def test_tasks_adapt_on_their_own(backend: Backend, example: Example) -> None:
    """The result of a step for a task is the inner loop on that task."""
    tasks, v = example.on(backend)
    _, _, inner = maml_step(
        tasks, cost, None, v, example.steps, 0.1, batched="vmap", return_inner_v="all"
    )
    last = example.count - 1
    alone = inner_loop(cost, v, tree.map(lambda x: x[last], tasks), steps=example.steps, lr=0.1)
    example.close(tree.map(lambda x: x[last], inner), alone, backend)
