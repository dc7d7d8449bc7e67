"""Names that ivy 1.0.0.5 needs of newer frameworks; nothing of ours needs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def let_ivy_read_arrays(backend: str, setattr: Callable[..., Any] = setattr) -> None:
    """Let ivy turn an array into NumPy, which needs JAX < 0.10 or NumPy < 2.4."""
    if backend == "jax":
        public, private = (
            importlib.import_module(f"jax.{name}")
            for name in ("interpreters.batching", "_src.interpreters.batching")
        )
        # It asks whether an array is one of these, by a name that JAX no longer exports.
        setattr(public, "BatchTracer", private.BatchTracer)
    elif backend == "tensorflow":
        import tensorflow

        # It takes the int of a one-element vector, which NumPy made an error.
        setattr(type(tensorflow.constant(0)), "__int__", lambda x: int(x.numpy().item()))
