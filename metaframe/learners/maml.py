"""MAML around a model of any framework (Finn et al. 2017, arXiv 1703.03400)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metaframe import arguments, optim
from metaframe.learners.functions import adapted_names, rate_for
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.method import PLAIN, Method
from metaframe.learners.minibatches import minibatches
from metaframe.learners.norms import Norm
from metaframe.learners.outer_variables import OuterVariables
from metaframe.learners.registry import Algorithm, register_algorithm
from metaframe.learners.settings import AdaptConfig, InnerRate
from metaframe.models.lookup import adapter_of


class MAML(MetaLearner):
    """Model-agnostic meta-learning of any model.

        theta' = theta - alpha * grad L_support(theta),   meta-gradient d L_query(theta') / d theta

    On torch the wrapper is an `nn.Module` over the model's live parameters: any `torch.optim`
    optimizer takes `maml.parameters()`, and `backward()` through an adapted learner accumulates
    exact meta-gradients into them. On every backend `meta_value_and_grad` returns them.

    Args:
        module: the model, see `metaframe.models`; its parameters are the meta-parameters.
        inner_lr: inner step size, or one for each adapted parameter, by its name or that of a part
            of the model, such as a layer; a rate may be an array that broadcasts to the shape of
            its parameter. `None` if `update` brings its own. A function
            `inner_lr(learned) -> rate` makes it of outer variables; to an `optim.Optimizer` of
            your own goes whatever it returns.
        inner_steps: default number of inner steps, at least 1.
        first_order: take the inner gradients for constants (FOMAML).
        adapt_names: names of the parameters to adapt; default: all trainable ones, at the time of
            each adaptation. Frozen ones do not adapt.
        allow_unused: leave adapted parameters that a support loss does not depend on as they are;
            False makes that an error.
        norm: statistics of batch normalisation. "batch": of the examples in hand, so predictions
            for a query depend on the other queries (transductive). "frozen": the model's running
            ones. "support": of the support set, under the adapted parameters. "per-step": running
            ones of the wrapper's own, one set for each point theta_0 .. theta_K, which move only
            in `collect_statistics` (Antoniou et al. 2018, arXiv 1810.09502). No policy writes to
            the model's running statistics. A `tf.Module`, a function of your own with parameters
            and an Equinox module without its state decide for themselves.
        update: the inner update rule, as for `metaframe.inner_loop`.
        method: where an algorithm of your own departs from MAML, see `metaframe.learners.Method`.
        learned: outer variables beyond the model's, such as the parameters of a loss network or
            one learned rate: a mapping from names to floating arrays, numbers or structures of
            them, of which the wrapper takes copies. They are meta-parameters, under "learned/", and
            in the attribute `learned` by name, and are read by `inner_lr` as a
            function and by what has an argument `learned`, see `meta_value_and_grad`. With
            `first_order` what acts through an inner gradient gets none.
        inner_batches: minibatches of the support set: how many examples an inner step sees, or
            `Minibatches(size, seed=...)`, or rows of your own, integers (steps, batch size).
            Default: every step sees all of it.

    Raises:
        InputError: fewer steps than one, no parameters to adapt, an unknown name.
        InputTypeError: not a model, or a trainable parameter that cannot be learned, such as a
            complex one.

    >>> import torch
    >>> from metaframe.learners import MAML
    >>> from metaframe.tasks import Task
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.1)
    >>> optimizer = torch.optim.SGD(maml.parameters(), lr=0.01)
    >>> x, y = torch.linspace(-1, 1, 8)[:, None], torch.ones(8, 1)
    >>> learner = maml.clone().adapt_on(torch.nn.functional.mse_loss, x, y)
    >>> torch.nn.functional.mse_loss(learner(x), y).backward()
    >>> optimizer.step()

    The same, for many tasks at once and on any backend:

    >>> tasks = [Task(x, y, x, y), Task(x, -y, x, -y)]
    >>> cost, grads, _ = maml.meta_value_and_grad(torch.nn.functional.mse_loss, tasks)
    >>> sorted(grads)
    ['bias', 'weight']
    """

    def __init__(
        self,
        module: Any,
        inner_lr: InnerRate | None = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
        update: Any = optim.gradient_descent_update,
        method: Method = PLAIN,
        learned: Mapping[str, Any] | None = None,
        inner_batches: Any = None,
    ) -> None:
        arguments.integer(inner_steps, "inner_steps", at_least=1)
        adapter = adapter_of(module)
        names = adapted_names(adapter.adaptable(), adapt_names)
        if inner_lr is not None and not callable(inner_lr):
            known = {*adapter.params(), *adapter.adaptable()}
            rate_for(inner_lr, names, known, name="inner_lr")
        config = AdaptConfig(
            names,
            inner_lr,
            inner_steps,
            first_order,
            allow_unused,
            norm,
            update,
            every=adapt_names is None,
            outer=None if learned is None else OuterVariables.of(learned),
            batches=minibatches(inner_batches),
        )
        params, values = adapter.params(), None
        if config.outer is not None:
            values = config.outer.values(learned, params, adapter.backend)
        config.check_rate(params, values)
        super().__init__(adapter, config, method)
        if values is not None:
            self.learned = self._learn(values)

    @property
    def inner_lr(self) -> InnerRate | None:
        """The inner step size, or those by name, or the function that makes them."""
        return self.config.inner_lr

    @property
    def inner_steps(self) -> int:
        """The default number of inner steps."""
        return self.config.inner_steps

    @property
    def first_order(self) -> bool:
        """True if the inner gradients are constants."""
        return self.config.first_order

    @property
    def adapt_names(self) -> tuple[str, ...]:
        """Names of the parameters that adapt."""
        return self.config.names

    @property
    def allow_unused(self) -> bool:
        """True if a support loss may leave adapted parameters out."""
        return self.config.allow_unused


register_algorithm(
    Algorithm(
        "maml",
        "exact second-order meta-gradients (arXiv 1703.03400)",
        lambda model, c: MAML(model, c.inner_lr, c.inner_steps, norm=c.norm),
    )
)
register_algorithm(
    Algorithm(
        "fomaml",
        "inner gradients detached (arXiv 1703.03400, 5.2)",
        lambda model, c: MAML(model, c.inner_lr, c.inner_steps, first_order=True, norm=c.norm),
        ignores=("mode",),
        exact=False,
    )
)
