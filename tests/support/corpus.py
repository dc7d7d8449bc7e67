"""Small files of every kind that metaframe reads and does not write, intact, to be damaged."""

from __future__ import annotations

import io
import random
import zipfile
from functools import cache
from typing import Any

import pytest

from metaframe.training.metrics import COLUMNS

Image = pytest.importorskip("PIL.Image")


def picture(form: str, mode: str, side: int = 16, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = random.Random(side).randbytes(side * side * 4)
    image = Image.frombytes("RGBA", (side, side), pixels).convert(mode)
    image.save(buffer, form, **options)
    return buffer.getvalue()


@cache
def pictures() -> dict[str, tuple[bytes, ...]]:
    turned = Image.Exif()
    turned[0x112] = 6
    return {
        "JPEG": (picture("JPEG", "RGB", exif=turned), picture("JPEG", "L", progressive=True)),
        "PNG": (picture("PNG", "RGBA", exif=turned), picture("PNG", "P"), picture("PNG", "1", 105)),
        "BMP": (picture("BMP", "RGB"), picture("BMP", "P")),
        "GIF": (picture("GIF", "P"),),
        "PPM": (picture("PPM", "RGB"), b"P3 2 2 255 " + b"9 " * 12),
        "TIFF": tuple(
            picture("TIFF", "RGB", compression=c) for c in ("raw", "tiff_lzw", "jpeg", "packbits")
        ),
        "WEBP": (picture("WEBP", "RGBA", lossless=True), picture("WEBP", "RGB", exif=turned)),
    }


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


STEM = "images_background_small1"


@cache
def drawings() -> dict[str, bytes]:
    one = pictures()["PNG"][2]
    return {f"{STEM}/Greek/character01/0001_{i:02d}.png": one for i in range(1, 21)}


@cache
def runs() -> dict[str, bytes]:
    found = {}
    for run in (f"run{i:02d}" for i in range(1, 21)):
        items = range(1, 21)
        found |= {f"{run}/training/class{i:02d}.png": pictures()["PNG"][2] for i in items}
        found |= {f"{run}/test/item{i:02d}.png": pictures()["PNG"][2] for i in items}
        lines = [f"{run}/test/item{i:02d}.png {run}/training/class{i:02d}.png" for i in items]
        found[f"{run}/class_labels.txt"] = "\n".join(lines).encode()
    return found


LISTED = {"images/a.jpg": "JPEG", "images/b.png": "PNG"}
LIST = b"filename,label\na.jpg,n1\nb.png,n2\n"
POINT = {"mean": 0.5, "ci95": 0.1}
RESULT = {
    "metric": "accuracy",
    "evaluation": {"tasks": 5, "curve": [POINT] * 2, "transductive": POINT, "inductive": None},
}
RECORD = dict.fromkeys(COLUMNS, 1)
