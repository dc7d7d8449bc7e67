"""The data sets that the command knows, one entry each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaframe import nn, ops
from metaframe.cli.errors import UsageError, suggestion
from metaframe.cli.run_config import RunConfig
from metaframe.tasks import (
    ClassSplit,
    FewShotSampler,
    ImageClasses,
    IndexedSampler,
    LabelledImages,
    Omniglot,
    SinusoidTaskSampler,
    Task,
    digits_sampler,
    load_image_folder,
    load_mini_imagenet,
    load_omniglot,
    load_tiered_imagenet,
    one_shot_runs,
)
from metaframe.tasks._files import stamp
from metaframe.tasks.sampling import Split


@dataclass(frozen=True)
class Dataset:
    """A source of tasks, and what fits it.

    Attributes:
        about: one line.
        sampler: `(config, split, seed) -> sampler`.
        model: `config -> model`.
        settings: the settings that this data set has a use for, and not all others.
        regression: mean squared error instead of cross-entropy and accuracy.
        convolutional: is its model slow on a CPU when vectorised over tasks?
        defaults: settings that differ from the general ones.
        classes: `(config, split) -> names of the classes`, where files decide on them.
    """

    about: str
    sampler: Callable[[RunConfig, Split, int], IndexedSampler]
    model: Callable[[RunConfig], nn.Model]
    settings: tuple[str, ...] = ()
    regression: bool = False
    convolutional: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    classes: Callable[[RunConfig, Split], list[str]] | None = None


def _sinusoid(config: RunConfig, split: Split, seed: int) -> SinusoidTaskSampler:
    return SinusoidTaskSampler(
        k_support=config.shots, k_query=config.queries, seed=seed, split=split
    )


def _sinusoid_model(config: RunConfig) -> nn.Model:
    return nn.mlp([1, config.width, config.width, 1], context=config.context)


def _digits(config: RunConfig, split: Split, seed: int) -> FewShotSampler:
    return digits_sampler(
        ways=config.ways, shots=config.shots, queries=config.queries, split=split, seed=seed
    )


def _digits_model(config: RunConfig) -> nn.Model:
    sizes = [64, config.width, config.width // 2 or 1, config.features or config.ways]
    network = nn.mlp(sizes, context=config.context)
    return nn.Model(network.init, lambda params, x: network.apply(params, ops.reshape(x, (-1, 64))))


def _few_shot(
    data: Omniglot | LabelledImages | ImageClasses,
    classes: ClassSplit,
    config: RunConfig,
    split: Split,
    seed: int,
    rotations: bool = False,
) -> FewShotSampler:
    return FewShotSampler(
        data.images,
        data.labels,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        split=split,
        classes=classes,
        rotations=rotations,
        seed=seed,
    )


def _omniglot(config: RunConfig, split: Split, seed: int) -> FewShotSampler:
    return _few_shot(*_divided_omniglot(config), config, split, seed, rotations=True)


def _omniglot_classes(config: RunConfig, split: Split) -> list[str]:
    data, classes = _divided_omniglot(config)
    return [data.characters[label] for label in classes[split]]


def _divided_omniglot(config: RunConfig) -> tuple[Omniglot, ClassSplit]:
    if config.data is None:
        raise UsageError("dataset omniglot needs its files: --data FOLDER with the official zips.")
    data = load_omniglot(config.data, config.parts)
    classes = data.split_characters()
    if config.protocol == "runs":  # their alphabets are none of these
        classes = ClassSplit(train=tuple(range(len(data.characters))))
    if config.held_out:
        classes = data.split_alphabets(config.held_out)
    return data, _with_validation(classes, config)


def _with_validation(classes: ClassSplit, config: RunConfig) -> ClassSplit:
    """With classes to validate on, never those that are tested on: every tenth of the others."""
    if classes.validation or not config.eval_every:
        return classes
    train, held = classes.train, classes.train[::10]
    return ClassSplit(tuple(c for c in train if c not in held), held, classes.test)


def _folder(config: RunConfig, split: Split, seed: int) -> FewShotSampler:
    return _few_shot(*_divided_folder(config), config, split, seed)


def _folder_classes(config: RunConfig, split: Split) -> list[str]:
    data, classes = _divided_folder(config)
    return [str(data.classes[label]) for label in classes[split]]


def _divided_folder(config: RunConfig) -> tuple[LabelledImages, ClassSplit]:
    if config.data is None:
        raise UsageError("dataset folder needs its files: --data FOLDER, with one for each class.")
    data = _folder_of_images(config.data, stamp(Path(config.data)))
    if config.held_out:
        classes = data.hold_out(config.held_out)
    else:
        classes = data.own_split or data.split_classes()
    return data, _with_validation(classes, config)


@functools.lru_cache(maxsize=1)
def _folder_of_images(path: str, state: str) -> LabelledImages:
    """The images of a folder, all read, so that a broken one ends no run within."""
    del state  # in the signature, a folder that has changed is read again
    data = load_image_folder(path)
    data.images.verify()
    return data


Load = Callable[..., ImageClasses]


def _imagenet(load: Load, config: RunConfig, split: Split, seed: int) -> FewShotSampler:
    data = _imagenet_split(load, config, split)
    return _few_shot(data, data.class_split, config, split, seed)


def _imagenet_classes(load: Load, config: RunConfig, split: Split) -> list[str]:
    return list(_imagenet_split(load, config, split).classes)


def _imagenet_split(load: Load, config: RunConfig, split: Split) -> ImageClasses:
    if config.data is None:
        raise UsageError(f"dataset {config.dataset} needs its files: --data FOLDER.")
    return load(config.data, split)


def _imagenet_model(config: RunConfig) -> nn.Model:
    return nn.conv4(
        config.features or config.ways,
        channels=config.width,
        in_channels=3,
        image_size=84,
        context=config.context,
    )


def _official_runs(config: RunConfig) -> list[Task]:
    if config.data is None:
        raise UsageError("protocol runs needs --data FOLDER with Omniglot's all_runs.zip.")
    if (config.ways, config.shots) != (20, 1):
        raise UsageError(
            "the official runs are 20-way 1-shot, received "
            f"ways={config.ways}, shots={config.shots}."
        )
    return [run.task() for run in one_shot_runs(config.data)]


def test_tasks(config: RunConfig) -> IndexedSampler | list[Task]:
    """The tasks that a run is measured on: of the test split, or a data set's official ones."""
    if config.protocol == "random":
        return dataset(config.dataset).sampler(config, "test", config.eval_seed)
    return _official_runs(config)


def check_tasks(config: RunConfig) -> None:
    """The data set's files are there, and have the classes and examples that tasks need.

    Raises:
        UsageError, InputError: they do not.
    """
    source = dataset(config.dataset)
    source.sampler(config, "train", config.seed)
    if config.eval_every:
        source.sampler(config, "validation", config.eval_seed)
    test_tasks(config)


def _omniglot_model(config: RunConfig) -> nn.Model:
    return nn.conv4(
        config.features or config.ways,
        channels=config.width,
        pooling="stride",
        context=config.context,
    )


_NORMALISED = ("norm", "learn_norms")
"""The settings for models with batch normalisation."""

_AS_MAML = {"width": 32, "inner_steps": 5, "meta_batch_size": 4}
"""Its settings for photographs, 5-way 1-shot."""

DATASETS = {
    "sinusoid": Dataset(
        "sine curves of random amplitude and phase; regression from a few points",
        _sinusoid,
        _sinusoid_model,
        regression=True,
        defaults={"shots": 10, "queries": 10, "width": 40, "meta_batch_size": 25},
    ),
    "digits": Dataset(
        "handwritten digits in four rotations, from scikit-learn",
        _digits,
        _digits_model,
        ("ways",),
        defaults={
            "queries": 10,
            "width": 128,
            "inner_lr": 0.1,
            "inner_steps": 3,
            "iterations": 300,
            "eval_every": 0,  # it is over in seconds, before there is anything to choose from
        },
    ),
    "omniglot": Dataset(
        "handwritten characters of many alphabets; needs --data",
        _omniglot,
        _omniglot_model,
        ("data", "parts", "held_out", "protocol", "ways", *_NORMALISED),
        convolutional=True,
        defaults={"parts": ("small1",), "queries": 5, "inner_lr": 0.4, "eval_steps": 3},
        classes=_omniglot_classes,
    ),
    "mini-imagenet": Dataset(
        "photographs of 100 classes; needs --data with train.csv and so on, and images",
        functools.partial(_imagenet, load_mini_imagenet),
        _imagenet_model,
        ("data", "ways", *_NORMALISED),
        convolutional=True,
        defaults=_AS_MAML,
        classes=functools.partial(_imagenet_classes, load_mini_imagenet),
    ),
    "tiered-imagenet": Dataset(
        "photographs of 608 classes, unlike between splits; needs --data with npz files or folders",
        functools.partial(_imagenet, load_tiered_imagenet),
        _imagenet_model,
        ("data", "ways", *_NORMALISED),
        convolutional=True,
        defaults=_AS_MAML,
        classes=functools.partial(_imagenet_classes, load_tiered_imagenet),
    ),
    "folder": Dataset(
        "images of your own; needs --data with a folder for each class, also within others",
        _folder,
        _imagenet_model,
        ("data", "held_out", "ways", *_NORMALISED),
        convolutional=True,
        defaults=_AS_MAML,
        classes=_folder_classes,
    ),
}


def dataset(name: str) -> Dataset:
    """The data set called `name`."""
    if name not in DATASETS:
        raise UsageError(f"no data set called {name!r}. {suggestion(name, DATASETS)}")
    return DATASETS[name]
