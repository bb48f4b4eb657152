"""Writing the figure of a report."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntools.errors import SaveError
from bntools.plots.canvas import ENDINGS, figures, rendered
from bntools.plots.drift import draw_drift
from bntools.plots.errors import draw_errors
from bntools.report import DepthReport, Difference, RecalibrationReport
from bntools.writing import check_writable, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot", "write_plot"]

_DRAWINGS: dict[type, Callable[[Any], Figure]] = {
    DepthReport: lambda report: draw_errors({"candidate": report}),
    dict: draw_errors,
    Difference: lambda report: draw_drift(report.layers),
    RecalibrationReport: lambda report: draw_drift([layer.drift for layer in report.layers]),
}


def write_plot(report: Any, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Draw a report as a `.png` or `.svg` file, whole or not at all; needs matplotlib.

    Raises SaveError, or BNToolsError without matplotlib.
    """
    check_plot(path, force=force)
    draw = _DRAWINGS.get(type(report))
    if draw is None:
        raise SaveError(f"Cannot draw a {type(report).__name__}: it has no figure.")
    content = rendered(draw(report), Path(path).suffix.lower())
    write_atomically(path, lambda stream: stream.write(content), force=force)


def check_plot(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Find out before long work whether a figure could be written there.

    Raises SaveError, or BNToolsError without matplotlib.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        raise SaveError(f"Cannot draw {path}: a figure is a {' or a '.join(ENDINGS)} file.")
    check_writable(path, force=force)
    figures()
