"""metaframe's contract for backends, clause by clause."""

from metaframe.testing.conformance import ConformanceSuite


class TestMLX(ConformanceSuite):
    backend = "mlx"
