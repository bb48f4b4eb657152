"""The v of EvoNorm, which no closed form gives: a grid, with the affine solved for each v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sample", "best_v", "sampled"]

SAMPLE = 2048
"""Values per channel that v is chosen on."""
_COARSE = (
    -32.0,
    -16.0,
    -8.0,
    -4.0,
    -2.0,
    -1.0,
    -0.5,
    -0.25,
    0.0,
    0.25,
    0.5,
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
)
_FINE = 7
_REFINEMENTS = 2
_LEAST = 1e-4
"""A v that shrinks the squared output to less than so much of that of v = 0 is out of the question:
a gate that is shut for all values fits with a weight that no dtype holds."""
_CHANNELS = 128
"""Channels that are searched at a time."""

Shape = Callable[[Tensor, Tensor, slice], Tensor]
"""(x, v, channels) -> the layer's output without its affine, for x of shape (C, M)."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Some pairs of an input of the new layer and its target, of shape (C, M), in float64.

    `rows` says from which sample of the data each of the M columns is; `means` and `variances` are
    those of the inputs of each sample and channel, of shape (R, C).
    """

    x: Tensor
    target: Tensor
    rows: Tensor
    means: Tensor
    variances: Tensor

    @staticmethod
    def joined(parts: Sequence[Sample]) -> Sample:
        """The pairs of all parts."""
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.means.shape[0])
        return Sample(
            torch.cat([p.x for p in parts], 1),
            torch.cat([p.target for p in parts], 1),
            torch.cat([p.rows + offset for p, offset in zip(parts, offsets, strict=False)]),
            torch.cat([p.means for p in parts]),
            torch.cat([p.variances for p in parts]),
        )


def sampled(x: Tensor, target: Tensor, share: float, generator: torch.Generator) -> Sample:
    """About `SAMPLE * share` values per channel of tensors of shape (N, C, ...), drawn by seed."""
    flat_x = x.reshape(x.shape[0], x.shape[1], -1)
    flat_t = target.reshape(flat_x.shape)
    count, positions = flat_x.shape[0], flat_x.shape[2]
    wanted = max(1, round(SAMPLE * share))
    images = torch.randperm(count, generator=generator, device="cpu")[:wanted].sort().values
    each = min(positions, -(-wanted // len(images)))
    images = images.to(x.device)
    chosen_x, chosen_t = flat_x[images], flat_t[images]
    variances, means = torch.var_mean(chosen_x.double(), dim=2, correction=0)
    places = torch.rand(len(images), positions, generator=generator, device="cpu").argsort(1)
    places = places[:, :each].to(x.device).unsqueeze(1).expand(-1, x.shape[1], -1)
    rows = torch.arange(len(images), device=x.device).repeat_interleave(each)
    return Sample(
        _by_channel(chosen_x.gather(2, places)),
        _by_channel(chosen_t.gather(2, places)),
        rows,
        means,
        variances,
    )


def best_v(sample: Sample, shape: Shape, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The v of each channel with the least squared error, in multiples of `unit`, and that error.

    A coarse grid from -32 to 32 units, then finer ones around its best value.
    """
    found = []
    for start in range(0, sample.x.shape[0], _CHANNELS):
        part = slice(start, start + _CHANNELS)
        found.append(_searched(sample.x[part], sample.target[part], shape, part, unit[part]))
    return torch.cat([v for v, _ in found]), torch.cat([error for _, error in found])


def _searched(
    x: Tensor, target: Tensor, shape: Shape, part: slice, unit: Tensor
) -> tuple[Tensor, Tensor]:
    centred = target - target.mean(1, keepdim=True)
    least = _LEAST * shape(x, torch.zeros_like(unit).unsqueeze(1), part).square().sum(1)
    grid = torch.tensor(_COARSE, dtype=x.dtype, device=x.device).expand(x.shape[0], -1)
    best, error = _best_of(grid, (x, centred, least), shape, part, unit)
    for _ in range(_REFINEMENTS):
        place = torch.searchsorted(grid.contiguous(), best.unsqueeze(1))
        low = grid.gather(1, (place - 1).clamp(min=0))
        high = grid.gather(1, (place + 1).clamp(max=grid.shape[1] - 1))
        steps = torch.linspace(0, 1, 2 * _FINE + 1, dtype=x.dtype, device=x.device)
        finer = low + (high - low) * steps
        grid = torch.cat([finer, best.unsqueeze(1)], 1).sort(1).values
        best, error = _best_of(grid, (x, centred, least), shape, part, unit)
    return best * unit, error


def _best_of(
    grid: Tensor, data: tuple[Tensor, Tensor, Tensor], shape: Shape, part: slice, unit: Tensor
) -> tuple[Tensor, Tensor]:
    x, target, least = data
    errors = torch.stack(
        [_error(shape(x, (v * unit).unsqueeze(1), part), target, least) for v in grid.unbind(1)], 1
    )
    error, index = errors.min(1)
    return grid.gather(1, index.unsqueeze(1)).squeeze(1), error


def _error(base: Tensor, target: Tensor, least: Tensor) -> Tensor:
    """What the best line leaves of a centred target."""
    base = base - base.mean(1, keepdim=True)
    spread, both = base.square().sum(1), (base * target).sum(1)
    usable = spread > least
    gain = torch.where(usable, both.square() / torch.where(usable, spread, 1.0), 0.0)
    return (target.square().sum(1) - gain).clamp(min=0)


def _by_channel(values: Tensor) -> Tensor:
    return values.double().movedim(1, 0).reshape(values.shape[1], -1)
