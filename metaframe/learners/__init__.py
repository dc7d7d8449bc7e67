"""Meta-learning of whole models: the functional core, and MAML and its relatives around it."""

from metaframe.learners.anil import ANIL as ANIL
from metaframe.learners.anil import head_names as head_names
from metaframe.learners.functional import adapt as adapt
from metaframe.learners.functional import functional_forward as functional_forward
from metaframe.learners.functional import inner_step as inner_step
from metaframe.learners.functional import named_buffers as named_buffers
from metaframe.learners.functional import named_params as named_params
from metaframe.learners.learner import Learner as Learner
from metaframe.learners.maml import MAML as MAML
from metaframe.learners.meta_sgd import MetaSGD as MetaSGD

__all__ = [
    "ANIL",
    "MAML",
    "Learner",
    "MetaSGD",
    "adapt",
    "functional_forward",
    "head_names",
    "inner_step",
    "named_buffers",
    "named_params",
]
