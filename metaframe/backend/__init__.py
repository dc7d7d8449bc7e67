"""Backends: what a framework provides, which are known, and which one a call runs on.

`contract.py` is what the adapter of a framework implements, with the tables in `tables.py`, the
models in `model.py` and the workers in `workers.py`. `registry.py` knows the backends, and
`selection.py` chooses one for a call.
"""

from metaframe.backend.contract import Backend as Backend
from metaframe.backend.contract import NativeOptimizer as NativeOptimizer
from metaframe.backend.model import BatchNorm as BatchNorm
from metaframe.backend.model import Forward as Forward
from metaframe.backend.model import Inputs as Inputs
from metaframe.backend.model import ModelAdapter as ModelAdapter
from metaframe.backend.model import NamedParameters as NamedParameters
from metaframe.backend.registry import BackendInfo as BackendInfo
from metaframe.backend.registry import available_backends as available_backends
from metaframe.backend.registry import load_backend as load_backend
from metaframe.backend.selection import current_backend as current_backend
from metaframe.backend.selection import set_backend as set_backend
from metaframe.backend.selection import unset_backend as unset_backend
from metaframe.backend.selection import use_backend as use_backend
from metaframe.backend.tables import NNTable as NNTable
from metaframe.backend.tables import OpsTable as OpsTable
from metaframe.backend.types import Array as Array
from metaframe.backend.types import Arrays as Arrays
from metaframe.backend.types import ArraysFn as ArraysFn
from metaframe.backend.types import ObjectiveFn as ObjectiveFn
from metaframe.backend.types import ScalarFn as ScalarFn
