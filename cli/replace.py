"""`bntools replace`: other norm layers in the place of BatchNorm, fitted to data."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

import bntools
from bntools.errors import TargetError
from bntools.report import ReplacementReport, Result

from .data_options import DataJob, data_options
from .options import Answer, Job, shared_options, state_dict_option
from .values import Whole, file_option

if TYPE_CHECKING:
    from bntools.report import FitProgress

    from .console import Console

__all__ = ["replace_norms"]

_HELP = """Replace BatchNorm layers by GroupNorm, LayerNorm, InstanceNorm or EvoNorm.

\b
Examples:
  bntools replace model.pt --with groupnorm --groups 8
  bntools replace model.pt --with groupnorm --groups auto --fit images/ --preset timm:resnet18
  bntools replace model.pt --with evonorm-s0 --fit x.npz --distill 300 -o evo.pt
  bntools replace model.pt --with mypackage.norms:make

With --fit the new layers are fitted, one after the other, to what the old ones gave on the same
images; without it they start with the old weight and bias, and the model has to be trained. An
EvoNorm stands for the activation as well, which is removed at that call alone.
"""


@dataclass(frozen=True)
class _Asked:
    """The options of this command."""

    output: Path | None
    dry_run: bool
    with_: str
    groups: int | Literal["auto"] | None
    channels_per_group: int | None
    over: str | None
    keep_activation: bool
    no_activation: Literal["affine", "keep"] | None
    distill: int | None
    cache: int


class _Groups(click.ParamType[int | str]):
    """A number of groups from 1 on, or "auto"."""

    name = "groups"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto":
            return "auto"
        if not (isinstance(value, int) or value.isdecimal()) or int(value) < 1:
            self.fail(f"{value!r} is neither a whole number from 1 nor 'auto'.", param, ctx)
        return int(value)


_OPTIONS = [
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        callback=file_option,
        help="Where to write the result; beside MODEL by default: model.replaced.pt.",
    ),
    click.option("-n", "--dry-run", is_flag=True, help="Only show what would be replaced."),
    click.option(
        "--with",
        "with_",
        metavar="NAME",
        required=True,
        help="The new layer: groupnorm, layernorm, instancenorm, evonorm-s0, evonorm-b0, or"
        " package.module:factory, which is called with the old one.",
    ),
    click.option(
        "--groups",
        type=_Groups(),
        metavar="N|auto",
        help="Groups of a groupnorm or evonorm-s0 (default 32), as near as the channels allow;"
        " auto takes what fits the data best.",
    ),
    click.option(
        "--channels-per-group",
        type=Whole(1),
        metavar="N",
        help="The size of a group in place of their number.",
    ),
    click.option(
        "--over",
        type=click.Choice(["sample", "channels"]),
        help="What a layernorm normalises: whole samples (default), or the channels of each"
        " position.",
    ),
    click.option(
        "--distill",
        type=Whole(1),
        metavar="STEPS",
        help="After --fit, tune the new layers against the original for so many steps.",
    ),
    click.option(
        "--keep-activation",
        is_flag=True,
        help="Leave the activation after an EvoNorm where it is.",
    ),
    click.option(
        "--no-activation",
        type=click.Choice(["affine", "keep"]),
        help="Where no activation follows, an EvoNorm is an affine map (default); or keep the"
        " BatchNorm there.",
    ),
    click.option(
        "--cache",
        type=Whole(0),
        default=4096,
        metavar="MIB",
        help="Memory for activations during --fit; the disk takes the rest (default 4096).",
    ),
]


def _replace_options(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*arguments: Any, **values: Any) -> None:
        asked = _Asked(**{field.name: values.pop(field.name) for field in fields(_Asked)})
        command(*arguments, asked=asked, **values)

    for option in reversed(_OPTIONS):
        option(run)
    return run


@click.command("replace", help=_HELP, short_help="Replace BatchNorm by another norm layer.")
@_replace_options
@data_options("--fit", required=False)
@state_dict_option
@shared_options
def replace_norms(job: Job, *, data: DataJob, asked: _Asked) -> None:
    """Replace, fit and save."""
    output = asked.output or job.beside(".replaced.pt")
    _check(job, asked, data, output)
    target = _target(asked)
    job.check_writable(job.report)
    if not asked.dry_run:
        job.check_output(output)
    model = job.load()
    batches = None if data.source is None else data.read(job)
    examples = job.examples(model)
    helped = data.explained() if data.source else nullcontext()
    with _progress(job.console) as progress, helped:
        result = bntools.replace(
            model,
            target,
            examples,
            fit=batches,
            only=job.only or "*",
            skip=job.skip,
            options=bntools.ReplaceOptions(
                keep_activation=asked.keep_activation,
                no_activation=asked.no_activation or "affine",
                distill=asked.distill or 0,
                seed=job.seed,
                cache_bytes=asked.cache << 20,
                progress=progress,
            ),
        )
    _deliver(job, result, output, dry_run=asked.dry_run)


def _check(job: Job, asked: _Asked, data: DataJob, output: Path) -> None:
    job.check_distinct(output)
    if asked.groups is not None and asked.channels_per_group is not None:
        raise click.UsageError("Give --groups or --channels-per-group, not both.")
    for name, given in (("--distill", asked.distill), ("--groups auto", asked.groups == "auto")):
        if given and data.source is None:
            raise click.UsageError(f"{name} needs data: give --fit.")
    evonorm = asked.with_.startswith("evonorm")
    for name, chosen in (
        ("--keep-activation", asked.keep_activation),
        ("--no-activation", asked.no_activation is not None),
    ):
        if chosen and not evonorm:
            raise click.UsageError(f"{name} is for evonorm-s0 and evonorm-b0.")


def _target(asked: _Asked) -> Any:
    try:
        return bntools.named_target(
            asked.with_,
            groups=asked.groups,
            channels_per_group=asked.channels_per_group,
            over=asked.over,
        )
    except TargetError as error:
        raise click.BadParameter(str(error), param_hint="--with") from error


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[FitProgress], None] | None]:
    """What to call after every layer that is fitted; a spinner until then."""
    if console.quiet or sys.stderr is None or not sys.stderr.isatty():
        with console.hushed():
            yield None
        return
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False))
    bar = Progress(
        *columns,
        BarColumn(),
        MofNCompleteColumn(),
        console=RichConsole(stderr=True),
        transient=True,
    )
    task = bar.add_task("replacing the norm layers", total=None)

    def show(done: FitProgress) -> None:
        verb = {"fit": "fitting", "distill": "distilling"}.get(done.stage, done.stage)
        bar.update(task, description=f"{verb} {done.layer}", completed=done.done, total=done.total)

    with console.hushed(), bar:
        yield show


def _deliver(job: Job, result: Result[ReplacementReport], output: Path, *, dry_run: bool) -> None:
    report = result.report
    job.say_inputs(report.inputs)
    for warning in report.warnings:
        job.console.warn(warning)
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    job.console.detail(f"time: {spent}")
    written = _written(job, result, output, dry_run=dry_run)
    answer = Answer(result, {"model": job.model, "output": written})
    job.write_report(answer)
    job.show(answer, str(replace(report, warnings=())))


def _written(
    job: Job, result: Result[ReplacementReport], output: Path, *, dry_run: bool
) -> str | None:
    if not result.report.replaced:
        job.console.note("nothing was replaced, so no model is written")
        return None
    return job.save(result, output, dry_run=dry_run)
