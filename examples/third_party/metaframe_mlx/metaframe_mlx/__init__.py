"""The MLX backend of metaframe, as a package of its own."""

from metaframe_mlx._backend import MLXBackend as MLXBackend

__all__ = ["MLXBackend"]
