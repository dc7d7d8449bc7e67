"""The layer primitives in torch calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metaframe.backend.tables import NNTable, Pads
from metaframe_torch import _private
from metaframe_torch._batch_norm import batch_norm


class TorchNN(NNTable):
    """See `metaframe.nn` for what each function does."""

    def relu(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        return torch.softmax(x, axis)

    def log_softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        return torch.log_softmax(x, axis)

    def conv2d(self, x: Tensor, kernel: Tensor, stride: tuple[int, int], pads: Pads) -> Tensor:
        (top, bottom), (left, right) = pads
        if top != bottom or left != right:
            x = F.pad(x, (0, 0, left, right, top, bottom))
            top = left = 0
        images, weights = x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1)
        return F.conv2d(images, weights, stride=stride, padding=(top, left)).permute(0, 2, 3, 1)

    def max_pool2d(self, x: Tensor, window: tuple[int, int]) -> Tensor:
        return F.max_pool2d(x.permute(0, 3, 1, 2), window).permute(0, 2, 3, 1)

    def batch_norm(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor | None:
        if eps == 0 or x.ndim not in (2, 4) or x.numel() <= x.shape[-1]:
            return None
        if _private.gradients_active() > 2:
            return None  # torch's third derivative is wrong
        # As a convolution lays out its images, and `conv2d` has permuted them.
        images = x if x.ndim == 2 else x.permute(0, 3, 1, 2)
        found = batch_norm(images, scale, shift, eps)
        return found if x.ndim == 2 else found.permute(0, 2, 3, 1)
