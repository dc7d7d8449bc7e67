"""The devices on which JAX runs."""

from __future__ import annotations

import jax
from jax import Array, Device

from metaframe_jax._private import is_tracer


def on_cpu(x: Array) -> bool:
    """True if work on `x` runs on a CPU; of a tracer, unless it is told otherwise."""
    return _platform(x) == "cpu"


def _platform(x: Array) -> str:
    if not is_tracer(x):
        return str(next(iter(x.devices())).platform)
    device: Device | str | None = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else str(device.platform)
