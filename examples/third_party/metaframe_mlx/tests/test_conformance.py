"""metaframe's contract for backends, clause by clause."""

from metaframe.testing.conformance import Clause, ConformanceSuite


class TestMLX(ConformanceSuite):
    backend = "mlx"

    @classmethod
    def is_slow(cls, clause: Clause) -> bool:
        """On the CPU MLX has a C++ compiler make its kernels."""
        return clause.compiles or clause.heavy
