"""`bntools export`: fold, export to ONNX, run it in ONNX Runtime, and write what is the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

import bntools
from bntools.report import ExportReport, Result

from .options import Answer, Job, is_same, shared_options
from .values import Whole, file_option

__all__ = ["export"]

_HELP = """Fold a model, export it to ONNX, and prove in ONNX Runtime that it computes the same.

\b
Examples:
  bntools export model.pt
  bntools export model.pt -o model.onnx --provider cuda
  bntools export model.pt --dtype float16 --input-shape 1x3x224x224
  bntools export weights.pth --arch timm:resnet18 --json --report report.json

The original in float64 is the truth. What ONNX Runtime gives is judged beside the original's own
rounding, at several batch sizes. The file is written only where it passes (else exit code 1).
"""


@click.command(
    "export", help=_HELP, short_help="Fold, export to ONNX, verify, and only then write."
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=file_option,
    help="Where to write the result; beside MODEL by default: model.onnx.",
)
@click.option("--no-fold", is_flag=True, help="Keep every BatchNormalization node.")
@click.option("--opset", type=Whole(1), metavar="N", help="The ONNX opset to write.")
@click.option(
    "--static-batch/--dynamic-batch",
    "static",
    default=None,
    help="Fix the batch size at that of the input, or insist on a free one. By default it is free"
    " where the model allows that.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Cast the folded model; the limit of its error follows from the dtype.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where ONNX Runtime runs the check; auto takes CUDA where it works.",
)
@click.option("--allow-tf32", is_flag=True, help="Let CUDA round to TF32; the limit follows.")
@click.option(
    "--eval", "evaluate", is_flag=True, help="Put a model that was saved in training mode in eval."
)
@shared_options
def export(
    job: Job,
    output: Path | None,
    *,
    no_fold: bool,
    opset: int | None,
    static: bool | None,
    dtype: str | None,
    provider: str,
    allow_tf32: bool,
    evaluate: bool,
) -> None:
    """Export, check and write."""
    output = output or job.beside(".onnx")
    if is_same(output, Path(job.model)):
        raise click.UsageError("--output names the file of the model.")
    job.check_distinct(output)
    job.check_writable(output, job.report)
    options = bntools.ExportOptions(
        only=job.only or "*",
        skip=job.skip,
        allow_tf32=allow_tf32,
        require_dynamic=static is False,
        seed=job.seed,
        source=job.model,
    )
    model = job.load()
    if evaluate:
        model.eval()
    with job.console.working("exporting"), _told(job):
        result = bntools.export_onnx(
            model,
            job.examples(model),
            output,
            opset=opset,
            dynamic_batch=not static,
            provider=provider,
            fold=not no_fold,
            dtype=dtype,
            force=job.force,
            options=options,
        )
    _answer(job, result)


@contextmanager
def _told(job: Job) -> Iterator[None]:
    """With --verbose, what torch's exporter says is shown."""
    log = logging.getLogger("bntools.export")
    before = log.level
    log.setLevel(logging.DEBUG if job.verbose else before)
    try:
        yield
    finally:
        log.setLevel(before)


def _answer(job: Job, result: Result[ExportReport]) -> None:
    report = result.report
    job.say_inputs(report.example)
    for warning in report.warnings:
        job.console.warn(warning)
    for note in report.notes:
        job.console.note(f"note: {note}")
    _say_how(job, report)
    for path in filter(None, (report.path, report.data)):
        job.console.note(f"wrote {path}")
    if not report:
        job.console.error(
            "failed: ONNX Runtime computes something else than the original, so no model was"
            " written"
        )
    answer = Answer(result, {"model": job.model, "output": report.path})
    job.write_report(answer)
    job.show(answer, str(replace(report, warnings=(), notes=())))
    if not report:
        click.get_current_context().exit(1)


def _say_how(job: Job, report: ExportReport) -> None:
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    job.console.detail(f"time: {spent}\nran: {report.placement}")
    job.console.detail(f"inputs: {', '.join(report.inputs)}\noutputs: {', '.join(report.outputs)}")
    nodes = ", ".join(f"{count} {name}" for name, count in report.operators.items())
    job.console.detail(f"nodes: {nodes}")
    for check in report.checks:
        job.console.detail(f"check on {check.inputs}:\n{check}")
