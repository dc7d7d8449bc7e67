"""Archives that no official one is: every reader refuses each of them, by the same guards."""

from __future__ import annotations

import io
import os
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaframe.errors import InputError
from metaframe.tasks import (
    _archives,
    load_image_folder,
    load_mini_imagenet,
    load_omniglot,
    load_tiered_imagenet,
    one_shot_runs,
)

Image = pytest.importorskip("PIL.Image")


def png(*size: int, mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, "PNG")
    return buffer.getvalue()


DRAWING, PHOTOGRAPH = png(105, 105), png(8, 8, mode="RGB")


def _runs() -> dict[str, bytes]:
    found = {}
    for run in (f"run{i:02d}" for i in range(1, 21)):
        items = range(1, 21)
        found |= {f"{run}/training/class{i:02d}.png": DRAWING for i in items}
        found |= {f"{run}/test/item{i:02d}.png": DRAWING for i in items}
        lines = [f"{run}/test/item{i:02d}.png {run}/training/class{i:02d}.png" for i in items]
        found[f"{run}/class_labels.txt"] = "\n".join(lines).encode()
    return found


def _arrays(folder: Path) -> dict[str, bytes]:
    np.savez(folder / "train_labels.npz", labels=np.zeros(2, np.int64))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 8, 8, 3), np.uint8))
    return {"images.npy": buffer.getvalue()}


def _listed(folder: Path) -> dict[str, bytes]:
    (folder / "train.csv").write_text("filename,label\na.jpg,n1\nb.jpg,n2\n")
    return {"images/a.jpg": PHOTOGRAPH, "images/b.jpg": PHOTOGRAPH}


STEM = "images_background_small1"
READERS: dict[str, tuple[str, Callable[[Path], dict[str, bytes]], Callable[[Path], Any]]] = {
    "omniglot": (
        f"{STEM}.zip",
        lambda folder: {
            f"{STEM}/Greek/character01/0001_{i:02d}.png": DRAWING for i in range(1, 21)
        },
        load_omniglot,
    ),
    "runs": ("all_runs.zip", lambda folder: _runs(), one_shot_runs),
    "mini": ("images.zip", _listed, lambda folder: load_mini_imagenet(folder, size=8)),
    "tiered": (
        "train.zip",
        lambda folder: {"train/n00000001/a.jpg": PHOTOGRAPH, "train/n00000002/b.jpg": PHOTOGRAPH},
        lambda folder: load_tiered_imagenet(folder, size=8),
    ),
    "arrays": ("train_images.npz", _arrays, lambda folder: load_tiered_imagenet(folder, size=8)),
}


def _add(name: str, data: bytes = b"x", method: int = zipfile.ZIP_DEFLATED, mode: int = 0) -> Any:
    def add(archive: zipfile.ZipFile) -> None:
        member = zipfile.ZipInfo(name)
        member.compress_type, member.external_attr = method, mode << 16
        archive.writestr(member, data)

    return add


def _overlap(archive: zipfile.ZipFile) -> None:
    """Names for the same bytes: each costs 50 bytes and promises 100,000."""
    data = random.Random(0).randbytes(100_000)
    archive.writestr("kernel", data)
    whole = archive.getinfo("kernel")
    for i in range(5):
        member = zipfile.ZipInfo(f"copy{i}")
        member.header_offset, member.CRC = whole.header_offset, whole.CRC
        member.compress_size, member.file_size = whole.compress_size, whole.file_size
        archive.filelist.append(member)
        archive.NameToInfo[member.filename] = member


def _again(archive: zipfile.ZipFile) -> None:
    archive.writestr(archive.namelist()[0], b"another")


def _spelled_otherwise(archive: zipfile.ZipFile) -> None:
    archive.writestr(f"./{archive.namelist()[0]}", b"another")


def _many(archive: zipfile.ZipFile) -> None:
    for i in range(401):
        archive.writestr(f"{i}", b"")


HOSTILE: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    "a name twice": (_again, "two members called"),
    "a name twice, spelled otherwise": (_spelled_otherwise, "two members called"),
    "a link": (_add("x.png", b"/etc/passwd", mode=stat.S_IFLNK | 0o777), "a link or a device"),
    "a device": (_add("x.png", mode=stat.S_IFCHR | 0o666), "a link or a device"),
    "a bomb": (_add("x.png", b"\0" * 2_000_000), "a ratio of over 200"),
    "another compression": (_add("x.png", b"x", zipfile.ZIP_BZIP2), "expected stored or deflated"),
    "members that overlap": (_overlap, "its members overlap"),
    "a parent": (_add("a/../../x"), "points outside it"),
    "a root": (_add("/etc/x"), "points outside it"),
    "a drive": (_add("C:x"), "points outside it"),
    "another system's": (_add("..\\x"), "points outside it"),
    "a line break": (_add("x\nOK"), "points outside it"),
    "a name that ends": (_add("x@y"), "points outside it"),
    "too many": (_many, "members, expected at most 400"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", HOSTILE)
def test_hostile_archives(
    form: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, members, read), (damage, says) = READERS[reader], HOSTILE[form]
    if form == "too many":
        monkeypatch.setattr(_archives, "MOST_MEMBERS", 400)
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members(tmp_path).items():
            archive.writestr(member, data)
    if form == "a link":
        read(tmp_path)  # it is intact
    with zipfile.ZipFile(tmp_path / name, "a") as archive:
        damage(archive)
    if form == "a name that ends":
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"x@y", b"x\0y"))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=says) as caught:
        read(tmp_path)
    assert name in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def _images(reader: str, extra: str, tmp_path: Path) -> Any:
    name, members, read = READERS[reader]
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for member, data in members(tmp_path).items():
            archive.writestr(member, data)
        archive.writestr(extra, png(8, 8, mode="RGB"))
    return read(tmp_path)


@pytest.mark.parametrize(
    ("reader", "again"), [("mini", "other/a.jpg"), ("tiered", "x/n00000001/a.jpg")]
)
def test_an_image_in_two_folders_is_refused(reader: str, again: str, tmp_path: Path) -> None:
    """The one that came last would have been taken."""
    with pytest.raises(InputError, match=f"and '{again}' are the same image|'{again}' and"):
        _images(reader, again, tmp_path)


@pytest.mark.parametrize("reader", ["mini", "tiered"])
def test_what_operating_systems_add_is_passed_over(reader: str, tmp_path: Path) -> None:
    assert len(_images(reader, "__MACOSX/train/n00000001/._a.jpg", tmp_path).images) == 2


def test_a_pipe_in_the_place_of_an_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{STEM}.zip")
    with pytest.raises(InputError, match="no regular file"):
        load_omniglot(tmp_path)


def test_a_pipe_in_the_place_of_a_list(tmp_path: Path) -> None:
    _listed(tmp_path)
    os.mkfifo(tmp_path / "SHA256SUMS")
    with pytest.raises(InputError, match="Not a regular file"):
        load_mini_imagenet(tmp_path)


@pytest.mark.parametrize("text", [b"filename,label\n\0,x\n", b'filename,label\n"' + b"x" * 200_000])
def test_a_list_that_csv_refuses(text: bytes, tmp_path: Path) -> None:
    _listed(tmp_path)
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(InputError, match=r"train\.csv"):
        load_mini_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("form", "side"), [("PNG", 4900), ("JPEG", 4900), ("WEBP", 3470), ("GIF", 4900)]
)
def test_a_picture_takes_no_more_than_announced(form: str, side: int, tmp_path: Path) -> None:
    """A few kilobytes that decode into more than 24 million pixels, or 12 of WebP."""
    (tmp_path / "cat").mkdir()
    file = tmp_path / "cat" / f"1.{form.lower()}"
    Image.new("1" if form != "WEBP" else "RGB", (side, side)).convert("L").save(file, form)
    images = load_image_folder(tmp_path, size=8).images
    with pytest.raises(InputError, match=rf"{side}x{side} pixels, expected at most \d+ in all"):
        images.verify()


def test_a_picture_of_24_million_pixels_is_read(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("L", (6000, 4000), 9).save(tmp_path / "cat" / "1.png")
    assert np.asarray(load_image_folder(tmp_path, size=2).images).min() == 9


def test_names_that_are_no_unicode_are_names(tmp_path: Path) -> None:
    """Linux takes any bytes; a folder of images is read all the same."""
    _listed(tmp_path)
    (tmp_path / "images").mkdir()
    for name in (b"a.jpg", b"b.jpg", b"\xff.jpg"):
        (tmp_path / "images" / os.fsdecode(name)).write_bytes(PHOTOGRAPH)
    assert len(load_mini_imagenet(tmp_path, size=8).images) == 2
    for home in (b"train/n00000001", b"train/n00000002"):
        (tmp_path / os.fsdecode(home)).mkdir(parents=True)
        (tmp_path / os.fsdecode(home + b"/\xff.jpg")).write_bytes(PHOTOGRAPH)
    assert len(load_tiered_imagenet(tmp_path, size=8).sha256) == 64
