"""Every function under every transform: the right numbers, or an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from frameworks import BACKENDS, require, slow
from metaframe.backend import load_backend
from metaframe.errors import MetaframeError
from transform_tables import (
    BY_DEFAULT,
    FUNCTIONS,
    PAGE,
    Fn,
    Refused,
    Row,
    W,
    functions,
    page_with_tables,
    rows,
)

pytestmark = [
    # What torch says of transforms that a user chose.
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*might cause the trace to be incorrect"),
]


def _cells() -> Iterator[Any]:
    for framework in BACKENDS:
        try:
            table = rows(framework)
        except ImportError:  # reported by the test of the page
            continue
        for name, row in table.items():
            for function in FUNCTIONS:
                quick = function in BY_DEFAULT[framework] and not row.slow
                make = pytest.param if quick else slow
                yield make((framework, row, function), id=f"{framework}-{name}-{function}")


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, tuple[Fn, Fn]]]:
    """The functions of each framework, made and compiled once."""
    return {}


@pytest.mark.parametrize("cell", tuple(_cells()))
def test_transform(cell: tuple[str, Row, str], made: dict[str, dict[str, tuple[Fn, Fn]]]) -> None:
    framework, row, function = cell
    require(framework)
    backend = load_backend(framework)
    with backend.double_precision():
        if framework not in made:
            made[framework] = functions(backend)
        ours, plain = made[framework][function]
        outcome, w = row.of(function), backend.asarray(W, "float64")
        if isinstance(outcome, Refused):
            with pytest.raises(outcome.error):
                row.run(ours, w)
            assert issubclass(outcome.error, MetaframeError)
            return
        found, expected = (backend.to_numpy(row.run(f, w)) for f in (ours, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_page_is_current() -> None:
    for framework in BACKENDS:
        require(framework)
    text = PAGE.read_text()
    assert page_with_tables(text) == text, "run: python tests/support/transform_tables.py"
