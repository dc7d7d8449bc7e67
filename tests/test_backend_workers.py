"""Who runs which task: shares are equal, in order, and leave none out."""

from __future__ import annotations

import numpy as np
import pytest

from metaframe.backend.workers import ALONE, Alone

COUNTS = [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)]
"""Workers, and the processes that have them."""


@pytest.mark.parametrize(("count", "processes"), COUNTS)
@pytest.mark.parametrize("num_tasks", [1, 3, 4, 5, 12])
def test_shares(count: int, processes: int, num_tasks: int) -> None:
    """The last task fills the places that are left over."""
    every = [Alone(count, process, processes) for process in range(processes)]
    shares = [workers.share(num_tasks) for workers in every]
    places = -(-num_tasks // count) * count
    assert {workers.padded(num_tasks) for workers in every} == {places}
    assert {len(share) for share in shares} == {places // processes}
    expected = [*range(num_tasks), *[num_tasks - 1] * (places - num_tasks)]
    assert [task for share in shares for task in share] == expected


def test_one_process_writes_files() -> None:
    assert [Alone(2, process, 2).is_first for process in range(2)] == [True, False]


def test_alone_runs_the_whole_and_hears_itself() -> None:
    tasks = (np.arange(6.0).reshape(3, 2),)
    found = ALONE.each(lambda mine, i, add: (add(mine[0].sum(0)), i), tasks, shared=False)
    np.testing.assert_array_equal(found[0], [6.0, 9.0])
    assert found[1] == 0
    assert ALONE.tell("word") == ["word"]
    assert ALONE.last_word() is None
