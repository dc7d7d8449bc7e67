"""Assertions for tests of meta-learning code. Each raises AssertionError with what it found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from metaframe import arguments, tree
from metaframe.backend.registry import available_backends, load_backend, owner
from metaframe.backend.selection import backend_of, use_backend
from metaframe.core.compile import Compiled
from metaframe.core.inner_loop import Cost
from metaframe.core.program_cache import Signature
from metaframe.errors import InputError, InputTypeError
from metaframe.tasks import Task, TaskSampler
from metaframe.testing.differences import components
from metaframe.testing.subject import ONE_STEP, Adaptation, Step, Subject, Values

PRECISION = {"float64": 1e-12, "float32": 2e-6}
"""The largest difference between backends, relative to the largest value of an array."""

NOTHING = "nothing: not smooth, not repeatable or of fewer digits than float64"


def assert_meta_gradient(
    cost: Cost,
    variables: tree.Tree,
    batch: tree.Tree,
    adaptation: Adaptation = ONE_STEP,
    *,
    step: Step | None = None,
    rtol: float = 1e-8,
) -> None:
    """The gradient of the cost after adaptation is what finite differences say.

    Every variable is moved along a random direction, in float64, by a fourth-order stencil.

    Args:
        cost: `cost(batch, v) -> scalar` for one task.
        variables: where the gradient is taken.
        batch: all tasks; every leaf has a leading task axis.
        adaptation: what happens before the cost is taken, default one step at rate 0.01.
        step: your own `(variables, batch) -> (cost, gradients)`; default: metaframe's
            meta-gradient of `cost`.
        rtol: tolerance, relative to the norm of each variable's gradient.

    Raises:
        AssertionError: naming the variables whose gradient is wrong, or cannot be told because
            the cost is not smooth, not repeatable or of fewer digits than float64.
        InputError, InputTypeError: bad arguments.

    >>> import torch
    >>> def cost(task, v):
    ...     return (v["w"] - task) ** 4
    >>> v, tasks = {"w": torch.tensor(0.5)}, torch.tensor([1.0, 2.0])
    >>> assert_meta_gradient(cost, v, tasks)
    >>> assert_meta_gradient(cost, v, tasks, step=lambda v, b: (cost(b[0], v), {"w": v["w"]}))
    Traceback (most recent call last):
    AssertionError: the meta-gradient is wrong:
      'w': 0.5 along a random direction, finite differences say -0.5
    """
    with backend_of(*tree.leaves((variables, batch))).double_precision():
        subject = Subject(cost, variables, batch, adaptation, step)
        found = components(subject, subject.gradient())
    bad = [c for c in found if not (c.known and c.agrees(rtol))]
    lines = [
        f"  {c.name!r}: {c.claimed:.9g} along a random direction, finite differences say "
        + (f"{c.slope.value:.9g}" if c.known else NOTHING)
        for c in bad
    ]
    if lines:
        raise AssertionError("\n".join(["the meta-gradient is wrong:", *lines]))


def assert_backends_agree(
    fn: Callable[..., Any],
    *args: tree.Tree,
    backends: Sequence[str] | None = None,
    dtype: str = "float64",
    rtol: float | None = None,
) -> None:
    """`fn` computes the same numbers on every backend.

    Args:
        fn: a function of structures of arrays, written in `metaframe.ops` and `metaframe.nn`.
        args: structures of NumPy arrays and numbers; on each backend its arrays are handed over.
        backends: at least two names; default: all that are installed.
        dtype: floating dtype of the arrays, "float64" or "float32".
        rtol: tolerance relative to the largest value of an array; default 1e-12 in float64, 2e-6
            in float32.

    Raises:
        AssertionError: naming the leaf of the result and both backends.
        InputError: fewer than two backends, which would assert nothing.

    >>> from metaframe import ops
    >>> assert_backends_agree(lambda x: ops.sum(x**2), np.arange(3.0))
    """
    arguments.choice(dtype, "dtype", tuple(PRECISION))
    names = list(backends or (b.name for b in available_backends() if b.version is not None))
    if len(names) < 2:
        raise InputError(f"to agree takes two backends, received {names}. Install another one.")
    tolerance = PRECISION[dtype] if rtol is None else rtol
    first, *others = names
    expected = _on(first, fn, args, dtype)
    for name in others:
        found = _on(name, fn, args, dtype)
        leaves = tree.same_structure(found, tree.structure(expected), what=f"the result on {name}")
        for chain, a, b in zip(
            tree.key_chains(expected), tree.leaves(expected), leaves, strict=True
        ):
            _assert_near(chain, (first, a), (name, b), tolerance)


def _on(name: str, fn: Callable[..., Any], args: Sequence[tree.Tree], dtype: str) -> tree.Tree:
    backend = load_backend(name)

    def place(leaf: Any) -> Any:
        if (found := owner(leaf)) is not None:
            raise InputTypeError(
                f"assert_backends_agree takes NumPy arrays, received one of {found.name}. It makes "
                "the arrays of each backend itself."
            )
        if not isinstance(leaf, np.ndarray):
            return leaf
        return backend.asarray(leaf, dtype if leaf.dtype.kind == "f" else None)

    with backend.double_precision(), use_backend(name, dtype=dtype):
        result = fn(*(tree.map(place, arg) for arg in args))
        return tree.map(lambda x: backend.to_numpy(x) if backend.owns(x) else np.asarray(x), result)


def _assert_near(
    chain: str, one: tuple[str, Values], other: tuple[str, Values], rtol: float
) -> None:
    (first, a), (second, b) = one, other
    where = f"{chain!r}" if chain else "the result"
    if a.shape != b.shape:
        raise AssertionError(f"{where} has shape {a.shape} on {first} and {b.shape} on {second}")
    if a.dtype.kind not in "fc":
        if not np.array_equal(a, b):
            raise AssertionError(f"{where} differs between {first} and {second}")
        return
    finite = np.isfinite(a)
    here, there = np.where(finite, 0, a), np.where(np.isfinite(b), 0, b)
    if not np.array_equal(here, there, equal_nan=True):
        raise AssertionError(f"{where} has other infinities or NaN on {first} than on {second}")
    # Of the finite values: an infinite scale would allow any difference.
    apart = np.abs(a[finite] - b[finite])
    scale = float(np.max(np.abs(a[finite]), initial=0.0))
    if np.any(apart > rtol * scale):
        raise AssertionError(
            f"{where} differs between {first} and {second} by {np.max(apart):.3g}, largest value "
            f"{scale:.3g}, tolerance {rtol:.3g} of it"
        )


def assert_compiled_once(fn: Callable[..., Any]) -> None:
    """A function made by `metaframe.compile` has been called, and was compiled for one signature.

    Args:
        fn: what `metaframe.compile` returned.

    Raises:
        AssertionError: it was never called, or compiled again and for which arguments.
        InputTypeError: not a function of `metaframe.compile`.

    >>> import torch
    >>> from metaframe import compile
    >>> double = compile(lambda x: 2 * x)
    >>> _ = double(torch.ones(3)), double(torch.zeros(3))
    >>> assert_compiled_once(double)
    """
    if not isinstance(fn, Compiled):
        raise InputTypeError(
            f"assert_compiled_once takes what metaframe.compile returned, received {fn!r}."
        )
    if fn.traces == 0:
        raise AssertionError("the function was never called, so never compiled")
    if fn.traces > 1:
        raise AssertionError(
            f"compiled {fn.traces} times; what differed:\n" + "\n".join(_changes(fn.signatures))
        )


def _changes(signatures: Sequence[Signature]) -> Iterable[str]:
    first, *others = signatures
    for i, other in enumerate(others, start=2):
        if other.selection != first.selection:
            yield f"  program {i}: another selection: {other.selection}, not {first.selection}"
        if other.ambient != first.ambient:
            yield (
                f"  program {i}: another state of the framework, such as a default dtype: "
                f"{other.ambient}, not {first.ambient}"
            )
        if (other.structure, other.keys) != (first.structure, first.keys):
            yield (
                f"  program {i}: the arguments have another structure: {other.structure}, "
                f"not {first.structure}"
            )
            continue
        chains = tree.key_chains(tree.unflatten(other.structure, range(len(other.leaves))))
        for chain, kind, before in zip(chains, other.leaves, first.leaves, strict=True):
            if kind != before:
                # The first part says whether it was an argument or a keyword argument.
                yield f"  program {i}: argument {chain[2:]!r}: {kind}, not {before}"


def assert_no_leak(
    sampler: TaskSampler, *others: TaskSampler, tasks: int = 100, labels: bool = True
) -> None:
    """No information about the query labels reaches the support set, nor test tasks training.

    - No example is in the support and the query set of one task.
    - Integer labels are given out anew in every task: an example has different labels in
      different tasks, so that they cannot be learned by heart.
    - Samplers of different splits have no example in common.

    Args:
        sampler: the sampler of one split.
        others: samplers of the other splits.
        tasks: how many tasks of each to look at.
        labels: False for labels that mean the same in all tasks.

    Raises:
        AssertionError: naming the task and the examples, or when no example comes twice, so that
            nothing can be said about the labels.

    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> assert_no_leak(SinusoidTaskSampler(seed=0), SinusoidTaskSampler(seed=0, split="test"))
    """
    arguments.integer(tasks, "tasks", at_least=1)
    seen: list[set[bytes]] = []
    for number, source in enumerate((sampler, *others)):
        drawn = _drawn(source, tasks)
        for index, task in enumerate(drawn):
            _assert_apart(f"sampler {number}, task {index}", task)
        if labels:
            _assert_labels_vary(f"sampler {number}", drawn)
        examples = {e for task in drawn for e in (*_keys(task.support_x), *_keys(task.query_x))}
        for earlier, before in enumerate(seen):
            if shared := examples & before:
                raise AssertionError(
                    f"samplers {earlier} and {number} have {len(shared)} examples in common; "
                    "splits must be disjoint"
                )
        seen.append(examples)


def _drawn(sampler: TaskSampler, count: int) -> Sequence[Task]:
    """The next tasks, the sampler put back to where it was if it can be."""
    state = sampler.state() if hasattr(sampler, "state") else None
    drawn = sampler.sample(count)
    if state is not None and hasattr(sampler, "restore"):
        sampler.restore(state)
    return drawn


def _keys(x: tree.Tree) -> list[bytes]:
    """One key an example."""
    leaves = [_numpy(leaf) for leaf in tree.leaves(x)]
    return [b"".join(leaf[i].tobytes() for leaf in leaves) for i in range(len(leaves[0]))]


def _numpy(x: Any) -> Values:
    backend = owner(x)
    return np.asarray(x) if backend is None else backend.to_numpy(x)


def _assert_apart(where: str, task: Task) -> None:
    support = {key: i for i, key in enumerate(_keys(task.support_x))}
    shared = [(support[key], i) for i, key in enumerate(_keys(task.query_x)) if key in support]
    if shared:
        raise AssertionError(
            f"{where}: {len(shared)} examples are in the support and in the query set; the first "
            f"is support example {shared[0][0]} = query example {shared[0][1]}"
        )


def _classes(targets: Values) -> Values | None:
    """One class number an example; None if the targets are no labels."""
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    one_hot = targets.ndim == 2 and bool(np.all((targets == 0) | (targets == 1)))
    if one_hot and bool(np.all(targets.sum(axis=1) == 1)):
        return np.asarray(targets.argmax(axis=1))
    return targets if targets.dtype.kind in "iu" and targets.ndim == 1 else None


def _assert_labels_vary(where: str, drawn: Sequence[Task]) -> None:
    given: dict[bytes, list[int]] = defaultdict(list)
    ways = set()
    for task in drawn:
        for x, y in ((task.support_x, task.support_y), (task.query_x, task.query_y)):
            targets = _classes(_numpy(tree.leaves(y)[0]))
            if targets is None:
                return
            ways.update(targets.tolist())
            for key, label in zip(_keys(x), targets.tolist(), strict=True):
                given[key].append(label)
    if len(ways) < 2:
        return
    repeated = [row for row in given.values() if len(row) > 1]
    if not repeated:
        raise AssertionError(
            f"{where}: no example came twice in {len(drawn)} tasks, so nothing can be said about "
            "the labels. Look at more tasks, or pass labels=False."
        )
    if all(len(set(row)) == 1 for row in repeated):
        raise AssertionError(
            f"{where}: {len(repeated)} examples came in several tasks and had the same label in "
            "all of them. Give the labels out anew in every task."
        )
