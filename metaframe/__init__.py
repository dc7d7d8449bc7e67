"""metaframe: one definition of a meta-learning algorithm, on PyTorch, JAX and TensorFlow."""

import functools
import importlib
import sys
from typing import TYPE_CHECKING, Any

from metaframe import errors as errors
from metaframe import nn as nn
from metaframe import ops as ops
from metaframe import optim as optim
from metaframe import tree as tree
from metaframe.backend import Backend as Backend
from metaframe.backend import BackendInfo as BackendInfo
from metaframe.backend import available_backends as available_backends
from metaframe.backend import current_backend as current_backend
from metaframe.backend import set_backend as set_backend
from metaframe.backend import unset_backend as unset_backend
from metaframe.backend import use_backend as use_backend
from metaframe.backend.convert import convert as convert
from metaframe.core.compile import compile as compile
from metaframe.core.container import Container as Container
from metaframe.core.implicit import implicit_loop as implicit_loop
from metaframe.core.meta_gradient import MetaResult as MetaResult
from metaframe.core.meta_gradient import map_tasks as map_tasks
from metaframe.core.meta_gradient import meta_value_and_grad as meta_value_and_grad
from metaframe.core.per_step import per_step as per_step
from metaframe.core.steps import fomaml_step as fomaml_step
from metaframe.core.steps import maml_step as maml_step
from metaframe.core.steps import reptile_step as reptile_step
from metaframe.core.unroll import Unrolled as Unrolled
from metaframe.core.unroll import inner_loop as inner_loop
from metaframe.core.unroll import unroll as unroll
from metaframe.core.value_and_grad import hessian_vector_product as hessian_vector_product
from metaframe.core.value_and_grad import value_and_grad as value_and_grad
from metaframe.errors import MetaframeError as MetaframeError
from metaframe.ops import stop_gradient as stop_gradient
from metaframe.optim import Optimizer as Optimizer
from metaframe.optim import apply_updates as apply_updates
from metaframe.optim import gradient_descent_update as gradient_descent_update

if TYPE_CHECKING:
    from metaframe import interop as interop
    from metaframe import models as models
    from metaframe.learners import ANIL as ANIL
    from metaframe.learners import CAVIA as CAVIA
    from metaframe.learners import MAML as MAML
    from metaframe.learners import ImplicitMAML as ImplicitMAML
    from metaframe.learners import Learner as Learner
    from metaframe.learners import MAMLPlusPlus as MAMLPlusPlus
    from metaframe.learners import MetaCurvature as MetaCurvature
    from metaframe.learners import MetaSGD as MetaSGD
    from metaframe.learners import ProtoMAML as ProtoMAML
    from metaframe.learners import ProtoNet as ProtoNet
    from metaframe.learners import Reptile as Reptile
    from metaframe.learners import adapt as adapt
    from metaframe.learners import functional_forward as functional_forward
    from metaframe.learners import head_names as head_names
    from metaframe.learners import inner_step as inner_step
    from metaframe.learners import named_buffers as named_buffers
    from metaframe.learners import named_params as named_params
    from metaframe.tasks import SinusoidTaskSampler as SinusoidTaskSampler
    from metaframe.tasks import Task as Task
    from metaframe.tasks import TaskSampler as TaskSampler
    from metaframe.training import History as History
    from metaframe.training import MetaTrainer as MetaTrainer
    from metaframe.training import evaluate as evaluate
    from metaframe.training import load_arrays as load_arrays
    from metaframe.training import save_arrays as save_arrays

__version__ = "0.1.0"


@functools.cache
def _later() -> dict[str, str]:
    """The modules of the names above that type checkers alone see, read from this file.

    A user of the steps need not wait for wrappers of models, data sets and progress bars: their
    module is imported when somebody asks for the name.
    """
    import ast
    import inspect

    source = ast.parse(inspect.getsource(sys.modules[__name__]))
    block = next(node for node in source.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name not in _later():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _later()[name]
    if module == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_later()})
