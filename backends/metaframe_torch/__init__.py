"""The PyTorch backend of metaframe."""

from metaframe_torch._backend import TorchBackend as TorchBackend

__all__ = ["TorchBackend"]
