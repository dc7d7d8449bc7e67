"""The gradient doctor: a check of a meta-gradient, with the cause where it is wrong.

The judge is finite differences of the cost itself. What a wrong gradient equals instead, the
first-order gradient, nothing, a multiple of the right one, tells the cause.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import numpy as np

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.convert import convert
from metaframe.backend.registry import load_backend
from metaframe.backend.selection import backend_of, use_backend
from metaframe.core.inner_loop import Cost, Order
from metaframe.errors import InputError
from metaframe.testing import _texts as texts
from metaframe.testing._causes import causes, redrawn
from metaframe.testing._detached import without_second_derivative
from metaframe.testing._kept import ignored_batch
from metaframe.testing._kinks import at_kinks, rounded
from metaframe.testing._locate import not_finite
from metaframe.testing._quick import FEWEST, compiled, forward, of_all, way
from metaframe.testing._random import Streams
from metaframe.testing.differences import NEAR, PRECISE, Component, components
from metaframe.testing.report import Finding, Kind, Report
from metaframe.testing.subject import (
    ONE_STEP,
    Adaptation,
    Gradient,
    Step,
    Subject,
    Values,
    distance,
)
from metaframe.testing.watch import Watch

Execution = Literal["vmap", "scan", "compiled"]
EXECUTIONS: tuple[Execution, ...] = ("vmap", "scan", "compiled")
FEW = 4
"""The number of tasks that are examined one by one; all of them by vmap or scan."""
AGREE = 1e-9
"""Relative: how far two ways of computing one gradient in float64 may differ."""


def check_meta_gradient(
    cost: Cost,
    variables: tree.Tree,
    batch: tree.Tree,
    adaptation: Adaptation = ONE_STEP,
    *,
    step: Step | None = None,
    backends: Sequence[str] = (),
    executions: Sequence[Execution] = EXECUTIONS,
) -> Report:
    """Examine a meta-gradient: metaframe's of your cost, or that of your own `step`.

    In float64: finite differences of every variable; two calls against each other; a loop over
    tasks against vmap, scan and the compiled function; backend against backend; arrays changed in
    place; a batch that is kept from an earlier call; values that are not finite; for a step of
    your own, also metaframe's answer. A kink, such as a relu at 0, is a note. Without a step, 4
    tasks are examined one by one, or 2 by one compiled program if the cost takes seconds without.

    Args:
        cost: `cost(batch, v) -> scalar` for one task.
        variables: where the gradient is taken.
        batch: all tasks; every leaf has a leading task axis.
        adaptation: what happens before the cost is taken, default one step at rate 0.01.
        step: your own `(variables, batch) -> (cost, gradients)`, which is then what is examined.
        backends: further backends to run on, for a `cost` written in `metaframe.ops`; not with a
            `step`, which is of one framework.
        executions: which of metaframe's ways of running to compare with its loop, default all; a
            `step` runs as it is.

    Returns:
        a `Report`: `.ok`, `.findings`, and a text from `str`.

    Raises:
        InputError, InputTypeError, UnknownKeyError, BackendNotInstalledError: bad arguments.
            What your function raises is passed on, except on other backends and in other ways of
            running, where it is reported.

    >>> import torch
    >>> def detaching(v, grads, lr, stop_gradients):
    ...     return {name: v[name] - lr * grads[name].detach() for name in v}
    >>> def cost(task, v):
    ...     return (v["w"] - task) ** 4
    >>> v, tasks = {"w": torch.tensor(0.5)}, torch.tensor([1.0, 2.0])
    >>> check_meta_gradient(cost, v, tasks, executions=("vmap",)).ok
    True
    >>> report = check_meta_gradient(
    ...     cost, v, tasks, Adaptation(update=detaching), executions=("vmap",)
    ... )
    >>> report.kinds()
    ('lost second-order term',)
    """
    for name in executions:
        arguments.choice(name, "executions", EXECUTIONS)
    if step is not None and backends:
        raise InputError(
            f"backends={tuple(backends)} would run your cost on other frameworks, and a step is of "
            "one. Leave out either."
        )
    others = [load_backend(name) for name in backends]
    backend = backend_of(*tree.leaves((variables, batch)))
    with backend.double_precision():
        whole = Subject(cost, variables, batch, adaptation, step)
        # A step may be made for one number of tasks; of metaframe's own a few tell as much.
        subject = whole if step is not None else whole.of_tasks(FEW)
        examination = _Examination(subject, whole)
        if examination.gradient():
            if step is None:
                examination.all_tasks()
                examination.executions(executions)
                examination.backends(others)
            else:
                examination.compared_with_ours()
                examination.task_by_task(step)
    return examination.report()


class _Examination:
    """The checks, and what they found so far."""

    def __init__(self, subject: Subject, whole: Subject) -> None:
        self._subject, self._whole = subject, whole
        self._streams = Streams(subject.backend)
        self._seeded = False
        self._findings: list[Finding] = []
        self._passed: list[str] = []
        self._unknown: list[str] = []

    def report(self) -> Report:
        findings = sorted(self._findings, key=lambda finding: not finding.wrong)
        return Report(tuple(findings), tuple(self._passed), tuple(self._unknown))

    def gradient(self) -> bool:
        """Examine the gradient itself; returns whether to look any further."""
        given = self._subject
        roots = {"cost": given.cost, "outer_cost": given.adaptation.outer_cost}
        roots |= {"update": given.adaptation.update, "step": given.step}
        watch = Watch({"variables": given.variables, "batch": given.batch, **roots})
        program = compiled(given)
        self._subject = subject = program or given
        self._compiled = program is not None
        first = self._differentiated()
        if first is None:
            return False
        self._first = first
        again = subject.gradient()
        changed = watch.changed()
        if changed:
            self._findings.append(texts.in_place(changed))
        bad = not_finite(subject, self._first)
        if bad is not None:
            self._findings.append(bad)
            return False
        if not self._repeatable(again, changed=bool(changed)):
            return False
        kept = (
            None
            if self._seeded
            else ignored_batch(forward(subject) if self._compiled else subject, watch)
        )
        if kept is not None:
            self._findings.append(kept)
        self._quick = subject.cost_at if self._seeded else subject.quick_cost()
        self._judge(components(subject, self._first, self._cost_at))
        if self._seeded:
            self._unknown.append("other ways to run it: they draw other random numbers")
        return not self._seeded

    def _repeatable(self, again: Gradient, *, changed: bool) -> bool:
        """True if two calls give one result, if need be with every random stream set back."""
        if _near(self._first, again):
            self._passed.append("two calls give the same cost and gradient")
            return True
        if changed:
            self._unknown.append("finite differences: what is changed in place changes the cost")
            return False
        with self._streams.replayed():
            self._first = self._subject.gradient()
        with self._streams.replayed():
            again = self._subject.gradient()
        self._findings.append(texts.random())
        self._seeded = _near(self._first, again)
        if not self._seeded:
            self._unknown.append("finite differences: no two calls return the same cost")
        return self._seeded

    def _cost_at(self, values: Sequence[Values]) -> float:
        """The cost, with the same random numbers every time if it draws any."""
        with self._streams.replayed() if self._seeded else nullcontext():
            return self._quick(values)

    def _differentiated(self) -> Gradient | None:
        """The gradient; None, with a finding, if the function has no second derivative."""
        try:
            return self._subject.gradient()
        except Exception as error:
            if self._whole.step is not None or not self._subject.adaptation.steps:
                raise
            try:
                self._subject.reference(order=1)
            except Exception:  # noqa: BLE001  it is not about the order
                raise error from None
            self._findings.append(without_second_derivative(error))
            return None

    def _explained(self, found: list[Component]) -> list[Component]:
        """Those that remain to be judged, without those at kinks or of rounded values."""
        open_ = [c for c in found if c.lossy or not c.known or not c.agrees(PRECISE)]
        if not open_ or self._seeded:
            return found
        cut, findings = rounded(self._subject, open_, self._cost_at)
        self._findings += findings
        left = [c for c in open_ if c not in cut]
        at, note = at_kinks(self._subject, left, self._cost_at) if left else ([], None)
        if note is not None:
            self._findings.append(note)
        return [c for c in found if c not in cut and c not in at]

    def _judge(self, found: list[Component]) -> None:
        if not found:
            self._unknown.append("finite differences: the variables have no elements")
        found = self._explained(found)
        lossy = [c for c in found if c.lossy]
        if lossy:
            self._findings.append(texts.lossy(lossy))
        for c in found:
            if not c.known and not c.lossy:
                self._unknown.append(f"finite differences in {c.name!r}: {texts.why(c)}")
        known = [c for c in found if c.known]
        unused = [c for c in known if c.norm == 0.0 and not c.slope.moved]
        if unused:
            self._findings.append(texts.unused(unused, self._subject.tasks))
        wrong = [c for c in known if not c.agrees(PRECISE)]
        if wrong:
            self._findings += self._causes(wrong)
        elif known:
            worst = max((c.apart / c.size for c in known if not c.stationary), default=0.0)
            self._passed.append(
                f"finite differences in {len(known)} variables, largest difference {worst:.1e} "
                "of a variable's gradient"
            )
            self._passed += [
                f"the gradient in {c.name!r} is 0 to within {NEAR * c.slope.rounding:.1e}"
                for c in known
                if c.stationary and c not in unused
            ]

    def _causes(self, wrong: list[Component]) -> list[Finding]:
        if self._seeded:
            return [redrawn(wrong)]
        first_order = self._ours(order=1) if self._subject.adaptation.steps else None
        return causes(self._subject, self._first, wrong, first_order)

    def _ours(self, order: Order) -> Gradient | None:
        """Metaframe's gradient of the cost, if it is a function that can be transformed."""
        try:
            return self._subject.reference(order=order)
        except Exception as error:  # noqa: BLE001  whatever it is, it is reported
            kind = {1: "first-order", 2: "second-order"}[order]
            self._unknown.append(
                f"metaframe's {kind} gradient of this cost: {texts.summary(error)}"
            )
            return None

    def executions(self, names: Sequence[Execution]) -> None:
        """The loop against the other ways to run the same gradient."""
        few, quickly = self._subject.of_tasks(FEWEST), self._subject.backend.compiles_quickly
        examined = ("compiled", way(few)) if self._compiled else ()
        ways: dict[Execution, Callable[[], Gradient]] = {
            "vmap": lambda: few.reference("vmap", compiled=quickly),
            "scan": lambda: few.reference("scan"),
            "compiled": lambda: few.of_tasks(1).reference("loop", compiled=True),
        }
        for name in names:
            if name in examined:
                self._passed.append(f"{name} is how the gradient was examined")
                continue
            if self._compiled:
                loop = self._first
            else:
                loop = few.of_tasks(1 if name == "compiled" else FEWEST).reference()
            try:
                other = ways[name]()
            except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
                self._findings.append(texts.failed(name, error))
                continue
            self._compare(
                f"{name} and {way(few) if self._compiled else 'a loop over tasks'}",
                (loop, other),
                texts.EXECUTIONS_DIFFER,
                "executions disagree",
            )

    def all_tasks(self) -> None:
        """The gradient of all tasks is finite, where a few of them were examined."""
        if self._whole.tasks == self._subject.tasks:
            return
        try:
            quickly = self._whole.backend.compiles_quickly
            if self._compiled:
                found = of_all(self._subject, self._whole)
            else:
                found = self._whole.reference(way(self._whole), compiled=quickly)
        except Exception as error:  # noqa: BLE001  whatever it is, it is reported
            self._unknown.append(f"all {self._whole.tasks} tasks: {texts.summary(error)}")
            return
        bad = not_finite(self._whole, found)
        if bad is not None:
            self._findings.append(bad)

    def backends(self, others: Sequence[Backend]) -> None:
        """The same on other backends."""
        for backend in others:
            pair = f"{self._subject.backend.name} and {backend.name}"
            try:
                other = self._on(backend)
            except Exception as error:  # noqa: BLE001  whatever it is, it is reported
                self._unknown.append(
                    f"{pair}: on {backend.name} the cost raises {texts.summary(error)}"
                )
                continue
            self._compare(pair, (self._first, other), texts.BACKENDS_DIFFER, "backends disagree")

    def _on(self, backend: Backend) -> Gradient:
        """The gradient on another backend."""
        given, name = self._subject, backend.name
        with backend.double_precision(), use_backend(name, dtype="float64"):
            v, batch = convert((given.variables, given.batch), to=name)
            lr = convert(given.adaptation.lr, to=name)
            adaptation = dataclasses.replace(given.adaptation, lr=lr)
            return Subject(given.cost, v, batch, adaptation).gradient()

    def compared_with_ours(self) -> None:
        """A user's step against metaframe's meta-gradient of what it is said to compute."""
        if any(f.wrong for f in self._findings) or (ours := self._ours(order=2)) is None:
            return
        gap = distance(self._first, ours)
        if gap <= AGREE:
            self._passed.append(f"metaframe's own gradient differs by {gap:.1e}")
        elif gap < 1e-5:
            self._findings.append(texts.rounded(gap))
        else:
            self._findings.append(texts.another(self._first, ours, gap))

    def task_by_task(self, step: Step) -> None:
        """A user's step on all tasks at once against the mean of its results on each alone."""
        try:
            alone = self._subject.alone(step)
        except Exception as error:  # noqa: BLE001  whatever it is, it is reported
            self._unknown.append(
                f"tasks one by one: on a task alone, step raises {texts.summary(error)}"
            )
            return
        mean = Gradient(
            float(np.mean([g.cost for g in alone])),
            tuple(sum(rows) / len(alone) for rows in zip(*(g.arrays for g in alone), strict=True)),
        )
        self._compare(
            "all tasks at once and one by one",
            (self._first, mean),
            texts.TASKS_MIXED,
            "executions disagree",
        )

    def _compare(
        self, pair: str, found: tuple[Gradient, Gradient], advice: str, kind: Kind
    ) -> None:
        one, other = found
        gap = distance(one, other)
        if gap <= AGREE:
            self._passed.append(f"{pair} differ by {gap:.1e}")
            return
        names = [
            name
            for name, a, b in zip(self._subject.names, one.arrays, other.arrays, strict=True)
            if not np.allclose(a, b, rtol=AGREE, atol=AGREE * float(np.max(np.abs(a), initial=0)))
        ]
        where = ", ".join(map(repr, names)) or "the cost"
        self._findings.append(Finding(kind, where, f"{pair} differ by {gap:.1e}", advice))


def _near(one: Gradient, other: Gradient) -> bool:
    # Threads may add in another order.
    return distance(one, other) <= 1e-12
