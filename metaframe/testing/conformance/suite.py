"""The contract as tests of pytest, for the package that brings a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from metaframe.backend.registry import load_backend
from metaframe.testing.conformance.clause import Clause
from metaframe.testing.conformance.report import clauses_like, gaps

if TYPE_CHECKING:
    import pytest


class ConformanceSuite:
    """Subclass it with the name of a backend, and pytest runs every clause as a test of its own.

    >>> class TestMLX(ConformanceSuite):
    ...     backend = "mlx"

    The ids are those of the clauses: `pytest -k "vmap"`. A gap that the backend declares in
    `conformance_gaps` is a strict expected failure with its reason. Without the framework the tests
    are skipped, unless METAFRAME_REQUIRED_BACKENDS names it.
    """

    backend: ClassVar[str]
    """The name of the backend."""
    patterns: ClassVar[tuple[str, ...]] = ("*",)
    """The clauses to run, such as ("ops/*", "nn/*")."""

    @classmethod
    def is_slow(cls, clause: Clause) -> bool:
        """True if a clause gets the marker `slow`; none does unless a subclass says so.

        Args:
            clause: the clause.

        Returns:
            True for the marker.
        """
        del clause
        return False

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test of every clause; pytest calls this.

        Args:
            metafunc: pytest's description of the test function.
        """
        import pytest

        if "clause" in metafunc.fixturenames:
            chosen = clauses_like(self.patterns)
            marks = [[pytest.mark.slow] if self.is_slow(clause) else [] for clause in chosen]
            metafunc.parametrize(
                "clause",
                [
                    pytest.param(clause, id=clause.id, marks=mark)
                    for clause, mark in zip(chosen, marks, strict=True)
                ],
            )

    def test_clause(self, clause: Clause, request: pytest.FixtureRequest) -> None:
        """Check that the backend keeps a promise; pytest calls this.

        Args:
            clause: the promise and its check.
            request: pytest's request, for the mark of a declared gap.
        """
        import pytest

        from metaframe.testing.plugin import require

        if not hasattr(self, "backend"):
            pytest.fail(f'{type(self).__name__} names no backend: write backend = "...".')
        require(self.backend)
        backend = load_backend(self.backend)
        reason = gaps(backend).get(clause.id)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
        clause.run(backend)
