"""`bntools inspect`: the health of every norm layer, and where it would fold or why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import click

import bntools
from bntools.errors import PlanError
from bntools.report import Finding, Inspection, Severity

from .options import Answer, Job, shared_options

__all__ = ["inspect"]

_HELP = """Examine every norm layer: its statistics, what is wrong with it, where it would fold.

\b
Examples:
  bntools inspect model.pt
  bntools inspect weights.pth --arch torchvision:resnet50 --fail-on error
  bntools inspect model.pt --json | jq '.findings[]'

Findings are errors (the model is wrong), warnings (it may well be) and notes (good to know).
"""


@click.command("inspect", help=_HELP, short_help="Examine every norm layer.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning"]),
    help="Exit with 1 where a finding is that bad, for CI systems.",
)
@shared_options
def inspect(job: Job, fail_on: str | None) -> None:
    """Examine and judge."""
    job.check_writable(job.report)
    model = job.load()
    with job.console.working("inspecting"):
        inspection = _inspected(model, job.examples(model))
    inspection = _selected(inspection, job)
    job.say_inputs(inspection.inputs)
    for warning in inspection.warnings:
        job.console.warn(warning)
    answer = Answer(inspection, {"model": job.model})
    job.write_report(answer)
    job.show(answer, str(replace(inspection, warnings=())))
    bad = [finding for finding in inspection.findings if _reaches(finding.severity, fail_on)]
    if bad:
        plural = "s" if len(bad) > 1 else ""
        job.console.error(f"failed: {len(bad)} finding{plural} (--fail-on {fail_on})")
        click.get_current_context().exit(1)


def _inspected(model: Any, examples: Any) -> Inspection:
    """The inspection; inputs that the user gave and the model refuses are an error."""
    inspection = bntools.inspect(model, examples)
    counted = [layer for layer in inspection.layers if not layer.input_dependent]
    if examples is not None and counted and all(layer.decision is None for layer in counted):
        bntools.plan_fold(model, examples)
    return inspection


def _selected(inspection: Inspection, job: Job) -> Inspection:
    """The layers that --only and --skip leave in, with their findings and those of the model."""
    paths = [layer.path for layer in inspection.layers]
    for pattern in (*job.only, *job.skip):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise PlanError(
                f"Cannot select {pattern!r}: no norm layer has such a path (there are:"
                f" {', '.join(paths[:3]) or 'none'}{', ...' if len(paths) > 3 else ''})."
            )
    chosen = {path for path in paths if _is_chosen(path, job)}
    layers = tuple(layer for layer in inspection.layers if layer.path in chosen)
    return replace(inspection, layers=layers, findings=tuple(_of(inspection, chosen)))


def _is_chosen(path: str, job: Job) -> bool:
    wanted = not job.only or any(fnmatchcase(path, pattern) for pattern in job.only)
    return wanted and not any(fnmatchcase(path, pattern) for pattern in job.skip)


def _of(inspection: Inspection, chosen: set[str]) -> Iterator[Finding]:
    of_layers = {layer.path for layer in inspection.layers}
    for finding in inspection.findings:
        if finding.path in chosen or finding.path not in of_layers:
            yield finding


def _reaches(severity: Severity, limit: str | None) -> bool:
    if limit is None:
        return False
    order = list(Severity)
    return order.index(severity) >= order.index(Severity(limit))
