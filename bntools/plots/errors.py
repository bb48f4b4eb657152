"""The error of each layer by depth, for any number of candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from bntools.errors import InputError
from bntools.plots.canvas import canvas, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bntools.report import DepthReport, LayerError

__all__ = ["draw_errors"]

_LONGEST_NAME = 34
# Okabe and Ito's, which colour-blind readers tell apart
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_errors(reports: Mapping[str, DepthReport]) -> Figure:
    """The error of each layer on a log scale, beside the reference's own and the limit.

    `reports` has a name for each candidate. A layer that differs is a cross; an error of 0 lies on
    the lower border, infinity on the upper one. Raises `InputError` where no layer was compared.
    """
    places = _places(reports)
    if not places:
        raise InputError("Cannot draw the errors by depth: no layer could be compared.")
    shown = _Range.of(reports)
    figure, (axis,) = canvas(1, min(18.0, max(7.0, 3 + 0.17 * len(places))), 6.0)
    axis.set_yscale("log")
    axis.set_ylim(shown.low, shown.high)
    for (name, report), colour in zip(reports.items(), cycle(_COLOURS), strict=False):
        _Drawing(axis, places, shown, colour).candidate(name, report)
    ticks(axis, [_short(name) for name in places])
    axis.set_xlabel("layer, in execution order")
    axis.set_ylabel(f"relative error, against {next(iter(reports.values())).truth} truth")
    axis.plot([], [], ":", color="gray", label="the reference's own error")
    axis.plot([], [], "--", color="gray", label="limit")
    axis.plot([], [], "x", color="gray", markeredgewidth=2, label="differs")
    axis.legend(fontsize=8, loc="best")
    return figure


@dataclass(frozen=True)
class _Range:
    """What the log scale shows: values beyond it lie on its borders."""

    low: float
    high: float

    @classmethod
    def of(cls, reports: Mapping[str, DepthReport]) -> _Range:
        rows = [row for report in reports.values() for row in report.layers]
        numbers = [n for row in rows for n in (row.error, row.reference_error, row.limit)]
        shown = [n for n in numbers if math.isfinite(n) and n > 0] or [1.0]
        return cls(min(shown) / 3, max(shown) * 10)

    def clamped(self, value: float) -> float:
        return self.high if math.isnan(value) else min(max(value, self.low), self.high)


@dataclass(frozen=True)
class _Drawing:
    """Where and how one candidate is drawn."""

    axis: Axes
    places: Mapping[str, int]
    shown: _Range
    colour: str

    def candidate(self, name: str, report: DepthReport) -> None:
        rows = sorted(report.layers, key=lambda row: self.places[row.name])
        x = [self.places[row.name] for row in rows]
        for style, values, width in (
            ("--", [row.limit for row in rows], 1.0),
            (":", [row.reference_error for row in rows], 1.2),
        ):
            y = [self.shown.clamped(value) for value in values]
            self.axis.plot(x, y, style, color=self.colour, linewidth=width, alpha=0.8)
        errors = [self.shown.clamped(row.error) for row in rows]
        self.axis.plot(x, errors, "-", color=self.colour, linewidth=1.6, label=_escaped(name))
        wrong = [(i, y) for row, i, y in zip(rows, x, errors, strict=True) if not row.agrees]
        for place, error in wrong:
            self.axis.plot(place, error, "x", color=self.colour, markersize=7, markeredgewidth=2)
        if report.first_different is not None:
            self.point_at(report.first_different)

    def point_at(self, row: LayerError) -> None:
        late = self.places[row.name] > len(self.places) / 2
        self.axis.annotate(
            f"{_short(row.name)}: {_escaped(row.note or row.where or 'all of it')}",
            (self.places[row.name], self.shown.clamped(row.error)),
            xytext=(-12 if late else 12, 28),
            textcoords="offset points",
            ha="right" if late else "left",
            color=self.colour,
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": self.colour},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )


def _places(reports: Mapping[str, DepthReport]) -> dict[str, int]:
    """Where each layer is on the axis: in the order of the longest report, then of the others."""
    ordered = sorted(reports.values(), key=lambda report: -len(report.layers))
    names = dict.fromkeys(row.name for report in ordered for row in report.layers)
    return {name: place for place, name in enumerate(names)}


def _short(name: str) -> str:
    """The end of a long name, which is what tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else f"...{name[-_LONGEST_NAME:]}"


def _escaped(text: str) -> str:
    """A text in which no dollar sign begins a formula, and no underscore hides it in a legend."""
    return text.replace("$", r"\$").lstrip("_")
