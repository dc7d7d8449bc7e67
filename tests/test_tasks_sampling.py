"""Tasks are pure functions of (seed, split, index), and checked where they are made."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frameworks import hardly_depends_on_the_backend, require
from metaframe import meta_value_and_grad, ops, tree
from metaframe.backend import use_backend
from metaframe.errors import InputError, InputTypeError
from metaframe.tasks import (
    IndexedSampler,
    SinusoidTaskSampler,
    Task,
    TaskBatch,
    TaskSampler,
    digits_sampler,
    mean_and_ci95,
    sampling,
    stack_tasks,
    task_rng,
)
from metaframe.tasks.sampling import SPLITS, choices, permutations, task_numbers


def digest(task: Task) -> str:
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in tree.leaves(task))).hexdigest()


SAMPLERS = {
    "sinusoid": lambda **kw: SinusoidTaskSampler(freq_range=(0.5, 2.0), **kw),
    "digits": lambda **kw: digits_sampler(**kw),
}


@pytest.fixture(params=SAMPLERS)
def make(request):
    return SAMPLERS[request.param]


# -- purity --------------------------------------------------------------------------------


def test_a_task_does_not_depend_on_what_was_sampled_before(make):
    sampler, fresh = make(seed=7), make(seed=7)
    sampled = sampler.sample(3) + sampler.sample(2)
    assert [digest(t) for t in sampled] == [digest(fresh.task(i)) for i in range(5)]
    assert (sampler.position, fresh.position) == (5, 0)


def test_seed_split_and_index_each_give_another_task(make):
    tasks = {
        digest(make(seed=seed, split=split).task(index))
        for seed, split, index in itertools.product((0, 1), SPLITS, (0, 1, 2**40))
    }
    assert len(tasks) == 2 * 3 * 3


def test_another_process_draws_the_same_bits():
    code = (
        "from metaframe.tasks import digits_sampler as d, SinusoidTaskSampler as s;"
        "from metaframe import tree; import hashlib, json, sys;"
        "h = lambda t: hashlib.sha256(b''.join(x.tobytes() for x in tree.leaves(t))).hexdigest();"
        "print(json.dumps([h(s(seed=3).task(11)), h(d(seed=3).task(11)),"
        " sorted({'torch', 'jax', 'tensorflow'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [digest(SinusoidTaskSampler(seed=3).task(11)), digest(digits_sampler(seed=3).task(11))]
    assert json.loads(done.stdout) == [*here, []]


def test_importing_the_package_imports_no_framework_and_no_image_library():
    code = (
        "import sys, metaframe.tasks;"
        "print({'torch', 'jax', 'tensorflow', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_stream_is_pinned():
    """These bits are what every published number was drawn with; they never change."""
    drawn = task_rng(2024, "validation", 2**33 + 5).random(3)
    pinned = ["0x1.d92ed100b6475p-1", "0x1.11d60e94783ecp-3", "0x1.7f0f98f5eff94p-3"]
    assert [float(x).hex() for x in drawn] == pinned
    raw = np.random.Philox(
        key=np.array([2024, 1], np.uint64), counter=np.array([0, 0, 2**33 + 5, 0], np.uint64)
    ).random_raw(3)
    np.testing.assert_array_equal(drawn, (raw >> np.uint64(11)) * 2.0**-53)


@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**64 - 1))
def test_every_seed_and_index_in_range_is_accepted(seed, index):
    for split in SPLITS:
        assert 0 <= task_rng(seed, split, index).random() < 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, "train", 0), InputError, "seed must be at least 0"),
        ((2**64, "train", 0), InputError, "below 2"),
        ((0.5, "train", 0), InputTypeError, "seed must be an integer, received 0.5"),
        ((True, "train", 0), InputTypeError, "bool"),
        ((0, "trian", 0), InputError, "Did you mean 'train'"),
        ((0, "train", -1), InputError, "index"),
    ],
)
def test_bad_coordinates_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        task_rng(*arguments)


# -- state ---------------------------------------------------------------------------------


def test_a_restored_sampler_goes_on_where_the_first_stopped(make):
    first, second = make(seed=1), make(seed=1)
    first.sample(3)
    second.restore(json.loads(json.dumps(first.state())))
    assert digest(second.sample(1)[0]) == digest(first.sample(1)[0])


def test_a_state_of_another_stream_is_refused(make):
    state = make(seed=1).state()
    with pytest.raises(InputError, match="seed=1, this sampler has seed=2"):
        make(seed=2).restore(state)
    with pytest.raises(InputError, match="split='train'"):
        make(seed=1, split="test").restore(state)
    with pytest.raises(InputError, match=r"lacks \['position'\]"):
        make(seed=1).restore({"seed": 1, "split": "train"})


def test_seed_none_is_fresh_and_can_be_repeated():
    first, second = SinusoidTaskSampler(), SinusoidTaskSampler()
    assert first.seed != second.seed
    assert digest(SinusoidTaskSampler(seed=first.seed).task(0)) == digest(first.task(0))


def test_a_generator_gives_the_seed():
    rng = np.random.default_rng(5)
    first, second = SinusoidTaskSampler(generator=rng), SinusoidTaskSampler(generator=rng)
    again = SinusoidTaskSampler(generator=np.random.default_rng(5))
    assert first.seed == again.seed != second.seed
    with pytest.raises(InputError, match="not both"):
        SinusoidTaskSampler(generator=rng, seed=0)
    with pytest.raises(InputTypeError, match=r"NumPy, torch or TensorFlow, received int"):
        SinusoidTaskSampler(generator=3)

    class Generator:
        """As torch's, which has NumPy's name too."""

    with pytest.raises(InputTypeError, match=rf"received {__name__}.*Generator"):
        SinusoidTaskSampler(generator=Generator())


GENERATORS = {
    "torch": lambda torch: torch.Generator().manual_seed(5),
    "tensorflow": lambda tf: tf.random.Generator.from_seed(5),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_of_a_framework(name):
    require(name)
    framework = importlib.import_module(name)
    one, same = (GENERATORS[name](framework) for _ in range(2))
    first, second = SinusoidTaskSampler(generator=one), SinusoidTaskSampler(generator=one)
    assert first.seed == SinusoidTaskSampler(generator=same).seed != second.seed


def test_what_training_would_pass_by_is_not_overridden():
    class Shifted(SinusoidTaskSampler):
        def draw(self, rng):
            return tree.map(lambda x: x + 100, super().draw(rng))

    tasks = [Shifted(seed=0).task(0), Shifted(seed=0).sample(1)[0], Shifted(seed=0).sample_batch(1)]
    assert all(task.query_y.min() > 50 for task in tasks)
    with pytest.raises(InputTypeError, match=r"Own overrides task\(\).*Override draw\(rng\)"):

        class Own(SinusoidTaskSampler):
            def task(self, index):
                return super().task(index + 1)

    class Twice:
        def sample(self, meta_batch_size):
            return super().sample(2 * meta_batch_size)

    with pytest.raises(InputTypeError, match=r"Mixed overrides sample\(\)"):

        class Mixed(Twice, SinusoidTaskSampler):
            pass


@pytest.mark.parametrize("count", [0, -1])
def test_sampling_no_tasks_is_an_error(make, count):
    with pytest.raises(InputError, match="meta_batch_size must be at least 1"):
        make().sample(count)


# -- backends ------------------------------------------------------------------------------


def test_a_selected_backend_gets_the_same_numbers(make, backend):
    on_backend = make(seed=4, dtype="float32").task(2)
    values = [backend.to_numpy(x) for x in tree.leaves(on_backend)]
    assert all(backend.owns(x) for x in tree.leaves(on_backend))
    with use_backend(backend.name, dtype="float32"):
        assert backend.dtype_name(make(seed=4).task(2).support_x) == "float32"
    assert backend.dtype_name(make(seed=4).task(2).support_x) == "float64"
    for value, expected in zip(values, tree.leaves(numpy_task(make)), strict=True):
        np.testing.assert_array_equal(value, expected)


@hardly_depends_on_the_backend
def test_a_dtype_wider_than_the_selected_one_keeps_every_digit(make, backend):
    expected = make(seed=4, dtype="float64")
    expected = tree.map(
        lambda x: x.astype("float64") if x.dtype.kind == "f" else x,
        expected.draw(expected.rng(2)),
    )
    with use_backend(backend.name, dtype="float32"):
        found = make(seed=4, dtype="float64").task(2)
    for value, exact in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        assert backend.to_numpy(value).dtype == exact.dtype
        np.testing.assert_array_equal(backend.to_numpy(value), exact)


def numpy_task(make) -> Task:
    """The task as drawn, before any backend sees it."""
    sampler = make(seed=4)
    drawn = sampler.draw(sampler.rng(2))
    return tree.map(lambda x: x.astype("float32") if x.dtype.kind == "f" else x, drawn)


def test_without_a_backend_tasks_are_numpy():
    task = SinusoidTaskSampler(seed=0).task(0)
    assert {(type(x), x.dtype.name) for x in tree.leaves(task)} == {(np.ndarray, "float32")}
    assert SinusoidTaskSampler(seed=0, dtype="float64").task(0).query_y.dtype == np.float64
    assert SinusoidTaskSampler(seed=0, device="cpu").task(0).query_y.dtype == np.float32
    with pytest.raises(InputError, match="needs a backend"):
        SinusoidTaskSampler(seed=0, device="cuda").task(0)


def test_dtypes_of_frameworks_are_understood(backend_name):
    framework = pytest.importorskip(backend_name)
    dtype = (framework.numpy if backend_name == "jax" else framework).float64
    assert SinusoidTaskSampler(dtype=dtype).dtype == "float64"


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_a_dtype_must_be_floating(dtype):
    with pytest.raises(InputError, match=f"floating dtype, received '{dtype}'"):
        SinusoidTaskSampler(dtype=dtype)
    with pytest.raises(InputTypeError, match="NumPy dtype name"):
        SinusoidTaskSampler(dtype="float33")


# -- sinusoids -----------------------------------------------------------------------------

ranges = st.tuples(st.floats(-10, 10), st.floats(0, 10)).map(lambda t: (t[0], t[0] + t[1]))


@given(
    amp=ranges,
    phase=ranges,
    x=ranges,
    freq=ranges,
    k=st.integers(1, 30),
    q=st.integers(1, 30),
    seed=st.integers(0, 2**64 - 1),
)
def test_sinusoids_stay_in_their_ranges(amp, phase, x, freq, k, q, seed):
    sampler = SinusoidTaskSampler(amp, phase, x, k, q, seed=seed, dtype="float64", freq_range=freq)
    task = sampler.task(0)
    assert task.support_x.shape == task.support_y.shape == (k, 1)
    assert task.query_x.shape == task.query_y.shape == (q, 1)
    inputs = np.concatenate([task.support_x, task.query_x])
    outputs = np.concatenate([task.support_y, task.query_y])
    # low + (high - low) * u can round to one place beyond high.
    assert (inputs >= x[0] - 1e-12).all()
    assert (inputs <= x[1] + 1e-12).all()
    assert np.abs(outputs).max() <= max(map(abs, amp)) + 1e-12


def test_support_and_query_lie_on_one_curve_of_the_family():
    for task in SinusoidTaskSampler(seed=0, k_support=20, dtype="float64").sample(50):
        basis = np.hstack([np.sin(task.support_x), np.cos(task.support_x)])
        (a, b), *_ = np.linalg.lstsq(basis, task.support_y[:, 0], rcond=None)
        np.testing.assert_allclose(
            task.query_y, a * np.sin(task.query_x) + b * np.cos(task.query_x), atol=1e-12
        )
        assert 0.1 <= math.hypot(a, b) <= 5.0
        assert 0.0 <= math.atan2(b, a) <= math.pi


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"amp_range": (5.0, 0.1)}, InputError, "amp_range must be finite with low <= high"),
        ({"x_range": (0.0, math.inf)}, InputError, "x_range"),
        ({"phase_range": (math.nan, 1.0)}, InputError, "phase_range"),
        ({"freq_range": 1.0}, InputTypeError, r"pair of numbers \(low, high\), received freq"),
        ({"k_support": 0}, InputError, "k_support must be at least 1, received 0"),
        ({"k_query": 2.5}, InputTypeError, "k_query must be an integer"),
    ],
)
def test_bad_sinusoid_settings_are_named(settings, error, words):
    with pytest.raises(error, match=words):
        SinusoidTaskSampler(**settings)


# -- Task ----------------------------------------------------------------------------------


def test_samplers_follow_the_protocol(make):
    assert isinstance(make(), TaskSampler)
    assert isinstance(make(), IndexedSampler)


def test_a_task_is_a_node():
    task = SinusoidTaskSampler(seed=0).task(0)
    assert tree.key_chains(task) == ("support_x", "support_y", "query_x", "query_y")
    means = tree.map(lambda x: x.mean(), task)
    assert isinstance(means, Task)
    assert np.isscalar(means.query_y)


def test_frameworks_take_tasks_apart():
    """As an argument of the user's own `vmap` and `jit`; TensorFlow has no such registry."""
    batch = stack_tasks(SinusoidTaskSampler(seed=0).sample(3))
    expected = batch.query_y.sum(1)

    def query_sum(task):
        return task.query_y.sum(0)

    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    on_jax = jax.jit(jax.vmap(query_sum))(stack_tasks([*SinusoidTaskSampler(seed=0).sample(3)]))
    np.testing.assert_allclose(on_jax, expected, rtol=1e-6)
    on_torch = torch.func.vmap(query_sum)(tree.map(torch.as_tensor, batch))
    np.testing.assert_allclose(on_torch, expected, rtol=1e-6)


def test_tasks_are_frozen():
    task = SinusoidTaskSampler(seed=0).task(0)
    with pytest.raises(AttributeError):
        task.query_x = None


def test_stacking_puts_the_task_axis_first(make, backend):
    tasks = make(seed=0).sample(3)
    stacked = stack_tasks(tasks)
    for name in ("support_x", "support_y", "query_x", "query_y"):
        column = backend.to_numpy(getattr(stacked, name))
        expected = np.stack([backend.to_numpy(getattr(t, name)) for t in tasks])
        np.testing.assert_array_equal(column, expected)


def test_tasks_of_nested_inputs_stack():
    x = {"image": np.zeros((5, 4, 4)), "where": (np.zeros((5, 2)), None)}
    stacked = stack_tasks([Task(x, np.zeros(5), x, np.zeros(5))] * 2)
    assert stacked.support_x["image"].shape == (2, 5, 4, 4)
    assert stacked.support_x["where"][0].shape == (2, 5, 2)


def shaped(*shapes) -> Task:
    return Task(*(np.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((3, 1), (2, 1), (3, 1), (3, 1)), "support_x has 3 examples and support_y has 2"),
        (((3, 1), (3, 1), (3, 1), (4, 1)), "query_x has 3 examples and query_y has 4"),
        (((3, 1), (3, 1), (0, 1), (0, 1)), "query_x has no examples"),
        (((3, 1), (3,), (3, 1), (3, 1)), r"support_y has shape \(3,\) and query_y"),
        (((3, 2), (3,), (3, 5), (3,)), r"support_x has shape \(3, 2\) and query_x"),
        (((3, 2), (3, 1), (3, 5), (3, 1)), r"support_x has shape \(3, 2\) and query_x"),
        (((3, 2), (3, 1), (4, 2), (4, 2)), r"support_y has shape \(3, 1\) and query_y"),
        (((8, 3, 2), (8, 3), (8, 4, 5), (8, 4)), r"support_x has shape \(8, 3, 2\) and query_x"),
        (((8, 3, 2), (8, 3), (9, 4, 2), (9, 4)), r"support_x has shape \(8, 3, 2\) and query_x"),
    ],
)
def test_a_malformed_task_is_refused(shapes, words):
    with pytest.raises(InputError, match=words):
        shaped(*shapes)


def test_a_stacked_task_may_be_written_out():
    """Behind the tasks, its support and query differ in their examples alone."""
    for shapes in (
        ((8, 3, 2), (8, 3), (8, 4, 2), (8, 4)),
        ((8, 3), (8, 3), (8, 4), (8, 4)),
        ((8, 3, 2), (8, 3, 1), (8, 4, 2), (8, 4, 1)),
    ):
        assert shaped(*shapes).query_x.shape == shapes[2]


def test_stacking_names_what_does_not_fit():
    small, large = (shaped((k, 1), (k, 1), (4, 1), (4, 1)) for k in (3, 5))
    with pytest.raises(InputError, match=r"support_x is \(3, 1\) in task 0 and \(5, 1\) in task 1"):
        stack_tasks([small, large])
    with pytest.raises(InputError, match="at least one task"):
        stack_tasks([])
    with pytest.raises(InputTypeError, match="task 1 is a tuple"):
        stack_tasks([small, (1, 2)])
    nested = Task({"a": np.zeros((3, 1))}, small.support_y, small.query_x, small.query_y)
    with pytest.raises(InputError, match="task 1 has another structure"):
        stack_tasks([small, nested])


def test_stacking_arrays_of_two_frameworks_is_refused(backend_name):
    other = {"torch": "jax", "jax": "tensorflow", "tensorflow": "torch"}[backend_name]
    pytest.importorskip(other)
    with use_backend(backend_name):
        first = SinusoidTaskSampler(seed=0).task(0)
    with use_backend(other):
        second = SinusoidTaskSampler(seed=0).task(0)
    with pytest.raises(InputTypeError, match="two frameworks"):
        stack_tasks([first, second])


# -- estimates -----------------------------------------------------------------------------


def test_the_interval_is_1_96_standard_errors():
    values = np.random.default_rng(0).normal(48.7, 23.0, 600)
    estimate = mean_and_ci95(values)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.ci95 == pytest.approx(1.96 * values.std() / np.sqrt(600))
    assert str(estimate) == f"{values.mean():.2f} ± {estimate.ci95:.2f} (600 tasks, 95% CI)"


def test_the_interval_covers_the_mean_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    estimates = [mean_and_ci95(rng.normal(1.0, 2.0, 200)) for _ in range(2000)]
    covered = np.mean([abs(e.mean - 1.0) <= e.ci95 for e in estimates])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_one_task_has_no_interval_and_none_no_mean():
    assert math.isnan(mean_and_ci95([3.0]).ci95)
    with pytest.raises(InputError, match="at least one value"):
        mean_and_ci95([])


# -- batches -------------------------------------------------------------------------------

FIELDS = ("support_x", "support_y", "query_x", "query_y")


@pytest.mark.parametrize("first", [0, 7, 2**40, 2**64 - 5])
def test_a_batch_is_its_tasks_one_by_one(make, first):
    sampler = make(seed=3)
    batch = sampler.tasks(range(first, first + 4))
    assert [digest(t) for t in batch] == [digest(sampler.task(first + i)) for i in range(4)]
    scattered = [first + 3, first, first + 1, first + 2, first + 3]
    assert [digest(t) for t in sampler.tasks(scattered)] == [
        digest(sampler.task(i)) for i in scattered
    ]


def test_the_size_of_a_batch_changes_no_bit(make):
    sizes = {size: make(seed=5) for size in (1, 2, 3, 12)}
    drawn = {
        size: [digest(t) for _ in range(12 // size) for t in sampler.sample(size)]
        for size, sampler in sizes.items()
    }
    assert len({tuple(tasks) for tasks in drawn.values()}) == 1
    several = make(seed=5)
    stacked = several.sample_batches(4, 3)
    assert several.position == 12
    rows = [tree.map(lambda x, i=i, j=j: x[i, j], stacked) for i in range(4) for j in range(3)]
    assert [digest(t) for t in rows] == drawn[1]


def test_a_share_of_a_batch_is_those_tasks_of_it(make):
    whole, part = make(seed=5).sample_batch(6), make(seed=5)
    share = part.sample_batch(6, [4, 5, 5])
    assert part.position == 6
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(share, name), getattr(whole, name)[[4, 5, 5]])


def test_numbers_are_one_stream_of_philox():
    """Against NumPy's own generator, moved on by hand; these bits never change either."""
    numbers = task_numbers(2024, "validation", range(3, 5), 6)
    stream = np.random.Philox(
        key=np.array([2024, 1], np.uint64), counter=np.array([0, 0, 0, 1], np.uint64)
    ).advance(3 * 2)
    raw = stream.random_raw(16).reshape(2, 8)[:, :6]
    np.testing.assert_array_equal(numbers, (raw >> np.uint64(11)) * 2.0**-53)
    pinned = ["0x1.5ca167f7f1939p-1", "0x1.c89ced873f1e2p-2", "0x1.9e0028dee47bbp-1"]
    assert [float(x).hex() for x in numbers[0, :3]] == pinned


def test_a_batch_is_a_sequence_of_views_and_a_stacked_task(make):
    batch = make(seed=0).sample(4)
    assert isinstance(batch, TaskBatch)
    assert isinstance(batch, Task)
    assert isinstance(batch, Sequence)
    assert len(batch) == len(list(batch)) == 4
    assert digest(batch[-1]) == digest(batch[3]) == digest(list(batch)[3])
    assert all(np.shares_memory(getattr(batch[1], n), getattr(batch, n)) for n in FIELDS)
    assert all(getattr(stack_tasks(batch), n) is getattr(batch, n) for n in FIELDS)
    assert type(stack_tasks(batch)) is type(tree.map(lambda x: x, batch)) is Task
    assert [digest(t) for t in batch[1:3]] == [digest(batch[1]), digest(batch[2])]
    assert isinstance(batch[1:3], TaskBatch)
    assert [type(t) for t in batch + batch[:1]] == [Task] * 5
    assert [type(t) for t in list(batch[1:]) + batch[:1]] == [Task] * 4
    with pytest.raises(IndexError, match="task 4 of a batch of 4"):
        batch[4]
    with pytest.raises(AttributeError):
        batch.support_x = None
    again = pickle.loads(pickle.dumps(batch))
    assert [digest(t) for t in again] == [digest(t) for t in batch]


@hardly_depends_on_the_backend
def test_frameworks_take_a_batch_as_the_stacked_task_that_it_is(backend):
    step = meta_value_and_grad(lambda v, task: ops.mean(v * task.query_y))
    batch = SinusoidTaskSampler(seed=0).sample(3)
    assert backend.owns(batch[2].query_y)
    v = backend.asarray(np.float64(2.0))
    whole, plain = step(v, batch), step(v, stack_tasks(batch))
    assert float(whole.cost) == float(plain.cost) == float(step(v, stack_tasks([*batch])).cost)


def test_no_tasks_and_no_batches_are_named(make):
    with pytest.raises(InputError, match="at least one task, received none"):
        make().tasks([])
    with pytest.raises(InputError, match="index must be at least 0"):
        make().task(-1)


class OneByOne(IndexedSampler):
    """As samplers were written before there were batches."""

    def draw(self, rng):
        slope, x = rng.random(), rng.random((6, 1))
        return Task(x[:2], slope * x[:2], x[2:], slope * x[2:])


def test_a_sampler_of_single_tasks_gives_batches_too():
    sampler = OneByOne(seed=1)
    batch = sampler.sample(3)
    assert not sampler.quick
    assert batch.query_x.shape == (3, 4, 1)
    slope = task_rng(1, "train", 2).random()
    np.testing.assert_allclose(batch[2].query_y, slope * batch[2].query_x, rtol=1e-6)
    assert [digest(t) for t in batch] == [digest(sampler.task(i)) for i in range(3)]


def test_single_tasks_of_different_sizes_come_in_a_list():
    class Growing(IndexedSampler):
        def draw(self, rng):
            x = np.zeros((1 + int(3 * rng.random()), 1))
            return Task(x, x, x, x)

    sampler = Growing(seed=0)
    tasks = sampler.sample(8)
    assert isinstance(tasks, list)
    assert sampler.position == 8
    assert {len(t.support_x) for t in tasks} == {1, 2, 3}
    with pytest.raises(InputError, match="different shapes cannot be stacked"):
        Growing(seed=0).sample_batch(8)


def test_a_subclass_may_change_single_tasks_or_whole_batches():
    plain = SinusoidTaskSampler(seed=2).sample(3)

    class Single(SinusoidTaskSampler):
        def draw(self, rng):
            return tree.map(lambda x: x + 1, super().draw(rng))

    class Whole(SinusoidTaskSampler):
        def draw_batch(self, numbers):
            return tree.map(lambda x: x + 1, super().draw_batch(numbers))

    assert (Single(seed=2).quick, Whole(seed=2).quick) == (False, True)
    for kind in (Single, Whole):
        for found, before in zip(kind(seed=2).sample(3), plain, strict=True):
            np.testing.assert_allclose(found.query_y, before.query_y + 1, rtol=0, atol=1e-6)


# -- uniformity ----------------------------------------------------------------------------

DRAWS = 100_000


def assert_uniform(values, cells):
    """Pearson's chi-square of counts, beyond five standard deviations in one of a million."""
    counts = np.bincount(np.asarray(values).ravel(), minlength=cells)
    assert len(counts) == cells
    expected = counts.sum() / cells
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = cells - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom) + 5


def test_numbers_are_uniform_within_and_between_tasks():
    numbers = task_numbers(0, "train", range(DRAWS), 3)
    cells = (numbers * 10).astype(int)
    for column in cells.T:
        assert_uniform(column, 10)
    assert_uniform(cells[:, 0] * 10 + cells[:, 1], 100)
    assert_uniform(cells[:-1, 2] * 10 + cells[1:, 0], 100)


def test_every_order_is_as_likely():
    orders = permutations(task_numbers(1, "train", range(DRAWS), 4))
    kinds, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(kinds) == 24
    assert_uniform(np.repeat(np.arange(24), counts), 24)


@pytest.mark.parametrize("at_once", [sampling._AT_ONCE, 50])
def test_every_choice_is_as_likely(monkeypatch, at_once):
    """Of ordered pairs out of five; also in parts, as for classes of very many examples."""
    monkeypatch.setattr(sampling, "_AT_ONCE", at_once)
    chosen = choices(task_numbers(2, "train", range(DRAWS // 10), 2), 5)
    kinds, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(kinds) == 20
    assert_uniform(np.repeat(np.arange(20), counts), 20)


def test_choices_out_of_different_numbers_stay_within_them():
    sizes = np.arange(3, 60)
    chosen = choices(task_numbers(3, "train", range(len(sizes)), 3), sizes)
    assert (chosen < sizes[:, None]).all()
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    whole = choices(task_numbers(3, "train", range(50), 7), 7)
    assert (np.sort(whole) == np.arange(7)).all()
    edges = choices(np.full((58, 3), 1 - 2.0**-53), np.arange(3, 61))
    assert (edges[:, 0] == np.arange(2, 60)).all(), "the largest number is the last one"


def test_sinusoids_are_uniform_in_their_ranges():
    tasks = SinusoidTaskSampler(seed=0, dtype="float64", k_support=1, k_query=1).tasks(range(DRAWS))
    x = np.stack([tasks.support_x, tasks.query_x]).reshape(2, -1)
    assert_uniform(((x + 5) / 10 * 20).astype(int), 20)
    assert abs(np.corrcoef(x)[0, 1]) < 5 / math.sqrt(DRAWS)
