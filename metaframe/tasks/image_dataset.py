"""Few-shot classification over the data sets of other libraries.

What torch's, torchvision's and Hugging Face's data sets have in common is `len(dataset)` and
`dataset[i]`, and that is all that is asked of one: neither library is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from metaframe.errors import InputError, InputTypeError, UnknownKeyError, nearest
from metaframe.tasks._pictures import Mode, check_mode, check_size, fitted, pillow
from metaframe.tasks.labelled import LabelledImages, labelled
from metaframe.tasks.lazy import LazyImages

Channels = Literal["last", "first"]

_DEPTHS = (1, 3, 4)
"""The numbers of channels that an image may have."""


def load_image_dataset(
    dataset: Any,
    *,
    image: str = "image",
    label: str = "label",
    labels: Iterable[int | str] | None = None,
    size: int | None = None,
    mode: Mode | None = None,
    channels: Channels = "last",
    keep: bool = True,
    workers: int | None = None,
) -> LabelledImages:
    """Take the images and classes of a map-style data set, such as torch's or Hugging Face's.

    `dataset[i]`, for i from 0 to `len(dataset) - 1`, is a pair (image, label) or a mapping with
    these two; others of its entries are passed over. Images are Pillow's, or whatever
    `numpy.asarray` makes `(height, width)`, `(height, width, channels)` or, with
    `channels="first"`, `(channels, height, width)` of. They are read when a task first asks for
    them; `images.verify()` reads them all before.

    Labels are needed at once. They come from the column `label` of a Hugging Face data set, or
    from the attribute `targets` that torchvision's have; without either, every example is read.
    Whenever an image is read, its label is compared with these.

    Args:
        dataset: the data set.
        image: the key of the image, where examples are mappings.
        label: the key of the label, where examples are mappings.
        labels: `(N,)` integers or strings that take the place of the data set's labels.
        size: side of the images in pixels, at most 512; default: they have one size already.
        mode: "RGB", or "L" for grey; default: as they are.
        channels: where arrays have their channels. "first" is what torchvision's `ToTensor` makes.
        keep: hold on to images that were read. With random transforms, False; tasks are then no
            longer fixed by their seed.
        workers: how many examples are read at once, in threads; default: one for each core, at
            most 8. 1 for a data set that only one thread may read at a time.

    Returns:
        images `(N, height, width, channels)`, uint8 or floating, and their classes. Integers are
        0 to 255, which `FewShotSampler` makes floats in [0, 1]; floats stay as they are.
        `split_classes()` or `hold_out([7, 8, 9])` divides the classes.

    Raises:
        InputTypeError: no map-style data set, an example that is no pair, or an image or label
            that is none.
        UnknownKeyError: no such key, with the nearest one that there is.
        InputError: no examples, several data sets in one, images of different shapes, or a label
            that is not the one announced; names the example.
        MissingDependencyError: Pillow is not installed, which size and mode need.

    >>> class Digits:  # as a torch.utils.data.Dataset
    ...     def __len__(self):
    ...         return 40
    ...     def __getitem__(self, i):
    ...         return np.full((1, 8, 8), i / 40, np.float32), i % 10
    >>> data = load_image_dataset(Digits(), channels="first")
    >>> data.images.shape, data.classes
    ((40, 8, 8, 1), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    >>> from metaframe.tasks import FewShotSampler
    >>> split = data.hold_out(test=[7, 8, 9])
    >>> FewShotSampler(data.images, data.labels, ways=5, queries=3, classes=split).task(0)
    Task(support_x=(5, 8, 8, 1), support_y=(5,), query_x=(15, 8, 8, 1), query_y=(15,))
    """
    form = _Form(
        None if size is None else check_size(size),
        None if mode is None else check_mode(mode),
        _check_channels(channels),
    )
    source = _Examples(dataset, _length(dataset), image, label)
    first = form.pixels(source.example(0)[0], 0)
    names = _own_labels(source) if labels is None else _checked(list(labels), len(source), "labels")

    def read(row: int) -> np.ndarray[Any, Any]:
        picture, own = source.example(row)
        if labels is None and own != names[row]:
            raise InputError(
                f"example {row} has the label {own!r}, where the data set announces "
                f"{names[row]!r}. Pass labels=, those that count."
            )
        pixels = form.pixels(picture, row)
        if (pixels.shape, pixels.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"image {row} has shape {pixels.shape} and dtype {pixels.dtype}, image 0 has "
                f"{first.shape} and {first.dtype}. Pass size=84 and mode='RGB', or make them alike "
                "in the data set."
            )
        return pixels

    images = LazyImages(read, (len(source), *first.shape), first.dtype, keep=keep, workers=workers)
    return labelled(images, names)


@dataclass(frozen=True)
class _Examples:
    """A data set's examples, each as an image and a label."""

    dataset: Any
    count: int
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return self.count

    def example(self, row: int) -> tuple[Any, int | str]:
        """Example number `row`."""
        found = self.dataset[row]
        if isinstance(found, Mapping):
            for key in (self.image_key, self.label_key):
                if key not in found:
                    raise UnknownKeyError(
                        f"example {row} has no {key!r}; pass image= and label=, the names of its "
                        f"image and its label. {nearest(key, map(str, found))}"
                    )
            return found[self.image_key], _label(found[self.label_key], row)
        if not isinstance(found, tuple | list) or len(found) < 2:
            raise InputTypeError(
                f"example {row} is a {type(found).__qualname__}, expected a pair (image, label) or "
                f"a mapping with {self.image_key!r} and {self.label_key!r}."
            )
        return found[0], _label(found[1], row)


@dataclass(frozen=True)
class _Form:
    """The size and the channels that images are brought to."""

    size: int | None
    mode: str | None
    channels: str

    def pixels(self, image: Any, row: int) -> np.ndarray[Any, Any]:
        """`image` as `(height, width, channels)`, uint8 or floating."""
        where = f"image {row}"
        if hasattr(image, "convert") and hasattr(image, "resize"):  # Pillow's
            return self._fitted(image, where)
        array = _as_array(image, where)
        if self.channels == "first" and array.ndim == 3:
            array = np.moveaxis(array, 0, 2)
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[2] not in _DEPTHS or 0 in array.shape:
            order = "first" if self.channels == "last" else "last"
            raise InputError(
                f"{where} has shape {np.shape(image)}, expected an image with its channels "
                f"{self.channels}, {', '.join(map(str, _DEPTHS))} of them; if they are {order}, "
                f"pass channels={order!r}."
            )
        if self.size is None and self.mode is None:
            return array
        if array.dtype != np.uint8:
            raise InputTypeError(
                f"{where} has dtype {array.dtype}; size and mode are for images of 8 bits. Leave "
                "them out and scale the images in the data set."
            )
        squeezed = array[..., 0] if array.shape[2] == 1 else array
        return self._fitted(pillow("load_image_dataset").fromarray(squeezed), where)

    def _fitted(self, picture: Any, where: str) -> np.ndarray[Any, Any]:
        try:
            return fitted(picture, self.size, self.mode)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow reads the file only now
            raise InputError(f"{where} cannot be read: {error}.") from error


def _as_array(image: Any, where: str) -> np.ndarray[Any, Any]:
    """A NumPy array, uint8 or floating."""
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(
            f"{where} is a {type(image).__qualname__}, of which NumPy makes no array: {error}."
        ) from error
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    if array.dtype.kind != "f":
        raise InputTypeError(
            f"{where} is a {type(image).__qualname__} of dtype {array.dtype}, expected a Pillow "
            "image, floats, or integers from 0 to 255."
        )
    return array


def _own_labels(source: _Examples) -> list[int | str]:
    """The label of every example, without reading images where that can be."""
    dataset = source.dataset
    if source.label_key in (getattr(dataset, "column_names", None) or ()):
        return _checked(list(dataset[source.label_key]), len(source), f"column {source.label_key}")
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == len(source):
        return _checked(list(targets), len(source), "targets")
    read = [source.example(row)[1] for row in range(len(source))]
    return _checked(read, len(source), "examples")


def _checked(labels: list[Any], count: int, what: str) -> list[int | str]:
    if len(labels) != count:
        raise InputError(f"{what}: {len(labels)} labels, the data set has {count} examples.")
    names = [_label(value, row) for row, value in enumerate(labels)]
    if len({type(name) for name in names}) > 1:
        raise InputTypeError(f"{what}: labels must be all integers or all strings.")
    return names


def _label(value: Any, row: int) -> int | str:
    """An integer or a string, also out of an array without axes."""
    plain = value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, int | str):
        raise InputTypeError(
            f"the label of example {row} is {value!r} ({type(value).__qualname__}), expected an "
            "integer or a string."
        )
    return plain


def _length(dataset: Any) -> int:
    if isinstance(dataset, Mapping):
        raise InputError(
            f"dataset is a mapping of several, {', '.join(map(str, dataset))}; pass one of them."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputTypeError(
            f"dataset must have a length and examples by number, received a "
            f"{type(dataset).__qualname__}. Of one that can only be gone through, pass a list."
        )
    if len(dataset) == 0:
        raise InputError("dataset has no examples.")
    return len(dataset)


def _check_channels(channels: str) -> str:
    if channels not in ("last", "first"):
        raise InputError(f"channels must be 'last' or 'first', received channels={channels!r}.")
    return channels
