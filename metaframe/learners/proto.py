"""Prototypes as a classifier, and as where one starts: ProtoNet and Proto-MAML.

Logits -|f(x) - c_k|^2 are, up to a number that is the same for all classes of an example and that
softmax ignores, linear in the features: 2 c_k . f(x) - |c_k|^2 (Snell et al. 2017, section 2.4).
So both are a linear head made from the support set; Proto-MAML takes inner steps from there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from metaframe import arguments, ops, optim
from metaframe.backend.selection import backend_of
from metaframe.backend.types import Array
from metaframe.errors import InputError
from metaframe.learners.functions import Params
from metaframe.learners.maml import MAML
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.method import Method, Support
from metaframe.learners.norms import Norm
from metaframe.learners.registry import Algorithm, register_algorithm
from metaframe.learners.settings import AdaptConfig
from metaframe.models.lookup import adapter_of
from metaframe.models.wrapped import HEAD, WithHead


class ProtoNet(MetaLearner):
    """Prototypical networks (Snell et al. 2017, arXiv 1703.05175).

        c_k = mean of f(x) over the support examples of class k
        logits 2 c_k . f(x) - |c_k|^2, of which softmax is that of -|f(x) - c_k|^2

    There is no inner loop: a learner's `adapt_on` computes the prototypes, and the wrapper itself
    returns features.

    Args:
        module: f, a model whose output is (examples, features).
        ways: the largest number of classes; labels are integers 0 to ways - 1. A class without
            examples in a support set has the logit -inf, so a query example of it costs infinity.
            Any other label in a support set is an error, or NaN where the step is compiled or
            vectorised.
        norm: see `MAML`.

    Raises:
        InputError: from a learner, for a label that is not below `ways`.

    >>> import torch
    >>> net = ProtoNet(torch.nn.Linear(3, 3), ways=2)
    >>> x, y = torch.eye(3)[:2], torch.tensor([0, 1])
    >>> net.clone().adapt_on(torch.nn.functional.cross_entropy, x, y)(x).argmax(1)
    tensor([0, 1])
    """

    def __init__(self, module: Any, ways: int, *, norm: Norm = "batch") -> None:
        config = AdaptConfig((), None, 0, True, True, norm, optim.gradient_descent_update)
        super().__init__(WithHead(adapter_of(module)), config, _from_prototypes(ways))


class ProtoMAML(MAML):
    """MAML whose linear head starts from prototypes (Triantafillou et al. 2020, arXiv 1903.03096).

        w_k = 2 c_k,   b_k = -|c_k|^2,   c_k = mean of f(x) over the support examples of class k

    and then the inner loop adapts f and the head. The meta-gradient goes through the prototypes.

    Args:
        module: f, a model whose output is (examples, features); the head is added to it.
        ways: see `ProtoNet`.
        inner_lr: see `MAML`.
        inner_steps: see `MAML`.
        first_order: see `MAML`; the prototypes are differentiated in any case.
        adapt_names: names of the parameters to adapt; those of the head are "prototypes/w",
            (features, ways), and "prototypes/b", (ways,). Default: all.
        allow_unused: see `MAML`.
        norm: see `MAML`.
        update: see `MAML`.

    >>> import torch
    >>> maml = ProtoMAML(torch.nn.Linear(3, 8), ways=2)
    >>> x, y = torch.eye(3)[:2], torch.tensor([0, 1])
    >>> learner = maml.clone().adapt_on(torch.nn.functional.cross_entropy, x, y, steps=2)
    >>> learner(x).shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        module: Any,
        ways: int,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
        update: Any = optim.gradient_descent_update,
    ) -> None:
        super().__init__(
            WithHead(adapter_of(module)),
            inner_lr,
            inner_steps,
            first_order,
            adapt_names,
            allow_unused,
            norm=norm,
            update=update,
            method=_from_prototypes(ways),
        )


def prototypes(features: Array, labels: Array, ways: int) -> tuple[Array, Array]:
    """The mean feature of each class, (ways, features), and how many examples it has, (ways,).

    Zeros for a class without any; NaN everywhere if a label is none of the classes.
    """
    if len(features.shape) != 2:
        raise InputError(
            "prototypes need a model whose output is (examples, features), received shape "
            f"{tuple(features.shape)}."
        )
    backend = backend_of(features)
    if not backend.is_traced(labels):
        _check_labels(backend.to_numpy(labels), ways)
    hit = ops.one_hot(labels, ways, backend.dtype_name(features))
    members = hit / ops.sum(hit, axis=1, keepdims=True)  # of 1, or 0 for a label out of range
    sums, counts = ops.einsum("nk,nf->kf", members, features), ops.sum(members, axis=0)
    return sums / ops.maximum(counts, 1.0)[:, None], counts


def _check_labels(labels: np.ndarray[Any, Any], ways: int) -> None:
    if wrong := sorted({*labels.tolist()} - {*range(ways)}):
        raise InputError(
            f"the labels of a support set are integers 0 to {ways - 1} with ways={ways}, received "
            f"{wrong}. Number the classes of each task from 0, or pass a larger ways."
        )


def _from_prototypes(ways: int) -> Method:
    arguments.integer(ways, "ways", at_least=2)
    return Method(begin=functools.partial(_with_head, ways=ways))


def _with_head(support: Support, params: Params, *, ways: int) -> Params:
    centres, counts = prototypes(support.predict(params, support.x), support.y, ways)
    squared = ops.sum(ops.square(centres), axis=1)
    head = (2 * ops.transpose(centres, (1, 0)), ops.where(counts > 0, -squared, -math.inf))
    # Where operations are recorded, the inner gradient is with respect to these very objects: the
    # ones the head was made from would count its change as theirs.
    start = {name: 1 * x if name in support.names else x for name, x in params.items()}
    return {**start, **dict(zip(HEAD, head, strict=True))}


register_algorithm(
    Algorithm(
        "protonet",
        "classes are the means of their features (arXiv 1703.05175)",
        lambda model, c: ProtoNet(model, c.ways, norm=c.norm),
        ("features",),
        {"features": 64},
        ignores=("inner_lr", "inner_steps", "eval_steps", "mode"),
        classifies=True,
    )
)
register_algorithm(
    Algorithm(
        "protomaml",
        "MAML with a head that starts from prototypes (arXiv 1903.03096)",
        lambda model, c: ProtoMAML(model, c.ways, c.inner_lr, c.inner_steps, norm=c.norm),
        ("features",),
        {"features": 64},
        classifies=True,
    )
)
