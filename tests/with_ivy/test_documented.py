"""The examples in ivy's documentation of its meta steps, with the steps taken from metaframe."""

from __future__ import annotations

import doctest
import re
from types import ModuleType

import numpy as np
import pytest

import metaframe

MAML = """
>>> import ivy
>>> from ivy.functional.ivy.gradients import _variable
>>> ivy.set_backend("torch")
>>> def inner_cost_fn(sub_batch, v):
...     return sub_batch.mean().x / v.mean().latent
>>> def outer_cost_fn(sub_batch,v):
...     return sub_batch.mean().x / v.mean().latent
>>> num_tasks = 2
>>> batch = ivy.Container({"x": ivy.arange(1, num_tasks + 1, dtype="float32")})
>>> variables = ivy.Container({
...     "latent": _variable(ivy.repeat(ivy.array([[1.0]]), num_tasks, axis=0))
... })
>>> cost = ivy.maml_step(batch, inner_cost_fn, outer_cost_fn, variables, 5, 0.01)
>>> print(cost)
(ivy.array(1.40069818), {
latent: ivy.array([-1.13723135])
}, ())
"""

REPTILE = """
>>> from ivy.functional.ivy.gradients import gradient_descent_update
>>> import ivy
>>> from ivy.functional.ivy.gradients import _variable
>>> ivy.set_backend("torch")
>>> def inner_cost_fn(batch_in, v):
...     return batch_in.mean().x / v.mean().latent
>>> num_tasks = 2
>>> batch = ivy.Container({"x": ivy.arange(1, num_tasks + 1, dtype="float32")})
>>> variables = ivy.Container({
...     "latent": _variable(ivy.repeat(ivy.array([[1.0]]), num_tasks, axis=0))
... })
>>> cost, gradients = ivy.reptile_step(batch, inner_cost_fn, variables, 5, 0.01,
...                                    num_tasks=num_tasks)
>>> print(cost)
ivy.array(1.4485182)
>>> print(gradients)
{
    latent: ivy.array([-139.9569855])
}
>>> batch = ivy.Container({"x": ivy.arange(1, 4, dtype="float32")})
>>> variables = ivy.Container({
...     "latent": _variable(ivy.array([1.0, 2.0]))
... })
>>> cost, gradients, firsts = ivy.reptile_step(batch, inner_cost_fn, variables, 4,
...                                            0.025, batched=False, num_tasks=2,
...                                            return_inner_v='first')
>>> print(cost)
ivy.array(0.9880483)
>>> print(gradients)
{
    latent: ivy.array([-13.01766968, -13.01766968])
}
>>> print(firsts)
{
    latent: ivy.array([[1.02197957, 2.02197981]])
}
"""

NUMBER = re.compile(r"-?\d+\.\d+")


class SameNumbers(doctest.OutputChecker):
    """The same text but for whitespace, and numbers equal to the digits that float32 has."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        del optionflags
        if not want:  # the documentation leaves out what `set_backend` returns
            return True
        texts = ["".join(NUMBER.sub("#", text).split()) for text in (want, got)]
        numbers = [np.array([float(x) for x in NUMBER.findall(text)]) for text in (want, got)]
        return texts[0] == texts[1] and np.allclose(*numbers, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("example", "prints"), [(MAML, 1), (REPTILE, 5)], ids=["maml", "reptile"])
def test_documented_example(example: str, prints: int, backend_name: str, ivy: ModuleType) -> None:
    del ivy
    ours = example.replace('set_backend("torch")', f'set_backend("{backend_name}")')
    for step in ("maml_step", "reptile_step"):
        ours = ours.replace(f"ivy.{step}(", f"metaframe.{step}(")
    test = doctest.DocTestParser().get_doctest(ours, {"metaframe": metaframe}, "ivy", None, None)
    assert sum(bool(part.want) for part in test.examples) == prints
    report: list[str] = []
    result = doctest.DocTestRunner(checker=SameNumbers()).run(test, out=report.append)
    assert result.attempted == len(test.examples)
    assert not result.failed, "".join(report)
