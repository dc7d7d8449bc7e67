"""The code of the page on porting from ivy, as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np

PAGE = Path(__file__).resolve().parents[2] / "docs" / "porting" / "ivy.md"


def test_porting_page(backend_name: str, ivy: ModuleType) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace('set_backend("torch")', f'set_backend("{backend_name}")'), names)
    np.testing.assert_allclose(ivy.to_numpy(names["grads"]["latent"]), -1.1372314, rtol=1e-6)  # type: ignore[index]
