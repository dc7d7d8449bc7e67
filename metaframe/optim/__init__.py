"""Update rules for the inner and the outer loop, and clipping; `metaframe.core.optim` has them."""

from metaframe.core.optim import AdamState as AdamState
from metaframe.core.optim import Optimizer as Optimizer
from metaframe.core.optim import Rate as Rate
from metaframe.core.optim import adagrad as adagrad
from metaframe.core.optim import adam as adam
from metaframe.core.optim import adamw as adamw
from metaframe.core.optim import apply_updates as apply_updates
from metaframe.core.optim import clip_by_global_norm as clip_by_global_norm
from metaframe.core.optim import clip_by_value as clip_by_value
from metaframe.core.optim import clipped as clipped
from metaframe.core.optim import global_norm as global_norm
from metaframe.core.optim import gradient_descent_update as gradient_descent_update
from metaframe.core.optim import momentum as momentum
from metaframe.core.optim import rmsprop as rmsprop
from metaframe.core.optim import sgd as sgd
