"""What is rarely changed about a recalibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bntools.errors import InputError
from bntools.report.recalibration import Progress

__all__ = ["RecalibrationOptions"]


@dataclass(frozen=True, kw_only=True)
class RecalibrationOptions:
    """The settings of `recalibrate` that most callers leave alone.

    What runs: `device` (default: where the model is), `autocast` (a dtype for `torch.autocast`),
    `forward(model, batch)` in place of calling the model on the batch's inputs, and
    `mask(batch)`, a boolean tensor (N, ...) of the positions that count, resized to each layer.
    `layout`: "channels_last" runs convolutions on larger images in that layout, which is faster on
    the CPU, and rounds otherwise; "keep" does not; "auto" does for the method "pooled" alone, so
    that "cumulative" and "ema" are PyTorch's own loop to the last bits.

    How long: at most `max_batches` a pass, or until the 95 % confidence interval of every channel's
    mean (in standard deviations) and variance (relative) is within `max_error`; with
    `passes="converge"` until the residual is at most `tolerance`, or for `max_passes`.

    What is accepted: `skip_nonfinite` leaves out batches that give NaN or infinity and counts them;
    `keep_partial` keeps the batches before a failure or Ctrl-C; `add_statistics` gives running
    statistics to layers without any; `gate` keeps the result only if `evaluate` finds it not worse.

    The rest: `inplace` changes the model itself, at the end and all or nothing; up to
    `compare_samples` predictions (a 32nd of the samples, at least 8) are compared before and after
    where there is no `evaluate`; `held_out` is the share
    of the batches on which `prior="auto"` scores; `progress` is called after every batch.
    """

    device: torch.device | str | None = None
    autocast: torch.dtype | None = None
    layout: Literal["auto", "keep", "channels_last"] = "auto"
    forward: Callable[[nn.Module, Any], Any] | None = None
    mask: Callable[[Any], Tensor] | None = None
    max_batches: int | None = None
    max_error: float | None = None
    max_passes: int = 20
    tolerance: float = 1e-3
    skip_nonfinite: bool = False
    keep_partial: bool = False
    add_statistics: bool = False
    gate: bool = True
    inplace: bool = False
    compare_samples: int = 32
    held_out: float = 0.25
    progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_batches": (self.max_batches is None or self.max_batches >= 1, "1 or more"),
            "max_error": (self.max_error is None or self.max_error > 0, "above 0, such as 0.05"),
            "max_passes": (self.max_passes >= 1, "1 or more"),
            "tolerance": (self.tolerance > 0, "above 0, such as 1e-3"),
            "held_out": (0 < self.held_out < 1, "between 0 and 1"),
            "compare_samples": (self.compare_samples >= 0, "0 or more"),
            "layout": (
                self.layout in ("auto", "keep", "channels_last"),
                '"auto", "keep" or "channels_last"',
            ),
        }
        for name, (fits, rule) in rules.items():
            if not fits:
                raise InputError(
                    f"Cannot recalibrate with {name}={getattr(self, name)!r}: give {rule}."
                )
