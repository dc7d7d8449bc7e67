"""Algorithms by name: every registered one is held to the same tests, and so is one of a user."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import BACKENDS, require, slow
from metaframe import MAML, nn, ops
from metaframe.cli import main
from metaframe.cli.experiment import Experiment, resolve, selected
from metaframe.errors import InputError, InputTypeError
from metaframe.learners import (
    Algorithm,
    Method,
    Outcome,
    Support,
    TaskRun,
    algorithms,
    register_algorithm,
    registry,
)

STRENGTH = 0.5


def pull(params: dict[str, Any], start: dict[str, Any]) -> Any:
    """A penalty: the inner loop is pulled back to where it began."""
    return STRENGTH * sum(ops.sum(ops.square(params[n] - start[n])) for n in params)


def scaled(support: Support, params: dict[str, Any]) -> dict[str, Any]:
    """A start: what adapts begins at half its value."""
    return {n: 0.5 * x if n in support.names else 1 * x for n, x in params.items()}


def halfway(support: Support, start: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """A finish: half the way that the inner loop went."""
    return {n: 0.5 * (start[n] + x) if n in support.names else x for n, x in params.items()}


def late_half(run: TaskRun) -> Outcome:
    """An objective: the mean of the query losses before the first step and after the last."""
    found = run.adapted()
    after, report = run.outer(found.params, None)
    return Outcome((run.outer(run.start, None)[0] + after) / 2, found.params, report)


METHOD = Method(objective=late_half, begin=scaled, penalty=pull, finish=halfway)
OWN = Algorithm(
    "halfway",
    "everything that a method can change",
    lambda model, c: MAML(model, c.inner_lr, c.inner_steps, norm=c.norm, method=METHOD),
    defaults={"inner_steps": 2},
)
ALL = {**algorithms(), OWN.name: OWN}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The algorithm of this file is known within its tests."""
    monkeypatch.setattr(registry, "_registered", dict(algorithms()))
    register_algorithm(OWN)


def experiment_of(name: str, backend: str) -> Any:
    """A tiny run in float64, and its configuration."""
    flags = {
        "algorithm": name,
        "backend": backend,
        "precision": "float64",
        "width": 3,
        "shots": 2,
        "queries": 2,
        "seed": 3,
    }
    if ALL[name].classifies:
        flags |= {"dataset": "digits", "ways": 2, "features": 3}
    return resolve(flags)


class Problem:
    """The meta-cost of an algorithm on two tasks, as a function of a vector."""

    def __init__(self, config: Any) -> None:
        self.experiment = Experiment(config)
        self.learner = self.experiment.learner
        self.tasks = self.experiment.sampler("train").sample(2)
        self.start = self.values()
        rng = np.random.default_rng(4)
        self.move(rng.normal(size=self.start.size) / 500)  # off the zeros that models start from
        self.start = self.values()

    def values(self) -> np.ndarray[Any, Any]:
        to_numpy = self.learner.backend.to_numpy
        found = self.learner.meta_parameters().values()
        return np.concatenate([to_numpy(x).ravel() for x in found])

    def move(self, by: np.ndarray[Any, Any]) -> None:
        backend, meta = self.learner.backend, self.learner.meta_parameters()
        at, new = 0, {}
        for name, x in meta.items():
            size = int(np.prod(x.shape))
            value = (self.start + by)[at : at + size].reshape(tuple(x.shape))
            new[name], at = backend.asarray(value), at + size
        self.learner.assign(new)

    def __call__(self, by: np.ndarray[Any, Any] | float = 0.0) -> tuple[float, Any]:
        """The cost and the meta-gradient, `by` away from the start."""
        self.move(by)
        found = self.learner.meta_value_and_grad(self.experiment.loss_fn, self.tasks)
        grads = [self.learner.backend.to_numpy(g).ravel() for g in found.grads.values()]
        return float(self.learner.backend.to_numpy(found.cost)), np.concatenate(grads)


@pytest.fixture
def _smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' relu replaced: a stencil across its kink measures the kink."""
    monkeypatch.setattr(nn, "mlp", functools.partial(nn.mlp, activation=ops.tanh))


CASES = [
    (backend, name) if backend == "torch" else slow(backend, name)  # the others compile
    for backend in BACKENDS
    for name in ALL
]


@pytest.mark.usefixtures("_smooth")
@pytest.mark.parametrize(("backend_name", "name"), CASES, indirect=["backend_name"])
def test_the_meta_gradient_is_the_derivative_of_the_cost(backend_name: str, name: str) -> None:
    """By a fourth-order stencil along one direction; of others, and only of those, it is not."""
    config = experiment_of(name, backend_name)
    with selected(config):
        problem = Problem(config)
        _, grads = problem()
        direction = np.random.default_rng(5).normal(size=grads.size)
        direction /= np.linalg.norm(direction)
        size = 5e-4
        at = {k: problem(k * size * direction)[0] for k in (-2, -1, 1, 2)}
    slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * size)
    error = abs(slope - grads @ direction) / np.linalg.norm(grads)
    if ALL[name].exact:
        assert error <= 1e-10
    else:
        assert error > 1e-6


@pytest.mark.usefixtures("_smooth")
@pytest.mark.parametrize("name", [OWN.name, *(slow(name) for name in algorithms())])
def test_backends_agree(name: str) -> None:
    found = {}
    for backend in BACKENDS:
        require(backend)
        config = experiment_of(name, backend)
        with selected(config):
            found[backend] = Problem(config)()
    cost, grads = found["torch"]
    for other in BACKENDS[1:]:
        np.testing.assert_allclose(found[other][0], cost, rtol=1e-12)
        scale = np.abs(grads).max()
        np.testing.assert_allclose(found[other][1], grads, rtol=0, atol=1e-12 * scale)


def trained(name: str, folder: Path) -> Any:
    flags = [
        *("train", "--algorithm", name, "--backend", "torch", "--no-compiled", "--no-plots"),
        *("--precision", "float64", "--width", "4", "--iterations", "3", "--inner-steps", "2"),
        *("--meta-batch-size", "2", "--eval-every", "0", "--eval-tasks", "4", "--eval-steps", "2"),
        *("--quiet", "--out", str(folder)),
    ]
    assert main(flags) == 0
    return json.loads((folder / "result.json").read_text())


def test_the_command_line_trains_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("torch")
    same = Algorithm(
        "same", "MAML", lambda m, c: MAML(m, c.inner_lr, c.inner_steps, method=Method())
    )
    register_algorithm(same)
    found = {name: trained(name, tmp_path / name) for name in ("maml", "same", "halfway")}
    curves = {name: result["evaluation"]["curve"] for name, result in found.items()}
    assert curves["same"] == curves["maml"]
    assert curves["halfway"][-1]["mean"] != curves["maml"][-1]["mean"]
    assert found["halfway"]["config"]["algorithm"] == "halfway"
    capsys.readouterr()
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["algorithms"]["halfway"] == OWN.about


def test_its_defaults_are_the_command_lines() -> None:
    assert resolve({"algorithm": "halfway", "backend": "torch"}).inner_steps == 2


def test_algorithms_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """They register when they are asked for; an error names one that cannot be loaded."""

    class Entry:
        name, value, dist = "theirs", "package.theirs", None

        def load(self) -> None:
            register_algorithm(Algorithm("theirs", "of a package", OWN.build))

    class Broken(Entry):
        def load(self) -> None:
            raise ImportError("no module called package")

    entries = [Entry()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    registry._load_entry_points.cache_clear()
    assert algorithms()["theirs"].about == "of a package"
    entries[:] = [Broken()]
    registry._load_entry_points.cache_clear()
    with pytest.raises(InputError, match=r"algorithm 'theirs' cannot be loaded from package\."):
        algorithms()
    entries.clear()
    registry._load_entry_points.cache_clear()


def test_what_is_registered_is_checked() -> None:
    with pytest.raises(InputError, match="an algorithm called 'maml' is registered already"):
        register_algorithm(Algorithm("maml", "again", OWN.build))
    with pytest.raises(InputTypeError, match="must be an Algorithm, received Method"):
        register_algorithm(METHOD)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="build"):
        register_algorithm(Algorithm("new", "new", "MAML"))  # type: ignore[arg-type]
