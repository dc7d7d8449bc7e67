"""Any framework's model as pure functions of its parameters.

Understood are `torch.nn.Module`; `flax.nnx`, `flax.linen` and Equinox modules; Keras 3 models on
any of its backends; `tf.Module`; and a pair `(apply, params)`, where `apply(params, *args)` may
come from anywhere and `params` is any structure of arrays, such as
`(model, model.init(seed))` with a model of `metaframe.nn`.

- A linen module comes with its variables: `(module, variables)`.
- An Equinox module takes one example, as is the convention there. It is vectorised over the leading
  axis of its inputs, and so are its other methods; one in `equinox.filter_vmap` is already. A
  module that takes a batch comes with a function that says so:
  `(lambda module, x: module(x), module)`. A module that keeps state comes with it:
  `equinox.nn.make_with_state(Model)(...)`.
- A pair `(function, module)` says the same of a module of `flax.nnx`.
- What `haiku.transform` returns is refused: `(lambda params, x: transformed.apply(params, None, x),
  params)` says how it is called.
- A Keras model has to be built, and lazy layers of torch called once. It runs by its own
  `__call__`, with `training` as the normalisation policy says. Losses that its layers add, such as
  those of regularizers, are part of the loss function and of no call.
- A `tf.Module` learns with the Keras layers it holds. Variables that it makes when it is called
  have to be made before, and those of a closure are refused.
"""

from metaframe.models.lookup import FunctionalModel as FunctionalModel
from metaframe.models.lookup import functional as functional

__all__ = ["FunctionalModel", "functional"]
