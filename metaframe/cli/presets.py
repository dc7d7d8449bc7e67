"""Presets: experiments with the number they are expected to reach, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaframe.cli.errors import UsageError
from metaframe.cli.options import GROUPS
from metaframe.cli.output import described
from metaframe.cli.run_folder import read_result
from metaframe.errors import InputError, nearest

FREE = ("data", "iterations", "seed", "eval_tasks", "eval_seed", *GROUPS["Execution"])
"""The settings that may differ from a preset's when its number is reproduced."""


@dataclass(frozen=True)
class Preset:
    """One experiment.

    Attributes:
        about: one line: what it is, on which hardware, and how long it takes.
        settings: what differs from the defaults.
        expected: the number to reach, a mean squared error or a share of right answers.
        tolerance: how far from it, on the wrong side, is still reached.
        source: where the number comes from.
        step: the number of inner steps it is measured after; default: the last.
    """

    about: str
    settings: Mapping[str, Any]
    expected: float
    tolerance: float
    source: str
    step: int | None = None
    inductive: bool = False
    """Is it the inductive figure that counts, each query example decided alone?"""


@dataclass(frozen=True)
class Verdict:
    """The comparison of a run with its preset."""

    preset: Preset
    metric: str
    reached: float | None
    evaluation: Mapping[str, Any] = field(repr=False)

    @property
    def met(self) -> bool:
        """True if the number is reached. One that is not finite is not."""
        if self.reached is None:
            return False
        if self.metric == "mse":
            return self.reached <= self.preset.expected + self.preset.tolerance
        return self.reached >= self.preset.expected - self.preset.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        p = self.preset
        return {
            "met": self.met,
            "metric": self.metric,
            "reached": self.reached,
            "expected": p.expected,
            "tolerance": p.tolerance,
            "source": p.source,
            "evaluation": dict(self.evaluation),
        }

    def lines(self) -> list[str]:
        """For people."""
        percent, p = self.metric == "accuracy", self.preset
        shown = "{:.2%}" if percent else "{:.3f}"
        relation = "at least" if percent else "at most"
        reached = "not finite" if self.reached is None else shown.format(self.reached)
        bound = p.expected - p.tolerance if percent else p.expected + p.tolerance
        return [
            *described(self.evaluation, percent=percent),
            f"expected {relation} {shown.format(bound)} ({p.source})",
            f"{'reached' if self.met else 'NOT REACHED'}: {reached}",
        ]


_ALPHABETS = ["Japanese_(katakana)", "Sanskrit", "Tagalog"]
_SMALL = {
    "dataset": "omniglot",
    "parts": ["small1", "small2"],
    "held_out": _ALPHABETS,
    "width": 32,
    "eval_every": 0,
}
_PAPER = {
    "dataset": "omniglot",
    "parts": ["background", "evaluation"],
    "width": 64,
    "queries": 1,
    "task_map": "vmap",
    "iterations": 40000,
    "eval_every": 2000,
    "checkpoint_every": 2000,
}
_5W = {"ways": 5, "inner_lr": 0.4, "inner_steps": 1, "eval_steps": 3, "meta_batch_size": 32}
_20W = {"ways": 20, "inner_lr": 0.1, "inner_steps": 5, "eval_steps": 5, "meta_batch_size": 16}
# Nichol et al. 2018, tables 6 and 7, as far as settings go. There, inner steps are Adam's at 0.001
# (5-way) or 0.0005, on batches of 10 or 20 out of 10 images of each class, where the test has one;
# and the outer step is a plain one of size 1, which falls linearly to 0. Here, inner steps are
# gradient descent on the one image of each class, and the outer optimizer is Adam.
_REPTILE: Mapping[str, Any] = {"meta_batch_size": 5, "eval_steps": 50, "schedule": "cosine"}
_5W_REPTILE = {**_5W, **_REPTILE, "inner_lr": 0.1, "inner_steps": 5, "iterations": 100000}
_20W_REPTILE = {**_20W, **_REPTILE, "inner_lr": 0.1, "inner_steps": 10, "iterations": 200000}


def _runs(part: str, convnet: float) -> Preset:
    return Preset(
        f"ProtoNet trained on {part}, on the 20 official one-shot runs; two cores, 6 minutes",
        {
            "dataset": "omniglot",
            "parts": [part],
            "protocol": "runs",
            "algorithm": "protonet",
            "ways": 20,
            "queries": 5,
            "iterations": 1500,
            "meta_batch_size": 2,
            "outer_lr": 2e-3,
            "schedule": "cosine",
            "eval_every": 0,
        },
        expected=1 - convnet,
        tolerance=0.06,  # what 400 answers leave open
        source=f"a convolutional network trained on {part}: error {convnet:.1%}; without learning, "
        "by modified Hausdorff distance: 38.8% (Lake et al. 2015)",
        inductive=True,
    )


PRESETS: dict[str, Preset] = {
    "sinusoid-maml": Preset(
        "MAML on sine curves, 10 points, one step; any CPU, 1 minute",
        {"dataset": "sinusoid", "iterations": 2000, "eval_every": 0, "eval_steps": 10},
        expected=0.9,
        tolerance=0.0,
        source="iteryne's documentation: 0.87 after 2,000 iterations, 3.1 before adaptation",
        step=1,
    ),
    "sinusoid-maml-paper": Preset(
        "MAML on sine curves for the paper's 70,000 steps of 25 tasks; two cores, JAX, 2 minutes",
        {
            "dataset": "sinusoid",
            "iterations": 70000,
            "eval_every": 0,
            "eval_steps": 10,
            "checkpoint_every": 10000,
        },
        expected=0.344,
        tolerance=0.034,  # the interval of that run
        source="our own run with seed 0, on JAX; Finn et al. 2017, arXiv 1703.03400, section 5.1, "
        "has this schedule and its figure 3 no numbers",
        step=1,
    ),
    "omniglot-small1-5w1s": Preset(
        "MAML, 5-way 1-shot, tested on alphabets never trained on; two cores, 10 minutes",
        {
            **_SMALL,
            **_5W,
            "queries": 5,
            # Many outer steps of few tasks: 16 tasks in each of 2,200 end a percent lower.
            "iterations": 8000,
            "meta_batch_size": 4,
            "outer_lr": 2e-3,
            "schedule": "cosine",
            "task_map": "vmap",  # so few filters and tasks are quicker that way on two cores
        },
        expected=0.92,
        tolerance=0.0,
        source="a hand-written run with the same network reaches 91.3% after 1,000 steps of 32",
    ),
    "omniglot-oneshot-runs": _runs("small1", 0.240),
    "omniglot-oneshot-runs-small2": _runs("small2", 0.223),
}


def _paper(algorithm: str, ways: Mapping[str, Any], expected: float, source: str) -> Preset:
    return Preset(
        f"{algorithm.upper()}, {ways['ways']}-way 1-shot at paper scale; a GPU, hours",
        {**_PAPER, **ways, "algorithm": algorithm},
        expected,
        tolerance=0.01,
        source=source,
    )


_MAML_PAPER = "Finn et al. 2017, arXiv 1703.03400, table 1"
_REPTILE_PAPER = "Nichol et al. 2018, arXiv 1803.02999, table 1, transductive"
_ANIL_PAPER = (
    "Raghu et al. 2020, arXiv 1909.09157, which sees no difference from MAML; 5-way is MAML's"
)

for _algorithm, _ways, _expected, _source in (
    ("maml", _5W, 0.987, _MAML_PAPER),
    ("maml", _20W, 0.958, _MAML_PAPER),
    ("fomaml", _5W, 0.983, _REPTILE_PAPER),
    ("fomaml", _20W, 0.894, _REPTILE_PAPER),
    ("reptile", _5W_REPTILE, 0.9768, _REPTILE_PAPER),
    ("reptile", _20W_REPTILE, 0.8943, _REPTILE_PAPER),
    ("anil", _5W, 0.987, _ANIL_PAPER),
    ("anil", _20W, 0.962, _ANIL_PAPER),
):
    PRESETS[f"omniglot-{_ways['ways']}w1s-{_algorithm}"] = _paper(
        _algorithm, _ways, _expected, _source
    )


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        UsageError: there is none, with the nearest name.
    """
    if name not in PRESETS:
        raise UsageError(
            f"no preset called {name!r}. {nearest(name, PRESETS)} `metaframe list` shows them all."
        )
    return PRESETS[name]


def judge(chosen: Preset, folder: Path) -> Verdict:
    """Compare the result in `folder` with what was expected."""
    result = read_result(folder)
    if result is None:
        raise UsageError(f"{folder} has no result yet.")
    found = result["evaluation"]
    curve = found["curve"]
    point = curve[-1] if chosen.step is None else dict(enumerate(curve)).get(chosen.step)
    if chosen.inductive:
        point = found["inductive"]
    if point is None:
        raise InputError(f"{folder} has a result without the figure that {chosen.about!r} needs.")
    return Verdict(chosen, result["metric"], point["mean"], result["evaluation"])
