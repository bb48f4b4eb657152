"""`bntools inspect`: the health of every norm layer, and where it would fold or why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import click

import bntools
from bntools.errors import PlanError
from bntools.report import Explanation, Finding, Inspection, Severity

from .onnx_models import check_options, inspect_onnx, is_onnx
from .options import Answer, Job, shared_options

__all__ = ["inspect"]

_HELP = """Examine every norm layer: its statistics, what is wrong with it, where it would fold.

\b
Examples:
  bntools inspect model.pt
  bntools inspect weights.pth --arch torchvision:resnet50 --fail-on error
  bntools inspect model.pt --json | jq '.findings[]'
  bntools inspect model.pt --explain layer1.0.bn1
  bntools inspect model.onnx

Findings are errors (the model is wrong), warnings (it may well be) and notes (good to know).
"""


@click.command("inspect", help=_HELP, short_help="Examine every norm layer.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning"]),
    help="Exit with 1 where a finding is that bad, for CI systems.",
)
@click.option(
    "--explain",
    metavar="LAYER",
    multiple=True,
    help="Only tell, op by op, how LAYER (or a glob) would fold or what stops it; repeatable.",
)
@shared_options
def inspect(job: Job, fail_on: str | None, explain: tuple[str, ...]) -> None:
    """Examine and judge."""
    job.check_writable(job.report)
    inspection = _inspection(job)
    explanations = _explanations(inspection, explain)
    inspection = _selected(inspection, job)
    job.say_inputs(inspection.inputs)
    for warning in inspection.warnings:
        job.console.warn(warning)
    answer = Answer(_Explained(inspection, explanations), {"model": job.model})
    job.write_report(answer)
    told = "\n\n".join(map(str, explanations)) or str(replace(inspection, warnings=()))
    job.show(answer, told)
    bad = [finding for finding in inspection.findings if _reaches(finding.severity, fail_on)]
    if bad:
        plural = "s" if len(bad) > 1 else ""
        job.console.error(f"failed: {len(bad)} finding{plural} (--fail-on {fail_on})")
        click.get_current_context().exit(1)


@dataclass(frozen=True)
class _Explained:
    """An inspection, and in its document the explanations that were asked for."""

    inspection: Inspection
    explanations: tuple[Explanation, ...]

    def to_dict(self) -> dict[str, Any]:
        """The document."""
        document = self.inspection.to_dict()
        if not self.explanations:
            return document
        return {**document, "explanations": [each.to_dict() for each in self.explanations]}


def _explanations(inspection: Inspection, patterns: tuple[str, ...]) -> tuple[Explanation, ...]:
    """The explanations of the layers that are asked for, in execution order."""
    paths = [layer.path for layer in inspection.layers if layer.decision is not None]
    for pattern in patterns:
        if not any(path == pattern or fnmatchcase(path, pattern) for path in paths):
            raise PlanError(
                f"Cannot explain {pattern!r}: no norm layer of the plan has such a path (there are:"
                f" {', '.join(paths[:3]) or 'none'}{', ...' if len(paths) > 3 else ''})."
            )
    asked = (path for path in paths if any(path == p or fnmatchcase(path, p) for p in patterns))
    return tuple(inspection.explain(path) for path in asked)


def _inspection(job: Job) -> Inspection:
    if is_onnx(job):
        check_options(job)
        with job.console.working("inspecting"):
            return inspect_onnx(job)
    model = job.load()
    with job.console.working("inspecting"):
        return _inspected(model, job.examples(model))


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
