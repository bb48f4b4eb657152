"""`bntools fold`: fold the norm layers into their neighbours, prove it, and save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

import bntools
from bntools.report import Check, Plan, Report, Result

from .options import Answer, Job, file_option, is_same, shared_options

__all__ = ["fold"]

_HELP = """Fold BatchNorm layers into the layers before them, and prove that nothing changed.

\b
Examples:
  bntools fold model.pt
  bntools fold model.pt -o small.pt --input-shape 1x3x224x224
  bntools fold model.pt --dry-run --only 'backbone.*'
  bntools fold weights.pth --arch timm:resnet18 --json --report report.json

Every norm layer that can be folded is; every other one is listed with the reason why it is kept.
The result is compared with the original in float64 and in its own dtype on fresh inputs; a fold
that fails is undone. A file is written only where something was folded.
"""


@click.command("fold", help=_HELP, short_help="Fold BatchNorm into the layers before it.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=file_option,
    help="Where to write the result; beside MODEL by default: model.folded.pt.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be folded.")
@click.option(
    "--strict",
    is_flag=True,
    help="Where a fold fails its check, write nothing and exit with 1.",
)
@shared_options
def fold(job: Job, output: Path | None, dry_run: bool, strict: bool) -> None:
    """Fold, check and save."""
    output = output or job.beside(".folded.pt")
    if job.report is not None and is_same(job.report, output):
        raise click.UsageError("--output and --report name the same file.")
    if dry_run:
        _plan(job, output)
    else:
        _fold(job, output, strict=strict)


def _plan(job: Job, output: Path) -> None:
    job.check_writable(job.report)
    model = job.load()
    with job.console.working("planning"):
        plan = bntools.plan_fold(model, job.examples(model), only=job.only or "*", skip=job.skip)
    _say(job, plan)
    if plan.folds:
        exists = ", which exists: that takes --force" if output.exists() and not job.force else ""
        job.console.note(f"would write {output}{exists}")
    answer = Answer(plan, {"model": job.model, "output": None})
    job.write_report(answer)
    job.show(answer, str(plan) if plan.decisions else "the model has no norm layer to fold")


def _fold(job: Job, output: Path, *, strict: bool) -> None:
    job.check_writable(output, job.report)
    model = job.load()
    with job.console.working("folding"):
        result = bntools.fold(
            model, job.examples(model), only=job.only or "*", skip=job.skip, seed=job.seed
        )
    report = result.report
    _say(job, report)
    failed = _failures(report)
    for path in failed:
        job.console.warn(f"the fold of {path} failed its check and was undone")
    passed = _is_proven(report) and not (strict and failed)
    written = _save(job, result, output) if passed else None
    answer = Answer(result, {"model": job.model, "output": written})
    if passed:
        job.write_report(answer)
    else:
        job.console.error("failed: the check did not pass, so nothing was written")
    job.show(answer, str(replace(report, warnings=())))
    if not passed:
        click.get_current_context().exit(1)


def _save(job: Job, result: Result[Report], output: Path) -> str | None:
    if not result.report.folds:
        job.console.note("nothing was folded, so no model is written")
        return None
    return job.save(result, output)


def _is_proven(report: Report) -> bool:
    return not report.folds or bool(report.check)


def _failures(report: Report) -> tuple[str, ...]:
    return report.check.rolled_back if report.check is not None else ()


def _say(job: Job, result: Plan | Report) -> None:
    job.say_inputs(result.inputs)
    for warning in result.warnings:
        job.console.warn(warning)
    if not isinstance(result, Report):
        return
    if result.flushed:
        job.console.note(
            f"note: {result.flushed} values under the smallest normal float32 became 0"
        )
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    job.console.detail(f"time: {spent}\nversions: {versions}")
    if result.check is not None:
        _say_check(job.console.detail, result.check)


def _say_check(detail: Callable[[str], None], check: Check) -> None:
    detail(f"check: on {check.inputs}, seed {check.seed}")
    if check.peak_bytes is not None:
        detail(f"check: {check.peak_bytes / 2**20:.1f} MiB at most beside the models")
    for title, judged in (("float64", check.float64), ("native", check.native)):
        if judged is not None:
            detail(f"check in {title if title == 'float64' else judged.dtype}:\n{judged}")
