"""Nested structures: the rules of `metaframe.tree`, and round trips over random structures."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from types import MappingProxyType
from typing import Any, NamedTuple

import optree
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metaframe import tree
from metaframe.core.container import Container
from metaframe.errors import InputError, UnknownKeyError


class Pair(NamedTuple):
    first: Any
    second: Any


@tree.register_dataclass
@dataclasses.dataclass
class Batch:
    x: Any
    y: Any


KEYS = st.text("abcxyz_", min_size=1, max_size=4)
LEAVES = st.integers() | st.floats(allow_nan=False)


def _nodes(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(KEYS, inner, max_size=4).map(Container)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(deque)
        | st.builds(Pair, inner, inner)
        | st.builds(Batch, inner, inner)
    )


TREES = st.recursive(st.none() | LEAVES, _nodes, max_leaves=12)
MAPPINGS = st.recursive(
    LEAVES, lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=4), max_leaves=12
).filter(lambda node: isinstance(node, dict))


# -- flatten and back ----------------------------------------------------------------------


@given(TREES)
def test_flatten_then_unflatten_gives_the_tree_back(node: Any) -> None:
    leaves, spec = tree.flatten(node)
    again = tree.unflatten(spec, leaves)
    assert again == node
    assert type(again) is type(node)
    assert tree.structure(again) == spec


@given(TREES)
def test_leaves_chains_and_flags_line_up(node: Any) -> None:
    assert len(tree.leaves(node)) == len(tree.key_chains(node)) == len(tree.chosen(node, None))


@given(TREES)
def test_map_keeps_the_structure(node: Any) -> None:
    doubled = tree.map(lambda x: (x,), node)
    assert tree.map(lambda x: x, node) == node
    assert tree.leaves(doubled) == tree.leaves(node)
    assert tree.map(lambda a, b: a is b, node, node) == tree.map(lambda _: True, node)


@given(TREES)
def test_children_follow_every_key_chain(node: Any) -> None:
    def follow(inner: Any, parts: list[str]) -> Any:
        for part in parts:
            inner = tree.children(inner)[part]
        return inner

    for chain, leaf in zip(tree.key_chains(node), tree.leaves(node), strict=True):
        assert follow(node, chain.split("/") if chain else []) is leaf


def test_mapping_order_is_sorted_keys_whatever_the_insertion_order() -> None:
    assert tree.leaves({"b": 1, "a": 2}) == tree.leaves({"a": 2, "b": 1}) == (2, 1)
    assert tree.leaves(Container(b=1, a=2)) == (2, 1)
    assert tree.structure({"b": 1, "a": 2}) == tree.structure({"a": 2, "b": 1})


def test_none_is_an_empty_subtree() -> None:
    assert tree.leaves({"a": None, "b": [None, 1]}) == (1,)
    assert tree.leaves(None) == ()
    assert tree.map(lambda x: x + 1, {"a": None, "b": 1}) == {"a": None, "b": 2}


def test_key_chains_name_fields_keys_and_places() -> None:
    node = {"p": Pair(1, [2, 3]), "b": Batch(4, {"t": 5}), 7: 6}
    assert sorted(tree.key_chains(node)) == [
        "7", "b/x", "b/y/t", "p/first", "p/second/0", "p/second/1",
    ]  # fmt: skip


def test_a_bare_leaf_has_the_empty_chain() -> None:
    assert tree.key_chains(3) == ("",)
    assert tree.children(3) == {}


def test_is_leaf_stops_the_descent() -> None:
    leaves, spec = tree.flatten({"a": [1, 2]}, is_leaf=lambda node: isinstance(node, list))
    assert leaves == ([1, 2],)
    assert tree.unflatten(spec, [0]) == {"a": 0}


def test_a_users_registration_with_optree_is_seen() -> None:
    class Box:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

    optree.register_pytree_node(
        Box,
        lambda box: ((box.inner,), None),
        lambda _, children: Box(*children),
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
    assert tree.leaves(Box({"w": 1})) == (1,)


def test_our_registrations_stay_in_our_namespace() -> None:
    assert optree.tree_leaves(Container(a=1)) == [Container(a=1)]
    assert optree.tree_leaves(Batch(1, 2)) == [Batch(1, 2)]


def test_a_field_that_the_class_computes_is_no_child() -> None:
    @tree.register_dataclass
    @dataclasses.dataclass
    class Scaled:
        x: int
        twice: int = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.twice = 2 * self.x

    assert tree.map(lambda x: x + 1, Scaled(1)) == Scaled(2)


def test_register_dataclass_wants_a_dataclass() -> None:
    with pytest.raises(InputError, match="Plain is not a dataclass"):

        @tree.register_dataclass
        class Plain:
            pass


# -- structures that differ ------------------------------------------------------------------


def test_map_over_different_structures_names_the_leaves() -> None:
    with pytest.raises(ValueError, match=r"missing \['b/w'\]; unexpected \['b/v', 'c'\]"):
        tree.map(lambda a, b: a, {"a": 1, "b": {"w": 2}}, {"a": 1, "b": {"v": 2}, "c": 3})


def test_same_leaves_in_other_nodes_are_another_structure() -> None:
    with pytest.raises(ValueError, match="the keys agree, but it is made of"):
        tree.same_structure((1, 2), tree.structure([1, 2]), what="grads")


@given(TREES, TREES)
def test_same_structure_agrees_with_the_specs(one: Any, other: Any) -> None:
    spec = tree.structure(one)
    assume(tree.structure(other) != spec)
    assert tree.same_structure(one, spec, what="it") == tree.leaves(one)
    with pytest.raises(InputError):
        tree.same_structure(other, spec, what="it")


# -- choosing and pruning --------------------------------------------------------------------

VARIABLES = {"a": {"w": 0, "b": 0}, "c": [0, 0], "d": 0}
CHAINS = ("a/b", "a/w", "c/0", "c/1", "d")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, CHAINS),
        ("a", ("a/b", "a/w")),
        ("a/w", ("a/w",)),
        (["a/w", "c/1"], ("a/w", "c/1")),
        (("c", "c/1"), ("c/0", "c/1")),
        ([], ()),
        ({}, ()),
        ({"a": True}, ("a/b", "a/w")),
        ({"a": {"w": True, "b": False}, "d": False}, ("a/w",)),
        ({"a": {"w": None}, "d": True}, ("d",)),
        ({"c": [True, False]}, ("c/0",)),
        ({"c": {0: False, 1: True}}, ("c/1",)),
        (Container(a={"b": True}), ("a/b",)),
        (MappingProxyType({"a": MappingProxyType({"b": True})}), ("a/b",)),
    ],
)
def test_chosen(choice: Any, expected: tuple[str, ...]) -> None:
    assert tree.key_chains(VARIABLES) == CHAINS
    assert tree.chosen(VARIABLES, choice) == tuple(chain in expected for chain in CHAINS)
    inverted = CHAINS if choice is None else tuple(c for c in CHAINS if c not in expected)
    kept = tree.chosen(VARIABLES, choice, keep=choice is None)
    assert kept == tuple(chain in inverted for chain in CHAINS)


@pytest.mark.parametrize("choice", ["a/v", ["d", "a/v"], {"a": {"v": True}}, {"a": {"v": False}}])
def test_a_chain_that_names_nothing(choice: Any) -> None:
    with pytest.raises(UnknownKeyError, match=r"key chain 'a/v'. Did you mean 'a/[wb]'"):
        tree.chosen(VARIABLES, choice)


def test_a_chain_matches_whole_keys_only() -> None:
    assert tree.chosen({"layer": 0, "layer2": 0}, "layer") == (True, False)


@given(MAPPINGS, st.data())
def test_the_choice_and_its_inverse_share_out_the_leaves(node: Any, data: st.DataObject) -> None:
    chains = tree.key_chains(node)
    choice = data.draw(st.lists(st.sampled_from(chains), unique=True))
    kept = tree.prune(node, tree.chosen(node, choice))
    rest = tree.prune(node, tree.chosen(node, choice, keep=False))
    assert set(tree.key_chains(kept)) == set(choice)
    assert set(tree.key_chains(rest)) == set(chains) - set(choice)


@given(TREES, st.data())
def test_prune_keeps_exactly_the_flagged_leaves(node: Any, data: st.DataObject) -> None:
    leaves = tree.leaves(node)
    keep = data.draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)))
    expected = tuple(leaf for leaf, flag in zip(leaves, keep, strict=True) if flag)
    assert tree.leaves(tree.prune(node, keep)) == expected


def test_prune_leaves_the_input_alone() -> None:
    node = {"a": {"w": 1, "b": 2}}
    assert tree.prune(node, (False, True)) == {"a": {"w": 1}}
    assert node == {"a": {"w": 1, "b": 2}}


def test_prune_to_nothing() -> None:
    assert tree.prune({"a": {"w": 1}}, (False,)) == {}
    assert tree.prune(Container(a=1), (False,)) == Container()
    assert tree.prune(Pair(1, 2), (False, False)) is None


def test_prune_wants_one_flag_a_leaf() -> None:
    with pytest.raises(InputError, match="3 flags for 2 leaves"):
        tree.prune([1, 2], (True, True, False))


# -- packing ---------------------------------------------------------------------------------


@given(TREES)
def test_packed_trees_unpack(node: Any) -> None:
    packed = tree.Packed(node, is_array=lambda leaf: isinstance(leaf, float))
    assert all(isinstance(x, float) for x in packed.arrays)
    assert packed.unpack(packed.arrays) == node
    assert [tree.leaves(node)[i] for i in packed.places] == list(packed.arrays)
