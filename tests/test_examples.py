"""Every example runs on every backend in its quick form, and prints what it found."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from examples import EXAMPLES, example
from frameworks import BACKENDS, require, slow
from metaframe import MAML, MetaTrainer, optim
from metaframe.tasks import SinusoidTaskSampler
from processes import run


@pytest.mark.parametrize("backend_name", ["jax", slow("torch"), slow("tensorflow")], indirect=True)
def test_digits(backend_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("digits").main(["--backend", backend_name, "--quick"])
    before, after = found.curve[0], found.curve[-1]
    # Labels are permuted in every task, so that nothing can be known before adaptation.
    assert abs(before.mean - 0.2) < 2 * before.ci95 + 0.01
    assert after.mean - after.ci95 > 0.7
    assert f"{100 * after.mean:.2f} ± {100 * after.ci95:.2f} %" in capsys.readouterr().out


# Squared errors after 0, 1 and 5 steps, of the quick form on the CPU.
SINUSOID = (3.8615, 3.7741, 3.7022)


def test_sinusoid(backend_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every backend prints the same numbers, to what 30 steps leave of float32."""
    found = example("sinusoid").main(["--backend", backend_name, "--quick"])
    assert found.curve[5].mean < found.curve[0].mean
    printed = re.findall(r"(\d+\.\d+) ±", capsys.readouterr().out)
    np.testing.assert_allclose([float(x) for x in printed], SINUSOID, atol=2e-4)


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_every_example_has_the_same_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--backend", "--seed", "--quick"))


@pytest.mark.slow
def test_digits_end_alike_on_every_backend() -> None:
    """The same tasks, the same start: accuracies within each other's confidence intervals."""
    for name in BACKENDS:
        require(name)
    found = [example("digits").main(["--backend", name]).curve[-1] for name in BACKENDS]
    for one, other in itertools.combinations(found, 2):
        assert abs(one.mean - other.mean) < min(one.ci95, other.ci95)


@pytest.mark.slow
def test_omniglot(backend_name: str, omniglot_dir: Path) -> None:
    options = ["--data", str(omniglot_dir), "--backend", backend_name, "--quick", "--channels", "8"]
    found = example("omniglot").main(options)
    assert abs(found.curve[0].mean - 0.2) < 0.04
    assert found.curve[-1].mean - found.curve[-1].ci95 > 0.22


# The library, and how two processes of its example are started.
CLUSTER = {
    "with_fabric": ("lightning_fabric", (), ("--processes", "2")),
    "with_accelerate": (
        "accelerate",
        ("-m", "torch.distributed.run", "--nproc-per-node", "2"),
        (),
    ),
    "with_ray": ("ray", (), ("--processes", "2")),
}


def test_every_example_for_a_cluster_is_run() -> None:
    assert set(CLUSTER) == {path.stem for path in (EXAMPLES / "cluster").glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLUSTER)
def test_started_by_other_libraries(name: str) -> None:
    """Two processes end at the loss that one process ends at, whoever starts them."""
    require("torch")
    library, starter, flags = CLUSTER[name]
    pytest.importorskip(library, reason=f"{library} is optional, for examples/cluster/{name}.py")
    said = run(
        [*starter, str(EXAMPLES / "cluster" / f"{name}.py"), *flags, "--iterations", "5"],
        RAY_USAGE_STATS_ENABLED="0",
    )
    found = re.findall(r"loss (\d+\.\d+) with 2 processes", said)
    assert len(found) == 1, said
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    loss_fn = torch.nn.functional.mse_loss
    alone = MetaTrainer(
        MAML(model, inner_lr=0.01), optim.adam(1e-3), loss_fn, SinusoidTaskSampler(seed=0)
    )
    expected = alone.fit(5, meta_batch_size=5).meta_loss[-1]
    assert float(found[0]) == pytest.approx(expected, rel=1e-5)
