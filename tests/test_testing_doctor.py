"""The gradient doctor names every fault that is planted here.

Each planted function computes something without a word of complaint from its framework.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import meta_value_and_grad, nn, ops, tree
from metaframe.backend import current_backend, load_backend
from metaframe.cli import main
from metaframe.errors import InputError, InputTypeError, UnknownKeyError
from metaframe.testing import Adaptation, Report, check_meta_gradient

Call = Callable[..., Any]

TWO_STEPS = Adaptation(steps=2, lr=0.1)
V = {"b": np.array([0.3, -0.2]), "w": np.array([0.5, 0.25])}
BATCH = {"x": np.array([[1.0, 2.0], [0.5, -1.5], [2.0, 0.25]])}


def cost(task: Any, v: Any) -> Any:
    """Smooth, and not quadratic."""
    return ops.mean(ops.tanh(v["w"] * task["x"] + v["b"]) ** 2 * task["x"])


def check(arr: Call, planted: Call = cost, adaptation: Any = TWO_STEPS, **how: Any) -> Report:
    how = {"executions": (), **how}
    return check_meta_gradient(planted, arr(V), arr(BATCH), adaptation, **how)


def only(report: Report, kind: str, *words: str) -> None:
    """The report has this one finding, and its text says the words."""
    assert report.kinds() == (kind,), str(report)
    assert all(word in str(report) for word in (kind, *words)), str(report)


@pytest.fixture
def torch_arr() -> Call:
    require("torch")
    return lambda structure: tree.map(load_backend("torch").asarray, structure)


def test_nothing_is_wrong(backend: Any, arr: Call) -> None:
    report = check(arr, executions=("vmap", "scan"))
    assert report.ok, str(report)
    assert report.findings == ()
    assert "The meta-gradient is right." in str(report)
    assert "finite differences in 2 variables" in str(report)
    assert "vmap and a loop over tasks" in str(report)


def test_other_backends(torch_arr: Call) -> None:
    require("jax")
    assert check(torch_arr, backends=("jax",)).ok

    def planted(task: Any, v: Any) -> Any:
        name = current_backend(*tree.leaves(v)).name
        return cost(task, v) * (1.0 if name == "torch" else 1.5)

    report = check(torch_arr, planted, backends=("jax",))
    only(report, "backends disagree", "'b', 'w'", "torch and jax")


def test_other_backends_beside_other_ways_of_running(torch_arr: Call) -> None:
    """The ways of running are compared on fewer tasks than the backends."""
    require("jax")
    report = check(torch_arr, backends=("jax",), executions=("vmap", "scan"))
    assert report.ok, str(report)
    assert report.findings == ()


def test_a_cost_that_is_of_one_framework(torch_arr: Call) -> None:
    """What it raises elsewhere is reported beside what was found here."""
    require("jax")
    torch = importlib.import_module("torch")

    def planted(task: Any, v: Any) -> Any:
        return torch.mean(torch.tanh(v["w"] * task["x"] + v["b"]) ** 2)

    report = check(torch_arr, planted, backends=("jax",))
    assert report.findings == ()
    assert not report.ok
    assert "not checked: torch and jax: on jax the cost raises TypeError" in str(report)
    assert "finite differences in 2 variables" in str(report)
    with pytest.raises(UnknownKeyError, match="no backend called 'jacks'"):
        check(torch_arr, planted, backends=("jacks",))


def test_no_variable_has_an_element(torch_arr: Call) -> None:
    v = torch_arr({"w": np.zeros(0)})
    report = check_meta_gradient(
        lambda task, v: ops.sum(task["x"]) + ops.sum(v["w"]), v, torch_arr(BATCH), executions=()
    )
    assert not report.ok
    assert "not checked: finite differences: the variables have no elements" in str(report)


# -- the second-order term ---------------------------------------------------------------------


def test_an_update_that_detaches(backend: Any, arr: Call) -> None:
    def update(v: Any, grads: Any, lr: Any, stop_gradients: bool) -> Any:
        return tree.map(lambda x, g: x - lr * ops.stop_gradient(g), v, grads)

    report = check(arr, adaptation=Adaptation(steps=2, lr=0.1, update=update))
    only(report, "lost second-order term", "'b', 'w'", "first-order", "detach")


def test_no_curvature_no_finding(backend: Any, arr: Call) -> None:
    """A linear cost has no second-order term to lose."""
    report = check(arr, lambda task, v: ops.sum(v["w"] * task["x"] + v["b"]))
    assert report.ok, str(report)


def tape_step(inner_cost: Call, *, create_graph: bool = True, allow_unused: bool = False) -> Call:
    """A meta-gradient as it is written by hand in torch: two inner steps at rate 0.1."""
    torch = importlib.import_module("torch")

    def step(variables: Any, batch: Any) -> Any:
        start = {name: x.detach().requires_grad_() for name, x in variables.items()}
        costs = []
        for x in batch["x"]:
            v = start
            for _ in range(2):
                grads = torch.autograd.grad(
                    inner_cost({"x": x}, v), list(v.values()), create_graph=create_graph
                )
                v = {name: v[name] - 0.1 * g for name, g in zip(v, grads, strict=True)}
            costs.append(cost({"x": x}, v))
        total = torch.stack(costs).mean()
        return total, torch.autograd.grad(total, list(start.values()), allow_unused=allow_unused)

    return step


def test_a_step_by_hand(torch_arr: Call) -> None:
    report = check(torch_arr, step=tape_step(cost))
    assert report.ok, str(report)
    assert "metaframe's own gradient" in str(report)


def test_inner_gradients_without_a_graph(torch_arr: Call) -> None:
    report = check(torch_arr, step=tape_step(cost, create_graph=False))
    only(report, "lost second-order term", "create_graph=True")


def test_a_compiled_cost_in_a_tape_loop(torch_arr: Call) -> None:
    """torch: a compiled cost inside a reverse-mode inner loop gives the first-order answer."""
    torch = importlib.import_module("torch")
    compiled = torch.compile(
        lambda x, w, b: (torch.tanh(w * x + b) ** 2 * x).mean(), backend="aot_eager"
    )
    step = tape_step(lambda task, v: compiled(task["x"], v["w"], v["b"]))
    only(check(torch_arr, step=step), "lost second-order term", "never the cost alone")


# -- wrong derivatives -------------------------------------------------------------------------


def test_the_gradient_of_a_mean_over_vmap(torch_arr: Call) -> None:
    """torch: wrong second derivatives through fused batch normalisation."""
    torch = importlib.import_module("torch")
    rng = np.random.default_rng(2)
    variables = {"scale": 1 + rng.normal(size=4) / 3, "w": rng.normal(size=(4, 4))}
    batch = {"x": rng.normal(size=(3, 6, 4)), "y": rng.normal(size=(3, 6, 4))}
    adaptation = Adaptation(steps=2, lr=0.3)

    def normalised(task: Any, v: Any) -> Any:
        hidden = torch.nn.functional.batch_norm(
            task["x"] @ v["w"], None, None, v["scale"], training=True
        )
        return ((hidden.tanh() - task["y"]) ** 2).mean()

    def step(v: Any, tasks: Any) -> Any:
        def total(v: Any) -> Any:
            task_cost = adaptation.task_cost(normalised, load_backend("torch"))
            return torch.func.vmap(lambda task: task_cost(v, task))(tasks).mean()

        grads, value = torch.func.grad_and_value(total)(v)
        return value, grads

    given = (normalised, torch_arr(variables), torch_arr(batch), adaptation)
    assert check_meta_gradient(*given, executions=("vmap",)).ok
    report = check_meta_gradient(*given, step=step)
    assert "wrong gradient" in report.kinds()
    assert "mean over vmap" in str(report)
    assert "vmap(grad)" in str(report) or "vmap of the gradient" in str(report)


def test_recomputing_a_step_with_a_tape() -> None:
    """TensorFlow: `recompute_grad` round an inner step."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")

    def inner(w: Any, b: Any, x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((w, b))
            value = tf.reduce_mean(tf.tanh(w * x + b) ** 2 * x)
        grads = tape.gradient(value, (w, b), unconnected_gradients="zero")
        return w - 0.1 * grads[0], b - 0.1 * grads[1]

    def step(v: Any, batch: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(v)
            costs = []
            for x in tf.unstack(batch["x"]):
                w, b = v["w"], v["b"]
                for _ in range(2):
                    w, b = tf.recompute_grad(inner)(w, b, x)
                costs.append(tf.reduce_mean(tf.tanh(w * x + b) ** 2 * x))
            total = tf.reduce_mean(tf.stack(costs))
        return total, tape.gradient(total, v, unconnected_gradients="zero")

    def as_tf(structure: Any) -> Any:
        return tree.map(load_backend("tensorflow").asarray, structure)

    only(check(as_tf, step=step), "wrong gradient", "'b', 'w'", "recomputing a step")


def test_a_sum_over_tasks(torch_arr: Call) -> None:
    right = meta_value_and_grad(TWO_STEPS.task_cost(cost, load_backend("torch")))

    def step(v: Any, batch: Any) -> Any:
        value, grads, _ = right(v, batch)
        return value, tree.map(lambda g: 3 * g, grads)

    only(check(torch_arr, step=step), "scaled gradient", "3 times", "3 tasks")


def test_a_constant_through_float32() -> None:
    """TensorFlow: `tf.cast` of a Python number goes through float32."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    backend = load_backend("tensorflow")

    def step(v: Any, batch: Any) -> Any:
        adaptation = Adaptation(steps=2, lr=tf.cast(0.1, tf.float64))
        return meta_value_and_grad(adaptation.task_cost(cost, backend), task_map="loop")(v, batch)

    report = check(lambda structure: tree.map(backend.asarray, structure), step=step)
    only(report, "lost precision", "tf.cast(0.01, tf.float64)", "float32")


def test_another_rate(torch_arr: Call) -> None:
    other = Adaptation(steps=2, lr=0.2).task_cost(cost, load_backend("torch"))
    report = check(torch_arr, step=meta_value_and_grad(other))
    only(report, "another cost", "learning rate")


# -- variables without a gradient --------------------------------------------------------------


def test_a_variable_that_is_not_used(torch_arr: Call) -> None:
    variables = torch_arr({**V, "head": {"bias": np.ones(2)}})
    report = check_meta_gradient(cost, variables, torch_arr(BATCH), TWO_STEPS, executions=())
    only(report, "unused variable", "'head/bias'", "3 tasks")
    assert report.ok


def test_a_variable_closed_over_by_a_rule(torch_arr: Call) -> None:
    """torch: a rule of one's own sees only its arguments."""

    def planted(task: Any, v: Any) -> Any:
        rule = current_backend(v["w"]).custom_vjp(
            lambda xs: (v["b"] * xs[0] ** 2,), lambda xs, bars: (2 * v["b"] * xs[0] * bars[0],)
        )
        return ops.mean(rule((v["w"],))[0] * task["x"])

    report = check(torch_arr, planted, Adaptation(steps=0))
    only(report, "disconnected variable", "'b'", "closes over")


def test_a_variable_that_allow_unused_hides(torch_arr: Call) -> None:
    def detached(task: Any, v: Any) -> Any:
        return cost(task, {"w": v["w"], "b": v["b"]})

    torch = importlib.import_module("torch")

    def step(variables: Any, batch: Any) -> Any:
        v = {name: x.detach().requires_grad_() for name, x in variables.items()}
        total = torch.stack(
            [detached({"x": x}, {**v, "b": v["b"].detach()}) for x in batch["x"]]
        ).mean()
        w, b = torch.autograd.grad(total, (v["w"], v["b"]), allow_unused=True)
        return total, {"w": w, "b": b}

    report = check(torch_arr, detached, Adaptation(steps=0), step=step)
    only(report, "disconnected variable", "'b'", "None", "allow_unused")


# -- state -------------------------------------------------------------------------------------


def test_running_statistics(torch_arr: Call) -> None:
    torch = importlib.import_module("torch")
    norm = torch.nn.BatchNorm1d(2, affine=False, dtype=torch.float64)

    def planted(task: Any, v: Any) -> Any:
        hidden = norm(torch.stack([v["w"] * task["x"], v["b"]]))
        return (hidden[0].tanh() * task["x"]).mean()

    report = check(torch_arr, planted, step=tape_step(planted))
    assert report.kinds() == ("in-place change",), str(report)
    assert "norm.running_mean of" in str(report)


def test_variables_changed_in_place(torch_arr: Call) -> None:
    right = meta_value_and_grad(TWO_STEPS.task_cost(cost, load_backend("torch")), task_map="loop")

    def step(v: Any, batch: Any) -> Any:
        result = right(v, batch)
        batch["x"].mul_(0.5)
        return result

    report = check(torch_arr, step=step)
    assert report.kinds()[0] == "in-place change"
    assert "x of batch" in str(report)
    assert not report.ok


def test_state_of_an_object(torch_arr: Call) -> None:
    class Model:
        def __init__(self) -> None:
            self.calls = np.zeros(1)

        def cost(self, task: Any, v: Any) -> Any:
            self.calls += 1
            return cost(task, v)

    only(check(torch_arr, Model().cost), "in-place change", "calls of cost")


# -- randomness --------------------------------------------------------------------------------


def dropped(task: Any, v: Any) -> Any:
    torch = importlib.import_module("torch")
    return torch.nn.functional.dropout(torch.tanh(v["w"] * task["x"] + v["b"]), 0.5).square().mean()


def test_hidden_random_numbers(torch_arr: Call) -> None:
    importlib.import_module("torch").manual_seed(0)
    report = check(torch_arr, dropped)
    only(report, "randomness", "two calls with the same arguments differ", "an argument")
    assert "finite differences in 2 variables" in str(report)
    assert not report.ok


def test_numpy_random_numbers(torch_arr: Call) -> None:
    report = check(torch_arr, lambda task, v: cost(task, v) * np.random.rand())  # noqa: NPY002
    only(report, "randomness", "finite differences in 2 variables")


def test_a_mask_drawn_again_in_the_backward_pass(torch_arr: Call) -> None:
    """torch: a rule of one's own computes again, and draws another mask."""
    importlib.import_module("torch").manual_seed(0)

    def recomputed(task: Any, v: Any) -> Any:
        backend = current_backend(v["w"])

        def forward(xs: Any) -> Any:
            return (dropped(task, {"w": xs[0], "b": xs[1]}),)

        rule = backend.custom_vjp(forward, lambda xs, bars: backend.vjp(forward, xs, bars))
        return rule((v["w"], v["b"]))[0]

    report = check(torch_arr, recomputed, Adaptation(steps=0))
    assert report.kinds() == ("randomness in the backward pass", "randomness")
    assert "draws again" in str(report)


# -- values that are not finite -----------------------------------------------------------------


def test_a_padded_task(backend: Any, arr: Call) -> None:
    x = np.where(np.arange(3)[:, None] == 1, np.nan, BATCH["x"])
    batch = {"weight": np.array([1.0, 0.0, 1.0]), "x": x}

    def weighted(task: Any, v: Any) -> Any:
        return task["weight"] * cost(task, v)

    report = check_meta_gradient(weighted, arr(V), arr(batch), TWO_STEPS, executions=())
    only(report, "not finite", "batch['x'], task 1", "weight 0")


def test_a_derivative_that_is_not_finite(backend: Any, arr: Call) -> None:
    def planted(task: Any, v: Any) -> Any:
        return cost(task, v) + ops.sqrt(ops.sum((v["w"] - 0.5) ** 2 * task["x"][0]))

    v = {**V, "w": np.array([0.5, 0.5])}
    report = check_meta_gradient(planted, arr(v), arr(BATCH), TWO_STEPS, executions=())
    assert report.kinds() == ("not finite",)
    assert "inner step 1" in str(report)
    assert "'w'" in str(report)


def test_a_second_derivative_that_is_not_finite(backend: Any, arr: Call) -> None:
    """The power 1.5 at 0: the gradient is 0, the curvature is infinite."""
    report = check_meta_gradient(
        lambda task, v: cost(task, v) + ops.sum(v["b"] ** 1.5),
        arr({**V, "b": np.zeros(2)}),
        arr(BATCH),
        Adaptation(outer_cost=cost),
        executions=(),
    )
    only(report, "not finite", "'b'", "second derivative")


# -- ways of running ---------------------------------------------------------------------------


def test_a_value_that_is_only_there_when_run_eagerly() -> None:
    require("jax")

    def planted(task: Any, v: Any) -> Any:
        try:
            scale = float(task["x"].sum())
        except TypeError:
            scale = 1.0
        return scale * cost(task, v)

    def as_jax(structure: Any) -> Any:
        return tree.map(load_backend("jax").asarray, structure)

    report = check(as_jax, planted, executions=("vmap", "compiled"))
    assert set(report.kinds()) == {"executions disagree"}
    assert "vmap and a loop" in str(report)
    assert "compiled and a loop" in str(report)


def test_a_branch_on_a_value(torch_arr: Call) -> None:
    def planted(task: Any, v: Any) -> Any:
        return cost(task, v) * (2.0 if task["x"][0] > 0.75 else 1.0)

    report = check(torch_arr, planted, executions=("vmap",))
    only(report, "cannot be vectorised", "vmap", "ops.where")
    assert report.ok


# -- input -------------------------------------------------------------------------------------


def test_float32_in_float64_out(arr: Call, backend: Any) -> None:
    """Whatever comes in is examined in float64."""
    given = arr(V, dtype="float32"), arr(BATCH, dtype="float32")
    assert check_meta_gradient(cost, *given, TWO_STEPS, executions=()).ok


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "kinked",
    [
        lambda task, v: ops.sum(ops.abs(v["w"]) * task["x"]),
        lambda task, v: ops.sum(nn.relu(v["w"] * task["x"]) * (v["b"] - 0.5)) + ops.sum(v["b"]),
        lambda task, v: ops.max(v["w"]) * ops.sum(task["x"]) + ops.sum(v["b"] ** 2),
        lambda task, v: ops.sum(ops.maximum(v["w"], v["b"] * 0.0) * task["x"]),
        lambda task, v: ops.sum(nn.relu(v["w"] - v["b"] * 0.0) ** 2 * task["x"]) + ops.sum(v["b"]),
    ],
)
def test_a_kink_is_a_note(backend: Any, arr: Call, kinked: Call, steps: int) -> None:
    variables = arr({"b": np.array([0.3, -0.2]), "w": np.zeros(2)})
    report = check_meta_gradient(
        kinked, variables, arr(BATCH), Adaptation(steps=steps, lr=0.1), executions=()
    )
    assert report.ok, str(report)
    assert set(report.kinds()) <= {"kink", "unused variable"}


def test_a_wrong_derivative_at_one_point_is_no_kink(torch_arr: Call) -> None:
    """The cost is smooth there: the double-where trick with the wrong branch."""

    def planted(task: Any, v: Any) -> Any:
        zero = v["w"] == 0.0
        safe = ops.where(zero, 1.0, v["w"])
        return ops.sum(ops.where(zero, 0.0, safe**2 / safe) * task["x"]) + ops.sum(v["b"] ** 2)

    report = check_meta_gradient(
        planted,
        torch_arr({**V, "w": np.zeros(2)}),
        torch_arr(BATCH),
        Adaptation(steps=0),
        executions=(),
    )
    assert not report.ok
    assert "'w'" in report.findings[0].where


def test_bad_input(torch_arr: Call) -> None:
    with pytest.raises(InputTypeError, match="cost must be a function"):
        check(torch_arr, 3)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="adaptation must be an Adaptation"):
        check(torch_arr, adaptation={"steps": 2})
    with pytest.raises(InputError, match="Did you mean 'vmap'"):
        check(torch_arr, executions=("vmp",))
    with pytest.raises(InputError, match="1 gradients for 2 variables"):
        check(torch_arr, step=lambda v, batch: (1.0, [v["w"]]))
    with pytest.raises(
        InputError, match=r"called \['b', 'weight'\] for the variables \['b', 'w'\]"
    ):
        check(torch_arr, step=lambda v, batch: (1.0, {"weight": v["w"], "b": v["b"]}))
    with pytest.raises(InputError, match=r"shape \(1, 2\) for 'w', which has shape \(2,\)"):
        check(torch_arr, step=lambda v, batch: (1.0, {**v, "w": v["w"][None]}))
    with pytest.raises(InputError, match="a step is of one"):
        check(torch_arr, step=lambda v, batch: (1.0, v), backends=("jax",))


# -- the command -------------------------------------------------------------------------------

CASES = """
import numpy as np
from metaframe import ops, tree
from metaframe.testing import Adaptation

def cost(task, v):
    return ops.mean(ops.tanh(v["w"] * task) ** 2)

def update(v, grads, lr, stop_gradients):
    return tree.map(lambda x, g: x - lr * ops.stop_gradient(g), v, grads)

def right():
    return {"cost": cost, "variables": {"w": np.ones(2)}, "batch": np.ones((2, 2)),
            "executions": ("vmap",)}

def wrong():
    return {**right(), "adaptation": Adaptation(update=update, lr=0.5)}

def of(cost, w, batch=np.ones((2, 2)), **others):
    return {"cost": cost, "variables": {"w": w, **others}, "batch": batch, "executions": ("vmap",)}

def kinked():
    return of(lambda task, v: ops.sum(ops.abs(v["w"]) * task), np.zeros(2))

def unused():
    return of(cost, np.ones(2), c=np.ones(2))

def branching():
    return of(lambda task, v: cost(task, v) * (2.0 if task[0] > 0.5 else 1.0), np.ones(2))

def padded():
    return of(cost, np.ones(2), np.array([[1.0, 2.0], [np.nan, 1.0]]))

def flat():
    return of(lambda task, v: ops.sum((v["w"] - task) ** 4) + 1e-10 * v["c"], 0.5 * np.ones(2),
              np.array([[1.0, 1.0], [2.0, 2.0]]), c=np.ones(()))

def jumping():
    calls = iter(range(10**6))
    return of(lambda task, v: cost(task, v) * (1.0 + next(calls)), np.ones(2))

def empty():
    return of(lambda task, v: ops.sum(task) + ops.sum(v["w"]), np.zeros(0))

def foreign():
    import torch
    return of(lambda task, v: torch.mean(torch.tanh(v["w"] * task) ** 2), np.ones(2))

def misspelt():
    return {**right(), "adaptaton": Adaptation()}

def nothing():
    return None

number = 3
"""


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require("torch")
    (tmp_path / "doctor_cases.py").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    yield
    sys.modules.pop("doctor_cases", None)


@pytest.mark.usefixtures("cases")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "doctor_cases:right", "--backend", "torch"]) == 0
    assert "The meta-gradient is right." in capsys.readouterr().out
    assert main(["doctor", "doctor_cases:wrong", "--backend", "torch", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert report["findings"][0]["kind"] == "lost second-order term"


@pytest.mark.usefixtures("cases")
@pytest.mark.parametrize(
    ("target", "code", "says"),
    [
        ("right", 0, "The meta-gradient is right."),
        ("kinked", 0, "kink in 'w' (may be meant)"),
        ("unused", 0, "unused variable in 'c' (may be meant)"),
        ("branching", 0, "cannot be vectorised in vmap (may be meant)"),
        ("wrong", 1, "lost second-order term in 'w'"),
        ("padded", 1, "not finite in batch, task 1"),
        ("flat", 1, "not checked: finite differences in 'c': its gradient is so small"),
        ("jumping", 1, "not checked: finite differences: no two calls"),
        ("empty", 1, "not checked: finite differences: the variables have no elements"),
    ],
)
def test_the_exit_code(
    target: str, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 where all is right, with or without notes; 1 for a fault and for what cannot be told."""
    assert main(["doctor", f"doctor_cases:{target}", "--backend", "torch"]) == code
    assert says in capsys.readouterr().out


@pytest.mark.usefixtures("cases")
def test_the_command_compares_with_another_backend(capsys: pytest.CaptureFixture[str]) -> None:
    require("jax")
    run = ["doctor", "doctor_cases:right", "--backend", "torch", "--compare", "jax"]
    assert main(run) == 0, capsys.readouterr().out
    run[1] = "doctor_cases:foreign"
    assert main(run) == 1
    assert "not checked: torch and jax: on jax the cost raises" in capsys.readouterr().out


@pytest.mark.usefixtures("cases")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("doctor_cases", "expected module:function"),
        (".doctor_cases:right", "expected module:function"),
        ("doctor_cases.:right", "expected module:function"),
        ("doctor_cases:number", "doctor_cases:number is no function, but of type int"),
        ("doctor_case:right", "no module 'doctor_case'"),
        ("doctor_cases:rigth", "Did you mean 'right'?"),
        ("doctor_cases:misspelt", "Did you mean 'adaptation'?"),
        ("doctor_cases:nothing", "returned a NoneType, expected a dict with 'cost'"),
    ],
)
def test_the_command_says_what_it_needs(
    target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", target, "--backend", "torch"]) == 2
    assert message in capsys.readouterr().err
