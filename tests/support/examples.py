"""The scripts in examples/, loaded as modules, and derivatives to check them against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complex_slopes(fn: Callable[[Any], Any], x: Any) -> Any:
    """The gradient of a real function of one array by complex steps, which are exact to rounding.

    Args:
        fn: analytic, and written in NumPy without absolute values or conjugates.
        x: where, a real array.
    """
    slopes = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[place] += 1e-30j
        slopes[place] = fn(moved).imag / 1e-30
    return slopes
