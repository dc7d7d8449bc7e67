"""Nested structures: the one door to them, for every backend alike.

`nodes.py` has the rules and the functions, `choice.py` chooses among leaves, `flat.py` holds what
goes through a transform, and `foreign.py` other libraries' classes around one array.
"""

from metaframe.tree.choice import chosen as chosen
from metaframe.tree.choice import flags as flags
from metaframe.tree.choice import parts as parts
from metaframe.tree.flat import Flat as Flat
from metaframe.tree.flat import Packed as Packed
from metaframe.tree.flat import Part as Part
from metaframe.tree.flat import Returned as Returned
from metaframe.tree.foreign import register_wrapper as register_wrapper
from metaframe.tree.foreign import unwrapped as unwrapped
from metaframe.tree.foreign import wrapped_as as wrapped_as
from metaframe.tree.nodes import Leaves as Leaves
from metaframe.tree.nodes import Tree as Tree
from metaframe.tree.nodes import TreeSpec as TreeSpec
from metaframe.tree.nodes import bounded as bounded
from metaframe.tree.nodes import chains as chains
from metaframe.tree.nodes import children as children
from metaframe.tree.nodes import flatten as flatten
from metaframe.tree.nodes import is_leaf as is_leaf
from metaframe.tree.nodes import key_chains as key_chains
from metaframe.tree.nodes import keyed_by_names as keyed_by_names
from metaframe.tree.nodes import leaves as leaves
from metaframe.tree.nodes import map as map
from metaframe.tree.nodes import node_types as node_types
from metaframe.tree.nodes import prune as prune
from metaframe.tree.nodes import register as register
from metaframe.tree.nodes import register_dataclass as register_dataclass
from metaframe.tree.nodes import register_dict as register_dict
from metaframe.tree.nodes import same_structure as same_structure
from metaframe.tree.nodes import structure as structure
from metaframe.tree.nodes import unflatten as unflatten

__all__ = [  # the other names are for metaframe itself
    "Tree",
    "TreeSpec",
    "flatten",
    "key_chains",
    "leaves",
    "map",
    "prune",
    "register",
    "register_dataclass",
    "register_dict",
    "register_wrapper",
    "structure",
    "unflatten",
]
