"""The built-in backends keep the contract, and the suite sees it when one does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import metaframe.backend as mb
from frameworks import require
from metaframe.backend import registry
from metaframe.errors import InputError
from metaframe.testing.conformance import CLAUSES, Clause, ConformanceSuite, check_backend


def is_another_case(clause: Clause) -> bool:
    """Whether it is about a portable function that an earlier clause calls with other shapes."""
    call = clause.id.split("/")[1]
    return "-" in call and call not in FIRST_CALLS.values()


FIRST_CALLS: dict[str, str] = {}
for _clause in CLAUSES:
    _call = _clause.id.split("/")[1]
    FIRST_CALLS.setdefault(_call.partition("-")[0], _call)


class SuiteWithCompiling(ConformanceSuite):
    """Where every call of another shape is compiled, even an eager one."""

    @classmethod
    def is_slow(cls, clause: Clause) -> bool:
        return clause.heavy or (clause.id.startswith(("ops/", "nn/")) and is_another_case(clause))


class TestJax(SuiteWithCompiling):
    backend = "jax"


class TestTensorFlow(SuiteWithCompiling):
    backend = "tensorflow"


class TestTorch(ConformanceSuite):
    backend = "torch"

    @classmethod
    def is_slow(cls, clause: Clause) -> bool:
        """Its compiler takes seconds for what others do in a blink."""
        kept = ("compile/", "arrays/", "value_and_grad/third-derivative/custom")
        return clause.heavy or (clause.compiles and not clause.id.startswith(kept))


def test_ids_are_unique() -> None:
    ids = [clause.id for clause in CLAUSES]
    assert len(ids) == len(set(ids))
    assert all(clause.promise.endswith(".") for clause in CLAUSES)


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`altered(**members)`: torch's backend with other members, as the backend "torch"."""
    require("torch")
    original = type(mb.load_backend("torch"))

    def make(**members: Any) -> None:
        changed = type("Altered", (original,), members)
        monkeypatch.setitem(registry._loaded, "torch", changed())
        monkeypatch.setattr(registry, "_by_type", {})
        monkeypatch.setattr(registry, "_in_use", {})

    yield make
    registry._by_type.clear()


BROKEN = {
    "vmap/constants": {"vmap": lambda self, fn: lambda xs: (fn(xs)[0],)},
    "value_and_grad/unused": {
        "value_and_grad": lambda self, fn, on_disconnected=None: lambda xs: (*fn(xs), xs)
    },
    "value_and_grad/stop_gradient": {"stop_gradient": lambda self, x: x},
    "arrays/devices": {"devices": lambda self: ()},
    "products/custom_vjp": {"custom_vjp": lambda self, forward, backward: forward},
    "inner_loop/remat/gradients": {
        "custom_vjp": lambda self, forward, backward: (
            lambda xs: tuple(y.detach() for y in forward(xs))
        )
    },
}
"""Clause to a fault that it must not overlook."""


@pytest.mark.parametrize("clause", BROKEN)
def test_a_fault_is_seen(altered: Any, clause: str) -> None:
    assert check_backend("torch", clause).ok
    altered(**BROKEN[clause])
    report = check_backend("torch", clause)
    assert list(report.broken) == [clause]
    assert not report.ok
    assert "DOES NOT CONFORM" in str(report)


def test_a_declared_gap_is_no_fault_while_it_is_open(altered: Any) -> None:
    gaps = {"arrays/dev*": "there are none", "arrays/owns": "no reason at all"}
    altered(devices=lambda self: (), conformance_gaps=gaps)
    report = check_backend("torch", "arrays/devices", "arrays/owns")
    assert report.gaps == {"arrays/devices": "there are none"}
    assert report.closed == ("arrays/owns",)
    assert not report.ok
    assert "remove it: arrays/owns" in str(report)


@pytest.mark.parametrize(
    ("gaps", "message"),
    [
        ({"arrays/owner": "?"}, r"no clause is like 'arrays/owner'. Did you mean 'arrays/owns'"),
        ({"arrays/owns": ""}, r"gap 'arrays/owns' of backend 'torch' needs a reason"),
    ],
)
def test_a_gap_names_a_clause_and_a_reason(altered: Any, gaps: Any, message: str) -> None:
    altered(conformance_gaps=gaps)
    with pytest.raises(InputError, match=message):
        check_backend("torch", "arrays/owns")


def test_a_backend_without_float64_is_checked_in_float32(altered: Any) -> None:
    altered(conformance_gaps={"dtype/float64": "pretended"})
    report = check_backend("torch", "inner_loop/reverse/*", "products/*", "ops/exp-*")
    assert report.broken == {}
