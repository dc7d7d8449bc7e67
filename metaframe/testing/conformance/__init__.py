"""The conformance suite: the backend contract, checked on any backend.

A clause is one promise. Its truth is independent of every backend: closed forms, formulas in NumPy,
finite differences. docs/backends.md says how to write a backend that keeps them.
"""

from metaframe.testing.conformance.clause import Clause as Clause
from metaframe.testing.conformance.report import CLAUSES as CLAUSES
from metaframe.testing.conformance.report import ConformanceReport as ConformanceReport
from metaframe.testing.conformance.report import check_backend as check_backend
from metaframe.testing.conformance.suite import ConformanceSuite as ConformanceSuite
