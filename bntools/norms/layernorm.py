"""Layer norm over the channels of each position."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ChannelLayerNorm"]


class ChannelLayerNorm(nn.Module):
    """Layer norm of every position over its channels, for inputs of shape (N, C, ...).

    Mean and biased variance of the C values at one position normalise them; `weight` and `bias`
    have one value per channel. Statistics are computed in float32 for half and bfloat16.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); as used over channels by ConvNeXt
    (Liu et al. 2022).

    Example:
        >>> import torch
        >>> from bntools.norms import ChannelLayerNorm
        >>> y = ChannelLayerNorm(16)(torch.rand(2, 16, 5, 7))
        >>> y.shape, bool(y.mean(1).abs().max() < 1e-6)
        (torch.Size([2, 16, 5, 7]), True)
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    @property
    def num_features(self) -> int:
        """The channels, as batch norms name them: code around a norm may ask."""
        return int(self.channels)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's norms name it
        """Normalise an input of shape (N, C, ...)."""
        last = input.movedim(1, -1)
        return F.layer_norm(last, [self.channels], self.weight, self.bias, self.eps).movedim(-1, 1)

    def extra_repr(self) -> str:
        """Channels and eps."""
        return f"{self.channels}, eps={self.eps}"
