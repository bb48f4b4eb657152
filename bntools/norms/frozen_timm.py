"""The frozen classes of timm's norms with an activation; imported only where timm is in use."""

from __future__ import annotations

from typing import Any

from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor

from bntools.norms.frozen import _EvalBatchNorm

__all__ = ["FrozenBatchNormAct2d", "FrozenSyncBatchNormAct"]


class FrozenBatchNormAct2d(_EvalBatchNorm, BatchNormAct2d):
    """A BatchNormAct2d with fixed statistics; its dropout and activation follow the mode."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, H, W), then drop and activate."""
        y: Tensor = self.act(self.drop(self._normalised(x)))
        return y


class FrozenSyncBatchNormAct(_EvalBatchNorm, SyncBatchNormAct):
    """A SyncBatchNormAct with fixed statistics; its dropout and activation follow the mode."""

    _ranks = (2, 5)

    def forward(self: Any, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, ...), then drop and activate."""
        y: Tensor = self.act(self.drop(self._normalised(x)))
        return y
