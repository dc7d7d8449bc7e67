"""The algorithms by name. The command line, the documentation and the tests find them here.

An algorithm registers itself once, in its own file. One of another package does so when metaframe
asks for it: it is an entry point of the group `metaframe.algorithms`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from metaframe import arguments
from metaframe.errors import InputError, InputTypeError
from metaframe.learners.meta_learner import MetaLearner

ENTRY_POINT_GROUP = "metaframe.algorithms"
_registered: dict[str, Algorithm] = {}


@dataclass(frozen=True)
class Algorithm:
    """An algorithm as the command line offers it: a learner around a model.

    Attributes:
        name: how it is called, as in `--algorithm NAME`.
        about: one line.
        build: `(model, settings) -> learner`. The settings are those of a run: attributes such as
            `inner_lr`, `inner_steps`, `norm` and `ways`, see `metaframe train --help`.
        settings: the settings that this algorithm has a use for, and not all others.
        defaults: settings that differ from the general ones, and from the data set's.
        ignores: the settings of all the others that it has no use for.
        classifies: True if it is for classification alone.
        exact: True if the meta-gradient is the derivative of the cost that is returned with it;
            first-order and implicit algorithms return another direction.

    >>> import torch
    >>> from metaframe import MAML
    >>> plain = Algorithm(
    ...     "plain",
    ...     "second-order MAML, one step",
    ...     lambda model, c: MAML(model, c.inner_lr, norm=c.norm),
    ...     ignores=("inner_steps",),
    ... )
    >>> plain.exact
    True
    """

    name: str
    about: str
    build: Callable[[Any, Any], MetaLearner]
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    classifies: bool = False
    exact: bool = True


def register_algorithm(algorithm: Algorithm) -> Algorithm:
    """Make an algorithm known by its name.

    Args:
        algorithm: its name, a sentence about it, and how it is built.

    Returns:
        The algorithm.

    Raises:
        InputTypeError: not an `Algorithm`.
        InputError: another one has that name.

    >>> from metaframe import MAML
    >>> register_algorithm(Algorithm("maml", "again", lambda model, c: MAML(model)))
    Traceback (most recent call last):
    metaframe.errors.InputError: an algorithm called 'maml' is registered already...
    """
    if not isinstance(algorithm, Algorithm):
        raise InputTypeError(
            f"algorithm must be an Algorithm, received {type(algorithm).__qualname__}."
        )
    arguments.function(algorithm.build, "build")
    if algorithm.name in _registered:
        raise InputError(
            f"an algorithm called {algorithm.name!r} is registered already: "
            f"{_registered[algorithm.name].about}. Choose another name."
        )
    return _registered.setdefault(algorithm.name, algorithm)


def algorithms() -> dict[str, Algorithm]:
    """The known algorithms: those of metaframe, of other packages and of this process.

    Returns:
        Algorithms by name.

    Raises:
        MetaframeError: an installed package registers what cannot be.

    >>> algorithms()["protonet"].about
    'classes are the means of their features (arXiv 1703.05175)'
    """
    _load_entry_points()
    return dict(_registered)


@functools.cache
def _load_entry_points() -> None:
    import importlib.metadata  # slow to import, and needed by the command line alone

    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()  # which registers it
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist else entry.value
            raise InputError(
                f"algorithm {entry.name!r} cannot be loaded from {entry.value}: {error}. Bring "
                f"{package} up to date, or remove it."
            ) from error
