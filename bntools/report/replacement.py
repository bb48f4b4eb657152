"""What a replacement did to each norm layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bntools import tables
from bntools.report.plans import NOTHING, Action, Reason
from bntools.report.schema import SCHEMA_VERSION, as_json

if TYPE_CHECKING:
    from bntools.report.fit import DistillReport, FitReport

__all__ = ["Replacement", "ReplacementReport"]


@dataclass(frozen=True)
class Replacement:
    """What happened to one norm layer.

    `becomes` is the new layer, as its repr; `groups` its number of groups, where it has any;
    `activation` the one that it took along, and where that was called. `note` says what was chosen
    otherwise than asked for. A layer that is kept has a `reason`, and `detail` is a sentence.
    """

    path: str
    kind: str
    action: Action
    becomes: str = ""
    groups: int | None = None
    activation: str = ""
    note: str = ""
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True)
class ReplacementReport:
    """The certificate of a replacement: every norm layer once, in execution order.

    `target` is what was asked for, as in the recipe; `fit` and `distilled` say how well the new
    layers give what the old ones gave, where data was given.
    """

    target: dict[str, Any]
    layers: tuple[Replacement, ...]
    fit: FitReport | None = None
    distilled: DistillReport | None = None
    inputs: str = ""
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        """The layers that were replaced."""
        return tuple(row for row in self.layers if row.action is Action.REPLACE)

    @property
    def kept(self) -> tuple[Replacement, ...]:
        """The layers that were kept."""
        return tuple(row for row in self.layers if row.action is Action.KEEP)

    def summary(self) -> str:
        """The last line that the command line prints."""
        if not self.layers:
            return NOTHING.replace("fold", "replace")
        name = self.target.get("name", "another layer")
        line = f"replaced {len(self.replaced)} of {len(self.layers)} norm layers by {name}"
        taken = sum(bool(row.activation) for row in self.replaced)
        line += f", with {taken} activation{'s' * (taken != 1)}" if taken else ""
        if not self.replaced:
            return f"{line}; the model is unchanged"
        last = self.distilled or self.fit
        return line if last is None else f"{line}; {last.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        fit, distilled = self.fit, self.distilled
        return tables.text(
            tables.replacements(self.layers),
            self._tally(),
            tables.fits(fit.layers) if fit is not None else "",
            tables.blocks(distilled.blocks) if distilled is not None else "",
            *(fit.warnings if fit is not None else ()),
            *(distilled.warnings if distilled is not None else ()),
            *self.warnings,
            self.summary(),
        )

    def _tally(self) -> str:
        reasons = Counter(row.reason.value for row in self.kept if row.reason is not None)
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        return f"kept {reasons.total()} of {len(self.layers)}: {counts}" if counts else ""
