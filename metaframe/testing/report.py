"""The report of the gradient doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "wrong gradient",
    "lost second-order term",
    "disconnected variable",
    "unused variable",
    "scaled gradient",
    "another cost",
    "lost precision",
    "in-place change",
    "randomness",
    "randomness in the backward pass",
    "not finite",
    "executions disagree",
    "cannot be vectorised",
    "kept batch",
    "unused batch",
    "kink",
    "rounded values",
    "no second derivative",
    "detached leaf",
    "backends disagree",
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    >>> print(Finding("not finite", "task 3", "the cost is nan", "Lower the rate."))
    not finite in task 3
         found: the cost is nan
         do: Lower the rate.
    """

    kind: Kind
    """The name of the kind of fault, such as "not finite"."""
    where: str
    """The variable, task, step or way of running that is concerned; empty for all."""
    found: str
    """The measurement that shows it."""
    advice: str
    """The remedy."""
    wrong: bool = True
    """False for what may be as it is meant to be."""

    def __str__(self) -> str:
        where = f" in {self.where}" if self.where else ""
        mark = "" if self.wrong else " (may be meant)"
        return f"{self.kind}{where}{mark}\n     found: {self.found}\n     do: {self.advice}"


@dataclass(frozen=True)
class Report:
    """The outcome of `check_meta_gradient`; `str` makes it a text.

    >>> Report(findings=(), passed=("finite differences",), unknown=()).ok
    True
    """

    findings: tuple[Finding, ...]
    """The faults and remarks, worst first."""
    passed: tuple[str, ...]
    """The checks that passed."""
    unknown: tuple[str, ...]
    """The checks that could not be made, and why."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and nothing had to be left open."""
        return not self.unknown and not any(f.wrong for f in self.findings)

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the findings, worst first."""
        return tuple(f.kind for f in self.findings)

    def lines(self) -> list[str]:
        """The report as text."""
        wrong = sum(f.wrong for f in self.findings)
        if wrong:
            head = f"The meta-gradient is not to be trusted: {wrong} of these findings say so."
        elif self.unknown:
            head = "Nothing wrong was found, but not everything could be checked."
        else:
            head = "The meta-gradient is right."
        numbered = [f"  {i}. {finding}" for i, finding in enumerate(self.findings, start=1)]
        passed = [f"  checked: {line}" for line in self.passed]
        return [head, *numbered, *passed, *(f"  not checked: {line}" for line in self.unknown)]

    def __str__(self) -> str:
        return "\n".join(self.lines())
