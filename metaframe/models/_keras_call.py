"""One call of a Keras layer on other values than it holds, by the layer's own `__call__`.

`stateless_call` runs `call` alone, and so leaves out what `__call__` does: it hands `training` and
masks on, casts inputs and variables, and chooses the quantized form. Here the layer is called as
its user calls it, with two things around it. A `StatelessScope` puts the values in the places of
the variables, keeps every assignment to itself, and sees what else is read or changed. The call
of a layer without weights says what `training` is for all that is called inside.

This needs public names of Keras and one private one, see `_keras_private.py`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from metaframe.backend.types import Array
from metaframe.errors import InputError
from metaframe.models._keras_private import forget_losses


def keras() -> Any:
    """Keras, which whoever has a layer has imported."""
    return sys.modules["keras"]


def is_layer(x: object) -> bool:
    """True if `x` is a Keras layer or model. Imports nothing."""
    # Half imported while Keras itself is being imported.
    layers = getattr(sys.modules.get("keras"), "layers", None)
    layer = getattr(layers, "Layer", None)
    return layer is not None and isinstance(x, layer)


def is_variable(x: object) -> bool:
    """True if `x` is a variable of Keras, with the framework's own inside. Imports nothing."""
    kind = getattr(sys.modules.get("keras"), "Variable", None)
    return kind is not None and isinstance(x, kind)


def layers_of(layer: Any) -> list[Any]:
    """`layer` and every layer inside it, each once, in the order of its attributes."""
    kind, found, left = keras().layers.Layer, dict[int, Any](), [layer]
    while left:
        x = left.pop()
        if isinstance(x, kind):
            if id(x) not in found:
                found[id(x)] = x
                left.extend(reversed(vars(x).values()))
        elif isinstance(x, (list, tuple, set, dict)):
            inside = list(x.values() if isinstance(x, dict) else x)
            if inside and not isinstance(inside[0], (str, int, float)):  # words, sizes
                left.extend(reversed(inside))
    return list(found.values())


def unbuilt(layers: Iterable[Any]) -> list[Any]:
    """Layers that make weights when they are called, or are traced to see whether others do."""
    library = keras()
    # These three make weights only by way of the layers inside.
    bare = [kind.build for kind in (library.layers.Layer, library.Model, library.Sequential)]
    return [
        x
        for x in layers
        if not x.built
        and (type(x).build not in bare or not all(inner.built for inner in layers_of(x)[1:]))
    ]


class Call:
    """The outcome of a call of a layer: `output`, and `scope`, which has the variables' values."""

    def __init__(self, scope: Any, output: Any) -> None:
        self.output = output
        self._scope = scope

    def value(self, variable: Any) -> Array:
        """The value of `variable` after the call."""
        return self._scope.get_current_value(variable)

    def recorded(self, variable: Any) -> Array | None:
        """The last value assigned to `variable`; None if there was none."""
        return self._scope.assigned.get(id(variable), (None, None))[1]

    def foreign(self) -> tuple[list[Any], list[Any]]:
        """Keras variables that were read, and those that were assigned, without a value here."""
        known = self._scope.known
        read = [x for i, x in self._scope.read.items() if i not in known]
        return read, [x for i, (x, _) in self._scope.assigned.items() if i not in known]


def call_layer(
    run: Callable[[], Any],
    layers: Sequence[Any],
    values: Sequence[tuple[Any, Array]],
    *,
    owner: str,
    training: bool | None = None,
    recorded: Sequence[Any] = (),
) -> Call:
    """`run()` with `values` in the places of variables, none of which changes.

    Args:
        run: calls one of `layers`.
        layers: all there are, to be left as they are.
        values: pairs of a variable and its value.
        owner: the model, as an error names it.
        training: for every layer that is not told otherwise; None leaves it to them.
        recorded: variables that read as given throughout, whatever is assigned to them.
    """
    scope = _scope_class()(values, recorded)
    with _as_built(layers, owner), scope:
        output = _within_a_layer(lambda: _without_variables(run()), training)
    forget_losses(layers, scope.losses)
    return Call(scope, output)


def _without_variables(output: Any) -> Any:
    """`output` with values for variables, which outside the scope would read as the model's own."""
    kind = keras().Variable
    if not any(isinstance(x, kind) for x in keras().tree.flatten(output)):
        return output
    value = lambda x: x.value if isinstance(x, kind) else x  # noqa: E731
    return keras().tree.map_structure(value, output)


def _within_a_layer(run: Callable[[], Any], training: bool | None) -> Any:
    """`run()` as a part of a layer's call. Results go around Keras, which would reword errors."""
    done: dict[str, Any] = {}

    def kept() -> None:
        try:
            done["output"] = run()
        except Exception as error:  # noqa: BLE001
            done["error"] = error

    _entry()(run=kept, **({} if training is None else {"training": training}))
    if "error" in done:
        raise done["error"]
    return done["output"]


@functools.cache
def _entry() -> Any:
    """A layer that calls what it is given.

    Layers called inside take their `training` from it, and keep their losses of calls before,
    which the outermost layer of a call clears in itself and in what it holds.
    """

    class Entry(keras().layers.Layer):  # type: ignore[misc]
        def call(self, run: Callable[[], None], training: bool | None = None) -> None:
            del training
            run()

    return Entry(name="metaframe", dtype="float32", autocast=False)


@functools.cache
def _scope_class() -> Any:
    class Scope(keras().StatelessScope):  # type: ignore[misc]
        """Values of variables, and a note of every variable that is read or assigned."""

        def __init__(self, values: Sequence[tuple[Any, Array]], recorded: Sequence[Any]) -> None:
            super().__init__(values, collect_losses=True)  # for a call that returns its losses
            self.known = frozenset(id(variable) for variable, _ in values)
            self.read: dict[int, Any] = {}
            self.assigned: dict[int, tuple[Any, Array]] = {}
            self._recorded = frozenset(map(id, recorded))

        def get_current_value(self, variable: Any) -> Any:
            self.read.setdefault(id(variable), variable)
            return super().get_current_value(variable)

        def add_update(self, update: tuple[Any, Array]) -> None:
            self.assigned[id(update[0])] = update
            if id(update[0]) not in self._recorded:
                super().add_update(update)

    return Scope


@contextmanager
def _as_built(layers: Sequence[Any], owner: str) -> Iterator[None]:
    """A call that reaches a layer without weights is an error, and does not make them.

    They would come too late to be among the values, and a traced program would leave its
    tracers in them.
    """
    reached: list[str] = []

    def refused(layer: Any) -> Callable[..., None]:
        def build(*args: Any, **kwargs: Any) -> None:
            del args, kwargs
            reached.append(layer.name)
            raise InputError(f"layer {layer.name!r} is not built.")

        return build

    before = [(vars(layer), layer.build, layer) for layer in unbuilt(layers)]
    for attributes, _, layer in before:
        attributes["build"] = refused(layer)
    try:
        yield
    except Exception:
        if not reached:
            raise
        raise InputError(not_built(owner, reached[:1])) from None
    finally:
        for attributes, build, _ in before:
            attributes["build"] = build


def not_built(owner: str, names: Sequence[str]) -> str:
    """Advice about a model whose layers of these names are not built."""
    missing = f"its layers {list(names)} are not built" if names else "it has no weights yet"
    return (
        f"{owner} is not complete: {missing}. Call it once on data, in the mode it is used in "
        "(training=True or False), before it is handed to metaframe."
    )
