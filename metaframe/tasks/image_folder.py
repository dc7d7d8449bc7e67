"""Few-shot classification over any folder of images: a class is a folder with images in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from metaframe.errors import InputError
from metaframe.tasks._files import Source, read_file, reporting
from metaframe.tasks._pictures import CHANNELS, Mode, Pixels, check_mode, check_size, decoder
from metaframe.tasks.labelled import LabelledImages, check_folders, labelled
from metaframe.tasks.lazy import LazyImages

FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""The formats that are read, by Pillow's names, and the endings of such files."""

_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
_ANY = Source(
    "",
    256 * 2**20,
    remedy="The file is damaged or no image; replace it, or take it out of the folder.",
)


def load_image_folder(
    path: str | Path,
    *,
    size: int = 84,
    mode: Mode = "RGB",
    keep: bool = True,
    workers: int | None = None,
) -> LabelledImages:
    """Find the images in a folder, whose subfolders are classes: `path`/cat/1.jpg and so on.

    Folders may be nested, as alphabets are, `path`/Greek/alpha/1.png: a class is a folder that
    holds images itself, and its name is its path, "Greek/alpha". Hidden files and files that are
    not called like images are passed over. An image has at most 24 million pixels, 6000 x 4000, and
    of WebP half as many. The images are read when a task first asks for them;
    `images.verify()` reads them all before.

    Args:
        path: the folder.
        size: side of the images in pixels, at most 512. They are scaled to squares, not cut.
        mode: "RGB", or "L" for grey.
        keep: hold on to images that were read, `size * size * channels` bytes each.
        workers: how many images are read at once, in threads; default: one for each core, at most
            8.

    Returns:
        images `(N, size, size, 3)`, with mode "L" `(N, size, size, 1)`, uint8, which
        `FewShotSampler` makes floats in [0, 1], and their classes. `split_classes()`,
        `hold_out(["Greek"])` or, with folders train, val and test, `own_split` divides these.

    Raises:
        InputError: no such folder, none with images, an empty folder or file, images outside of
            all classes, or a class in two of the folders train, val and test; when it is read, a
            broken image. Names it.
        MissingDependencyError: Pillow is not installed.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(8):
    ...         home = Path(folder, ("cat", "dog")[i % 2])
    ...         home.mkdir(exist_ok=True)
    ...         Image.new("L", (60, 40), 30 * i).save(home / f"{i}.png")
    ...     data = load_image_folder(folder, size=28, mode="L")
    ...     data.images.verify()
    >>> data.classes, data.images.shape
    (('cat', 'dog'), (8, 28, 28, 1))
    >>> from metaframe.tasks import FewShotSampler
    >>> split = data.split_classes((2, 0, 0))
    >>> FewShotSampler(data.images, data.labels, ways=2, queries=3, classes=split).task(0)
    Task(support_x=(2, 28, 28, 1), support_y=(2,), query_x=(6, 28, 28, 1), query_y=(6,))
    """
    root, size = Path(path).resolve(), check_size(size)
    decode = decoder("load_image_folder", size, check_mode(mode), tuple(FORMATS))
    if not root.is_dir():
        raise InputError(f"{root} is no folder. Pass the one that holds a folder for each class.")
    files = list(_images(root))
    if not files:
        raise InputError(
            f"{root} has no images in folders called after their classes, such as cat/1.jpg. "
            f"Images end in {', '.join(sorted(_SUFFIXES))}."
        )
    classes = [file.parent.relative_to(root).as_posix() for file in files]
    check_folders(str(root), classes)

    def read(row: int) -> Pixels:
        data = read_file(files[row], _ANY)
        with reporting(str(files[row]), _ANY):
            return decode(data)

    shape = (len(files), size, size, CHANNELS[mode])
    return labelled(LazyImages(read, shape, keep=keep, workers=workers), classes)


def _images(root: Path) -> Iterator[Path]:
    """All images below `root`, in the order of their names."""
    seen: set[str] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            raise InputError(f"{folder} is a link to a folder that is there already; remove it.")
        seen.add(real)
        inner[:] = sorted(name for name in inner if not _passed_over(name))
        found = [
            Path(folder, name)
            for name in sorted(names)
            if not _passed_over(name) and Path(name).suffix.lower() in _SUFFIXES
        ]
        _check_folder(root, Path(folder), found, inner)
        yield from found


def _check_folder(root: Path, folder: Path, images: list[Path], inner: list[str]) -> None:
    if folder == root and images:
        raise InputError(
            f"{images[0]} is in no class. Put it into a folder called after its class, such as "
            f"{root / 'cat' / images[0].name}."
        )
    if folder != root and not images and not inner:
        raise InputError(f"{folder} has no images. Add some, or remove the folder.")
    for image in images:
        if not image.exists() or image.stat().st_size == 0:
            raise InputError(f"{image} is empty or a broken link. {_ANY.again}")


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
