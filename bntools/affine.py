"""Per-channel affine maps `y = scale * x + shift`, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Affine"]


@dataclass(frozen=True, eq=False)
class Affine:
    """A per-channel map `y[c] = scale[c] * x[c] + shift[c]`.

    `scale` and `shift` are tensors of shape (C,), held in float64 on the CPU.

    Example:
        >>> import torch
        >>> double = Affine(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0]))
        >>> double.then(double).shift
        tensor([0., 3.], dtype=torch.float64)
    """

    scale: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.scale.detach().to("cpu", torch.float64))
        object.__setattr__(self, "shift", self.shift.detach().to("cpu", torch.float64))

    @classmethod
    def of_batch_norm(
        cls,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
    ) -> Affine:
        """The map of an eval-mode batch norm with statistics of shape (C,).

        `scale = weight / sqrt(variance + eps)`, `shift = bias - mean * scale`
        (Ioffe & Szegedy 2015).
        """
        scale = (variance.detach().double() + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.detach().double()
        shift = -mean.detach().double() * scale
        if bias is not None:
            shift = shift + bias.detach().double()
        return cls(scale, shift)

    @classmethod
    def identity(cls, channels: int) -> Affine:
        """The map that changes nothing."""
        ones = torch.ones(channels, dtype=torch.float64, device="cpu")
        return cls(ones, torch.zeros_like(ones))

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        return self.scale.numel()

    def then(self, after: Affine) -> Affine:
        """This map followed by another one."""
        return Affine(after.scale * self.scale, after.scale * self.shift + after.shift)

    def is_finite(self) -> bool:
        """Whether no scale and no shift is NaN or infinite."""
        return bool((self.scale + self.shift).isfinite().all())

    def same_as(self, other: Affine) -> bool:
        """Whether both maps are equal to the bit."""
        return torch.equal(self.scale, other.scale) and torch.equal(self.shift, other.shift)
