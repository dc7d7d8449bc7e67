"""torch's state around a function, which decides what the function computes."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from metaframe_torch import _private

T = TypeVar("T")

_accelerator = torch.accelerator.current_accelerator()
AUTOCAST = ("cpu",) if _accelerator is None else ("cpu", _accelerator.type)
"""The kinds of devices whose autocast has an effect here."""


class Ambient(NamedTuple):
    """The settings of this thread or process."""

    default_dtype: torch.dtype
    default_device: torch.device | None
    autocast: tuple[torch.dtype | None, ...]
    """The dtype for each kind of device, None where it is off."""
    recording: bool
    inference: bool
    others: Hashable
    """Settings of algorithms and of precision, which a program is compiled for."""

    @classmethod
    def now(cls) -> Ambient:
        """The settings at this moment."""
        return cls(
            torch.get_default_dtype(),
            torch.get_default_device() if _private.may_have_default_device() else None,
            tuple(
                torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
                for kind in AUTOCAST
            ),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            (
                torch.get_float32_matmul_precision(),
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.mkldnn.enabled,
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cuda.math_sdp_enabled(),
            ),
        )

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """The dtypes and the device as they were, for what is computed once more."""
        now = Ambient.now()
        with ExitStack() as stack:
            for kind, dtype, current in zip(AUTOCAST, self.autocast, now.autocast, strict=True):
                if dtype is not current:
                    stack.enter_context(_autocast(kind, dtype))
            if self.default_device != now.default_device:
                stack.enter_context(self.default_device or torch.device("cpu"))
            if self.default_dtype is not now.default_dtype:
                stack.callback(torch.set_default_dtype, now.default_dtype)
                torch.set_default_dtype(self.default_dtype)
            yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """For code that has its casts built in."""
    with ExitStack() as stack:
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(_autocast(kind, None))
        yield


@dataclasses.dataclass(frozen=True)
class Streams:
    """The states of the random streams that a function may draw from: torch's, Python's, NumPy's.

    Those of accelerators that are not in use yet are left alone.
    """

    torch_: tuple[bytes, ...]
    python: object
    numpy: bytes

    @classmethod
    def now(cls) -> Streams:
        """Their present states."""
        states = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            states += torch.cuda.get_rng_state_all()
        return cls(
            tuple(state.numpy().tobytes() for state in states),
            random.getstate(),
            pickle.dumps(np.random.get_state()),  # noqa: NPY002  users' code draws from it
        )

    def restore(self) -> None:
        """Go back to there."""
        first, *others = (torch.frombuffer(bytearray(s), dtype=torch.uint8) for s in self.torch_)
        torch.set_rng_state(first)
        if others:
            torch.cuda.set_rng_state_all(others)
        random.setstate(self.python)  # type: ignore[arg-type]
        np.random.set_state(pickle.loads(self.numpy))  # noqa: NPY002

    def replayed(self, fn: Callable[..., T]) -> Callable[..., T]:
        """`fn` with what it draws from Python and NumPy here, and nothing drawn for others."""

        def call(*args: Any) -> T:
            now = Streams.now()
            dataclasses.replace(self, torch_=now.torch_).restore()
            try:
                return fn(*args)
            finally:
                dataclasses.replace(now, torch_=Streams.now().torch_).restore()

        return call


def outside(fn: Callable[..., T], *args: Any) -> T:
    """`fn(*args)` where no transform, trace or mode is active: in another thread."""
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(fn, *args).result()


def _autocast(kind: str, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype=dtype)
