"""A progress bar on stderr, when that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bntools.report import Progress

    from .console import Console

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    console: Console, samples: int | None
) -> Iterator[Callable[[Progress], None] | None]:
    """What to call after every batch; None where nobody watches.

    `samples` is how many a pass of all processes has, None where nobody knows: then there is no
    time left.
    """
    if console.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bar = _bar()
    task = bar.add_task("calibrating", total=samples, rate="")

    def show(progress: Progress) -> None:
        stage = "evaluating" if progress.stage == "evaluate" else "calibrating"
        passes = f", pass {progress.passes}" if progress.passes > 1 else ""
        done = progress.samples
        rate = f"{done / progress.seconds:.0f} images/s" if progress.seconds > 0 else ""
        bar.update(
            task,
            completed=done if samples is None else min(done, samples),
            description=f"{stage}{passes}",
            rate=rate,
        )

    with bar:
        yield show


def _bar() -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=RichConsole(stderr=True),
        transient=True,
    )
