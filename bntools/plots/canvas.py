"""Empty figures, and figures as files; nothing here touches pyplot's global state."""

from __future__ import annotations

import importlib
from io import BytesIO
from typing import TYPE_CHECKING, Any

from bntools.errors import BNToolsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ENDINGS", "canvas", "figures", "rendered", "ticks"]

ENDINGS = (".png", ".svg")
_MOST_TICKS = 40


def figures() -> Any:
    """The figures of matplotlib, without its state of windows; BNToolsError without it."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise BNToolsError(
            "Cannot draw: matplotlib is not installed. Install it with: pip install matplotlib"
        ) from error


def canvas(rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels below each other that share their x axis, sizes in inches.

    Raises BNToolsError without matplotlib.
    """
    figure: Figure = figures().Figure(figsize=(width, height), layout="constrained")
    axes: list[Axes] = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def ticks(axis: Axes, names: list[str]) -> None:
    """Name the places 0, 1, ... of the x axis; of very many every second, third ..."""
    step = -(-len(names) // _MOST_TICKS)
    places = list(range(0, len(names), step))
    # "$" would begin a formula
    shown = [names[i].replace("$", r"\$") for i in places]
    axis.set_xticks(places, shown, rotation=90, fontsize=7)
    axis.set_xlim(-0.5, len(names) - 0.5)


def rendered(figure: Figure, ending: str) -> bytes:
    """The figure as the bytes of a file with one of ENDINGS; the same figure gives the same."""
    stream = BytesIO()
    metadata = {"Date": None} if ending == ".svg" else {}
    import_rc: Any = importlib.import_module("matplotlib")
    with import_rc.rc_context({"svg.hashsalt": "bntools"}):
        figure.savefig(stream, format=ending.removeprefix("."), dpi=150, metadata=metadata)
    return stream.getvalue()
