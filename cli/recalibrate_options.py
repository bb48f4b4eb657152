"""The options of `bntools recalibrate` beside those for data and those that all commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from .values import Number, Whole, file_option, named

__all__ = ["Asked", "recalibrate_options"]


@dataclass(frozen=True)
class Asked:
    """What the options ask for."""

    output: Path | None
    dry_run: bool
    method: str
    momentum: float
    passes: int | str
    max_passes: int | None
    tolerance: float | None
    prior: float | str
    max_batches: int | None
    max_error: float | None
    mask: str | None
    forward: str | None
    skip_nonfinite: bool
    keep_partial: bool
    add_statistics: bool
    autocast: str | None
    eval_data: str | None
    metric: str | None
    gate: bool
    plot: Path | None

    def check(self) -> None:
        """Find the options that contradict each other."""
        if self.momentum != _MOMENTUM and self.method != "ema":
            raise click.UsageError("--momentum is for --method ema.")
        if self.passes != "converge" and (self.max_passes or self.tolerance):
            raise click.UsageError("--max-passes and --tolerance are for --passes converge.")


def _number_or(word: str, kind: type[int] | type[float], least: float) -> Callable[..., Any]:
    """A callback that takes a number, or one word."""

    def convert(_: click.Context, option: click.Parameter, value: str) -> float | str:
        if value == word:
            return word
        try:
            number = kind(value)
        except ValueError:
            number = least - 1
        if not least <= number < float("inf"):
            raise click.BadParameter(
                f"{value!r} is neither a number from {least:g} nor {word!r}.", param=option
            )
        return number

    return convert


def _function(_context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """`package.module:function`, once it has both parts."""
    if value is None:
        return None
    module, _, function = value.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        raise click.BadParameter(f"{value!r} is not package.module:function.", param=option)
    return value


_MOMENTUM = 0.1
_POSITIVE = Number(min=0, min_open=True)

_OPTIONS = [
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        callback=file_option,
        help="Where to write the result; beside MODEL by default: model.recalibrated.pt.",
    ),
    click.option("-n", "--dry-run", is_flag=True, help="Measure and report, and write no model."),
    click.option(
        "--method",
        type=click.Choice(["cumulative", "pooled", "ema"]),
        default="cumulative",
        help="Average of the batches' figures (PyTorch's momentum=None; the default), moments of"
        " all elements, or moving average.",
    ),
    click.option(
        "--momentum",
        type=Number(0, 1, min_open=True),
        metavar="X",
        default=_MOMENTUM,
        help="Weight of each new batch with --method ema (default 0.1).",
    ),
    click.option(
        "--passes",
        callback=_number_or("converge", int, 1),
        default="1",
        metavar="N|converge",
        help="Go through the data so often; converge: until the statistics in use are those that"
        " the layers see (default 1).",
    ),
    click.option(
        "--max-passes",
        type=Whole(1),
        metavar="N",
        help="At most so many with --passes converge (default 20).",
    ),
    click.option(
        "--tolerance",
        type=_POSITIVE,
        metavar="X",
        help="The residual at which --passes converge ends (default 0.001).",
    ),
    click.option(
        "--prior",
        callback=_number_or("auto", float, 0),
        default="0",
        metavar="N|auto",
        help="Count the old statistics as N samples; auto: the mixture with the best score, without"
        " --eval-data that on batches that are held out (default 0).",
    ),
    click.option("--max-batches", type=Whole(1), metavar="N", help="Stop after so many batches."),
    click.option(
        "--max-error",
        type=_POSITIVE,
        metavar="X",
        help="Stop once the 95 % confidence interval of every channel is within this, relative.",
    ),
    click.option(
        "--mask",
        callback=_function,
        metavar="FUNCTION",
        help="package.module:function that gives for a batch the positions that count (N, ...).",
    ),
    click.option(
        "--forward",
        callback=_function,
        metavar="FUNCTION",
        help="package.module:function(model, batch) that runs a batch.",
    ),
    click.option(
        "--skip-nonfinite",
        is_flag=True,
        help="Leave out batches with NaN or infinity, and count them.",
    ),
    click.option(
        "--keep-partial",
        is_flag=True,
        help="After a failure or Ctrl-C keep the batches so far, and say how many.",
    ),
    click.option(
        "--add-statistics", is_flag=True, help="Give statistics to norm layers that have none."
    ),
    click.option(
        "--autocast",
        type=click.Choice(["float16", "bfloat16"]),
        help="Run the forwards in this type where torch.autocast does.",
    ),
    click.option(
        "--eval-data",
        metavar="SOURCE",
        callback=named,
        help="Labelled data, prepared like --data: the accuracy on them is the score.",
    ),
    click.option(
        "--metric",
        callback=_function,
        metavar="FUNCTION",
        help="package.module:function(model), or function(model, batches) on --eval-data or else on"
        " batches that are held out; it gives the score: the higher the better.",
    ),
    click.option(
        "--gate/--no-gate",
        default=True,
        help="Whether a score worse than before is exit code 1, with nothing written (the default,"
        " where there is a score).",
    ),
    click.option(
        "--plot",
        metavar="FILE",
        callback=file_option,
        help="Draw the drift by layer depth, old against new (.png or .svg; needs matplotlib).",
    ),
]


def recalibrate_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it is called with them as `asked`."""

    @functools.wraps(command)
    def run(*arguments: Any, **values: Any) -> None:
        asked = Asked(**{field.name: values.pop(field.name) for field in fields(Asked)})
        asked.check()
        command(*arguments, asked=asked, **values)

    for option in reversed(_OPTIONS):
        option(run)
    return run
