"""Few-shot tasks: nothing is shared that must not be, and nothing tells the label in advance."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaframe.backend import use_backend
from metaframe.errors import InputError, InputTypeError, MissingDependencyError
from metaframe.tasks import (
    DIGITS_SPLIT,
    ClassSplit,
    FewShotSampler,
    LazyImages,
    digits_sampler,
    few_shot,
    load_digits,
    split_classes,
)
from metaframe.tasks.sampling import SPLITS

CLASSES, EXAMPLES = 10, 20


@pytest.fixture
def numbered():
    """Examples whose only feature is their own row number, so that tasks can be traced back."""
    rows = np.arange(CLASSES * EXAMPLES, dtype=np.float64)[:, None]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), EXAMPLES))
    return rows, labels


ALL = ClassSplit(train=tuple(range(CLASSES)))


def sampler_of(numbered, **settings) -> FewShotSampler:
    return FewShotSampler(*numbered, **{"classes": ALL, "dtype": "float64", **settings})


# -- what a task consists of ---------------------------------------------------------------


@given(
    ways=st.integers(1, CLASSES),
    shots=st.integers(1, 5),
    queries=st.integers(1, 15),
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**64 - 1),
)
def test_a_task_has_its_ways_shots_and_queries(numbered, ways, shots, queries, seed, index):
    sampler = sampler_of(numbered, ways=ways, shots=shots, queries=queries, seed=seed)
    task, labels = sampler.task(index), numbered[1]
    for x, y, per_class in (
        (task.support_x, task.support_y, shots),
        (task.query_x, task.query_y, queries),
    ):
        assert x.shape == (ways * per_class, 1)
        assert y.dtype == np.int64
        np.testing.assert_array_equal(np.bincount(y), np.full(ways, per_class))
    rows = np.concatenate([task.support_x, task.query_x]).astype(int)[:, 0]
    assert len(set(rows)) == len(rows), "an example is used twice"
    label_of_class = dict(
        zip(labels[rows].tolist(), np.concatenate([task.support_y, task.query_y]), strict=True)
    )
    assert sorted(label_of_class.values()) == list(range(ways))
    for row, y in zip(rows, np.concatenate([task.support_y, task.query_y]), strict=True):
        assert label_of_class[labels[row]] == y


def test_neither_class_nor_position_tells_the_label(numbered):
    """The accuracy before adaptation is 1 / ways, whatever a model has memorised."""
    ways, tasks = 5, 4000
    sampler, labels = sampler_of(numbered, ways=ways, shots=1, queries=1), numbered[1]
    by_class, by_position = np.zeros((CLASSES, ways)), np.zeros((2, ways, ways))
    for task in sampler.sample(tasks):
        for part, (x, y) in enumerate(
            ((task.support_x, task.support_y), (task.query_x, task.query_y))
        ):
            np.add.at(by_class, (labels[x[:, 0].astype(int)], y), 1)
            by_position[part, np.arange(ways), y] += 1
    for counts in (by_class, by_position[0], by_position[1]):
        shares = counts / counts.sum(axis=-1, keepdims=True)
        # Five standard deviations of a share of 1 / 5 in 4000 draws.
        np.testing.assert_allclose(shares, 1 / ways, atol=5 * np.sqrt(0.2 * 0.8 / tasks))


def test_position_in_support_says_nothing_of_position_in_query(numbered):
    sampler = sampler_of(numbered, ways=5, shots=1, queries=1)
    agree = np.mean([(t.support_y == t.query_y).mean() for t in sampler.sample(4000)])
    assert agree == pytest.approx(0.2, abs=0.02)


def test_every_class_and_example_is_used_alike(numbered):
    sampler = sampler_of(numbered, ways=2, shots=1, queries=1)
    drawn = np.concatenate([t.query_x[:, 0] for t in sampler.sample(10_000)]).astype(int)
    counts = np.bincount(drawn, minlength=CLASSES * EXAMPLES)
    np.testing.assert_allclose(counts, 100, atol=60)


# -- splits --------------------------------------------------------------------------------


def test_splits_share_no_class_even_with_other_seeds(numbered):
    rows, labels = numbered
    seen = {}
    for seed, split in enumerate(SPLITS):
        tasks = FewShotSampler(rows, labels, ways=2, split=split, seed=seed).sample(50)
        seen[split] = {labels[int(r)] for t in tasks for r in t.support_x[:, 0]}
    assert [len(seen[split]) for split in SPLITS] == [6, 2, 2]
    assert len(set.union(*seen.values())) == 10


@given(
    total=st.integers(1, 60),
    cuts=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    seed=st.integers(0, 2**64 - 1),
)
def test_fractions_that_sum_to_one_use_every_class_once(total, cuts, seed):
    low, high = sorted(cuts)
    sizes = (low / 100, (high - low) / 100, (100 - high) / 100)
    split = split_classes(range(total), sizes, seed=seed)
    assert sorted(split.train + split.validation + split.test) == list(range(total))
    for name, size in zip(SPLITS[1:], sizes[1:], strict=True):
        assert len(split[name]) == int(size * total + 1e-9)
    assert split == split_classes(range(total), sizes, seed=seed)


def test_counts_leave_the_other_classes_out():
    split = split_classes(["b", "a", "b", "c", "d"], (1, 1, 1))
    assert [len(split[name]) for name in SPLITS] == [1, 1, 1]
    assert set(split.train + split.validation + split.test) < set("abcd")


def test_the_division_is_pinned():
    """Published results name a split by its seed, so these never change."""
    assert split_classes(range(12), seed=1) == ClassSplit(
        train=(0, 1, 2, 3, 4, 5, 6, 11), validation=(7, 9), test=(8, 10)
    )


def test_divisions_differ_by_seed():
    assert len({split_classes(range(50), seed=seed) for seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0.5, 0.5), "three numbers"),
        ((0.6, 0.3, 0.3), "sum of at most 1"),
        ((-0.1, 0.5, 0.5), "sum of at most 1"),
        ((float("nan"), 0.5, 0.5), "sum of at most 1"),
        ((6, 3, 2), "needs 11 classes, there are 10"),
        ((6, -1, 2), "a split size must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, words):
    with pytest.raises(InputError, match=words):
        split_classes(range(10), sizes)


def test_a_class_has_one_home():
    with pytest.raises(InputError, match="class 3 is in both 'train' and 'validation'"):
        ClassSplit(train=(1, 3), validation=(np.int64(3),))
    with pytest.raises(InputError, match="class 'a' is twice in 'test'"):
        ClassSplit(test=("a", "a"))


# -- rotations -----------------------------------------------------------------------------


def test_rotations_make_four_classes_of_one():
    corner = np.zeros((4, 3, 3, 1), np.uint8)
    corner[:, 0, 0] = 255
    sampler = FewShotSampler(
        corner,
        [7] * 4,
        ways=4,
        shots=1,
        queries=3,
        rotations=True,
        classes=ClassSplit(train=(7,)),
    )
    assert sampler.num_classes == 4
    task = sampler.task(0)
    marked = {}
    for x, y in zip(task.query_x, task.query_y, strict=True):
        assert x.max() == x.sum() == 1.0
        marked.setdefault(int(y), set()).add(tuple(np.argwhere(x[..., 0])[0].tolist()))
    corners = [spots.pop() for spots in marked.values() if len(spots) == 1]
    assert sorted(corners) == [(0, 0), (0, 2), (2, 0), (2, 2)]


def test_rotations_need_square_images():
    with pytest.raises(InputError, match=r"square images .* received shape \(20, 3, 4\)"):
        FewShotSampler(np.zeros((20, 3, 4)), [0] * 20, rotations=True)


# -- inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "ink", "expected"),
    [(np.uint8, 255, 1.0), (np.uint8, 51, 0.2), (np.bool_, True, 1.0), (np.float64, 7.5, 7.5)],
)
def test_images_become_floats(dtype, ink, expected):
    images = np.full((40, 2, 2), ink, dtype)
    sampler = FewShotSampler(images, [0, 1] * 20, ways=2, classes=ClassSplit(train=(0, 1)))
    task = sampler.task(0)
    assert task.support_x.dtype == np.float32
    np.testing.assert_array_equal(task.support_x, np.float32(expected))


def test_class_labels_fit_the_frameworks(numbered, backend_name):
    """int64 is what torch's cross-entropy takes, and becomes JAX's default integer."""
    with use_backend(backend_name) as backend:
        labels = sampler_of(numbered).task(0).support_y
        assert backend.owns(labels)
        assert backend.dtype_name(labels) in {"int64", "int32"}
        if backend_name == "torch":
            assert backend.dtype_name(labels) == "int64"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ways": 11}, InputError, "ways=11 needs .* split 'train' has 10"),
        ({"split": "test"}, InputError, "split 'test' has 0"),
        ({"shots": 6}, InputError, r"has 20 examples, a task needs 21 \(shots=6 \+ queries=15\)"),
        ({"ways": 0}, InputError, "ways must be at least 1"),
        ({"queries": True}, InputTypeError, "queries must be an integer"),
        ({"split": "dev"}, InputError, "no split called 'dev'"),
        ({"classes": ClassSplit(train=(99,))}, InputError, "class 99, which no example has"),
    ],
)
def test_what_cannot_be_sampled_is_named(numbered, arguments, error, words):
    with pytest.raises(error, match=words):
        sampler_of(numbered, **arguments)


@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (np.zeros((3, 2)), [0, 1], InputError, r"shape \(3, 2\) and 2 labels"),
        (np.zeros((2, 2), np.int64), [0, 1], InputTypeError, "received dtype int64"),
        (np.zeros((2, 2)), [0.5, 1.5], InputTypeError, "integers or strings"),
        (np.zeros((2, 2)), [[0], [1]], InputTypeError, r"shape \(2, 1\)"),
    ],
)
def test_unusable_examples_are_named(images, labels, error, words):
    with pytest.raises(error, match=words):
        FewShotSampler(images, labels)


# -- digits --------------------------------------------------------------------------------


def test_the_digits_are_scaled_and_read_only():
    images, labels = load_digits()
    assert (images.shape, images.dtype, images.min(), images.max()) == (
        (1797, 8, 8, 1),
        np.float32,
        0.0,
        1.0,
    )
    assert np.bincount(labels).min() == 174
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_the_digits_make_forty_classes():
    assert [digits_sampler(split=split).num_classes for split in SPLITS] == [24, 8, 8]
    assert sorted(DIGITS_SPLIT.train + DIGITS_SPLIT.validation + DIGITS_SPLIT.test) == [*range(10)]


def test_no_picture_of_a_test_digit_is_seen_in_training():
    images, labels = load_digits()
    digit_of = {
        np.rot90(image, turn).tobytes(): int(label)
        for image, label in zip(images, labels, strict=True)
        for turn in range(4)
    }
    seen = {
        split: {
            digit_of[x.tobytes()]
            for t in digits_sampler(split=split, queries=1).sample(200)
            for x in (*t.support_x, *t.query_x)
        }
        for split in SPLITS
    }
    assert {split: tuple(sorted(digits)) for split, digits in seen.items()} == {
        split: DIGITS_SPLIT[split] for split in SPLITS
    }


def test_digit_tasks_can_be_learnt_from_their_support():
    """Nearest neighbour in pixels is far above chance, so labels do belong to their images."""
    right = []
    for task in digits_sampler(split="test", shots=5, queries=5).sample(50):
        support, query = (x.reshape(len(x), -1) for x in (task.support_x, task.query_x))
        nearest = ((query[:, None] - support) ** 2).sum(-1).argmin(1)
        right.append((task.support_y[nearest] == task.query_y).mean())
    assert np.mean(right) > 0.85


def test_missing_scikit_learn_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    load_digits.cache_clear()
    with pytest.raises(MissingDependencyError, match="pip install scikit-learn") as caught:
        load_digits()
    assert isinstance(caught.value, ImportError)


# -- many tasks ----------------------------------------------------------------------------

DRAWS = 100_000


def assert_even(counts) -> None:
    """Pearson's chi-square of a table of counts that should be equal."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom) + 5


def test_a_hundred_thousand_tasks_are_even(numbered):
    """Classes among labels, labels among places, examples within classes, support with query."""
    sampler, labels = sampler_of(numbered, ways=2, shots=1, queries=1), numbered[1]
    tasks = sampler.tasks(range(DRAWS))
    support, query = (x[:, :, 0].astype(int) for x in (tasks.support_x, tasks.query_x))
    assert (support != query[:, :1]).all()
    assert (support != query[:, 1:]).all()
    classes = labels[support]
    assert (classes[:, 0] != classes[:, 1]).all()
    by_label = np.zeros((CLASSES, 2))
    np.add.at(by_label, (classes[:, 0], tasks.support_y[:, 0]), 1)
    assert_even(by_label)
    places = np.bincount(tasks.support_y[:, 0] * 2 + tasks.query_y[:, 0], minlength=4)
    assert_even(places)
    assert_even(np.bincount(support[:, 0], minlength=CLASSES * EXAMPLES))
    assert_even(np.bincount(query[:, 1], minlength=CLASSES * EXAMPLES))
    pairs = np.zeros((CLASSES, CLASSES))
    np.add.at(pairs, (classes[:, 0], classes[:, 1]), 1)
    assert_even(pairs[~np.eye(CLASSES, dtype=bool)])


def test_classes_of_different_sizes_are_used_whole(numbered):
    """Small classes beside large ones, each example as often as the others of its class."""
    sizes = (3, 5, 40)
    labels = np.repeat(np.arange(3), sizes)
    rows = np.arange(len(labels), dtype=np.float64)[:, None]
    sampler = FewShotSampler(
        rows, labels, ways=2, shots=1, queries=2, classes=ClassSplit(train=(0, 1, 2))
    )
    drawn = sampler.tasks(range(20_000)).support_x.astype(int)
    counts = np.bincount(drawn.ravel(), minlength=len(rows))
    for own in np.split(counts, np.cumsum(sizes)[:-1]):
        assert_even(own)


@pytest.mark.parametrize("limit", [0, 2**27])
def test_images_are_turned_alike_in_advance_or_later(monkeypatch, limit):
    images = np.random.default_rng(0).integers(0, 256, (60, 5, 5, 2), np.uint8)
    settings = {"ways": 4, "shots": 1, "queries": 2, "rotations": True}
    classes = ClassSplit(train=(0, 1, 2))
    labels = np.repeat(np.arange(3), 20)
    monkeypatch.setattr(few_shot, "_TURNED_BYTES", limit)
    task = FewShotSampler(images, labels, classes=classes, **settings).task(5)
    lazy = LazyImages(lambda row: images[row], images.shape)
    other = FewShotSampler(lazy, labels, classes=classes, **settings).task(5)
    for name in ("support_x", "support_y", "query_x", "query_y"):
        np.testing.assert_array_equal(getattr(task, name), getattr(other, name))
    turned = {np.rot90(image, k).tobytes() for image in images for k in range(4)}
    for x in (*task.support_x, *task.query_x):
        assert np.round(x * 255).astype(np.uint8).tobytes() in turned


def test_a_sampler_that_reads_images_is_sampled_ahead() -> None:
    images = np.zeros((40, 2, 2, 1), np.uint8)
    lazy = LazyImages(lambda row: images[row], images.shape)
    found = [
        FewShotSampler(x, [0, 1] * 20, ways=2, classes=ClassSplit(train=(0, 1))).quick
        for x in (images, lazy)
    ]
    assert found == [True, False]
