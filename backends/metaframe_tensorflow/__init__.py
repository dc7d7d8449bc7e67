"""The TensorFlow backend of metaframe."""

from metaframe_tensorflow._backend import TensorFlowBackend as TensorFlowBackend

__all__ = ["TensorFlowBackend"]
