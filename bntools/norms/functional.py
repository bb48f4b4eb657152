"""The formulas of our norm layers, as functions of tensors.

TorchScript compiles them. Half and bfloat16 are computed in float32 and cast once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channel_affine", "check_rank", "evo_norm_b0", "evo_norm_s0"]


def check_rank(rank: int, lowest: int, highest: int) -> None:
    """Refuse inputs of another number of axes.

    Raises ValueError, as torch's norms do.
    """
    if rank < lowest or rank > highest:
        wanted = f"{lowest}D" if lowest == highest else f"{lowest}D or {highest}D"
        raise ValueError(f"expected {wanted} input (got {rank}D input)")


def channel_affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x * weight + bias`, with one value per channel."""
    z = _widened(x)
    return (z * _per_channel(weight, x) + _per_channel(bias, x)).to(x.dtype)


def evo_norm_s0(
    x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float
) -> Tensor:
    """`x * sigmoid(v * x) / sqrt(var + eps) * weight + bias`, var of each sample and group."""
    z = _widened(x)
    _, rstd = _moments(z, groups, eps)
    scale = (rstd.unsqueeze(2) * weight.view(1, groups, -1)).flatten(1)
    scale = scale.view(list(scale.shape) + [1] * (x.dim() - 2))
    gate = (z * _per_channel(v, x)).sigmoid_()
    shift = _per_channel(bias, x)
    if torch.is_grad_enabled():
        return (gate * z * scale + shift).to(x.dtype)
    return gate.mul_(z).mul_(scale).add_(shift).to(x.dtype)


def evo_norm_b0(
    x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, variance: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """`x / max(sqrt(variance + eps), v * x + sqrt(var + eps)) * weight + bias`, and the variance.

    `variance` has shape (C,), and is that of the batch where None is given; var is that of each
    sample and channel.
    """
    z = _widened(x)
    mean, rstd = _moments(z, x.size(1), eps)
    if variance is None:
        if x.numel() == 0:
            raise ValueError("expected at least one value per channel when training")
        # the variance of equally many values in each sample is that within and that between them
        within = rstd.square().reciprocal().mean(0) - eps
        variance = (within + mean.var(0, correction=0)).clamp_min(0)
    batch = _per_channel((variance + eps).sqrt(), x)
    sample = rstd.reciprocal().view(list(rstd.shape) + [1] * (x.dim() - 2))
    bound = z * _per_channel(v, x)
    shift = _per_channel(bias, x)
    if torch.is_grad_enabled():
        y = z / torch.maximum(bound + sample, batch) * _per_channel(weight, x) + shift
    else:
        bound = bound.add_(sample).clamp_min_(batch)
        y = torch.div(z, bound, out=bound).mul_(_per_channel(weight, x)).add_(shift)
    return y.to(x.dtype), variance


def _widened(x: Tensor) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view([1, -1] + [1] * (x.dim() - 2))


def _moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps), both (N, groups), var being biased.

    On the CPU the kernel of group norm takes them: it is many times faster than `torch.var`, also
    with the output that nobody needs. On a GPU that output costs more than the reduction.
    """
    positions = 1
    for size in x.shape[2:]:
        positions *= size
    if x.is_cuda and x.numel() > 0:  # torch.var warns of empty batches
        return _reduced(x.reshape(x.size(0), groups, x.size(1) // groups * positions), eps)
    found = torch.native_group_norm(x, None, None, x.size(0), x.size(1), positions, groups, eps)
    return found[1], found[2]


def _reduced(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(rows, dim=[2], correction=0)
    return mean, (variance + eps).rsqrt()
