"""The arithmetic of a fold: an affine map after a linear layer goes into its weight and bias.

Everything is computed in float64 and cast once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bntools.affine import Affine

__all__ = ["SMALLEST_NORMAL", "Absorbed", "OutputLayout", "absorb_after", "overflows"]

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# elements at a time: a float64 block of this size stays in a core's cache
_BLOCK = 1 << 15


@dataclass(frozen=True)
class OutputLayout:
    """Where the output channels are in a weight.

    `axis` is 0 for convolutions and `F.linear`, 1 for `x @ W` and transposed convolutions; with
    `groups > 1` (transposed convolutions only) output channel `g * W.shape[1] + j` is column `j`
    of the g-th block of rows.
    """

    axis: int = 0
    groups: int = 1

    def channels(self, weight: Tensor) -> int:
        """The number of output channels of a weight."""
        return weight.shape[self.axis] * self.groups


@dataclass(frozen=True)
class Absorbed:
    """A weight and bias that hold an affine map; `flushed` values were subnormal and are 0."""

    weight: Tensor
    bias: Tensor | None
    flushed: int


def absorb_after(
    weight: Tensor, bias: Tensor | None, affine: Affine, layout: OutputLayout
) -> Absorbed:
    """Absorb `affine(linear(x))` into a weight and bias of the same dtype as the weight.

    The new weight is `scale * weight` along the output channels, the new bias
    `scale * bias + shift`; bias stays None where it was None and the shift is zero.
    """
    weight = weight.detach()
    scaled, flushed = _scaled(weight, affine.scale.to(weight.device), layout)
    if bias is None and not affine.shift.any():
        return Absorbed(scaled, None, flushed)
    like = weight if bias is None else bias
    shifted = _shifted(bias, affine).to(like.device, like.dtype, copy=True)
    return Absorbed(scaled, shifted, flushed + _flush(shifted))


def overflows(weight: Tensor, bias: Tensor | None, affine: Affine, layout: OutputLayout) -> bool:
    """Whether folding would give values that the weight's dtype cannot hold.

    Exact where the dtype is half or a scale is large; a float32 weight over 1e30 is not looked for.
    """
    limit = torch.finfo(weight.dtype).max
    shift = _shifted(bias, affine)
    if shift.numel() and float(shift.abs().max()) > limit:
        return True
    largest = float(affine.scale.abs().max()) if affine.channels else 0.0
    if limit > 1e30 and largest < 1e8:
        return False
    peaks = _channel_peaks(weight.detach(), layout)
    return bool((peaks * affine.scale.abs()).max() > limit)


def _shifted(bias: Tensor | None, affine: Affine) -> Tensor:
    if bias is None:
        return affine.shift
    return bias.detach().to("cpu", torch.float64) * affine.scale + affine.shift


def _blocks(weight: Tensor, layout: OutputLayout) -> tuple[Tensor, bool]:
    """View a weight as (rows, columns, rest) per group, and say whether channels are rows."""
    if layout.axis == 0:
        return weight.reshape(1, weight.shape[0], 1, -1), True
    return weight.reshape(layout.groups, -1, weight.shape[1], weight[0, 0].numel()), False


def _scaled(weight: Tensor, scale: Tensor, layout: OutputLayout) -> tuple[Tensor, int]:
    scaled = torch.empty_like(weight, memory_format=torch.contiguous_format)
    source, by_row = _blocks(weight, layout)
    target, _ = _blocks(scaled, layout)
    factors = scale.reshape(1, -1, 1, 1) if by_row else scale.reshape(layout.groups, 1, -1, 1)
    _multiply(source, factors, target)
    flushed = _flush(scaled) if _may_be_subnormal(weight, scale) else 0
    if not weight.is_contiguous():
        scaled = torch.empty_like(weight).copy_(scaled)
    return scaled, flushed


def _multiply(source: Tensor, factors: Tensor, target: Tensor) -> None:
    """`target = source * factors` in float64, rounded once; the source is never copied whole."""
    if source.dtype == torch.float32 and source.device.type == "cpu":
        arrays = source.numpy(), factors.numpy()
        np.multiply(*arrays, out=target.numpy(), dtype=np.float64, casting="same_kind")
        return
    for group in range(source.shape[0]):
        step = max(1, _BLOCK // max(1, source[group, :1].numel()))
        for start in range(0, source.shape[1], step):
            part = slice(start, start + step)
            factor = factors[group, part] if factors.shape[1] > 1 else factors[group]
            target[group, part].copy_(source[group, part].to(torch.float64) * factor)


def _may_be_subnormal(weight: Tensor, scale: Tensor) -> bool:
    if not weight.numel():
        return False
    return not float(weight.abs().amin()) * float(scale.abs().amin()) >= 2 * SMALLEST_NORMAL


def _flush(values: Tensor) -> int:
    """Zero what is subnormal in float32: it changes no result and slows convolutions down.

    Works in place and returns how many values it zeroed; float16 needs its small values.
    """
    if values.dtype == torch.float16:
        return 0
    below = SMALLEST_NORMAL * (1 - torch.finfo(values.dtype).eps)
    normal = torch.nn.functional.hardshrink(values, below)
    count = int(values.count_nonzero() - normal.count_nonzero())
    if count:
        values.copy_(normal)
    return count


def _channel_peaks(weight: Tensor, layout: OutputLayout) -> Tensor:
    blocks, by_row = _blocks(weight, layout)
    if not blocks.numel():
        return torch.zeros(layout.channels(weight), dtype=torch.float64, device="cpu")
    peaks = blocks.abs().amax(dim=(0, 2, 3) if by_row else (1, 3))
    return peaks.reshape(-1).to("cpu", torch.float64)
