"""Drift of running statistics by depth: how far each layer moved, and from where to where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bntools.plots.canvas import canvas, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bntools.report import LayerDrift, Spread

__all__ = ["draw_drift"]

_OLD, _NEW = "tab:gray", "tab:blue"
_WORST = "tab:red"


def draw_drift(layers: Sequence[LayerDrift]) -> Figure:
    """Three panels by depth: symmetric KL of the channels, their means, and their variances.

    Dots are medians over the channels, lines reach from the smallest to the largest value.
    """
    width = min(max(6.0, 2 + 0.22 * len(layers)), 16.0)
    figure, (divergence, means, variances) = canvas(3, width, 8.0)
    _draw_divergence(divergence, layers)
    _draw_spreads(means, "mean", [(x.mean_before, x.mean_after) for x in layers])
    means.set_title(
        "channels: median, and from the smallest to the largest", loc="left", fontsize=8
    )
    _legend(means)
    _draw_spreads(variances, "variance", [(x.variance_before, x.variance_after) for x in layers])
    lows = [s.low for x in layers for s in (x.variance_before, x.variance_after)]
    if all(low > 0 for low in lows):
        variances.set_yscale("log")
    ticks(variances, [layer.path or "(the model)" for layer in layers])
    return figure


def _draw_divergence(axis: Axes, layers: Sequence[LayerDrift]) -> None:
    places = range(len(layers))
    medians = [_finite(layer.kl_median) for layer in layers]
    largest = [_finite(layer.kl_max) for layer in layers]
    axis.plot(places, largest, "v", color=_WORST, ms=5, label="worst channel")
    axis.plot(places, medians, "o-", color=_NEW, ms=4, lw=1, label="median channel")
    if all(value > 0 or math.isnan(value) for value in medians) and medians:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    for place, layer in enumerate(layers):
        if not math.isfinite(layer.kl_max):
            axis.axvline(place, color=_WORST, ls=":", lw=1)
    axis.set_ylabel("symmetric KL (nats)")
    axis.set_title("drift of the running statistics by depth", loc="left", fontsize=10)
    _legend(axis)


def _draw_spreads(
    axis: Axes, name: str, pairs: Sequence[tuple[Spread | None, Spread | None]]
) -> None:
    for label, colour, which, offset in (("old", _OLD, 0, -0.15), ("new", _NEW, 1, 0.15)):
        found = [(i + offset, pair[which]) for i, pair in enumerate(pairs)]
        known = [(place, spread) for place, spread in found if spread is not None]
        places = [place for place, _ in known]
        axis.vlines(
            places,
            [_finite(spread.low) for _, spread in known],
            [_finite(spread.high) for _, spread in known],
            color=colour,
            lw=2.5,
            alpha=0.35,
        )
        axis.plot(
            places, [_finite(s.median) for _, s in known], "o", color=colour, ms=4, label=label
        )
    axis.set_ylabel(f"running {name}")


def _legend(axis: Axes) -> None:
    """Above the panel, where it hides nothing."""
    axis.legend(
        frameon=False,
        fontsize=8,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
