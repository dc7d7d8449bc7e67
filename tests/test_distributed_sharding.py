"""How a batch is divided and put together again, with workers that are played by one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distributed_problem import ALGORITHMS, batch, step, variables
from frameworks import hardly_depends_on_the_backend
from metaframe import meta_value_and_grad, tree
from metaframe.backend.workers import Part, Workers
from metaframe.distributed import Share
from metaframe.distributed.agreement import agree, described
from metaframe.errors import DistributedError, InputError

Call = Callable[..., Any]


class Played(Workers):
    """Workers one after the other: each says what it adds, then all hear the sum."""

    def __init__(self, count: int, told: list[str] | None = None) -> None:
        super().__init__(count, 0, 1 if told is None else 1 + len(told))
        self.sums = 0
        self.lengths: set[int] = set()
        self.told = told or []

    def each(self, part: Part, tasks: Any, *, shared: bool) -> Any:
        assert not shared
        length = tasks[0].shape[0] // self.count
        parts = [tuple(x[i * length : (i + 1) * length] for x in tasks) for i in range(self.count)]
        added: list[list[Any]] = [[] for _ in parts]
        for i, mine in enumerate(parts):
            part(mine, i, lambda x, i=i: added[i].append(x) or x)  # type: ignore[misc]
        totals = [sum(column[1:], column[0]) for column in zip(*added, strict=True)]
        self.sums += len(totals)
        self.lengths |= {int(x.shape[0]) for x in totals}
        heard = iter(totals)
        return part(parts[-1], self.count - 1, lambda x: next(heard))

    def tell(self, text: str) -> list[str]:
        return [text, *(other if other != "same" else text for other in self.told)]


@pytest.fixture
def play(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`play(count)`: the backend has so many workers."""

    def start(count: int, told: list[str] | None = None) -> Played:
        played = Played(count, told)
        monkeypatch.setattr(backend, "workers", lambda: played)
        return played

    return start


@hardly_depends_on_the_backend
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("tasks", [8, 3, 1])
def test_divided_equals_whole(
    backend: Any, arr: Call, to_np: Call, play: Call, tasks: int, workers: int
) -> None:
    data, v = arr(batch(tasks, "float64")), arr(variables("float64"))
    algorithm = ALGORITHMS[(tasks + workers) % 3]
    layout = ("vmap", "scan")[tasks % 2]
    whole = to_np(step(algorithm, batched="vmap")(data, v))
    played = play(workers)
    divided = to_np(step(algorithm, batched=layout, distributed=True)(data, v))
    for one, other in zip(tree.leaves(divided), tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
    assert played.sums == 1


def cost_with_aux(v: Any, task: Any) -> Any:
    """(w - 1/x)^2, which no padding with zeros would survive, and aux of three kinds."""
    target = 1 / task["x"]
    error = (v["w"] - target) ** 2
    return error, {"target": target, "large": error > 1.0, "label": task["label"]}


def test_every_task_keeps_its_place(backend: Any, arr: Call, to_np: Call, play: Call) -> None:
    x = np.array([0.5, 0.25, np.nan, 2.0, 1.0])
    data = arr({"x": x, "label": np.arange(5, dtype=np.int32)})
    found = meta_value_and_grad(cost_with_aux, has_aux=True)(arr({"w": 0.5}), data)
    played = play(4)
    divided = meta_value_and_grad(cost_with_aux, has_aux=True, distributed=True)
    again = divided(arr({"w": 0.5}), data)
    assert played.sums == 2  # whole numbers apart
    for name, value in to_np(again.aux).items():
        np.testing.assert_array_equal(value, to_np(found.aux)[name])
        assert value.dtype == to_np(found.aux)[name].dtype
    assert np.isnan(to_np(again.grads)["w"])
    fine = {"x": arr(np.array([0.5, 0.25, 4.0])), "label": data["label"][:3]}
    expected = np.mean(2 * (0.5 - np.array([2.0, 4.0, 0.25])))
    np.testing.assert_allclose(to_np(divided(arr({"w": 0.5}), fine).grads)["w"], expected)


@hardly_depends_on_the_backend
def test_one_buffer_in_single_precision(backend: Any, arr: Call, play: Call) -> None:
    data, v = arr(batch(3, "float32"), "float32"), arr(variables("float32"), "float32")
    played = play(2)
    _, grads = step("maml", distributed=True)(data, v)
    assert {backend.dtype_name(g) for g in tree.leaves(grads)} == {"float32"}
    numbers = sum(int(np.prod(g.shape)) for g in tree.leaves(grads))
    assert played.lengths == {numbers + 1 + 4}  # gradients, weights, and costs of four places


@pytest.mark.parametrize(("num_tasks", "share"), [(7, [0, 1, 2, 3]), (1, [0]), (8, [0, 1, 2, 3])])
def test_share(num_tasks: int, share: list[int]) -> None:
    two = Played(2, ["same"])
    assert two.share(num_tasks) == share
    two.process = 1
    last = {7: [4, 5, 6, 6], 1: [0], 8: [4, 5, 6, 7]}[num_tasks]
    assert two.share(num_tasks) == last


@hardly_depends_on_the_backend
def test_refused(backend: Any, arr: Call, play: Call) -> None:
    data, v = arr(batch(3, "float64")), arr(variables("float64"))
    play(2)
    with pytest.raises(InputError, match="divides the tasks"):
        step("maml", distributed=True, batched=True)(data, v)
    with pytest.raises(InputError, match="stop_gradients"):
        step("maml", distributed=True, stop_gradients=False)(data, v)
    with pytest.raises(InputError, match="distributed must be one of"):
        step("maml", distributed="yes")(data, v)
    with pytest.raises(InputError, match="share of 8 tasks is 8, the batch has 3"):
        meta_value_and_grad(lambda v, task: v, distributed=Share(8))(v, data)


@hardly_depends_on_the_backend
def test_disagreement_says_where(backend: Any, play: Call) -> None:
    digest, lines = "another", '["settings/lr = 0.2"]'
    told = iter([[digest], [lines]])
    played = play(1, ["same"])
    agree(backend, settings={"lr": 0.1})
    agree(backend, settings={"lr": 0.1})
    assert len(played.agreed) == 1
    played.tell = lambda text: [text, *next(told)]  # type: ignore[method-assign]
    with pytest.raises(
        DistributedError, match=r"process 0 has .*, process 1 has settings/lr = 0.2"
    ):
        agree(backend, settings={"lr": 0.3})


def test_what_is_compared() -> None:
    def closing_over(rate: float) -> Call:
        return lambda x: rate * x

    def described_by(x: Any) -> dict[str, str]:
        return dict(described(x, "x"))

    assert described_by(closing_over(0.1)) == described_by(closing_over(0.1))
    assert described_by(closing_over(0.1)) != described_by(closing_over(0.2))
    assert described_by(lambda x: x + 1) != described_by(lambda x: x - 1)
    assert described_by(np.zeros(3)) == described_by(np.ones(3))
    assert described_by(np.zeros(3)) != described_by(np.zeros(3, np.float32))
    knot: list[Any] = []
    knot.append(knot)
    assert described_by(knot) == {"x": "list", "x/0": "list"}
