"""ANIL: MAML that adapts only the head (Raghu et al. 2020, arXiv 1909.09157)."""

from __future__ import annotations

from typing import Any

from metaframe import tree
from metaframe.backend.registry import owner
from metaframe.backend.selection import is_neutral
from metaframe.errors import InputError
from metaframe.learners.maml import MAML
from metaframe.learners.registry import Algorithm, register_algorithm
from metaframe.models.lookup import adapter_of


class ANIL(MAML):
    """MAML whose inner loop adapts the parameters of a head and leaves the body as it is.

    The body still gets meta-gradients: through the features the head adapts on.

    Args:
        module: the model, see `MAML`.
        head: the part to adapt, see `head_names`.
        kwargs: passed to `MAML`; not `adapt_names`.

    Raises:
        InputError: the head shares no parameters with the model, or all of them are frozen.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    >>> ANIL(model, model[1]).config.names
    ('1.weight', '1.bias')
    """

    def __init__(self, module: Any, head: Any, **kwargs: Any) -> None:
        if "adapt_names" in kwargs:
            raise InputError("ANIL adapts its head; adapt_names is not an argument of it.")
        adapter = adapter_of(module)
        names = head_names(adapter, head)
        adaptable = frozenset(adapter.adaptable())
        if adaptable.isdisjoint(names):
            raise InputError(f"the parameters of the head are frozen: {list(names)}.")
        chosen = [name for name in names if name in adaptable]
        super().__init__(adapter, adapt_names=chosen, **kwargs)


def head_names(module: Any, head: Any) -> tuple[str, ...]:
    """The names, as seen from `module`, of the parameters of `head`.

    Args:
        module: the model.
        head: a submodule, matched by the identity of its parameters; or for models without
            submodules the name of a part of the parameters, such as "head", or that part itself.

    Returns:
        The names, in the model's order.

    Raises:
        InputError: no parameter is shared.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    >>> head_names(model, model[1])
    ('1.weight', '1.bias')
    """
    return part_names(module, head, "head")


def part_names(module: Any, part: Any, what: str) -> tuple[str, ...]:
    """`head_names` for any part of a model; `what` is what the error calls it."""
    adapter = adapter_of(module)
    params = adapter.params()
    if isinstance(part, str):
        known = {**adapter.aliases(), **{name: name for name in params}}
        inside = {
            name
            for called, name in known.items()
            if called == part or called.startswith((f"{part}/", f"{part}."))
        }
    else:
        shared = {id(x) for x in _arrays(part)}
        inside = {
            n for known in (params, adapter.given()) for n, x in known.items() if id(x) in shared
        }
    names = tuple(name for name in params if name in inside)
    if not names:
        raise InputError(
            f"{what} shares no parameters with the module, whose parameters are {list(params)}. "
            "Pass a submodule of it, or the name of a part of its parameters."
        )
    return names


def _arrays(head: Any) -> tuple[Any, ...]:
    # TensorFlow keeps a list of variables in a list class of its own.
    leaves = tree.leaves(list(head) if isinstance(head, list) else head)
    if all(owner(leaf) is not None or is_neutral(leaf) for leaf in leaves):
        return leaves
    return tuple(adapter_of(head).params().values())


register_algorithm(
    Algorithm(
        "anil",
        "adapts the head only (arXiv 1909.09157)",
        lambda model, c: ANIL(
            model, "head", inner_lr=c.inner_lr, inner_steps=c.inner_steps, norm=c.norm
        ),
    )
)
