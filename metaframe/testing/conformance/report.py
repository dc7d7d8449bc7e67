"""Checking a backend without pytest, and what is said of it."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from metaframe.backend.contract import Backend
from metaframe.backend.registry import load_backend
from metaframe.errors import InputError, nearest
from metaframe.testing.conformance.array_clauses import ARRAYS, DTYPES
from metaframe.testing.conformance.clause import Clause
from metaframe.testing.conformance.compile_clauses import COMPILE
from metaframe.testing.conformance.kinks import KINKS
from metaframe.testing.conformance.loop_clauses import LOOPS, VMAP
from metaframe.testing.conformance.nn_clauses import NN
from metaframe.testing.conformance.ops_clauses import OPS
from metaframe.testing.conformance.steps_clauses import INNER, STEPS
from metaframe.testing.conformance.transform_clauses import GRADIENTS, PRODUCTS

CLAUSES: tuple[Clause, ...] = tuple(
    clause
    for chapter in (
        DTYPES,
        ARRAYS,
        OPS,
        NN,
        GRADIENTS,
        PRODUCTS,
        VMAP,
        KINKS,
        LOOPS,
        COMPILE,
        INNER,
        STEPS,
    )
    for clause in chapter.clauses
)
"""The contract, from arrays to whole algorithms: the order in which to make it hold."""


def clauses_like(patterns: Iterable[str]) -> tuple[Clause, ...]:
    """The clauses whose id matches one of the patterns, such as "ops/*".

    Raises:
        InputError: a pattern that matches none.
    """
    chosen = set()
    for pattern in patterns:
        found = [clause.id for clause in CLAUSES if fnmatchcase(clause.id, pattern)]
        if not found:
            ids = {clause.id for clause in CLAUSES}
            raise InputError(f"no clause is like {pattern!r}. {_nearest(pattern, ids)}")
        chosen.update(found)
    return tuple(clause for clause in CLAUSES if clause.id in chosen)


def _nearest(pattern: str, ids: set[str]) -> str:
    chapters = {f"{name.partition('/')[0]}/*" for name in ids}
    return nearest(pattern, ids if "/" in pattern and "*" not in pattern else chapters)


def gaps(backend: Backend) -> dict[str, str]:
    """Id to reason of every clause that the backend declares it cannot keep.

    Raises:
        InputError: a gap that names no clause, or gives no reason.
    """
    found = {}
    for pattern, reason in backend.conformance_gaps.items():
        if not reason:
            raise InputError(f"the gap {pattern!r} of backend {backend.name!r} needs a reason.")
        found.update({clause.id: reason for clause in clauses_like([pattern])})
    return found


@dataclass(frozen=True)
class ConformanceReport:
    """The outcome of `check_backend`; `str` makes it a text.

    >>> print(ConformanceReport("mine", kept=("vmap/sum",), broken={}, gaps={}, closed=()))
    backend 'mine' keeps 1 of 1 clauses: conforms
    """

    backend: str
    """The name of the backend."""
    kept: tuple[str, ...]
    """Ids of the clauses that hold."""
    broken: dict[str, str]
    """Id to what was found, of those that do not."""
    gaps: dict[str, str]
    """Id to the reason, of those that are declared not to hold, and do not."""
    closed: tuple[str, ...]
    """Ids of those that are declared not to hold, and do."""

    @property
    def ok(self) -> bool:
        """Every clause holds, but for the declared gaps."""
        return not self.broken and not self.closed

    def lines(self) -> list[str]:
        """The report as text."""
        total = len(self.kept) + len(self.broken) + len(self.gaps) + len(self.closed)
        head = f"backend {self.backend!r} keeps {len(self.kept)} of {total} clauses"
        return [
            f"{head}: {'conforms' if self.ok else 'DOES NOT CONFORM'}",
            *(f"  broken: {name}\n    {_indented(why)}" for name, why in self.broken.items()),
            *(f"  no gap any more, remove it: {name}" for name in self.closed),
            *(f"  gap: {name}: {reason}" for name, reason in self.gaps.items()),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n    ")


def check_backend(name: str, *patterns: str) -> ConformanceReport:
    """Run the backend called `name` against the contract.

    Args:
        name: a built-in backend, or a registered one.
        patterns: which clauses, such as "ops/*"; default: all of them, which takes minutes.

    Returns:
        The clauses that hold, those that do not, and the declared gaps.

    Raises:
        BackendError, UnknownKeyError: the backend cannot be loaded; one that lacks a method says
            which.
        InputError: a pattern or a declared gap that names no clause.

    >>> report = check_backend("torch", "vmap/*", "products/*")
    >>> report.ok, report.broken
    (True, {})
    """
    backend = load_backend(name)
    declared = gaps(backend)
    kept, broken, open_gaps, closed = [], {}, {}, []
    for clause in clauses_like(patterns or ["*"]):
        why = _broken(clause, backend)
        if clause.id in declared and why is not None:
            open_gaps[clause.id] = declared[clause.id]
        elif clause.id in declared:
            closed.append(clause.id)
        elif why is not None:
            broken[clause.id] = why
        else:
            kept.append(clause.id)
    return ConformanceReport(name, tuple(kept), broken, open_gaps, tuple(closed))


def _broken(clause: Clause, backend: Backend) -> str | None:
    """The fault that was found, if the clause does not hold."""
    try:
        clause.run(backend)
    except AssertionError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - a backend under examination may raise anything
        return traceback.format_exc(limit=-4)
    return None
