"""How the running statistics of two models differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools import tables
from bntools.report.drift import LayerDrift
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["Difference", "Uncompared"]


@dataclass(frozen=True)
class Uncompared:
    """A norm layer that both models have and that cannot be compared, or that only one has."""

    path: str
    why: str


@dataclass(frozen=True)
class Difference:
    """The drift of each norm layer's statistics from one model to another, in the layers' order."""

    layers: tuple[LayerDrift, ...]
    uncompared: tuple[Uncompared, ...] = ()

    @property
    def is_zero(self) -> bool:
        """Whether all statistics that were compared are equal."""
        return all(layer.kl_max == 0 for layer in self.layers)

    @property
    def worst(self) -> LayerDrift:
        """The layer with the channel that moved most."""
        return max(self.layers, key=lambda layer: layer.kl_max)

    def by_drift(self) -> Difference:
        """The same with the layers that drifted most first."""
        order = sorted(self.layers, key=lambda layer: (-layer.kl_max, layer.path))
        return Difference(tuple(order), self.uncompared)

    def summary(self) -> str:
        """The last line that the command line prints."""
        count = f"{len(self.layers)} norm layer{'s' * (len(self.layers) > 1)} compared"
        if self.is_zero:
            return f"{count}; their statistics are the same"
        worst = self.worst
        return (
            f"{count}; the largest drift is at {tables.plain(worst.path) or 'the model'}, channel"
            f" {worst.worst_channel}: symmetric KL {worst.kl_max:.3g} (median"
            f" {worst.kl_median:.3g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for row in self.uncompared:
            reasons.setdefault(row.why, []).append(tables.plain(row.path) or "the model")
        notes = (f"not compared, {why}: {_some(paths)}" for why, paths in reasons.items())
        return tables.text(tables.drift(self.layers), "\n".join(notes), self.summary())


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
