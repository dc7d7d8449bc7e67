"""Container: a mapping, arithmetic over its leaves, and a node to the frameworks' transforms."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frameworks import BACKENDS, require
from metaframe import compile, inner_loop, ops, tree
from metaframe.backend import Backend, load_backend, use_backend
from metaframe.core.container import Container
from metaframe.errors import InputError, InputTypeError, UnknownAttributeError, UnknownKeyError

KEYS = st.text("abcxyz_", min_size=1, max_size=4)
LEAVES = st.integers(-100, 100)
DICTS = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=4),
    lambda inner: st.dictionaries(KEYS, LEAVES | inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def v() -> Container:
    return Container(layer={"w": np.arange(6.0).reshape(2, 3), "b": np.array([1.0, -1.0])})


# -- a mapping -----------------------------------------------------------------------------


@given(DICTS)
def test_a_dict_goes_in_and_comes_out(nested: dict[str, Any]) -> None:
    container = Container(nested)
    assert container == nested
    assert container.to_dict() == nested
    assert not any(isinstance(x, Container) for x in container.to_dict().values())


@given(DICTS)
def test_every_key_chain_finds_its_leaf(nested: dict[str, Any]) -> None:
    container = Container(nested)
    for chain, leaf in container.to_iterator():
        assert container[chain] is leaf
        assert container.get(chain) is leaf
        assert chain in container


@given(DICTS)
def test_setting_every_leaf_rebuilds_the_container(nested: dict[str, Any]) -> None:
    container = Container(nested)
    doubled = container.map(lambda x: 2 * x)
    assert container.set_at_key_chains(dict(doubled.to_iterator())) == doubled
    assert container.set_at_key_chains(doubled) == doubled
    assert container == nested


@given(DICTS, st.data())
def test_chosen_and_pruned_parts_make_the_whole(
    nested: dict[str, Any], data: st.DataObject
) -> None:
    container = Container(nested)
    chains = tree.key_chains(container)
    choice = data.draw(st.lists(st.sampled_from(chains), unique=True)) if chains else []
    part, rest = container.at_key_chains(choice), container.prune_key_chains(choice)
    assert isinstance(part, Container)
    assert isinstance(rest, Container)
    together = rest.set_at_key_chains(dict(part.to_iterator()))
    assert dict(together.to_iterator()) == dict(container.to_iterator())


@given(DICTS)
def test_copies(nested: dict[str, Any]) -> None:
    container = Container(nested)
    for other in (
        container.copy(),
        copy.copy(container),
        copy.deepcopy(container),
        pickle.loads(pickle.dumps(container)),
    ):
        assert type(other) is Container
        assert other is not container
        assert other == container
        assert repr(other) == repr(container)


def test_a_copy_shares_leaves_and_no_nodes(v: Container) -> None:
    other = v.copy()
    assert other.layer.w is v.layer.w
    other.layer.w = 0
    assert v.layer.w is not other.layer.w


def test_attribute_and_key_are_the_same(v: Container) -> None:
    assert v.layer.w is v["layer"]["w"] is v["layer/w"]
    v.layer.w = 1
    v.extra = {"nested": {"deep": 2}}
    assert v["layer/w"] == 1
    assert v.extra.nested.deep == 2
    del v.extra
    assert "extra" not in v


def test_what_a_key_chain_finds_it_takes_out(v: Container) -> None:
    for chain in tree.key_chains(v):
        left, leaf = v.copy(), v[chain]
        assert left.pop(chain) is leaf
        assert chain not in left
        assert left.pop(chain, 3) == 3
        with pytest.raises(UnknownKeyError, match="no key"):
            left.pop(chain)
        with pytest.raises(UnknownKeyError, match="no key"):
            del left[chain]
        other = v.copy()
        del other[chain]
        assert tree.key_chains(other) == tree.key_chains(left)
    with pytest.raises(InputError, match="'a' is a list and no Container"):
        del Container(a=[1, 2])["a/0"]


def test_chains_go_through_lists() -> None:
    container = Container(layers=[{"w": 1}, {"w": 2}])
    assert container["layers/1/w"] == 2
    assert "layers/2/w" not in container
    assert container.get("layers/2/w", "none") == "none"


@pytest.mark.parametrize("way", ["set", "update", "keyword", "setdefault", "or", "ior"])
def test_nested_dicts_become_containers_however_they_come_in(way: str) -> None:
    container = Container()
    match way:
        case "set":
            container["a"] = {"b": 1}
        case "update":
            container.update({"a": {"b": 1}})
        case "keyword":
            container = Container(a={"b": 1})
        case "setdefault":
            container.setdefault("a", {"b": 1})
        case "or":
            container = container | {"a": {"b": 1}}
        case "ior":
            container |= {"a": {"b": 1}}
    assert type(container) is Container
    assert container.a.b == 1


def test_a_mistyped_name_gives_the_nearest(v: Container) -> None:
    with pytest.raises(UnknownAttributeError, match=r"no key 'layr'\. Did you mean 'layer'"):
        _ = v.layr
    with pytest.raises(AttributeError, match="no key 'lyer'"):
        del v.lyer
    with pytest.raises(UnknownKeyError, match=r"no key 'layer/v'\. Did you mean 'layer/[wb]'"):
        _ = v["layer/v"]
    with pytest.raises(KeyError, match="layer/w/deeper"):
        _ = v["layer/w/deeper"]


def test_attribute_access_runs_nothing_on_the_leaves() -> None:
    class Leaf:
        def dangerous(self) -> None:
            raise AssertionError("ran")

    with pytest.raises(AttributeError, match="no key 'dangerous'"):
        _ = Container(a=Leaf()).dangerous
    assert not hasattr(Container(a=Leaf()), "__array__")


def test_a_key_that_is_a_method_is_reached_by_index() -> None:
    container = Container({"mean": 3})
    assert container["mean"] == 3
    assert callable(container.mean)
    with pytest.raises(AttributeError, match=r"'mean' is a Container method.*container\['mean'\]"):
        container.mean = 4


@pytest.mark.parametrize("key", [1, "", "a/b", None, ("a",)])
def test_keys_are_strings_without_slashes(key: Any) -> None:
    with pytest.raises(InputError, match="non-empty strings without '/'"):
        Container({key: 1})


def test_dir_lists_the_keys(v: Container) -> None:
    assert "layer" in dir(v)
    assert "multi_map" in dir(v)


def test_setting_below_something_that_is_no_container(v: Container) -> None:
    with pytest.raises(InputError, match="'x' cannot be set below 'w', which is a ndarray"):
        v.set_at_key_chains({"layer/w/x": 1})


def test_set_at_key_chains_adds_and_keeps_the_rest(v: Container) -> None:
    changed = v.set_at_key_chains({"layer/w": 1, "new/deep": 2})
    assert changed.layer.b is v.layer.b
    assert (changed.layer.w, changed.new.deep) == (1, 2)
    assert "new" not in v
    assert v.set_at_key_chains({"layer": {"w": 1}}).layer.b is v.layer.b


# -- arithmetic ----------------------------------------------------------------------------

BINARY = [operator.add, operator.sub, operator.mul, operator.truediv]


def check(result: Container, expected: dict[str, Any], to_np: Callable[[Any], Any]) -> None:
    assert type(result) is Container
    found = dict(to_np(result).to_iterator())
    assert found.keys() == expected.keys()
    for chain, value in expected.items():
        np.testing.assert_allclose(found[chain], value, rtol=1e-15, err_msg=chain)


@pytest.mark.parametrize("op", BINARY, ids=lambda op: op.__name__)
def test_arithmetic(
    v: Container, op: Callable[..., Any], arr: Callable[..., Any], to_np: Callable[[Any], Any]
) -> None:
    a, b = arr(v), arr(v.map(lambda x: x + 3))
    np_a, np_b = dict(v.to_iterator()), {c: x + 3 for c, x in v.to_iterator()}
    check(op(a, b), {c: op(np_a[c], np_b[c]) for c in np_a}, to_np)
    check(op(a, b.to_dict()), {c: op(np_a[c], np_b[c]) for c in np_a}, to_np)
    check(op(b, 2.0), {c: op(np_b[c], 2.0) for c in np_b}, to_np)
    check(op(2.0, b), {c: op(2.0, np_b[c]) for c in np_b}, to_np)
    check(op(np.float64(2), b), {c: op(2.0, np_b[c]) for c in np_b}, to_np)
    check(op(arr(2.0), b), {c: op(2.0, np_b[c]) for c in np_b}, to_np)


def test_powers_and_signs(
    v: Container, arr: Callable[..., Any], to_np: Callable[[Any], Any]
) -> None:
    check(arr(v) ** 2, {c: x**2 for c, x in v.to_iterator()}, to_np)
    check(-arr(v), {c: -x for c, x in v.to_iterator()}, to_np)
    check(abs(arr(v)), {c: abs(x) for c, x in v.to_iterator()}, to_np)


def test_numpy_arrays_leave_the_work_to_the_container(v: Container) -> None:
    result = np.array([[2.0], [3.0]]) * Container(w=v.layer.w)
    assert isinstance(result, Container)
    np.testing.assert_array_equal(result.w, np.array([[2.0], [3.0]]) * v.layer.w)


def test_arithmetic_with_another_structure_names_the_keys(v: Container) -> None:
    with pytest.raises(InputError, match=r"missing \['layer/b', 'layer/w'\]; unexpected \['a'\]"):
        _ = v + Container(a=1)


@pytest.mark.parametrize("names", list(permutations(BACKENDS, 2)), ids="-".join)
def test_frameworks_do_not_mix(names: tuple[str, str]) -> None:
    for name in names:
        require(name)
    one, other = (Container(a=load_backend(name).asarray([1.0])) for name in names)
    for combine in (
        lambda: one + other,
        lambda: one * other.a,
        lambda: Container.stack([one, other]),
    ):
        with pytest.raises(InputTypeError, match=f"{names[0]!r} and {names[1]!r}"):
            combine()


# -- reductions and axes -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "sum", "max", "min"])
@pytest.mark.parametrize(("axis", "keepdims"), [(None, False), (0, False), (-1, True)])
def test_reductions(
    v: Container,
    name: str,
    axis: int | None,
    keepdims: bool,
    arr: Callable[..., Any],
    to_np: Callable[[Any], Any],
) -> None:
    result = getattr(arr(v), name)(axis=axis, keepdims=keepdims)
    reduce = getattr(np, name)
    check(result, {c: reduce(x, axis=axis, keepdims=keepdims) for c, x in v.to_iterator()}, to_np)


def test_integers_have_no_mean(arr: Callable[..., Any], to_np: Callable[[Any], Any]) -> None:
    """As `ops.mean` has it: one framework truncates, one promotes, one refuses."""
    whole = arr(Container(n={"ones": np.array([1, 2])}))
    with pytest.raises(InputTypeError, match=r"mean needs a floating array.*ops\.astype"):
        whole.mean()
    check(whole.sum(), {"n/ones": 3}, to_np)
    check(whole.max(), {"n/ones": 2}, to_np)
    check(arr(Container(seen=np.array([True, True]))).sum(), {"seen": 2}, to_np)


@pytest.mark.usefixtures("backend")
def test_neutral_leaves_are_reduced_on_the_selected_backend(
    v: Container, to_np: Callable[[Any], Any]
) -> None:
    check(v.mean(), {c: np.mean(x) for c, x in v.to_iterator()}, to_np)
    check(Container(a=2).set_at_key_chains({"a": 2.5}).sum(), {"a": 2.5}, to_np)
    check(Container.stack([v, v]), {c: np.stack([x, x]) for c, x in v.to_iterator()}, to_np)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stack_then_unstack(
    v: Container, axis: int, arr: Callable[..., Any], to_np: Callable[[Any], Any]
) -> None:
    rows = [arr(v), arr(v + 1.0), arr(v + 2.0)]
    stacked = Container.stack(rows, axis=axis)
    check(stacked, {c: np.stack([x, x + 1, x + 2], axis) for c, x in v.to_iterator()}, to_np)
    for row, original in zip(stacked.unstack(axis=axis), rows, strict=True):
        check(row, dict(to_np(original).to_iterator()), to_np)
    kept = stacked.unstack(axis=axis, keepdims=True)[1]
    check(kept, {c: np.expand_dims(x + 1, axis) for c, x in v.to_iterator()}, to_np)


@pytest.mark.parametrize(
    ("container", "axis"),
    [
        (Container(), 0),
        (Container(a=1.0), 0),
        (Container(a=np.ones(2), b=np.ones(3)), 0),
        (Container(a=np.ones(2), b=np.ones((2, 3))), 1),
    ],
)
def test_unstack_wants_one_size(container: Container, axis: int) -> None:
    with pytest.raises(InputError, match=f"one size along axis {axis}, received shapes"):
        container.unstack(axis=axis)


def test_unstack_of_an_empty_axis() -> None:
    assert Container(a=np.ones((0, 2))).unstack() == []


def test_index_every_leaf(
    v: Container, arr: Callable[..., Any], to_np: Callable[[Any], Any]
) -> None:
    check(arr(v)[0:1], {c: x[0:1] for c, x in v.to_iterator()}, to_np)
    check(arr(v)[1], {c: x[1] for c, x in v.to_iterator()}, to_np)


def test_shape(v: Container, arr: Callable[..., Any]) -> None:
    assert arr(v).shape == (2,)
    assert arr(Container(a=np.ones((4, 2)), b=np.ones((4, 3)))).shape == (4, None)
    assert Container().shape == ()


def test_multi_map(v: Container) -> None:
    total = Container.multi_map(lambda a, b, c: a + b + c, [v, v, v])
    np.testing.assert_array_equal(total.layer.w, 3 * v.layer.w)
    with pytest.raises(InputError, match="at least one Container"):
        Container.multi_map(max, [])


# -- a node to the frameworks' own transforms ------------------------------------------------


def test_through_jax() -> None:
    require("jax")
    import jax
    import jax.numpy as jnp

    container = Container(b=jnp.ones(3), a={"w": jnp.arange(6.0).reshape(3, 2)})
    doubled = jax.jit(lambda c: c * 2)(container)
    assert type(doubled) is type(doubled.a) is Container
    np.testing.assert_array_equal(doubled.a.w, 2 * container.a.w)
    sums = jax.vmap(lambda c: c.sum())(container)
    np.testing.assert_array_equal(sums.a.w, [1.0, 5.0, 9.0])
    grads = jax.grad(lambda c: (c.a.w**2).sum())(container)
    np.testing.assert_array_equal(grads.a.w, 2 * container.a.w)
    paths = jax.tree_util.tree_flatten_with_path(container)[0]
    assert [jax.tree_util.keystr(path) for path, _ in paths] == ["['a']['w']", "['b']"]


def test_through_torch() -> None:
    require("torch")
    import torch
    from torch.utils import _pytree

    container = Container(b=torch.ones(3), a={"w": torch.arange(6.0).reshape(3, 2)})
    sums = torch.func.vmap(lambda c: c.map(torch.sum))(container)
    assert type(sums) is type(sums.a) is Container
    np.testing.assert_array_equal(sums.a.w, [1.0, 5.0, 9.0])
    grads = torch.func.grad(lambda c: (c.a.w**2).sum())(container)
    np.testing.assert_array_equal(grads.a.w, 2 * container.a.w)
    leaves, spec = _pytree.tree_flatten(container)
    assert [leaf.shape for leaf in leaves] == [(3, 2), (3,)]
    assert _pytree.tree_unflatten(leaves, spec) == container


def test_through_tensorflow() -> None:
    require("tensorflow")
    import tensorflow as tf

    container = Container(b=tf.ones(3), a={"w": tf.reshape(tf.range(6.0), (3, 2))})
    doubled = tf.function(lambda c: c * 2, autograph=False)(container)
    assert type(doubled) is type(doubled.a) is Container
    np.testing.assert_array_equal(doubled.a.w, 2 * container.a.w)
    sums = tf.vectorized_map(lambda c: c.map(tf.reduce_sum), container)
    np.testing.assert_array_equal(sums.a.w, [1.0, 5.0, 9.0])
    with tf.GradientTape() as tape:
        tape.watch(container)
        cost = tf.reduce_sum(container.a.w**2) + tf.reduce_sum(container.b)
    np.testing.assert_array_equal(tape.gradient(cost, container).a.w, 2 * container.a.w)


# -- subclasses ------------------------------------------------------------------------------


class Named(Container):
    """A Container with a method of its own."""

    def sizes(self) -> list[int]:
        return [leaf.size for _, leaf in self.to_iterator()]


def test_a_subclass_is_a_node(v: Container) -> None:
    named = Named(v, extra=Named(n=np.ones(3)))
    assert tree.key_chains(named) == ("extra/n", "layer/b", "layer/w")
    results = {
        "map": named.map(lambda x: x),
        "copy": named.copy(),
        "deepcopy": copy.deepcopy(named),
        "pickle": pickle.loads(pickle.dumps(named)),
        "plus": named + 1.0,
        "or": named | {"more": 1.0},
        "slice": named[0:1],
        "pruned": named.prune_key_chains("layer"),
        "set": named.set_at_key_chains({"layer/b": np.zeros(2)}),
    }
    assert {name: type(x) for name, x in results.items()} == dict.fromkeys(results, Named)
    assert {type(x.extra) for x in results.values()} == {Named}
    assert type(named.layer) is Container
    assert (named + 1.0).sizes() == [3, 2, 6]
    np.testing.assert_array_equal((named + named).extra.n, 2 * np.ones(3))
    flat = Named(a=np.ones(2))
    np.testing.assert_array_equal((flat + {"a": 1.0}).a, [2.0, 2.0])


def test_a_subclass_goes_through_an_inner_loop(arr: Callable[..., Any], to_np: Any) -> None:
    """And through the transforms and the compiler of its framework."""

    def adapt(given: Any, x: Any) -> Any:
        def cost(batch: Any, v: Any) -> Any:
            assert type(v) is Named
            return ops.sum(ops.square(v.inner.w - batch)) / 2

        return inner_loop(cost, given, x, steps=1, lr=0.25)

    given = arr(Named(inner={"w": np.array([1.0, 2.0])}))
    for found in (adapt(given, arr(np.zeros(2))), compile(adapt)(given, arr(np.zeros(2)))):
        assert type(found) is Named
        np.testing.assert_allclose(to_np(found).inner.w, [0.75, 1.5])


def test_a_subclass_goes_through_the_trees_of_the_frameworks() -> None:
    require("torch")
    require("jax")
    import jax
    from torch.utils import _pytree

    named = Named(inner={"w": np.array([1.0, 2.0])})
    assert type(jax.tree.map(lambda x: x, named)) is Named
    leaves, spec = _pytree.tree_flatten(named)
    assert len(leaves) == 1
    assert type(_pytree.tree_unflatten(leaves, spec)) is Named


# -- text ------------------------------------------------------------------------------------


def test_repr_is_the_same_on_every_backend(backend: Backend, arr: Callable[..., Any]) -> None:
    container = arr(Container(b=np.ones((2, 2)), a={"big": np.zeros((50, 2)), "n": np.arange(3)}))
    assert backend.owns(container.b)
    assert repr(container) == (
        "{\n"
        "    a: {\n"
        "        big: float64[50, 2],\n"
        "        n: int64[3] [0 1 2]\n"
        "    },\n"
        "    b: float64[2, 2] [[1. 1.] [1. 1.]]\n"
        "}"
    )


def test_repr_of_other_leaves() -> None:
    assert (
        repr(Container(a="text", b=None, c=[1])) == "{\n    a: 'text',\n    b: None,\n    c: [1]\n}"
    )
    assert repr(Container()) == "{}"


def test_repr_while_traced(backend: Backend, arr: Callable[..., Any]) -> None:
    seen = []

    def probe(xs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(repr(Container(x=xs[0])))
        return xs

    backend.compile(probe, (arr([1.0, 2.0]),))
    assert set(seen) == {"{\n    x: float64[2] traced\n}"}


def test_a_container_made_before_its_framework_was_selected(backend_name: str) -> None:
    container = Container(a=np.ones(2))
    with use_backend(backend_name) as backend:
        assert backend.owns(container.sum().a)
