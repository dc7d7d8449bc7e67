"""The JAX backend of metaframe."""

from metaframe_jax._backend import JaxBackend as JaxBackend

__all__ = ["JaxBackend"]
