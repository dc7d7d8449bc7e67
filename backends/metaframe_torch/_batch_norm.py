"""Batch normalisation with derivatives of its own on autograd's tape.

torch puts the second derivative together from some thirty sums, each a pass over all images, and
its third derivative is wrong: the statistics count as constants there. Here the second derivative
is two calls of torch's fused first one and a few products, and every derivative is right.

With x^ = (x - mean) * r, r = 1 / sqrt(variance + eps), and M entries a channel, Ioffe and Szegedy
(arXiv:1502.03167, section 3) have

    y = scale * x^ + shift
    dx = scale * r * P(g),   dscale = sum(g x^),   dshift = sum(g),
    where P(u) = u - mean(u) - x^ mean(u x^).

For cotangents a, b, c of these three, <a, dx> + <b, dscale> + <c, dshift> has the derivatives

    by g:      scale * r * P(a) + b * x^ + c
    by scale:  r * sum(g P(a))
    by x:      r * P(b * g - scale * r * (a * mean(g x^) + g * mean(a x^)))
               - scale * r^2 * sum(g P(a)) / M * x^
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaframe_torch import _private, _tape


def batch_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """`F.batch_norm` by the statistics of `x`, (N, C, ...), with its errors.

    `scale` and `shift` are (C,).
    """
    if _tape.transforming() or _tape.has_tangents() or not _ours(x, scale, shift):
        return F.batch_norm(x, None, None, scale, shift, training=True, momentum=0.0, eps=eps)
    if _private.BATCH_NORM.found is None or _private.BATCH_NORM_BACKWARD.found is None:
        return _composed(x, scale, shift, eps)
    apply: Any = _BatchNorm.apply
    result: Tensor = apply(x, scale, shift, eps)[0]
    return result


def _ours(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> bool:
    """True if `native_batch_norm` is sure of it. That looks at no shapes; `F.batch_norm` does."""
    if x.dtype not in (torch.float32, torch.float64) or x.device.type not in _DEVICES:
        return False
    if x.ndim < 2 or x.numel() <= x.shape[1]:
        return False
    channels = x.shape[1:2]
    return all(y is None or (y.dtype == x.dtype and y.shape == channels) for y in (scale, shift))


def _composed(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """The same in operations whose derivatives of every order are right."""
    over, shape = (0, *range(2, x.ndim)), (1, -1, *(1,) * (x.ndim - 2))
    centred = x - x.mean(over, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)
    scaled = normal if scale is None else normal * scale.view(shape)
    return scaled if shift is None else scaled + shift.view(shape)


_DEVICES = ("cpu", "cuda")
"""The devices on which the third result of `native_batch_norm` is known to be r."""


class _BatchNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Any:
        return _private.BATCH_NORM.found(x, scale, shift, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, scale, _, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(x, scale, mean, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        x, scale, mean, r = ctx.saved_tensors
        apply: Any = _FirstDerivative.apply
        found = apply(g, x, scale, mean, r, ctx.eps)
        wanted = zip(found, ctx.needs_input_grad[:3], strict=True)
        return (*(y if needed else None for y, needed in wanted), None)


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, r: Tensor, eps: float
    ) -> Any:
        return _fused(g, x, scale, mean, r, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Any, ...]:
        g, x, scale, mean, r = ctx.saved_tensors
        over, size = (0, *range(2, x.ndim)), x.numel() // x.shape[1]

        def per_channel(v: Tensor) -> Tensor:
            return v.view(1, -1, *(1,) * (x.ndim - 2))

        def projected(u: Tensor) -> tuple[Tensor, Tensor]:
            """P(u) times r, and sum(u x^)."""
            if not torch.is_grad_enabled():
                return _fused(u, x, None, mean, r, ctx.eps)[:2]
            normal = (x - per_channel(mean)) * per_channel(r)
            along = (u * normal).sum(over)
            rest = u - u.mean(over, keepdim=True) - normal * per_channel(along / size)
            return rest * per_channel(r), along

        if torch.is_grad_enabled():  # this will be differentiated, and the statistics are of x
            mean = x.mean(over)
            r = torch.rsqrt((x - per_channel(mean)).square().mean(over) + ctx.eps)
        scale_r = r if scale is None else scale * r
        projected_a, sum_a = projected(a)
        projected_g, sum_g = projected(g)
        by_scale = (g * projected_a).sum(over)
        # What multiplies x - mean, a and g, by channel.
        along_x, of_a, of_g = -scale_r * by_scale * r / size, scale_r * sum_g, scale_r * sum_a
        by_x = torch.addcmul(per_channel(-along_x * mean), x, per_channel(along_x))
        by_x = torch.addcmul(by_x, projected_a, per_channel(-of_a / size))
        by_x = torch.addcmul(by_x, projected_g, per_channel(b - of_g / size))
        by_g = torch.addcmul(per_channel(c - b * r * mean), x, per_channel(b * r))
        by_g = by_g + projected_a if scale is None else by_g + projected_a * per_channel(scale)
        return by_g, by_x, None if scale is None else by_scale, None, None, None


def _fused(
    g: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, r: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The first derivatives by x, scale and shift."""
    by_x, by_scale, by_shift = _private.BATCH_NORM_BACKWARD.found(
        g, x, scale, None, None, mean, r, True, eps, [True, True, True]
    )
    return by_x, by_scale, by_shift
