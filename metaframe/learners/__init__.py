"""Meta-learning of whole models: the functional core, and MAML and its relatives around it."""

from metaframe.core.task_program import Outcome as Outcome
from metaframe.core.task_program import TaskRun as TaskRun
from metaframe.learners.anil import ANIL as ANIL
from metaframe.learners.anil import head_names as head_names
from metaframe.learners.cavia import CAVIA as CAVIA
from metaframe.learners.functions import adapt as adapt
from metaframe.learners.functions import functional_forward as functional_forward
from metaframe.learners.functions import inner_step as inner_step
from metaframe.learners.functions import named_buffers as named_buffers
from metaframe.learners.functions import named_params as named_params
from metaframe.learners.implicit import ImplicitMAML as ImplicitMAML
from metaframe.learners.learner import Learner as Learner
from metaframe.learners.maml import MAML as MAML
from metaframe.learners.maml_pp import MAMLPlusPlus as MAMLPlusPlus
from metaframe.learners.meta_curvature import MetaCurvature as MetaCurvature
from metaframe.learners.meta_sgd import MetaSGD as MetaSGD
from metaframe.learners.method import Method as Method
from metaframe.learners.method import Support as Support
from metaframe.learners.minibatches import Minibatches as Minibatches
from metaframe.learners.proto import ProtoMAML as ProtoMAML
from metaframe.learners.proto import ProtoNet as ProtoNet
from metaframe.learners.registry import Algorithm as Algorithm
from metaframe.learners.registry import algorithms as algorithms
from metaframe.learners.registry import register_algorithm as register_algorithm
from metaframe.learners.reptile import Reptile as Reptile
from metaframe.learners.task_loss import TaskLoss as TaskLoss

__all__ = [
    "ANIL",
    "CAVIA",
    "MAML",
    "Algorithm",
    "ImplicitMAML",
    "Learner",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaSGD",
    "Method",
    "Minibatches",
    "Outcome",
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "Support",
    "TaskLoss",
    "TaskRun",
    "adapt",
    "algorithms",
    "functional_forward",
    "head_names",
    "inner_step",
    "named_buffers",
    "named_params",
    "register_algorithm",
]
