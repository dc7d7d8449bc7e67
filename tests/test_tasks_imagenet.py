"""mini-ImageNet and tieredImageNet from small files in the official layouts."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaframe.cli import main
from metaframe.errors import InputError
from metaframe.tasks import FewShotSampler, load_mini_imagenet, load_tiered_imagenet
from metaframe.training import latest_checkpoint, read_checkpoint

Image = pytest.importorskip("PIL.Image")

STEMS = {"train": "train", "validation": "val", "test": "test"}
CLASSES = {"train": (1, 2, 3), "val": (4, 5), "test": (6, 7)}
EXAMPLES = 4


def picture(seed: int, shape: tuple[int, int] = (84, 84)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray[Any, Any], form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def wnid(number: int) -> str:
    return f"n{number:08d}"


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """The lists and a folder of images."""
    (tmp_path / "images").mkdir()
    for stem, classes in CLASSES.items():
        rows = ["filename,label"]
        for c in classes:
            for i in range(EXAMPLES):
                name = f"{wnid(c)}{i:08d}.jpg"
                # Named .jpg as the official files are; PNG inside keeps what is compared exact.
                (tmp_path / "images" / name).write_bytes(encoded(picture(100 * c + i)))
                rows.append(f"{name},{wnid(c)}")
        (tmp_path / f"{stem}.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def tiered(tmp_path: Path) -> Path:
    """Arrays."""
    for stem, classes in CLASSES.items():
        images = np.stack([picture(100 * c + i) for c in classes for i in range(EXAMPLES)])
        np.savez(tmp_path / f"{stem}_images.npz", images=images)
        np.savez(tmp_path / f"{stem}_labels.npz", labels=np.repeat(range(len(classes)), EXAMPLES))
    return tmp_path


def as_folders(folder: Path) -> Path:
    for stem, classes in CLASSES.items():
        for c in classes:
            home = folder / stem / wnid(c)
            home.mkdir(parents=True)
            for i in range(EXAMPLES):
                (home / f"{wnid(c)}_{i}.JPEG").write_bytes(encoded(picture(100 * c + i)))
    return folder


def as_zip(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder.parent))


@pytest.mark.parametrize("split", STEMS)
@pytest.mark.parametrize("archived", [False, True])
def test_mini_imagenet(mini: Path, split: Any, archived: bool) -> None:
    if archived:
        as_zip(mini / "images.zip", mini / "images")
        (mini / "images").rename(mini / "elsewhere")
    found = load_mini_imagenet(mini, split)
    classes = CLASSES[STEMS[split]]
    assert found.classes == tuple(map(wnid, classes))
    np.testing.assert_array_equal(found.labels, np.repeat(range(len(classes)), EXAMPLES))
    expected = [picture(100 * c + i) for c in classes for i in range(EXAMPLES)]
    np.testing.assert_array_equal(found.images, np.stack(expected))
    assert not found.images.flags.writeable
    assert load_mini_imagenet(mini, split) is found
    sampler = FewShotSampler(
        found.images, found.labels, ways=2, queries=3, split=split, classes=found.class_split
    )
    assert sampler.task(0).query_x.shape == (6, 84, 84, 3)


@pytest.mark.parametrize("archived", [False, True])
def test_an_image_that_was_replaced_is_read_again(mini: Path, archived: bool) -> None:
    def write(pixels: np.ndarray[Any, Any]) -> None:
        (mini / "images" / f"{wnid(1)}{0:08d}.jpg").write_bytes(encoded(pixels))
        if archived:
            as_zip(mini / "images.zip", mini / "images")

    write(picture(100))
    if archived:
        (mini / "images").rename(mini / "elsewhere")
    old = load_mini_imagenet(mini, "train")
    if archived:
        (mini / "elsewhere").rename(mini / "images")
    write(picture(7))
    if archived:
        (mini / "images").rename(mini / "elsewhere")
    new = load_mini_imagenet(mini, "train")
    np.testing.assert_array_equal(old.images[0], picture(100))
    np.testing.assert_array_equal(new.images[0], picture(7))


def test_labels_that_were_replaced_are_read_again(tiered: Path) -> None:
    old = load_tiered_imagenet(tiered, "train")
    labels = np.arange(len(old.labels)) % 3
    np.savez(tiered / "train_labels.npz", labels=labels)
    np.testing.assert_array_equal(load_tiered_imagenet(tiered, "train").labels, labels)


def test_an_image_in_a_folder_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    as_folders(tmp_path)
    load_tiered_imagenet(tmp_path, "train")
    (tmp_path / "train" / wnid(1) / f"{wnid(1)}_0.JPEG").write_bytes(encoded(picture(7)))
    found = load_tiered_imagenet(tmp_path, "train")
    np.testing.assert_array_equal(found.images[0], picture(7))


def test_photographs_are_resized(mini: Path) -> None:
    name = f"{wnid(1)}{0:08d}.jpg"
    (mini / "images" / name).write_bytes(encoded(np.full((60, 40, 3), 77, np.uint8), "JPEG"))
    found = load_mini_imagenet(mini, size=32)
    assert found.images.shape == (12, 32, 32, 3)
    np.testing.assert_array_equal(found.images[0], 77)


@pytest.mark.parametrize("form", ["arrays", "folders", "zips"])
@pytest.mark.parametrize("split", STEMS)
def test_tiered_imagenet(tmp_path: Path, form: str, split: Any, request: Any) -> None:
    folder = request.getfixturevalue("tiered") if form == "arrays" else as_folders(tmp_path)
    stem = STEMS[split]
    if form == "zips":
        as_zip(folder / f"{stem}.zip", folder / stem)
        (folder / stem).rename(folder / "elsewhere")
    found = load_tiered_imagenet(folder, split)
    classes = CLASSES[stem]
    names = [str(i) for i in range(len(classes))] if form == "arrays" else map(wnid, classes)
    assert found.classes == tuple(names)
    expected = [picture(100 * c + i) for c in classes for i in range(EXAMPLES)]
    np.testing.assert_array_equal(found.images, np.stack(expected))


def test_checksums(mini: Path) -> None:
    files = [mini / "train.csv", *sorted((mini / "images").iterdir())]
    lines = [
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(mini)}\n" for f in files
    ]
    (mini / "SHA256SUMS").write_text("".join(lines))
    first = load_mini_imagenet(mini)
    assert len(first.sha256) == 64
    changed = mini / "images" / f"{wnid(2)}{3:08d}.jpg"
    changed.write_bytes(encoded(picture(0)))
    (mini / "SHA256SUMS").touch()
    with pytest.raises(InputError, match=f"{changed.name} has the SHA-256 .* SHA256SUMS says"):
        load_mini_imagenet(mini)
    (mini / "SHA256SUMS").unlink()
    assert load_mini_imagenet(mini).sha256 != first.sha256
    (mini / "SHA256SUMS").write_text("d41d8cd98f00b204e9800998ecf8427e  train.csv\n")
    with pytest.raises(InputError, match="expected 64 hexadecimal digits"):
        load_mini_imagenet(mini)


class Explosive:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "unpickled")


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_mini_imagenet, "mini-imagenet-cache-train.pkl"),
        (load_tiered_imagenet, "train_images_png.pkl"),
    ],
)
def test_pickles_are_refused_and_not_loaded(load: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Explosive(tmp_path / "proof")))
    with pytest.raises(InputError, match=f"{name} is a pickle.*metaframe unpickles nothing"):
        load(tmp_path)
    assert not (tmp_path / "proof").exists()


def test_labels_in_a_pickle_are_refused_and_not_loaded(tiered: Path) -> None:
    (tiered / "train_labels.npz").unlink()
    (tiered / "train_labels.pkl").write_bytes(pickle.dumps(Explosive(tiered / "proof")))
    with pytest.raises(InputError, match=r"a pickle can run any code.*convert it once"):
        load_tiered_imagenet(tiered)
    objects = np.array([Explosive(tiered / "proof")] * 12, dtype=object)
    np.savez(tiered / "train_labels.npz", labels=objects)
    with pytest.raises(InputError, match="holds pickled objects, which are not loaded"):
        load_tiered_imagenet(tiered)
    assert not (tiered / "proof").exists()


NAME = f"{wnid(1)}{0:08d}.jpg"


def _replace(folder: Path, old: str, new: str) -> None:
    file = folder / "train.csv"
    file.write_text(file.read_text().replace(old, new, 1))


def _cut(file: Path, share: float = 0.5) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


MINI_DAMAGES = {
    "no list": (lambda f: (f / "train.csv").unlink(), "has no train.csv. Get it from https"),
    "empty list": (lambda f: (f / "train.csv").write_text(""), "begins with nothing"),
    "no header": (lambda f: _replace(f, "filename,label\n", ""), "expected the header"),
    "cut list": (lambda f: _replace(f, f"{NAME},{wnid(1)}\n", f"{NAME}\n"), "line 2: .* no plain"),
    "a path": (lambda f: _replace(f, NAME, f"../{NAME}"), "line 2: .* is no plain file name"),
    "twice": (lambda f: _replace(f, f"{1:08d}.jpg", f"{0:08d}.jpg"), "names an image twice"),
    "no images": (lambda f: (f / "images").rename(f / "x"), "neither images.zip nor a folder"),
    "an image missing": (lambda f: (f / "images" / NAME).unlink(), f"has no {NAME}, which the"),
    "an image cut": (lambda f: _cut(f / "images" / NAME), f"{NAME} cannot be read"),
    "no image": (lambda f: (f / "images" / NAME).write_bytes(b"GIF89a"), f"{NAME} cannot be read"),
    "a bomb": (
        lambda f: (f / "images" / NAME).write_bytes(_huge()),
        "60000x60000 pixels|exceeds limit",
    ),
}


def _huge() -> bytes:
    """A PNG whose header promises more pixels than there is memory for."""
    data = bytearray(encoded(picture(0, (2, 2))))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("damage", MINI_DAMAGES)
def test_a_damaged_mini_imagenet_is_refused(mini: Path, damage: str) -> None:
    do, message = MINI_DAMAGES[damage]
    do(mini)
    with pytest.raises(InputError, match=message):
        load_mini_imagenet(mini)


def _false_promise(folder: Path) -> None:
    """A small file whose header promises a terabyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(  # type: ignore[attr-defined]
        header, {"descr": "|u1", "fortran_order": False, "shape": (50_000_000, 84, 84, 3)}
    )
    with zipfile.ZipFile(folder / "train_images.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"x" * 100)


TIERED_DAMAGES = {
    "nothing": (lambda f: (f / "train_images.npz").unlink(), "has none of train_images.npz"),
    "cut": (lambda f: _cut(f / "train_images.npz"), "train_images.npz cannot be read"),
    "cut a little": (lambda f: _cut(f / "train_images.npz", 0.99), "cannot be read"),
    "no zip": (lambda f: (f / "train_images.npz").write_bytes(b"\x93NUMPY"), "cannot be read"),
    "another array": (
        lambda f: np.savez(f / "train_images.npz", pictures=np.zeros(3)),
        "images.npy.* in the archive",
    ),
    "false promise": (_false_promise, "where the header promises"),
    "floats": (
        lambda f: np.savez(f / "train_images.npz", images=np.zeros((12, 84, 84, 3))),
        "dtype float64, expected",
    ),
    "another size": (
        lambda f: np.savez(f / "train_images.npz", images=np.zeros((12, 32, 32, 3), np.uint8)),
        r"\(32, 32\) pixels, received size=84",
    ),
    "too few labels": (
        lambda f: np.savez(f / "train_labels.npz", labels=np.zeros(11, int)),
        "expected 12 integers",
    ),
}


@pytest.mark.parametrize("damage", TIERED_DAMAGES)
def test_a_damaged_tiered_imagenet_is_refused(tiered: Path, damage: str) -> None:
    do, message = TIERED_DAMAGES[damage]
    do(tiered)
    with pytest.raises(InputError, match=message):
        load_tiered_imagenet(tiered)


def test_a_folder_without_classes_and_a_hostile_archive(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.jpg").write_bytes(encoded(picture(0)))
    with pytest.raises(InputError, match="no images in folders called after their classes"):
        load_tiered_imagenet(tmp_path)
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("../../n00000001/x.jpg", encoded(picture(0)))
    with pytest.raises(InputError, match="points outside it"):
        load_tiered_imagenet(tmp_path, "validation")


def test_bad_arguments(mini: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'train'"):
        load_mini_imagenet(mini, "trian")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="size must be at most 512"):
        load_mini_imagenet(mini, size=1000)


def command_flags(mini: Path) -> list[str]:
    return [
        *("--dataset", "mini-imagenet", "--data", str(mini), "--backend", "torch"),
        *("--ways", "2", "--queries", "2", "--width", "2", "--inner-steps", "1"),
        *("--meta-batch-size", "1", "--iterations", "1", "--eval-every", "1"),
        *("--validation-tasks", "2", "--eval-tasks", "2", "--eval-steps", "1"),
        *("--no-compiled", "--out", str(mini / "run"), "--json"),
    ]


def test_the_command_trains_on_it(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = command_flags(mini)
    assert main(["train", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "accuracy"
    assert (mini / "run" / "predictions.png").exists()
    without = [flag for flag in flags if flag not in ("--data", str(mini))]
    assert main(["train", *without, "--overwrite"]) == 2
    assert "needs its files: --data FOLDER" in capsys.readouterr().err


def test_the_command_records_the_normalisation_policy(
    mini: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with statistics of training alone, a query's prediction is its own."""
    flags = [*command_flags(mini), "--algorithm", "maml++", "--norm", "per-step", "--learn-norms"]
    assert main(["train", *flags, "--no-plots"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["config"]["norm"], found["config"]["learn_norms"]) == ("per-step", True)
    assert 'norm = "per-step"' in (mini / "run" / "config.toml").read_text()
    saved = read_checkpoint(latest_checkpoint(mini / "run" / "checkpoints"))
    assert saved.config["norm"] == "per-step"
    assert saved.arrays["statistics/block1/mean"].shape == (2, 2)
    assert saved.arrays["params/block1/scale"].shape == (2, 2)
    evaluation = found["evaluation"]
    assert evaluation["inductive"]["mean"] == evaluation["transductive"]["mean"]
