"""The official Omniglot files give what is published about them."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from metaframe.tasks import load_omniglot, one_shot_runs
from metaframe.tasks._omniglot_files import SIDE

Image = pytest.importorskip("PIL.Image")

SMALL1 = "images_background_small1"


def test_the_official_small_sets_have_the_published_counts(omniglot_dir):
    small1 = load_omniglot(omniglot_dir, "small1")
    small2 = load_omniglot(omniglot_dir, "small2")
    both = load_omniglot(omniglot_dir, ("small1", "small2"))
    assert small1.alphabets == ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
    assert [len(d.characters) for d in (small1, small2, both)] == [136, 156, 242]
    assert [len(d.images) for d in (small1, small2, both)] == [2720, 3120, 4840]
    ink = small1.images.mean() / 255
    assert 0.03 < ink < 0.1, "strokes are thin and bright on a dark ground"


def test_the_official_drawings_are_read_exactly(omniglot_dir):
    data = load_omniglot(omniglot_dir, size=SIDE)
    with zipfile.ZipFile(omniglot_dir / f"{SMALL1}.zip") as archive:
        name = f"{SMALL1}/Balinese/character01/0108_07.png"
        white = np.asarray(Image.open(io.BytesIO(archive.read(name))))
    np.testing.assert_array_equal(data.images[6, ..., 0], np.where(white, 0, 255))


def test_the_official_runs_are_20_of_20(omniglot_dir):
    runs = one_shot_runs(omniglot_dir)
    assert len(runs) == 20
    for run in runs:
        assert run.train_images.shape == run.test_images.shape == (20, 28, 28, 1)
        assert sorted(run.answers) == list(range(20))


def modified_hausdorff(a: np.ndarray, b: np.ndarray) -> float:
    """Dubuisson and Jain, "A modified Hausdorff distance for object matching" (ICPR 1994)."""
    # |a - b|^2 = |a|^2 - 2ab + |b|^2 as one product: four times faster than by parts.
    left = np.column_stack([a, (a**2).sum(1), np.ones(len(a))])
    right = np.column_stack([-2 * b, np.ones(len(b)), (b**2).sum(1)])
    squared = left @ right.T
    nearest = (np.sqrt(np.maximum(squared.min(axis), 0)) for axis in (0, 1))
    return max(distances.mean() for distances in nearest)


def centred_ink(image: np.ndarray) -> np.ndarray:
    points = np.argwhere(image[..., 0] > 0).astype(float)
    return points - points.mean(0)


@pytest.mark.slow
def test_the_official_baseline_errs_in_38_8_percent(omniglot_dir):
    """The figure published for the modified Hausdorff distance on these 400 trials."""
    errors = []
    for run in one_shot_runs(omniglot_dir, size=SIDE):
        train = [centred_ink(image) for image in run.train_images]
        for image, answer in zip(run.test_images, run.answers, strict=True):
            points = centred_ink(image)
            guess = np.argmin([modified_hausdorff(points, other) for other in train])
            errors.append(guess != answer)
    assert len(errors) == 400
    assert 100 * np.mean(errors) == pytest.approx(38.75, abs=0.01)
