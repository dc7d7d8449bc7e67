"""Folders of images, and data sets of torch's and Hugging Face's kind, as few-shot tasks."""

from __future__ import annotations

import contextvars
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaframe.cli import main
from metaframe.errors import (
    InputError,
    InputTypeError,
    MetaframeError,
    MissingDependencyError,
    UnknownKeyError,
)
from metaframe.tasks import (
    ClassSplit,
    FewShotSampler,
    LabelledImages,
    LazyImages,
    _files,
    load_image_dataset,
    load_image_folder,
)

Image = pytest.importorskip("PIL.Image")

Pixels = np.ndarray[Any, Any]
EXAMPLES = 6


def picture(seed: int, shape: tuple[int, ...] = (12, 12, 3)) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(file: Path, pixels: Pixels) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def folder_of(root: Path, *classes: str) -> Path:
    """`EXAMPLES` pictures for each class, the first of class c being `picture(100 * c)`."""
    for c, name in enumerate(classes):
        for i in range(EXAMPLES):
            save(root / name / f"{i}.png", picture(100 * c + i))
    return root


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return folder_of(tmp_path, "cat", "dog", "emu", "fox")


@pytest.fixture
def alphabets(tmp_path: Path) -> Path:
    return folder_of(tmp_path, "Greek/a", "Greek/b", "Latin/a", "Latin/b")


def traced(data: LabelledImages, of_picture: dict[bytes, str | int], split: ClassSplit) -> None:
    """Tasks show the pictures of their classes, in [0, 1]."""
    for name in ("train", "test"):
        sampler = FewShotSampler(
            data.images, data.labels, ways=2, shots=2, queries=3, split=name, classes=split
        )
        for task in sampler.sample(5):
            assert task.support_x.dtype == np.float32
            home: dict[int, set[str | int]] = {}
            shown = np.concatenate([task.support_x, task.query_x])
            for x, y in zip(shown, [*task.support_y, *task.query_y], strict=True):
                pixels = np.round(x * 255).astype(np.uint8)
                home.setdefault(int(y), set()).add(of_picture[pixels.tobytes()])
            assert all(len(names) == 1 for names in home.values())
            found = {names.pop() for names in home.values()}
            assert found <= {data.classes[label] for label in split[name]}
            assert len(found) == 2


# -- folders -------------------------------------------------------------------------------


def test_a_folder_for_each_class(animals: Path) -> None:
    for junk in (".DS_Store", "notes.txt", "cat/._0.png", "cat/Thumbs.db", ".git/x.png"):
        (animals / junk).parent.mkdir(exist_ok=True)
        (animals / junk).write_bytes(b"x")
    data = load_image_folder(str(animals), size=12)
    assert data.classes == ("cat", "dog", "emu", "fox")
    np.testing.assert_array_equal(data.labels, np.repeat(range(4), EXAMPLES))
    assert data.labels.dtype == np.int64
    assert not data.labels.flags.writeable
    expected = np.stack([picture(100 * c + i) for c in range(4) for i in range(EXAMPLES)])
    assert (data.images.shape, data.images.dtype) == (expected.shape, np.uint8)
    np.testing.assert_array_equal(np.asarray(data.images), expected)
    of_picture = {
        picture(100 * c + i).tobytes(): name
        for c, name in enumerate(data.classes)
        for i in range(EXAMPLES)
    }
    traced(data, of_picture, data.split_classes((2, 0, 2), seed=3))


def test_nothing_is_decoded_before_it_is_asked_for(
    animals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_image_folder(animals, size=12)
    opened: list[str] = []
    read = _files.contents
    monkeypatch.setattr(_files, "contents", lambda p, most: opened.append(p.name) or read(p, most))
    classes = ClassSplit(train=(0, 1))
    sampler = FewShotSampler(data.images, data.labels, ways=2, queries=1, classes=classes)
    assert opened == []
    first = sampler.task(0)
    assert len(opened) == 4
    np.testing.assert_array_equal(sampler.task(0).query_x, first.query_x)
    assert len(opened) == 4, "what was read is kept"
    lean = load_image_folder(animals, size=12, keep=False)
    for _ in range(2):
        np.testing.assert_array_equal(lean.images[2], picture(2))
    assert len(opened) == 6


def test_pictures_stand_upright(tmp_path: Path) -> None:
    """As a camera that was held sideways says in EXIF."""
    pixels = picture(0)
    for i in range(2):
        image = Image.fromarray(np.rot90(pixels).copy())
        exif = image.getexif()
        exif[0x0112] = 6  # turn it clockwise to see it
        (tmp_path / "cat").mkdir(exist_ok=True)
        image.save(tmp_path / f"cat/{i}.png", exif=exif)
    data = load_image_folder(tmp_path, size=12)
    np.testing.assert_array_equal(data.images[0], pixels)


def test_alphabets_and_their_characters(alphabets: Path) -> None:
    data = load_image_folder(alphabets, size=12)
    assert data.classes == ("Greek/a", "Greek/b", "Latin/a", "Latin/b")
    assert data.own_split is None
    assert data.hold_out("Latin") == ClassSplit((0, 1), (), (2, 3))
    assert data.hold_out(["Latin/a"], ["Greek"]) == ClassSplit((3,), (0, 1), (2,))
    with pytest.raises(UnknownKeyError, match=r"no class or folder 'Latn'. Did you mean 'Latin'"):
        data.hold_out(["Latn"])
    with pytest.raises(InputError, match="class 2 is in both 'validation' and 'test'"):
        data.hold_out(["Latin"], ["Latin/a"])


def test_folders_of_splits(tmp_path: Path) -> None:
    data = load_image_folder(folder_of(tmp_path, "train/cat", "train/dog", "val/emu", "test/fox"))
    assert data.classes == ("test/fox", "train/cat", "train/dog", "val/emu")
    assert data.own_split == ClassSplit(train=(1, 2), validation=(3,), test=(0,))
    folder_of(tmp_path, "test/cat")
    with pytest.raises(
        InputError, match=r"class 'cat' in test and in train.*classes that were not"
    ):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path / "train").classes == ("cat", "dog")


def test_folders_of_splits_in_capitals(tmp_path: Path) -> None:
    data = load_image_folder(folder_of(tmp_path, "Train/cat", "VAL/emu", "Test/fox"))
    assert data.own_split == ClassSplit(train=(1,), validation=(2,), test=(0,))
    folder_of(tmp_path, "train/fox")
    with pytest.raises(InputError, match=r"class 'fox' in Test and in train"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize(
    ("homes", "message"),
    [
        (["train/cat", "test/dog", "extra/emu"], r"'extra' lies beside test, train, .*hold_out"),
        (["train/cat", "test/dog", "emu"], r"'emu' lies beside test, train, "),
        (["train/cat", "Greek/dog"], r"'Greek' lies beside train, "),
        (["train/cat", "Val/emu"], r"folders Val, train and no test, .*--held-out"),
        (["train/cat"], r"folders train and no test, so nothing to test on"),
    ],
    ids=["a folder", "a class", "an alphabet", "without test", "train alone"],
)
def test_half_a_split_is_not_divided_at_random(
    homes: list[str], message: str, tmp_path: Path
) -> None:
    data = load_image_folder(folder_of(tmp_path, *homes))
    with pytest.raises(InputError, match=message):
        _ = data.own_split
    data.hold_out(["train/cat"])


def test_linked_folders(animals: Path, tmp_path: Path) -> None:
    subset = tmp_path / "subset"
    subset.mkdir()
    for name in ("cat", "dog"):
        (subset / name).symlink_to(animals / name, target_is_directory=True)
    assert load_image_folder(subset).classes == ("cat", "dog")
    (subset / "dog" / "round").symlink_to(subset, target_is_directory=True)
    with pytest.raises(InputError, match="link to a folder that is there already"):
        load_image_folder(subset)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_images_become_squares_of_a_mode(tmp_path: Path, mode: Any, channels: int) -> None:
    for i, (shape, suffix) in enumerate(
        [((30, 40, 3), "png"), ((9, 5), "png"), ((20, 20, 4), "png"), ((16, 8, 3), "bmp")]
    ):
        save(tmp_path / "cat" / f"{i}.{suffix}", np.full(shape, 60 * i, np.uint8))
    Image.new("P", (7, 7), 0).save(tmp_path / "cat" / "4.gif")
    Image.new("1", (7, 7), 1).save(tmp_path / "cat" / "5.TIFF", format="TIFF")
    data = load_image_folder(tmp_path, size=10, mode=mode)
    assert data.images.shape == (6, 10, 10, channels)
    for image, value in zip(data.images[:], (0, 60, 120, 180, 0, 255), strict=True):
        np.testing.assert_array_equal(image, value)


def _write(relative: str, content: bytes) -> Callable[[Path], Any]:
    def write(root: Path) -> None:
        (root / relative).parent.mkdir(exist_ok=True)
        (root / relative).write_bytes(content)

    return write


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an image outside": (lambda f: save(f / "9.png", picture(0)), r"9\.png is in no class"),
    "an empty class": (lambda f: (f / "gnu").mkdir(), "gnu has no images. Add some"),
    "a class without images": (_write("gnu/readme.txt", b"x"), "gnu has no images"),
    "an empty file": (_write("cat/9.png", b""), r"9\.png is empty or a broken link"),
    "a broken link": (
        lambda f: (f / "cat" / "9.png").symlink_to(f / "gone.png"),
        r"9\.png is empty or a broken link",
    ),
}


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_a_folder_that_cannot_be_is_refused_at_once(animals: Path, damage: str) -> None:
    do, message = BAD_FOLDERS[damage]
    do(animals)
    with pytest.raises(InputError, match=message):
        load_image_folder(animals)


def test_missing_folders_and_bad_arguments(
    animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="nowhere is no folder"):
        load_image_folder(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="no images in folders called after their classes"):
        load_image_folder(tmp_path / "bare")
    with pytest.raises(InputError, match="size must be at most 512"):
        load_image_folder(animals, size=1000)
    with pytest.raises(InputError, match=r"no mode called 'RBG'. Did you mean 'RGB'"):
        load_image_folder(animals, mode="RBG")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match="load_image_folder needs Pillow"):
        load_image_folder(animals)


BROKEN = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:200]),
    "text": lambda file: file.write_bytes(b"not an image"),
    "flipped": lambda file: file.write_bytes(file.read_bytes()[:50] + b"\0" * 60),
    "deep": lambda file: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(file),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_image_is_named_when_it_is_read(animals: Path, damage: str) -> None:
    file = animals / "dog" / "3.png"
    BROKEN[damage](file)
    data = load_image_folder(animals, size=12)
    np.testing.assert_array_equal(data.images[0], picture(0))
    words = "more than 8 bits" if damage == "deep" else "replace it, or take it out"
    for read in (data.images.verify, lambda: data.images[EXAMPLES + 3]):
        with pytest.raises(InputError, match=rf"dog/3\.png cannot be read.*{words}"):
            read()


# -- the command -----------------------------------------------------------------------------


def test_the_command_trains_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of(tmp_path / "images", *(f"{a}/{c}" for a in "ABC" for c in "xy"))
    flags = [
        *("--dataset", "folder", "--backend", "torch", "--ways", "2", "--queries", "2"),
        *("--width", "2", "--inner-steps", "1", "--meta-batch-size", "1", "--iterations", "1"),
        *("--eval-every", "0", "--eval-tasks", "2", "--eval-steps", "1", "--no-compiled"),
        *("--no-plots", "--out", str(tmp_path / "run"), "--json"),
    ]
    assert main(["train", *flags]) == 2
    assert "needs its files: --data FOLDER" in capsys.readouterr().err
    flags += ["--data", str(root), "--held-out", "C"]
    assert main(["train", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "accuracy"
    broken = folder_of(tmp_path / "broken", "cat", "dog")
    (broken / "cat" / "0.png").write_bytes(b"x")
    result = (tmp_path / "run" / "result.json").read_text()
    assert main(["train", *flags, "--data", str(broken), "--overwrite"]) == 1
    assert "0.png cannot be read" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").read_text() == result, "the old run is still there"


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """A run on a folder of twelve classes that are divided at random."""
    root = folder_of(tmp_path / "images", *(f"class{c:02}" for c in range(12)))
    flags = [
        *("--dataset", "folder", "--data", str(root), "--backend", "torch", "--no-compiled"),
        *("--ways", "2", "--queries", "2", "--width", "2", "--inner-steps", "1"),
        *("--meta-batch-size", "1", "--iterations", "2", "--eval-every", "1", "--eval-tasks", "2"),
        *("--validation-tasks", "1", "--eval-steps", "1", "--no-plots", "-q"),
    ]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 0
    return tmp_path


def test_a_run_goes_on_with_the_classes_it_began_with(
    divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = divided / "run"
    began = json.loads((run / "classes.json").read_text())
    sizes = {split: len(names) for split, names in began.items()}
    assert sizes == {"train": 8, "validation": 2, "test": 2}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (divided / "images" / began["train"][0]).rename(divided / "away")
    capsys.readouterr()
    for command in (["resume", "--iterations", "3"], ["evaluate"], ["plot"]):
        assert main([*command, str(run)]) == 2
        said = capsys.readouterr().err
        assert "does not divide into the classes that the run began with" in said
    found = re.search(r"'(class\d\d)' was in (train|test), and is (in|not in) test now", said)
    assert found is not None
    assert found[1] in began[found[2]]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "classes.json").unlink()  # as of a run from before it was written
    assert main(["evaluate", str(run), "-q"]) == 0


def test_a_damaged_record_of_classes_is_one_message(
    divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("{", "[]", '{"test": 1}'):
        (divided / "run" / "classes.json").write_text(text)
        assert main(["evaluate", str(divided / "run")]) == 1
        assert "classes.json is damaged" in capsys.readouterr().err


# -- lazy images -----------------------------------------------------------------------------


def test_lazy_images_are_indexed_as_arrays_are() -> None:
    whole = picture(0, (7, 3, 3, 1))
    images = LazyImages(lambda i: whole[i], whole.shape)
    for rows in (np.array([4, 0, 4]), slice(1, 6, 2), [2], -1, 3, np.array([], np.intp)):
        np.testing.assert_array_equal(images[rows], whole[rows])
    assert (len(images), images.ndim, images.dtype) == (7, 4, np.uint8)
    np.testing.assert_array_equal(np.asarray(images, np.float64), whole)
    for rows in (7, np.array([0, 7])):
        with pytest.raises(IndexError):
            images[rows]
    with pytest.raises(ValueError, match="read-only"):
        images[0][:] = 0


# -- data sets -------------------------------------------------------------------------------

LABELS = [3, 7, 5, 8] * 6
PICTURES = [picture(i) for i in range(len(LABELS))]


class Pairs:
    """A map-style data set in the sense of torch.utils.data."""

    def __init__(self, images: Any = PICTURES, labels: Any = LABELS) -> None:
        self.images, self.labels = images, labels
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        assert isinstance(i, int)
        self.read.append(i)
        return self.images[i], self.labels[i]


class WithTargets(Pairs):
    """As torchvision's are."""

    @property
    def targets(self) -> Any:
        return self.labels


class Table(Pairs):
    """As Hugging Face's are: examples are dictionaries, and a name gives a column."""

    column_names = ("image", "label", "id")

    def __getitem__(self, i: Any) -> Any:
        if i == "label":
            return iter(self.labels)
        image, label = super().__getitem__(i)
        return {"image": image, "label": label, "id": f"row {i}"}


def torch_tensors() -> Any:
    torch = pytest.importorskip("torch")
    images = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in PICTURES]) / 255
    return torch.utils.data.TensorDataset(images, torch.tensor(LABELS))


def torch_dataset() -> Any:
    torch = pytest.importorskip("torch")

    class Own(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return len(LABELS)

        def __getitem__(self, i: int) -> Any:
            return torch.from_numpy(PICTURES[i]), torch.tensor(LABELS[i])

    return Own()


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets", reason="an optional library")
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    columns = {"image": [Image.fromarray(p) for p in PICTURES], "label": LABELS}
    return datasets.Dataset.from_dict(columns, features=features)


SOURCES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "pairs": (Pairs, {}),
    "a list": (lambda: list(zip(PICTURES, LABELS, strict=True)), {}),
    "targets": (WithTargets, {}),
    "a table": (Table, {}),
    "pictures": (lambda: Table([Image.fromarray(p) for p in PICTURES]), {}),
    "nested lists": (lambda: Pairs([p.tolist() for p in PICTURES]), {}),
    "channels first": (
        lambda: Pairs([p.transpose(2, 0, 1) for p in PICTURES]),
        {"channels": "first"},
    ),
    "labels in arrays": (lambda: WithTargets(labels=np.array(LABELS)), {}),
    "torch tensors": (torch_tensors, {"channels": "first"}),
    "torch": (torch_dataset, {}),
    "hugging face": (hugging_face, {}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_data_sets(source: str) -> None:
    make, arguments = SOURCES[source]
    data = load_image_dataset(make(), **arguments)
    assert data.images.shape == (len(LABELS), 12, 12, 3)
    assert data.classes == (3, 5, 7, 8)
    np.testing.assert_array_equal(np.take(data.classes, data.labels), LABELS)
    of_picture = {p.tobytes(): label for p, label in zip(PICTURES, LABELS, strict=True)}
    traced(data, of_picture, data.hold_out(test=[7, 8]))
    for test in (7, np.int64(7), np.array([7])):
        assert data.hold_out(test) == ClassSplit((0, 1, 3), (), (2,))


@pytest.mark.parametrize("source", ["targets", "a table"])
def test_labels_are_found_without_reading_images(source: str) -> None:
    dataset = SOURCES[source][0]()
    data = load_image_dataset(dataset)
    assert dataset.read == [0]
    data.images.verify()
    data.images.verify()
    assert dataset.read[0] == 0
    assert sorted(dataset.read[1:]) == [*range(len(LABELS))], "each once, by whichever thread"
    given = Pairs()
    assert load_image_dataset(given, labels=["a", "b"] * 12, keep=False).classes == ("a", "b")
    assert given.read == [0]


@pytest.mark.parametrize(
    ("images", "arguments", "expected"),
    [
        (np.full((4, 6, 6), 51, np.uint8), {}, (6, 6, 1, 0.2)),
        (np.full((4, 6, 6), True), {}, (6, 6, 1, 1.0)),
        (np.full((4, 6, 6, 3), 51, np.int64), {}, (6, 6, 3, 0.2)),
        (np.full((4, 1, 6, 5), -2.5), {"channels": "first"}, (6, 5, 1, -2.5)),
        (np.full((4, 9, 5), 51, np.uint8), {"size": 6, "mode": "RGB"}, (6, 6, 3, 0.2)),
        (np.full((4, 9, 5, 3), 51, np.uint8), {"mode": "L"}, (9, 5, 1, 0.2)),
        ([Image.new("L", (5, 9 + i), 51) for i in range(4)], {"size": 6}, (6, 6, 1, 0.2)),
        ([Image.new(m, (6, 6), 0) for m in ("L", "P", "RGB", "1")], {"mode": "L"}, (6, 6, 1, 0.0)),
    ],
)
def test_images_of_a_data_set_take_one_form(
    images: Any, arguments: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    data = load_image_dataset(Pairs(images, [0, 0, 1, 1]), **arguments)
    sampler = FewShotSampler(
        data.images, data.labels, ways=2, queries=1, classes=ClassSplit(train=(0, 1))
    )
    *shape, value = expected
    task = sampler.task(0)
    assert task.query_x.shape == (2, *shape)
    np.testing.assert_array_equal(task.query_x, np.float32(value))


STREAM = (pair for pair in zip(PICTURES, LABELS, strict=True))
BAD_SETS: dict[str, tuple[Any, dict[str, Any], type[MetaframeError], str]] = {
    "a stream": (STREAM, {}, InputTypeError, "received a generator.*pass a list"),
    "splits": ({"train": [], "test": []}, {}, InputError, "of several, train, test; pass one"),
    "empty": ([], {}, InputError, "has no examples"),
    "no label": ([PICTURES[0]], {}, InputTypeError, r"example 0 is a ndarray, expected a pair"),
    "other keys": ([{"img": 0, "label": 1}], {}, UnknownKeyError, "no 'image'; pass.*'img'"),
    "no image": ([("cat.png", 0)], {}, InputTypeError, "image 0 is a str of dtype"),
    "nothing": ([(None, 0)], {}, InputTypeError, "image 0 is a NoneType"),
    "a vector": ([(np.zeros(9), 0)], {}, InputError, r"shape \(9,\), expected an image"),
    "other order": (
        *([(np.zeros((3, 9, 9)), 0)], {}, InputError),
        r"shape \(3, 9, 9\), .* pass channels='first'",
    ),
    "too bright": ([(np.full((9, 9), 256), 0)], {}, InputTypeError, "integers from 0 to 255"),
    "resized floats": (
        *([(np.zeros((9, 9)), 0)], {"size": 6}, InputTypeError),
        "are for images of 8 bits",
    ),
    "a float label": ([(PICTURES[0], 0.5)], {}, InputTypeError, "label of example 0 is 0.5"),
    "no label yet": ([(PICTURES[0], None)], {}, InputTypeError, "is None"),
    "one-hot": ([(PICTURES[0], np.eye(3)[0])], {}, InputTypeError, "expected an integer"),
    "mixed labels": (Pairs(labels=[0, "a"]), {}, InputTypeError, "all integers or all strings"),
    "few labels": (Pairs(), {"labels": [0, 1]}, InputError, "2 labels, the data set has 24"),
    "bad order": (Pairs(), {"channels": "third"}, InputError, "channels must be 'last' or"),
    "bad mode": (Pairs(), {"mode": "grey"}, InputError, "no mode called 'grey'"),
    "bad size": (Pairs(), {"size": 0}, InputError, "size must be at least 1"),
    "deep": (
        *([(Image.fromarray(np.zeros((9, 9), np.uint16)), 0)], {}, InputError),
        "image 0 cannot be read: mode I;16 has more than 8 bits",
    ),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_what_is_no_data_set_of_images_is_refused_at_once(case: str) -> None:
    dataset, arguments, error, words = BAD_SETS[case]
    with pytest.raises(error, match=words):
        load_image_dataset(dataset, **arguments)


def test_what_shows_only_when_it_is_read() -> None:
    uneven = load_image_dataset(Pairs([*PICTURES[:5], picture(0, (9, 9, 3)), *PICTURES[6:]]))
    with pytest.raises(InputError, match=r"image 5 has shape \(9, 9, 3\).*Pass size=84"):
        uneven.images.verify()

    class Shifted(WithTargets):
        """Its labels are transformed, its targets are not."""

        def __getitem__(self, i: int) -> Any:
            image, label = super().__getitem__(i)
            return image, label + 1

    with pytest.raises(
        InputError, match=r"example 3 has the label 9, .* announces 8. Pass labels="
    ):
        load_image_dataset(Shifted()).images[3]
    relabelled = load_image_dataset(Shifted(), labels=LABELS)
    np.testing.assert_array_equal(relabelled.images[3], PICTURES[3])


def test_errors_of_the_data_set_itself_pass_through() -> None:
    class Gone(WithTargets):
        def __getitem__(self, i: int) -> Any:
            if i == 4:
                raise FileNotFoundError("gone.png")
            return super().__getitem__(i)

    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_image_dataset(Gone()).images.verify()


def test_neither_library_is_imported() -> None:
    code = (
        "import sys, numpy as np, metaframe.tasks as t\n"
        "t.load_image_dataset([(np.zeros((8, 8), np.uint8), i % 2) for i in range(4)])\n"
        "print(*({'torch', 'datasets', 'torchvision', 'PIL'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


# -- reading in parallel ---------------------------------------------------------------------


def test_images_are_read_at_once_and_come_in_order() -> None:
    """Four readers wait for each other, which one alone would do for ever."""
    together = threading.Barrier(4, timeout=20)

    def read(row: int) -> np.ndarray[Any, Any]:
        together.wait()
        return np.full((2, 2, 1), row, np.uint8)

    images = LazyImages(read, (20, 2, 2, 1), workers=4)
    assert images[np.array([9, 3, 9, 7, 1])][:, 0, 0, 0].tolist() == [9, 3, 9, 7, 1]
    assert images[np.array([3, 9])][:, 0, 0, 0].tolist() == [3, 9], "what is kept is not read again"


@pytest.mark.parametrize("keep", [True, False])
def test_one_worker_reads_in_order_in_the_thread_that_asks(keep: bool) -> None:
    seen: list[tuple[int, int]] = []

    def read(row: int) -> np.ndarray[Any, Any]:
        seen.append((row, threading.get_ident()))
        return np.full((1, 1, 1), row, np.uint8)

    images = LazyImages(read, (9, 1, 1, 1), keep=keep, workers=1)
    images[np.array([5, 2, 5])]
    assert [row for row, _ in seen] == ([5, 2] if keep else [5, 2, 5])
    assert {thread for _, thread in seen} == {threading.get_ident()}


def test_a_broken_image_is_reported_from_a_worker() -> None:
    def read(row: int) -> np.ndarray[Any, Any]:
        if row == 7:
            raise InputError("image 7 cannot be read")
        return np.zeros((1, 1, 1), np.uint8)

    images = LazyImages(read, (9, 1, 1, 1), workers=4)
    with pytest.raises(InputError, match="image 7"):
        images.verify()
    with pytest.raises(InputError, match="image 7"):
        images[np.array([1, 7])]


def test_a_reader_may_read_from_other_images() -> None:
    """With as many readers waiting as there are threads, nobody would read."""
    inner = LazyImages(lambda row: np.full((1, 1, 1), row, np.uint8), (9, 1, 1, 1), workers=2)
    outer = LazyImages(lambda row: inner[np.arange(9)][row], (9, 1, 1, 1), workers=2)
    assert outer[:][:, 0, 0, 0].tolist() == list(range(9))


def test_a_reader_sees_the_context_of_who_asks() -> None:
    setting = contextvars.ContextVar("setting", default=0)
    images = LazyImages(
        lambda row: np.full((1, 1, 1), setting.get() + row, np.uint8), (5, 1, 1, 1), workers=3
    )
    setting.set(40)
    assert images[:][:, 0, 0, 0].tolist() == [40, 41, 42, 43, 44]


@pytest.mark.parametrize(("workers", "error"), [(0, InputError), (1.5, InputTypeError)])
def test_bad_workers_are_named(workers: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="workers must be"):
        LazyImages(lambda row: np.zeros((1, 1, 1)), (2, 1, 1, 1), workers=workers)
