"""What a recalibration did to each layer, and whether it helped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bntools import tables
from bntools.report.drift import LayerDrift
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = [
    "Comparison",
    "LayerStatistics",
    "LeftAlone",
    "PassSummary",
    "PriorScore",
    "Progress",
    "RecalibrationReport",
]


@dataclass(frozen=True)
class Progress:
    """Where a recalibration is, after a batch: times in seconds, `waited` is the loader's part."""

    passes: int
    batch: int
    samples: int
    seconds: float
    waited: float
    stage: str = "calibrate"


@dataclass(frozen=True)
class PassSummary:
    """One pass over the data.

    `residual` is the largest over layers and channels of the distance between the statistics that
    the layers normalised with and those of what they saw; None for a first pass, in which they
    normalise with the statistics of each batch.
    """

    batches: int
    samples: int
    residual: float | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer saw, and how its statistics moved.

    `elements` are those of one channel; `near_zero` counts channels whose new variance is under
    the layer's eps; `one_value` counts batches that had one value per channel.
    """

    path: str
    kind: str
    samples: int
    elements: int
    drift: LayerDrift
    near_zero: int = 0
    one_value: int = 0
    residual: float | None = None


@dataclass(frozen=True)
class LeftAlone:
    """A layer whose statistics are as they were, and why."""

    path: str
    kind: str
    why: str


@dataclass(frozen=True)
class Comparison:
    """What can be seen without labels, on `samples` predictions: no proof that it helped.

    Agreement is the share of predictions with the same largest output; entropy (nats) and
    confidence (the largest probability) are means over the predictions.
    """

    samples: int
    agreement: float
    entropy_before: float
    entropy_after: float
    confidence_before: float
    confidence_after: float

    def summary(self) -> str:
        """One line, which says that it is no proof."""
        return (
            f"{self.agreement:.1%} of {self.samples} predictions agree, confidence"
            f" {self.confidence_before:.3f} -> {self.confidence_after:.3f}, entropy"
            f" {self.entropy_before:.3f} -> {self.entropy_after:.3f} (no labels: this is no proof)"
        )


@dataclass(frozen=True)
class PriorScore:
    """The score of one mixture of old and new statistics; `weight` is the share of the new."""

    weight: float
    prior: float | None
    score: float


@dataclass(frozen=True)
class RecalibrationReport:
    """The certificate of a recalibration.

    `stopped` says why the data was not used to its end, where it was not; `partial` is set where
    a failure cut the run short; `waiting` is the share of the time spent waiting for the loader.
    `accepted` is False where `evaluate` found the new statistics worse: the model has the old ones.
    """

    method: str
    layers: tuple[LayerStatistics, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    momentum: float | None = None
    prior: float = 0.0
    passes: tuple[PassSummary, ...] = ()
    processes: int = 1
    bad_batches: tuple[str, ...] = ()
    stopped: str = ""
    partial: bool = False
    score_before: float | None = None
    score_after: float | None = None
    accepted: bool = True
    comparison: Comparison | None = None
    curve: tuple[PriorScore, ...] = ()
    warnings: tuple[str, ...] = ()
    waiting: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verb: str = "recalibrate"

    @property
    def batches(self) -> int:
        """The batches of the first pass; of all processes together one."""
        return self.passes[0].batches if self.passes else 0

    @property
    def samples(self) -> int:
        """The samples of the first pass, of all processes."""
        return self.passes[0].samples if self.passes else 0

    @property
    def residual(self) -> float | None:
        """The last residual that was measured."""
        return next((p.residual for p in reversed(self.passes) if p.residual is not None), None)

    def summary(self) -> str:
        """The last line that the command line prints."""
        if not self.layers:
            return "no norm layer was recalibrated; the model is unchanged"
        count = len(self.layers)
        line = (
            f"recalibrated {count} norm layer{'s' * (count > 1)} ({self.method}) on {self.samples}"
            f" samples in {self.batches} batch{'es' * (self.batches > 1)}"
        )
        if len(self.passes) > 1:
            line += f", {len(self.passes)} passes"
        if self.score_before is None or self.score_after is None:
            return line
        change = f"score {self.score_before:.6g} -> {self.score_after:.6g}"
        if self.accepted:
            return f"{line}; {change}"
        return f"{line}; {change}: worse, the old statistics are kept"

    def notes(self) -> Iterator[str]:
        """What there is to know beside the table, a sentence each."""
        yield from self.warnings
        if self.stopped:
            yield self.stopped
        if self.bad_batches:
            yield f"left out {len(self.bad_batches)} non-finite: {', '.join(self.bad_batches[:3])}"
        if self.residual is not None:
            yield f"residual {self.residual:.2g} after {len(self.passes)} passes"
        if self.curve:
            points = ", ".join(f"{p.weight:.2g}: {p.score:.4g}" for p in self.curve)
            yield f"score by share of new statistics: {points}"
        if self.comparison is not None:
            yield self.comparison.summary()
        for layer in self.left_alone:
            yield f"{tables.plain(layer.path) or 'the model'} ({layer.kind}) left: {layer.why}"

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON data."""
        return {
            "schema": SCHEMA_VERSION,
            "summary": self.summary(),
            "batches": self.batches,
            "samples": self.samples,
            "residual": self.residual,
            **as_json(self),
        }

    def __str__(self) -> str:
        rows = tables.drift([layer.drift for layer in self.layers])
        return tables.text(rows, "\n".join(self.notes()), self.summary())
