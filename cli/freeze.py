"""`bntools freeze`, `unfreeze` and `unsync`: what norm layers do with their statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bntools

from .options import (
    Answer,
    Job,
    file_option,
    shared_options,
    state_dict_option,
    stored_options,
)

if TYPE_CHECKING:
    from bntools.report import FreezeReport, Result

__all__ = ["freeze", "unfreeze", "unsync"]

_FREEZE = """Fix the running statistics of BatchNorm layers, through any later training.

\b
Examples:
  bntools freeze model.pt
  bntools freeze model.pt --affine --only 'backbone.*' -o backbone-frozen.pt
  bntools freeze model.pt --as torchvision

A frozen layer normalises by its running statistics and never updates them, also after
model.train(). It stays a BatchNorm, and its state_dict keys stay. Layers without statistics are
listed with the reason why they are left alone.
"""
_UNFREEZE = """Let frozen BatchNorm layers move again.

\b
Examples:
  bntools unfreeze model.frozen.pt -o model.pt
  bntools unfreeze detector.pt --only 'backbone.*'

What bntools froze becomes the class that it was, and trains what it trained; the FrozenBatchNorm2d
of torchvision, detectron and timm becomes a BatchNorm.
"""
_UNSYNC = """Make SyncBatchNorm layers plain BatchNorm layers.

\b
Examples:
  bntools unsync model.pt
  bntools unsync model.pt --input-shape 1x3x224x224

The model is run once, to see what dimensions the inputs of its layers have. timm's layers keep
their activation, frozen ones stay frozen.
"""


def _output_option(ending: str) -> Callable[[Any], Any]:
    return click.option(
        "-o",
        "--output",
        metavar="FILE",
        callback=file_option,
        help=f"Where to write the result; beside MODEL by default: model{ending}.",
    )


_DRY_RUN = click.option("-n", "--dry-run", is_flag=True, help="Only show what would be changed.")


@click.command("freeze", help=_FREEZE, short_help="Fix the statistics of BatchNorm.")
@_output_option(".frozen.pt")
@_DRY_RUN
@click.option("--affine", is_flag=True, help="Stop the gradients of weight and bias, too.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["bntools", "torchvision"]),
    default="bntools",
    help="What frozen layers become: a BatchNorm that stays frozen (the default), or torchvision's"
    " FrozenBatchNorm2d.",
)
@state_dict_option
@stored_options("seed")
def freeze(job: Job, output: Path | None, dry_run: bool, affine: bool, form: str) -> None:
    """Freeze and save."""

    def change(model: Any) -> Result[FreezeReport]:
        return bntools.freeze(
            model, affine=affine, only=job.only or "*", skip=job.skip, inplace=True, form=form
        )

    _run(job, change, output or job.beside(".frozen.pt"), dry_run=dry_run)


@click.command("unfreeze", help=_UNFREEZE, short_help="Let frozen BatchNorm move again.")
@_output_option(".unfrozen.pt")
@_DRY_RUN
@state_dict_option
@stored_options("seed")
def unfreeze(job: Job, output: Path | None, dry_run: bool) -> None:
    """Unfreeze and save."""

    def change(model: Any) -> Result[FreezeReport]:
        return bntools.unfreeze(model, only=job.only or "*", skip=job.skip, inplace=True)

    _run(job, change, output or job.beside(".unfrozen.pt"), dry_run=dry_run)


@click.command("unsync", help=_UNSYNC, short_help="Make SyncBatchNorm a plain BatchNorm.")
@_output_option(".unsynced.pt")
@_DRY_RUN
@state_dict_option
@shared_options
def unsync(job: Job, output: Path | None, dry_run: bool) -> None:
    """Convert and save."""

    def change(model: Any) -> Result[FreezeReport]:
        examples = job.examples(model)
        return bntools.unsync(model, examples, only=job.only or "*", skip=job.skip, inplace=True)

    _run(job, change, output or job.beside(".unsynced.pt"), dry_run=dry_run)


def _run(
    job: Job, change: Callable[[Any], Result[FreezeReport]], output: Path, *, dry_run: bool
) -> None:
    job.check_distinct(output)
    job.check_writable(job.report)
    if not dry_run:
        job.check_output(output)
    model = job.load()
    with job.console.working("changing the norm layers"):
        result = change(model)
    for warning in result.report.warnings:
        job.console.warn(warning)
    written = _written(job, result, output, dry_run=dry_run)
    answer = Answer(result, {"model": job.model, "output": written})
    job.write_report(answer)
    job.show(answer, str(replace(result.report, warnings=())))


def _written(job: Job, result: Result[FreezeReport], output: Path, *, dry_run: bool) -> str | None:
    """Write what was changed, and say so; the name of the file, if there is one."""
    if not result.report.changed:
        job.console.note("nothing was changed, so no model is written")
        return None
    return job.save(result, output, dry_run=dry_run)
