"""`bntools fold`: fold the norm layers into their neighbours, prove it, and save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

import bntools
from bntools.report import Check, Plan, Report, Result

from .onnx_models import check_options, fold_onnx, is_onnx, plan_onnx
from .options import Answer, Job, file_option, shared_options, state_dict_option

__all__ = ["fold"]

_HELP = """Fold BatchNorm layers into the layers before or after them, and prove it.

\b
Examples:
  bntools fold model.pt
  bntools fold model.pt -o small.pt --input-shape 1x3x224x224
  bntools fold model.pt --dry-run --only 'backbone.*'
  bntools fold weights.pth --arch timm:resnet18 --json --report report.json
  bntools fold model.pt --merge-branches --pad-forward
  bntools fold model.onnx -o small.onnx

Every norm layer that can be folded is; every other one is listed with the reason why it is kept.
The result is compared with the original in float64 and in its own dtype on fresh inputs; a fold
that fails is undone. A file is written only where something was folded.
"""


@click.command("fold", help=_HELP, short_help="Fold BatchNorm into its neighbours.")
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
@click.option(
    "--merge-branches",
    is_flag=True,
    help="Make one convolution of parallel linear branches that are added up.",
)
@click.option(
    "--merge-linear",
    is_flag=True,
    help="Make one layer of two linear ones in a row, where that makes the model smaller.",
)
@click.option(
    "--pad-forward",
    is_flag=True,
    help="Fold norms into padded convolutions after them, which then pad with other values than 0.",
)
@click.option(
    "--keep-originals",
    is_flag=True,
    help="Keep copies of what is removed or changed beside the result, for `bntools unfold`.",
)
@state_dict_option
@shared_options
def fold(
    job: Job,
    output: Path | None,
    *,
    dry_run: bool,
    strict: bool,
    merge_branches: bool,
    merge_linear: bool,
    pad_forward: bool,
    keep_originals: bool,
) -> None:
    """Fold, check and save."""
    output = output or job.beside(".folded.onnx" if is_onnx(job) else ".folded.pt")
    job.check_distinct(output)
    how = _How(merge_branches, merge_linear, pad_forward, keep_originals)
    if is_onnx(job):
        check_options(job, **asdict(how))
    if dry_run and not how.merges:
        _plan(job, output, how)
    else:
        _fold(job, output, how, strict=strict, dry_run=dry_run)


@dataclass(frozen=True)
class _How:
    """What to do beside folding norms."""

    merge_branches: bool
    merge_linear: bool
    pad_forward: bool
    keep_originals: bool

    @property
    def merges(self) -> bool:
        """Whether layers may merge, which shows only once the norms are folded."""
        return self.merge_branches or self.merge_linear


def _plan(job: Job, output: Path, how: _How) -> None:
    job.check_writable(job.report)
    plan = _planned(job, how)
    _say(job, plan)
    if plan.folds:
        exists = ", which exists: that takes --force" if output.exists() and not job.force else ""
        job.console.note(f"would write {output}{exists}")
    answer = Answer(plan, {"model": job.model, "output": None})
    job.write_report(answer)
    job.show(answer, str(plan) if plan.decisions else "the model has no norm layer to fold")


def _planned(job: Job, how: _How) -> Plan:
    if is_onnx(job):
        with job.console.working("planning"):
            return plan_onnx(job)
    model = job.load()
    with job.console.working("planning"):
        return bntools.plan_fold(
            model,
            job.examples(model),
            only=job.only or "*",
            skip=job.skip,
            pad_forward=how.pad_forward,
        )


def _fold(job: Job, output: Path, how: _How, *, strict: bool, dry_run: bool) -> None:
    if dry_run:
        job.console.note("note: what merges shows on a folded copy, which is not written")
    else:
        job.check_output(output, keep_originals=how.keep_originals)
    job.check_writable(job.report)
    result = _folded(job, how)
    report = result.report
    _say(job, report)
    failed = _failures(report)
    for path in failed:
        job.console.warn(f"the fold of {path} failed its check and was undone")
    passed = _is_proven(report) and not (strict and failed)
    written = _save(job, result, output, dry_run=dry_run) if passed else None
    answer = Answer(result, {"model": job.model, "output": written})
    if passed:
        job.write_report(answer)
    else:
        job.console.error("failed: the check did not pass, so nothing was written")
    job.show(answer, str(replace(report, warnings=())))
    if not passed:
        click.get_current_context().exit(1)


def _folded(job: Job, how: _How) -> Result[Report]:
    if is_onnx(job):
        with job.console.working("folding"):
            return fold_onnx(job)
    model = job.load()
    with job.console.working("folding"):
        return bntools.fold(
            model,
            job.examples(model),
            only=job.only or "*",
            skip=job.skip,
            seed=job.seed,
            merge_branches=how.merge_branches,
            merge_linear=how.merge_linear,
            pad_forward=how.pad_forward,
            keep_originals=how.keep_originals,
        )


def _save(job: Job, result: Result[Report], output: Path, *, dry_run: bool) -> str | None:
    if not result.report.changed:
        job.console.note("nothing was folded, so no model is written")
        return None
    return job.save(result, output, dry_run=dry_run)


def _is_proven(report: Report) -> bool:
    return not report.changed or bool(report.check)


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
