"""Agreement of all processes on algorithm, settings, keys and shapes before the first step.

Processes that disagree would add up arrays that do not belong together, some of them silently. So
they compare a digest of a description of everything but the arrays' values, once for each
description, and if it differs find out where.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np

from metaframe import tree
from metaframe.backend.contract import Backend
from metaframe.backend.registry import owner
from metaframe.backend.selection import is_neutral
from metaframe.errors import BackendError, DistributedError

NUMBERS = (int, float, complex, np.number, np.bool_)
CONSTANTS = (int, float, complex, str, tuple)


def agree(backend: Backend, **what: Any) -> None:
    """All processes call this with the same things, up to the values of arrays.

    Raises:
        DistributedError: on every process, if one of them differs, with the first difference.
        BackendError: this is one of several processes, and they have not been joined.
    """
    workers = backend.workers()
    if workers.processes == 1:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BackendError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and this process has not joined the "
                f'others. Enter `with metaframe.distributed.session("{backend.name}"):` first.'
            )
        return
    lines = [f"{path[1:]} = {value}" for path, value in described(what)]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if digest in workers.agreed:
        return
    if len(set(workers.tell(digest))) > 1:
        everyone = [json.loads(text) for text in workers.tell(json.dumps(lines))]
        raise DistributedError(_disagreement(everyone))
    workers.agreed.add(digest)


def _disagreement(everyone: list[list[str]]) -> str:
    for process, lines in enumerate(everyone):
        for i in range(max(len(lines), len(everyone[0]))):
            first, other = (
                each[i] if i < len(each) else "nothing" for each in (everyone[0], lines)
            )
            if first != other:
                return (
                    f"the {len(everyone)} processes do not agree: process 0 has {first}, process "
                    f"{process} has {other}. Start all of them with the same program, settings and "
                    "data."
                )
    return f"the {len(everyone)} processes do not agree."


def described(
    x: Any, path: str = "", seen: dict[int, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """Everything about `x` that is the same in every process, as pairs of a path and a text.

    Of an array dtype and shape; of a function its name and code, what it closes over, its defaults
    and the numbers and functions of its own module that it names; of a structure its parts; of any
    other object its class, and if it can be called the numbers among its public attributes.

    >>> dict(described({"lr": 0.1, "steps": (1, 2)}))
    {'/lr': '0.1', '/steps': 'tuple', '/steps/0': '1', '/steps/1': '2'}
    """
    seen = {} if seen is None else seen
    backend = owner(x)
    if backend is not None:
        yield path, f"{backend.dtype_name(x)} {tuple(x.shape)}"
    elif isinstance(x, (str, bytes, complex, type(None))):
        yield path, repr(x)
    elif is_neutral(x):
        yield path, f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else repr(x)
    else:
        if path:
            yield path, _kind(x)
        if id(x) not in seen:
            seen[id(x)] = x
            for name, value in _parts(x):
                yield from described(value, f"{path}/{name}", seen)


def _kind(x: Any) -> str:
    if isinstance(x, FunctionType):
        code = b"".join(each.co_code for each in _codes(x.__code__))
        return f"{x.__module__}.{x.__qualname__} {hashlib.sha256(code).hexdigest()[:16]}"
    if isinstance(x, type):
        return f"{x.__module__}.{x.__qualname__}"
    return type(x).__qualname__


def _parts(x: Any) -> list[tuple[str, Any]]:
    if isinstance(x, FunctionType):
        return _of_function(x)
    if isinstance(x, MethodType):
        return [("function", x.__func__), ("self", x.__self__)]
    if isinstance(x, functools.partial):
        return [("function", x.func), ("arguments", x.args), ("keywords", x.keywords)]
    if isinstance(x, type):
        return []
    if dataclasses.is_dataclass(x):
        return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
    if isinstance(x, Mapping):
        return sorted((str(key), value) for key, value in x.items())
    if isinstance(x, (list, tuple)):
        return [(str(i), value) for i, value in enumerate(x)]
    leaves = tree.leaves(x)
    if len(leaves) != 1 or leaves[0] is not x:
        return list(zip(tree.key_chains(x), leaves, strict=True))
    attributes = sorted(getattr(x, "__dict__", {}).items()) if callable(x) else []
    return [(n, v) for n, v in attributes if isinstance(v, NUMBERS) and not n.startswith("_")]


def _of_function(fn: FunctionType) -> list[tuple[str, Any]]:
    codes = list(_codes(fn.__code__))
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    constants = [c for code in codes for c in code.co_consts if isinstance(c, CONSTANTS)]
    named = {name: fn.__globals__.get(name) for code in codes for name in code.co_names}
    return [
        *((name, _content(cell)) for name, cell in cells),
        *((f"default {i}", value) for i, value in enumerate(fn.__defaults__ or ())),
        *sorted((fn.__kwdefaults__ or {}).items()),
        *((f"constant {i}", c) for i, c in enumerate(constants)),
        *((name, value) for name, value in named.items() if _belongs(value, fn)),
    ]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """That of a function and of those written in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _belongs(value: Any, fn: FunctionType) -> bool:
    """True if a global is one that makes another function of `fn`.

    Not the rest: paths, devices and loggers may differ from process to process.
    """
    if isinstance(value, FunctionType):
        return value.__globals__ is fn.__globals__
    return isinstance(value, NUMBERS)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
