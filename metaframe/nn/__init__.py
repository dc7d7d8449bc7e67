"""Layers, costs, initialisers and models that mean the same on every backend.

All are pure functions of arrays, dispatched as in `metaframe.ops`, and have correct second
derivatives everywhere. The examples assume `from metaframe import nn, ops` and a selected
backend, whichever it is.
"""

from metaframe.backend.attention import AttentionKernel as AttentionKernel
from metaframe.backend.attention import use_attention_kernel as use_attention_kernel
from metaframe.nn.activations import gelu as gelu
from metaframe.nn.activations import log_softmax as log_softmax
from metaframe.nn.activations import relu as relu
from metaframe.nn.activations import softmax as softmax
from metaframe.nn.attend import attention as attention
from metaframe.nn.init import Initializer as Initializer
from metaframe.nn.init import dropout_mask as dropout_mask
from metaframe.nn.init import glorot_uniform as glorot_uniform
from metaframe.nn.init import he_normal as he_normal
from metaframe.nn.init import ones as ones
from metaframe.nn.init import truncated_normal as truncated_normal
from metaframe.nn.init import zeros as zeros
from metaframe.nn.layers import batch_norm as batch_norm
from metaframe.nn.layers import conv2d as conv2d
from metaframe.nn.layers import dense as dense
from metaframe.nn.layers import dropout as dropout
from metaframe.nn.layers import embedding as embedding
from metaframe.nn.layers import layer_norm as layer_norm
from metaframe.nn.layers import max_pool2d as max_pool2d
from metaframe.nn.layers import mean_pool as mean_pool
from metaframe.nn.losses import accuracy as accuracy
from metaframe.nn.losses import binary_cross_entropy as binary_cross_entropy
from metaframe.nn.losses import cross_entropy as cross_entropy
from metaframe.nn.losses import linear_cross_entropy as linear_cross_entropy
from metaframe.nn.losses import mse as mse
from metaframe.nn.models import Model as Model
from metaframe.nn.models import conv4 as conv4
from metaframe.nn.models import mlp as mlp
from metaframe.ops import softplus as softplus

__all__ = [
    "AttentionKernel",
    "Initializer",
    "Model",
    "accuracy",
    "attention",
    "batch_norm",
    "binary_cross_entropy",
    "conv2d",
    "conv4",
    "cross_entropy",
    "dense",
    "dropout",
    "dropout_mask",
    "embedding",
    "gelu",
    "glorot_uniform",
    "he_normal",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "max_pool2d",
    "mean_pool",
    "mlp",
    "mse",
    "ones",
    "relu",
    "softmax",
    "softplus",
    "truncated_normal",
    "use_attention_kernel",
    "zeros",
]
