"""Any framework's model as pure functions of its parameters.

Understood are `torch.nn.Module`; `flax.nnx`, `flax.linen` and Equinox modules; Keras 3 models on
any of its backends; `tf.Module`; and a pair `(apply, params)`, where `apply(params, *args)` may
come from anywhere and `params` is any structure of arrays, such as
`(model, model.init(seed))` with a model of `metaframe.nn`.

- A linen module comes with its variables: `(module, variables)`.
- An Equinox module takes one example, as is the convention there, and is vectorised over the
  leading axis of its inputs. A module that takes a batch comes with a function that says so:
  `(lambda module, x: module(x), module)`.
- A Keras model has to be built, and lazy layers of torch called once. It runs by its own
  `__call__`, with `training` as the normalisation policy says. Losses that its layers add, such as
  those of regularizers, are part of the loss function and of no call.
- A `tf.Module` learns with the Keras layers it holds. Variables that it makes when it is called
  have to be made before, and those of a closure are refused.
"""

from metaframe.backend.model import BatchNorm as BatchNorm
from metaframe.backend.model import Forward as Forward
from metaframe.backend.model import Inputs as Inputs
from metaframe.backend.model import ModelAdapter as ModelAdapter
from metaframe.backend.model import NamedParameters as NamedParameters
from metaframe.models.lookup import FunctionalModel as FunctionalModel
from metaframe.models.lookup import adapter_of as adapter_of
from metaframe.models.lookup import functional as functional

__all__ = [
    "BatchNorm",
    "Forward",
    "FunctionalModel",
    "Inputs",
    "ModelAdapter",
    "NamedParameters",
    "adapter_of",
    "functional",
]
