"""`bntools ship`: the whole way to a folder that can be deployed, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import bntools
from bntools.errors import ShipError
from bntools.report import Result, ShipReport, ShipStep

from .data_options import DataJob, data_options
from .options import Answer, Job, is_same, options_without
from .values import Whole, file_option, named

__all__ = ["ship"]

_HELP = """Inspect, recalibrate, fold, export and verify a model, and write a folder with all of it.

\b
Examples:
  bntools ship model.pt -o release/
  bntools ship weights.pth --arch timm:resnet18 --data val/ --preset timm:resnet18 -o release/

The folder has model.pt (folded), model.onnx, certificate.json, and report.html, a page with the
pictures that needs no other file. With --data the running statistics are re-estimated first, and
--eval-data stops a change for the worse. The file is verified against the original on every
provider of ONNX Runtime there is.

Where a step fails nothing is left behind, and the exit code says which: 11 inspect (a finding as
bad as --fail-on), 12 recalibrate, 13 fold, 14 export, 15 verify.
"""
_FIRST_CODE = 11


@click.command("ship", help=_HELP, short_help="The whole way: inspect to verify, into one folder.")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    callback=file_option,
    help="The folder to write; beside MODEL by default: model.shipped.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "never"]),
    default="error",
    help="Findings of the doctor that stop it (default error).",
)
@click.option(
    "--method",
    type=click.Choice(["cumulative", "pooled", "ema"]),
    default="cumulative",
    help="How statistics are estimated from --data (default cumulative).",
)
@click.option(
    "--eval-data",
    metavar="SOURCE",
    callback=named,
    help="Labelled data for the score before and after --data.",
)
@click.option("--opset", type=Whole(1), metavar="N", help="The ONNX opset to write.")
@click.option("--static-batch", is_flag=True, help="Fix the batch size at that of the input.")
@data_options("--data", required=False)
@options_without("only", "skip", "device")
def ship(
    job: Job, output: Path | None, *, eval_data: str | None, data: DataJob, **asked: Any
) -> None:
    """Take the whole way."""
    output = output or job.beside(".shipped")
    _check(job, output, data, eval_data)
    bntools.check_ship(output, force=job.force)
    job.check_writable(job.report)
    model = job.load()
    options = bntools.ShipOptions(
        fail_on=asked["fail_on"],
        method=asked["method"],
        evaluate=bntools.Accuracy(data.open(eval_data, job.seed)) if eval_data else None,
        opset=asked["opset"],
        dynamic_batch=not asked["static_batch"],
        seed=job.seed,
        source=job.model,
    )
    batches = data.read(job) if data.source is not None else None
    try:
        with job.console.working("shipping"):
            result = bntools.ship(
                model,
                output,
                data=batches,
                example_inputs=job.examples(model),
                force=job.force,
                options=options,
            )
    except ShipError as error:
        job.console.error(f"Error: {error}")
        click.get_current_context().exit(_code(ShipStep(error.step)))
    _answer(job, result)


def _check(job: Job, output: Path, data: DataJob, eval_data: str | None) -> None:
    if is_same(output, Path(job.model)):
        raise click.UsageError("--output names the file of the model.")
    job.check_distinct(output)
    if eval_data is not None and data.source is None:
        raise click.UsageError("--eval-data scores what --data changes: give that too.")


def _code(step: ShipStep) -> int:
    return _FIRST_CODE + list(ShipStep).index(step)


def _answer(job: Job, result: Result[ShipReport]) -> None:
    report = result.report
    for note in report.notes:
        job.console.note(f"note: {note}")
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    job.console.detail(f"time: {spent}")
    if report:
        job.console.note(f"wrote {report.folder}")
    answer = Answer(result, {"model": job.model, "output": report.folder})
    job.write_report(answer)
    job.show(answer, str(report))
    if report.failed is not None:
        job.console.error(f"failed: {report.failed.value}, so nothing was written")
        click.get_current_context().exit(_code(report.failed))
