"""Meta-training, evaluation and checkpoints, over any learner and on any backend."""

from metaframe.training.callbacks import Callback as Callback
from metaframe.training.callbacks import EarlyStopping as EarlyStopping
from metaframe.training.callbacks import History as History
from metaframe.training.callbacks import Run as Run
from metaframe.training.evaluation import Evaluation as Evaluation
from metaframe.training.evaluation import evaluate as evaluate
from metaframe.training.step import Schedule as Schedule
from metaframe.training.step import StepReport as StepReport
from metaframe.training.step import StepSettings as StepSettings
from metaframe.training.trainer import MetaTrainer as MetaTrainer

__all__ = [
    "Callback",
    "EarlyStopping",
    "Evaluation",
    "History",
    "MetaTrainer",
    "Run",
    "Schedule",
    "StepReport",
    "StepSettings",
    "evaluate",
]
