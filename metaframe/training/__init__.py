"""Meta-training, evaluation and checkpoints, over any learner and on any backend."""

from metaframe.training.arrays import load_arrays as load_arrays
from metaframe.training.arrays import save_arrays as save_arrays
from metaframe.training.callbacks import Callback as Callback
from metaframe.training.callbacks import EarlyStopping as EarlyStopping
from metaframe.training.callbacks import History as History
from metaframe.training.callbacks import Run as Run
from metaframe.training.checkpoint import Checkpoint as Checkpoint
from metaframe.training.checkpoint import Checkpoints as Checkpoints
from metaframe.training.checkpoint import latest_checkpoint as latest_checkpoint
from metaframe.training.checkpoint import load_checkpoint as load_checkpoint
from metaframe.training.checkpoint import load_parameters as load_parameters
from metaframe.training.checkpoint import read_checkpoint as read_checkpoint
from metaframe.training.checkpoint import save_checkpoint as save_checkpoint
from metaframe.training.evaluation import Evaluation as Evaluation
from metaframe.training.evaluation import Evaluator as Evaluator
from metaframe.training.evaluation import evaluate as evaluate
from metaframe.training.step import Schedule as Schedule
from metaframe.training.step import StepReport as StepReport
from metaframe.training.step import StepSettings as StepSettings
from metaframe.training.trainer import MetaTrainer as MetaTrainer

__all__ = [
    "Callback",
    "Checkpoint",
    "Checkpoints",
    "EarlyStopping",
    "Evaluation",
    "Evaluator",
    "History",
    "MetaTrainer",
    "Run",
    "Schedule",
    "StepReport",
    "StepSettings",
    "evaluate",
    "latest_checkpoint",
    "load_arrays",
    "load_checkpoint",
    "load_parameters",
    "read_checkpoint",
    "save_arrays",
    "save_checkpoint",
]
