"""`bntools to-batchnorm`: batch norms that were written by hand become nn.BatchNorm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

import bntools

from .options import Answer, Job, file_option, shared_options, state_dict_option

__all__ = ["to_batchnorm"]

_HELP = """Turn hand-written batch norms into nn.BatchNorm, with equal outputs.

\b
Examples:
  bntools to-batchnorm lenet.pt --allow course.BatchNorm -o lenet-nn.pt
  bntools to-batchnorm weights.pth --arch package.module:build --input-shape 1x1x28x28

A batch norm is found by what it does, not by its name: a module of its own in which tensors work
like a mean, a variance, a gamma and a beta. Its momentum is found by training a copy for a step.
Everything else that is arithmetic with constants is listed with the reason why it is left alone.
"""


@click.command("to-batchnorm", help=_HELP, short_help="Make hand-written norms nn.BatchNorm.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=file_option,
    help="Where to write the result; beside MODEL by default: model.batchnorm.pt.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be changed.")
@state_dict_option
@shared_options
def to_batchnorm(job: Job, output: Path | None, dry_run: bool) -> None:
    """Convert and save."""
    output = output or job.beside(".batchnorm.pt")
    job.check_distinct(output)
    job.check_writable(job.report)
    if not dry_run:
        job.check_output(output)
    model = job.load()
    with job.console.working("finding batch norms"):
        result = bntools.to_batchnorm(
            model, job.examples(model), only=job.only or "*", skip=job.skip, seed=job.seed
        )
    for warning in result.report.warnings:
        job.console.warn(warning)
    written = None
    if result.report.converted:
        written = job.save(result, output, dry_run=dry_run)
    else:
        job.console.note("nothing was changed, so no model is written")
    answer = Answer(result, {"model": job.model, "output": written})
    job.write_report(answer)
    job.show(answer, str(replace(result.report, warnings=())))
