"""Norm layers of our own."""

from __future__ import annotations

from bntools.norms.evonorm import (
    EvoNorm1dB0,
    EvoNorm1dS0,
    EvoNorm2dB0,
    EvoNorm2dS0,
    EvoNorm3dB0,
    EvoNorm3dS0,
    EvoNormB0,
    EvoNormS0,
)
from bntools.norms.frozen import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenEvoNorm1dB0,
    FrozenEvoNorm2dB0,
    FrozenEvoNorm3dB0,
    FrozenSyncBatchNorm,
    is_frozen,
)
from bntools.norms.layernorm import ChannelLayerNorm
from bntools.norms.padding import (
    ChannelPadConv1d,
    ChannelPadConv2d,
    ChannelPadConv3d,
    pad_channels,
    padding_of,
)

__all__ = [
    "ChannelLayerNorm",
    "ChannelPadConv1d",
    "ChannelPadConv2d",
    "ChannelPadConv3d",
    "EvoNorm1dB0",
    "EvoNorm1dS0",
    "EvoNorm2dB0",
    "EvoNorm2dS0",
    "EvoNorm3dB0",
    "EvoNorm3dS0",
    "EvoNormB0",
    "EvoNormS0",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenEvoNorm1dB0",
    "FrozenEvoNorm2dB0",
    "FrozenEvoNorm3dB0",
    "FrozenSyncBatchNorm",
    "is_frozen",
    "pad_channels",
    "padding_of",
]
