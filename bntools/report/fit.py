"""How well new norm layers stand in for the old ones, after a fit to data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bntools import tables
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = [
    "Agreement",
    "BlockDistillation",
    "DistillReport",
    "FitProgress",
    "FitReport",
    "LayerFit",
]


@dataclass(frozen=True)
class FitProgress:
    """What a fit or a distillation is at: `done` of `total` layers, or steps of one block."""

    stage: str
    layer: str
    done: int
    total: int


@dataclass(frozen=True)
class LayerFit:
    """One new norm layer: how far its output is from that of the old one on the same images.

    `error` is the root of the summed squared error over that of the target around its channel
    means: 0 is the same, 1 is no better than a constant per channel. `carried_error` is that of the
    affine that was carried over from the old norm, on the same inputs (None where v, or the number
    of groups, was another one). `groups` is the number that the layer has, `tried` those that it
    was chosen from; `elements` the values per channel, `degenerate` the channels that were
    constant.
    """

    path: str
    kind: str
    error: float
    carried_error: float | None
    elements: int
    groups: int | None = None
    tried: tuple[int, ...] = ()
    degenerate: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Agreement:
    """How near the final outputs are: relative L2 error, and the share of samples with one top-1.

    `top1` is None where the output is not one tensor of shape (N, classes).
    """

    relative_l2: float
    top1: float | None
    samples: int

    def __str__(self) -> str:
        top1 = "" if self.top1 is None else f", the same top-1 on {self.top1:.1%}"
        return f"outputs {self.relative_l2:.2g} relative from the original's{top1}"


@dataclass(frozen=True)
class BlockDistillation:
    """One block: the relative error of its output before and after its norms were tuned."""

    path: str
    layers: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True)
class DistillReport:
    """What tuning the norm parameters against the original has brought."""

    blocks: tuple[BlockDistillation, ...]
    steps: int
    before: Agreement
    after: Agreement
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: the agreement before and after."""
        return f"distilled {len(self.blocks)} blocks: {self.before} before, {self.after} after"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(tables.blocks(self.blocks), *self.warnings, self.summary())


@dataclass(frozen=True)
class FitReport:
    """The new norm layers in execution order, and how near the network is to the original.

    `passes` counts the forwards over the data, of the original and of the new network together;
    `cache_peak` the bytes of activations that were in memory at most, `spilled` those that were
    written to disk.
    """

    layers: tuple[LayerFit, ...]
    samples: int
    batches: int
    passes: int
    agreement: Agreement
    cache_peak: int = 0
    spilled: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def summary(self) -> str:
        """One line: how many layers, on how many samples, and the agreement."""
        return (
            f"fitted {len(self.layers)} layers to {self.samples} samples in {self.passes} forward"
            f" passes: {self.agreement}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(tables.fits(self.layers), *self.warnings, self.summary())
