"""EvoNorm: normalisation and activation in one layer.

Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers" (NeurIPS 2020), and the
authors' code: groups are reduced until they divide the channels, eps is inside of every root, and
every variance is biased.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bntools.norms.functional import channel_affine, check_rank, evo_norm_b0, evo_norm_s0

__all__ = [
    "EvoNorm",
    "EvoNorm1dB0",
    "EvoNorm1dS0",
    "EvoNorm2dB0",
    "EvoNorm2dS0",
    "EvoNorm3dB0",
    "EvoNorm3dS0",
    "EvoNormB0",
    "EvoNormS0",
    "fitting_groups",
]

for _name in ("channel_affine", "check_rank", "evo_norm_b0", "evo_norm_s0"):
    torch.fx.wrap(_name)  # symbolic traces call them whole


def fitting_groups(channels: int, groups: int) -> int:
    """The largest number up to `groups` that divides the channels.

    Raises ValueError for numbers under 1.
    """
    if channels < 1 or groups < 1:
        raise ValueError(
            f"expected positive numbers of channels and groups, got {channels} and {groups}"
        )
    groups = min(groups, channels)
    while channels % groups:
        groups -= 1
    return groups


class EvoNorm(nn.Module):
    """What all EvoNorms have: `weight`, `bias`, and `v` unless they are without nonlinearity."""

    __constants__ = ("_ranks",)
    _ranks = (4, 4)

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        nonlinearity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.nonlinearity = nonlinearity
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        if nonlinearity:
            self.v = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("v", None)

    @property
    def num_features(self) -> int:
        """The channels, as batch norms name them: code around a norm may ask."""
        return int(self.channels)

    def reset_parameters(self) -> None:
        """Set weight and v to one, bias to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.v is not None:
            nn.init.ones_(self.v)

    def extra_repr(self) -> str:
        """The arguments that the layer was made with."""
        last = "" if self.nonlinearity else ", nonlinearity=False"
        return f"{self.channels}, eps={self.eps}{self._own_repr()}{last}"

    def _own_repr(self) -> str:
        return ""


class EvoNormS0(EvoNorm):
    """`y = x * sigmoid(v * x) / sqrt(var(x) + eps) * weight + bias`, var of sample and group.

    Without `nonlinearity` it is the published form for the end of a residual branch,
    `y = x * weight + bias`, which normalises nothing. Nothing depends on the batch or the mode.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        nonlinearity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps=eps, nonlinearity=nonlinearity, device=device, dtype=dtype)
        self.groups = fitting_groups(channels, groups)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's norms name it
        """Normalise and activate an input of shape (N, C, ...)."""
        check_rank(input.dim(), self._ranks[0], self._ranks[1])
        if self.v is None:
            return channel_affine(input, self.weight, self.bias)
        return evo_norm_s0(input, self.v, self.weight, self.bias, groups=self.groups, eps=self.eps)

    def _own_repr(self) -> str:
        return f", groups={self.groups}"


class EvoNormB0(EvoNorm):
    """`y = x / max(sqrt(var(x) + eps), v * x + sqrt(var_sample(x) + eps)) * weight + bias`.

    var is that of the batch per channel in training mode, and the running variance in eval mode;
    var_sample is that of each sample and channel. `running_var` is biased, starts at one, stays in
    float32 when the layer is cast to half precision, and is updated as batch norm does:
    `(1 - momentum) * running + momentum * batch`, or a cumulative average where `momentum` is None.
    Without running statistics (`track_running_stats=False`) the batch's variance is always used.
    Without `nonlinearity` it is `y = x * weight + bias`, and keeps no statistics.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        nonlinearity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps=eps, nonlinearity=nonlinearity, device=device, dtype=dtype)
        self.momentum = momentum
        self.track_running_stats = track_running_stats and nonlinearity
        self.running_var: Tensor | None
        self.num_batches_tracked: Tensor | None
        if self.track_running_stats:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self.register_buffer("running_var", torch.ones(channels, device=device, dtype=wide))
            count = torch.tensor(0, dtype=torch.long, device=device)
            self.register_buffer("num_batches_tracked", count)
        else:
            self.register_buffer("running_var", None)
            self.register_buffer("num_batches_tracked", None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running variance to one, and the number of batches to zero."""
        if self.running_var is not None and self.num_batches_tracked is not None:
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's norms name it
        """Normalise and activate an input of shape (N, C, ...)."""
        check_rank(input.dim(), self._ranks[0], self._ranks[1])
        if self.v is None:
            return channel_affine(input, self.weight, self.bias)
        variance = None if self.training else self.running_var
        y, seen = evo_norm_b0(input, self.v, self.weight, self.bias, variance, eps=self.eps)
        if self.training:
            self._update(seen)
        return y

    def _own_repr(self) -> str:
        return "" if self.momentum == 0.1 else f", momentum={self.momentum}"

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        before = self.running_var
        super()._apply(fn, *args)  # type: ignore[no-untyped-call] # torch has no types there
        after = self.running_var
        if before is not None and after is not None and after.dtype.itemsize < 4:
            self.running_var = before.to(after.device)
        return self

    def _update(self, variance: Tensor) -> None:
        if self.running_var is None or self.num_batches_tracked is None:
            return
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
            else:
                factor = self.momentum
            self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


class EvoNorm1dS0(EvoNormS0):
    """EvoNorm-S0 for inputs of shape (N, C) or (N, C, L).

    Example:
        >>> import torch
        >>> from bntools.norms import EvoNorm1dS0
        >>> EvoNorm1dS0(48)(torch.rand(2, 48, 9)).shape
        torch.Size([2, 48, 9])
    """

    _ranks = (2, 3)


class EvoNorm2dS0(EvoNormS0):
    """EvoNorm-S0 for inputs of shape (N, C, H, W).

    Example:
        >>> import torch
        >>> from bntools.norms import EvoNorm2dS0
        >>> EvoNorm2dS0(48)
        EvoNorm2dS0(48, eps=1e-05, groups=24)
    """


class EvoNorm3dS0(EvoNormS0):
    """EvoNorm-S0 for inputs of shape (N, C, D, H, W)."""

    _ranks = (5, 5)


class EvoNorm1dB0(EvoNormB0):
    """EvoNorm-B0 for inputs of shape (N, C) or (N, C, L)."""

    _ranks = (2, 3)


class EvoNorm2dB0(EvoNormB0):
    """EvoNorm-B0 for inputs of shape (N, C, H, W).

    Example:
        >>> import torch
        >>> from bntools.norms import EvoNorm2dB0
        >>> norm = EvoNorm2dB0(16)
        >>> _ = norm(torch.zeros(2, 16, 4, 4))
        >>> norm.running_var[0], norm.num_batches_tracked
        (tensor(0.9000), tensor(1))
    """


class EvoNorm3dB0(EvoNormB0):
    """EvoNorm-B0 for inputs of shape (N, C, D, H, W)."""

    _ranks = (5, 5)
