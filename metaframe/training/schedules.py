"""Learning rates as functions of the number of outer steps taken, as in `metaframe.optim`.

The rate enters a compiled step as an array, so that a change compiles nothing anew.
"""

from __future__ import annotations

from metaframe.core.schedules import constant as constant
from metaframe.core.schedules import cosine as cosine
from metaframe.core.schedules import warmup as warmup

__all__ = ["constant", "cosine", "warmup"]
