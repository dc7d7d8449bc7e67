"""Omniglot from small files in the official layout: intact, damaged and hostile ones."""

from __future__ import annotations

import io
import itertools
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaframe.errors import InputError, MissingDependencyError, UnknownKeyError
from metaframe.tasks import (
    FewShotSampler,
    Omniglot,
    load_omniglot,
    one_shot_runs,
)
from metaframe.tasks._omniglot_files import SIDE, reduce_ink
from metaframe.tasks.sampling import SPLITS

Image = pytest.importorskip("PIL.Image")

SMALL1 = "images_background_small1"
Members = dict[str, bytes]


def png(ink: np.ndarray) -> bytes:
    """A drawing as the official files hold it: one bit a pixel, ink is black."""
    buffer = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def drawing(*coordinates: int) -> np.ndarray:
    """A square at a place of its own."""
    ink = np.zeros((SIDE, SIDE), bool)
    row, column = (13 * coordinates[0]) % 90, (4 * coordinates[1]) % 90
    ink[row : row + 15, column : column + 15] = True
    return ink


def part_members(stem: str, characters: dict[str, int]) -> Members:
    members = {}
    number = itertools.count(1)
    for alphabet, count in characters.items():
        for i in range(1, count + 1):
            n = next(number)
            for drawer in range(1, 21):
                name = f"{stem}/{alphabet}/character{i:02d}/{n:04d}_{drawer:02d}.png"
                members[name] = png(drawing(n, drawer))
    return members


def run_members() -> Members:
    members = {}
    for run in range(1, 21):
        lines = []
        for i in range(1, 21):
            answer = (i * 3 + run) % 20 + 1
            members[f"run{run:02d}/training/class{i:02d}.png"] = png(drawing(run, i))
            members[f"run{run:02d}/test/item{i:02d}.png"] = png(drawing(run, answer))
            lines.append(
                f"run{run:02d}/test/item{i:02d}.png run{run:02d}/training/class{answer:02d}.png"
            )
        members[f"run{run:02d}/class_labels.txt"] = "\n".join(lines).encode()
    return members


def write(where: Path, stem: str, members: Members, form: str = "zip") -> Path:
    if form == "zip":
        with zipfile.ZipFile(where / f"{stem}.zip", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return where / f"{stem}.zip"
    for name, data in members.items():
        file = where / (name if name.startswith(stem) else f"{stem}/{name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return where / stem


@pytest.fixture(scope="module")
def small1() -> Members:
    return part_members(SMALL1, {"Greek": 2, "Latin": 1})


@pytest.fixture(scope="module")
def runs() -> Members:
    return run_members()


# -- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_a_part_is_read_from_zip_and_folder(tmp_path, small1, form):
    location = write(tmp_path, SMALL1, small1, form)
    for path in (tmp_path, str(tmp_path), location):
        data = load_omniglot(path)
        assert data.characters == ("Greek/character01", "Greek/character02", "Latin/character01")
        assert data.alphabets == ("Greek", "Latin")
        assert (data.images.shape, data.images.dtype) == ((60, 28, 28, 1), np.uint8)
        np.testing.assert_array_equal(data.labels, np.repeat([0, 1, 2], 20))
    full = load_omniglot(tmp_path, size=SIDE)
    np.testing.assert_array_equal(full.images[25, ..., 0], drawing(2, 6) * np.uint8(255))


def test_files_of_operating_systems_are_ignored(tmp_path, small1):
    extra = {"__MACOSX/._Greek": b"x", f"{SMALL1}/.DS_Store": b"x", "notes.txt": b"x"}
    extra[f"__MACOSX/{SMALL1}/Greek/character01/._0001_01.png"] = b"x"
    write(tmp_path, SMALL1, {**small1, **extra})
    assert len(load_omniglot(tmp_path).images) == 60


def test_a_character_in_two_parts_counts_once(tmp_path, small1):
    write(tmp_path, SMALL1, small1)
    stem = "images_background_small2"
    write(tmp_path, stem, part_members(stem, {"Greek": 2, "Tagalog": 1}))
    both = load_omniglot(tmp_path, ["small1", "small2"])
    assert both.alphabets == ("Greek", "Latin", "Tagalog")
    assert len(both.characters) == 4
    assert len(both.images) == 80


def test_a_second_call_decodes_nothing_and_a_new_file_is_read(tmp_path, small1, monkeypatch):
    write(tmp_path, SMALL1, small1)
    load_omniglot(tmp_path)
    opened = []
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a: opened.append(a))
    load_omniglot(tmp_path)
    assert not opened
    monkeypatch.undo()
    write(tmp_path, SMALL1, part_members(SMALL1, {"Korean": 1}))
    assert load_omniglot(tmp_path).alphabets == ("Korean",)


def test_what_is_returned_cannot_be_changed(tmp_path, small1):
    write(tmp_path, SMALL1, small1)
    data = load_omniglot(tmp_path)
    for array in (data.images, data.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_nothing_is_written_beside_the_files(tmp_path, small1, runs):
    write(tmp_path, SMALL1, small1)
    write(tmp_path, "all_runs", runs)
    before = sorted(tmp_path.rglob("*"))
    load_omniglot(tmp_path)
    one_shot_runs(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


# -- reducing ------------------------------------------------------------------------------


@settings(max_examples=10)
@given(size=st.integers(1, SIDE), seed=st.integers(0, 2**32 - 1))
def test_reducing_averages_over_each_pixels_area(size, seed):
    ink = np.random.default_rng(seed).random((1, SIDE, SIDE)) < 0.3
    fine = ink.repeat(size, 1).repeat(size, 2).reshape(1, size, SIDE, size, SIDE)
    share = fine.mean((2, 4))
    assert np.abs(reduce_ink(ink, size) / 255 - share).max() <= 0.5 / 255 + 1e-9


def test_reducing_matches_pillows_box_filter():
    """For whole ratios: for others Pillow counts a pixel by its centre, in or out."""
    ink = drawing(1, 1) | drawing(4, 9)
    box = Image.fromarray(ink.astype(np.uint8) * 255).resize((35, 35), Image.Resampling.BOX)
    ours = reduce_ink(ink[None], 35)[0].astype(int)
    assert np.abs(ours - np.asarray(box).astype(int)).max() <= 1


# -- splits --------------------------------------------------------------------------------


def test_alphabets_are_held_out_whole(tmp_path, small1):
    write(tmp_path, SMALL1, small1)
    data = load_omniglot(tmp_path)
    split = data.split_alphabets(test="Latin")
    assert (split.train, split.validation, split.test) == ((0, 1), (), (2,))
    with pytest.raises(UnknownKeyError, match="no alphabet 'Latn'"):
        data.split_alphabets(test=["Latn"])
    with pytest.raises(InputError, match="both 'validation' and 'test'"):
        data.split_alphabets(test="Latin", validation="Latin")
    sampler = FewShotSampler(
        data.images, data.labels, ways=4, queries=3, split="test", classes=split, rotations=True
    )
    assert sampler.task(0).query_x.shape == (12, 28, 28, 1)


@pytest.fixture(scope="module")
def whole() -> Omniglot:
    """As many characters as there are, each drawn twice, as its number in a corner."""
    characters = tuple(f"alphabet{i // 33:02d}/character{i % 33 + 1:02d}" for i in range(1623))
    drawings = np.zeros((2 * 1623, 2, 2, 1))
    labels = np.repeat(np.arange(1623), 2)
    drawings[:, 0, 0, 0] = labels
    return Omniglot(drawings, labels, characters)


def test_the_published_division_of_characters(whole):
    """1200 characters to train with, of which 100 to validate, and 423 to test."""
    split = whole.split_characters()
    parts = [split[name] for name in SPLITS]
    assert [len(part) for part in parts] == [1100, 100, 423]
    assert sorted(itertools.chain(*parts)) == list(range(1623))
    for part in parts:  # at random, whatever the alphabet
        alphabets = {whole.characters[label].partition("/")[0] for label in part}
        assert len(alphabets) > 40


@pytest.mark.parametrize(
    ("seed", "validation", "test"),
    [
        (0, (41, 62, 67, 82, 120, 122), (27, 28, 29, 32, 37, 38, 39, 48)),
        (1, (7, 9, 40, 41, 81, 94), (8, 10, 14, 15, 20, 25, 27, 31)),
    ],
)
def test_the_division_of_characters_is_fixed_by_its_seed(whole, seed, validation, test):
    """Published results name it by its seed, so it never changes."""
    split = whole.split_characters(seed)
    assert (split.validation[:6], split.test[:8]) == (validation, test)
    assert sum(split.test) == {0: 350599, 1: 350145}[seed]
    assert split == whole.split_characters(seed)


def test_other_parts_are_divided_in_proportion(whole):
    part = Omniglot(whole.images[:200], whole.labels[:200], whole.characters[:100])
    split = part.split_characters()
    assert [len(split[name]) for name in SPLITS] == [60, 20, 20]


def test_rotations_stay_in_the_split_of_their_character(whole):
    split = whole.split_characters()
    for name in SPLITS:
        sampler = FewShotSampler(
            whole.images,
            whole.labels,
            ways=40,
            queries=1,
            split=name,
            classes=split,
            rotations=True,
        )
        assert sampler.num_classes == 4 * len(split[name])
        corners = set()
        for task in sampler.sample(20):
            numbers = task.query_x.max((1, 2, 3)).astype(int)
            assert set(numbers) <= set(split[name])
            corners |= {tuple(x) for x in np.argwhere(task.query_x[..., 0])[:, 1:].tolist()}
        assert len(corners) == 4, "all four rotations occur"


# -- runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_the_runs_are_read_with_their_answers(tmp_path, runs, form):
    write(tmp_path, "all_runs", runs, form)
    found = one_shot_runs(tmp_path, size=35)
    assert [run.name for run in found] == [f"run{i:02d}" for i in range(1, 21)]
    for run in found:
        assert run.train_images.shape == run.test_images.shape == (20, 35, 35, 1)
        np.testing.assert_array_equal(run.train_images[run.answers], run.test_images)
    task = found[0].task()
    assert task.support_x.max() == 1.0
    np.testing.assert_array_equal(task.query_y, found[0].answers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("run07/test/item20.png"), "run07/test has 19 images, expected 20"),
        (lambda m: m.pop("run07/class_labels.txt"), "run07 has no class_labels.txt"),
        (lambda m: [m.pop(n) for n in [*m] if n.startswith("run20")], "expected run01 to run20"),
        (lambda m: m.update({"run07/class_labels.txt": b"\xff\xfe"}), "ascii"),
        (lambda m: m.update({"run07/class_labels.txt": b""}), "0 answers, expected 20"),
        (
            lambda m: m.update({"run07/class_labels.txt": b"run07/test/item01.png ../../passwd"}),
            "does not pair one test image of run07",
        ),
    ],
)
def test_damaged_runs_are_named(tmp_path, runs, change, words):
    members = dict(runs)
    change(members)
    write(tmp_path, "all_runs", members)
    with pytest.raises(InputError, match=words):
        one_shot_runs(tmp_path)


# -- hostile and damaged files ---------------------------------------------------------------

FIRST = f"{SMALL1}/Greek/character01/0001_01.png"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png() -> bytes:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def two_headers(first: int, second: int) -> bytes:
    """A picture of which the second header counts."""
    headers = (struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0) for side in (first, second))
    rows = zlib.compress(b"\0" * ((second + 7) // 8 + 1) * second, 9)
    body = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(b"IHDR", x) for x in headers) + body


def deep_png() -> bytes:
    """A drawing of 16 bits a pixel."""
    file = io.BytesIO()
    Image.fromarray(np.full((105, 105), 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (two_headers(105, 4000), "4000x4000 pixels, expected 105x105"),
        (deep_png(), "more than 8 bits a pixel"),
        (b"", "not a PNG image"),
        (b"GIF89a" + b"\0" * 100, "not a PNG image"),
        (png(drawing(1, 1))[:60], r"0001_01\.png cannot be read"),
        (huge_png(), "3600000000 pixels"),
        (png(np.zeros((28, 28), bool)), "28x28 pixels, expected 105x105"),
        (b"\0" * 1_000_000, "1000000 bytes, expected at most 65536"),
    ],
    ids=["two headers", "16 bits", "empty", "gif", "truncated", "huge", "small", "long"],
)
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_a_file_that_is_no_drawing_is_named(tmp_path, small1, data, words, form):
    write(tmp_path, SMALL1, {**small1, FIRST: data}, form)
    with pytest.raises(InputError, match=words) as caught:
        load_omniglot(tmp_path)
    assert "0001_01.png" in str(caught.value)
    assert "download it again" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(tmp_path, small1):
    write(tmp_path, SMALL1, small1)
    with zipfile.ZipFile(tmp_path / f"{SMALL1}.zip", "a") as archive:
        archive.writestr(FIRST, b"another")
    with pytest.raises(InputError, match=r"two members called .*0001_01\.png"):
        load_omniglot(tmp_path)


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "a\\evil"])
def test_names_that_point_outside_are_refused(tmp_path, small1, name):
    inside = tmp_path / "data"
    inside.mkdir()
    write(inside, SMALL1, {**small1, name: b"x"})
    with pytest.raises(InputError, match="Do not extract this file"):
        load_omniglot(inside)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("keep", [0, 10, 2000, -30])
def test_a_truncated_archive_is_named(tmp_path, small1, keep):
    file = write(tmp_path, SMALL1, small1)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"small1\.zip cannot be read.*download it again"):
        load_omniglot(tmp_path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path, small1):
    """Whatever is damaged, the result is an InputError or the right drawings."""
    file = write(tmp_path, SMALL1, dict(itertools.islice(small1.items(), 20)))
    intact, good = file.read_bytes(), load_omniglot(tmp_path).images
    rng = np.random.default_rng(0)
    for trial in range(150):
        damaged = bytearray(intact)
        for at in rng.integers(0, len(intact), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        folder = tmp_path / str(trial)
        folder.mkdir()
        (folder / file.name).write_bytes(damaged)
        try:
            images = load_omniglot(folder).images
        except InputError:
            continue
        np.testing.assert_array_equal(images, good)


def test_an_encrypted_member_is_named(tmp_path, small1):
    file = write(tmp_path, SMALL1, small1)
    data = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + offset] |= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"0001_01\.png cannot be read.*encrypted"):
        load_omniglot(tmp_path)


def test_a_character_with_a_drawing_too_few_or_twice_is_named(tmp_path, small1):
    members = dict(small1)
    members.pop(FIRST)
    write(tmp_path, SMALL1, members)
    with pytest.raises(InputError, match="Greek/character01 has 19 drawings, expected 20"):
        load_omniglot(tmp_path)
    members = {**small1, FIRST.replace("0001_01", "0009_01"): small1[FIRST]}
    write(tmp_path, SMALL1, members)
    with pytest.raises(InputError, match="are the same item"):
        load_omniglot(tmp_path)


def test_what_is_missing_is_named(tmp_path, small1, monkeypatch):
    with pytest.raises(InputError, match=r"neither images_background_small1\.zip nor a folder"):
        load_omniglot(tmp_path)
    with pytest.raises(InputError, match=r"neither all_runs\.zip"):
        one_shot_runs(tmp_path)
    with pytest.raises(UnknownKeyError, match=r"no part 'smal1' .* Did you mean 'small1'"):
        load_omniglot(tmp_path, "smal1")
    with pytest.raises(InputError, match="at least one of"):
        load_omniglot(tmp_path, [])
    for size in (0, 106):
        with pytest.raises(InputError, match=rf"size must be at .* received (size=)?{size}"):
            load_omniglot(tmp_path, size=size)
    write(tmp_path, SMALL1, {"readme.txt": b""})
    with pytest.raises(InputError, match="has no files called"):
        load_omniglot(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write(tmp_path, SMALL1, small1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match="pip install pillow"):
        load_omniglot(tmp_path)
