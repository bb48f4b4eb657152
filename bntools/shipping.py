"""The whole way: doctor, recalibrate, fold, export, verify, and a folder with all of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bntools.calibration.estimation import Method
from bntools.calibration.scoring import Score
from bntools.errors import BNToolsError, InputError, RuntimeUnavailableError, ShipError
from bntools.folders import check_folder, staged_folder
from bntools.inspection import inspect
from bntools.modules import duplicate, unwrap
from bntools.page import page
from bntools.pipeline import fold, timed, versions
from bntools.publishing import ExportOptions, export_onnx
from bntools.recalibrating import recalibrate
from bntools.recipe import Recipe
from bntools.report import Equivalence, Result, Severity, Shipped, ShipReport, ShipStep
from bntools.saving import save
from bntools.verifying import Reference
from bntools.writing import write_report, write_text_atomically

__all__ = ["ShipOptions", "check_ship", "ship"]

CERTIFICATE = "certificate.json"
_MODEL, _ONNX, _PAGE = "model.pt", "model.onnx", "report.html"
_PROVIDERS = ("cpu", "cuda")
Limit = Literal["error", "warning", "never"]


@dataclass(frozen=True)
class ShipOptions:
    """What is rarely asked for in a shipment.

    `fail_on` is the severity of a doctor's finding that stops it, `method` and `evaluate` are those
    of `recalibrate`; `opset` and `dynamic_batch` those of `export_onnx`; `seed` is that of all
    inputs that are drawn; `source` is what the folder says that it was made from.
    """

    fail_on: Limit = "error"
    method: Method = "cumulative"
    evaluate: Score | None = None
    opset: int | None = None
    dynamic_batch: bool = True
    seed: int = 0
    source: str = "model"
    progress: Callable[[str], None] | None = None


def ship(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    data: Any = None,
    example_inputs: Any = None,
    force: bool = False,
    options: ShipOptions | None = None,
) -> Result[ShipReport]:
    """Take a model the whole way to a folder that can be deployed, or leave nothing.

    Inspect (an error that the doctor finds stops it), recalibrate on `data` where they are given
    (a score that gets worse stops it), fold, export to ONNX, and verify the file against the
    original in ONNX Runtime on every provider there is. The folder then holds `model.pt` (folded),
    `model.onnx`, `certificate.json`, and `report.html`, a page with the pictures that needs no
    other file. Without `example_inputs` they are taken from `data`, or inferred. The argument is
    left as it was, and a model in training mode is shipped as its eval() version.

    Where a check fails, the report is falsy, names the step, and nothing is written. Raises
    `ShipError`, with the `step`, where a step cannot be done; `SaveError` for a folder that exists
    (without `force`) or holds anything but a shipment.

    Example:
        >>> import tempfile, torch, bntools
        >>> from pathlib import Path
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     result = bntools.ship(model, Path(parent) / "shipped")
        ...     bool(result.report), sorted(path.name for path in Path(parent, "shipped").iterdir())
        (True, ['certificate.json', 'model.onnx', 'model.pt', 'report.html'])
    """
    target = Path(folder)
    chosen = options or ShipOptions()
    with staged_folder(target, CERTIFICATE, force=force) as staging:
        shipment = _Shipment(unwrap(model), data, example_inputs, chosen, staging.path)
        shipment.go()
        report = shipment.report(target)
        if report:
            write_report(staging.path / CERTIFICATE, report)
            write_text_atomically(staging.path / _PAGE, page(report))
            staging.publish()
    return Result(shipment.model, report, shipment.recipe)


def check_ship(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Find out before long work whether a shipment could be written to `folder`.

    Raises `SaveError`.
    """
    check_folder(Path(folder), CERTIFICATE, force=force)


@dataclass
class _Shipment:
    """One shipment on its way; `model` is the newest one."""

    model: nn.Module
    data: Any
    examples: Any
    options: ShipOptions
    staged: Path
    original: nn.Module | None = None
    found: dict[str, Any] = field(default_factory=dict)
    checks: list[Equivalence] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    failed: ShipStep | None = None
    recipe: Recipe | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def go(self) -> None:
        """Take every step, up to the first one that fails its check."""
        self.model = duplicate(self.model)
        if self.model.training:
            self.notes.append("the model was in training mode: its eval() version is shipped")
            self.model.eval()
        if self.examples is None and self.data is not None:
            self.examples = _first_input(self.data)
        steps: dict[ShipStep, Callable[[], bool]] = {
            ShipStep.INSPECT: self._inspect,
            ShipStep.RECALIBRATE: self._recalibrate,
            ShipStep.FOLD: self._fold,
            ShipStep.EXPORT: self._export,
            ShipStep.VERIFY: self._verify,
        }
        for step, take in steps.items():
            if step is ShipStep.RECALIBRATE and self.data is None:
                continue
            if self.options.progress is not None:
                self.options.progress(step.value)
            with timed(self.seconds, step.value), _named(step):
                if not take():
                    self.failed = step
                    return

    def report(self, folder: Path) -> ShipReport:
        """What has become of it; `folder` is where it is going."""
        certificate = self.found.get("export")
        if certificate is not None:
            data = certificate.data and str(folder / Path(certificate.data).name)
            self.found["export"] = replace(certificate, path=str(folder / _ONNX), data=data)
        return ShipReport(
            self.options.source,
            None if self.failed is not None else str(folder),
            checks=tuple(self.checks),
            unavailable=self.unavailable,
            failed=self.failed,
            files=tuple(_files(self.staged)) if self.failed is None else (),
            notes=tuple(self.notes),
            seconds=self.seconds,
            versions=versions(),
            **self.found,
        )

    def _inspect(self) -> bool:
        inspection = inspect(self.model, self.examples)
        self.found["inspection"] = inspection
        limit = self.options.fail_on
        if limit == "never":
            return True
        order = list(Severity)
        worst = inspection.worst()
        return worst is None or order.index(worst) < order.index(Severity(limit))

    def _recalibrate(self) -> bool:
        result = recalibrate(
            self.model, self.data, method=self.options.method, evaluate=self.options.evaluate
        )
        self.found["recalibration"] = result.report
        self.model, self.recipe = result.model, result.recipe
        return result.report.accepted

    def _fold(self) -> bool:
        self.original = self.model
        result = fold(self.model, self.examples, seed=self.options.seed)
        self.found["fold"] = result.report
        self.model, self.recipe = result.model, result.recipe
        save(result, self.staged / _MODEL)
        check = result.report.check
        return check is None or bool(check)

    def _export(self) -> bool:
        options = ExportOptions(seed=self.options.seed, source=self.options.source)
        result = export_onnx(
            self.model,
            self.examples,
            self.staged / _ONNX,
            opset=self.options.opset,
            dynamic_batch=self.options.dynamic_batch,
            provider="cpu",
            fold=False,
            options=options,
        )
        self.found["export"] = result.report
        return bool(result.report)

    def _verify(self) -> bool:
        """The file against the model before its fold, on all providers; the CPU is always there."""
        reference = Reference(self.original or self.model, self.examples, seed=self.options.seed)
        for provider in _PROVIDERS:
            self._judge(reference, provider)
        return all(self.checks)

    def _judge(self, reference: Reference, provider: str) -> None:
        per_layer = provider == "cpu"
        try:
            judged = reference.judge(self.staged / _ONNX, provider=provider, per_layer=per_layer)
        except RuntimeUnavailableError as error:
            if provider == "cpu":
                raise
            self.unavailable[provider] = str(error).partition(": ")[2]
        else:
            self.checks.append(judged)


@contextmanager
def _named(step: ShipStep) -> Iterator[None]:
    """Errors say in which step they came."""
    try:
        yield
    except BNToolsError as error:
        raise ShipError(f"Cannot {step.value}: {_rest(str(error))}", step.value) from error


def _rest(message: str) -> str:
    return message[:1].lower() + message[1:]


def _first_input(data: Any) -> Any:
    """The first batch without its labels."""
    first = next(iter(data), None)
    if first is None:
        raise InputError("Cannot ship the model: the data have no batch. Give some.")
    return first[0] if isinstance(first, (tuple, list)) else first


def _files(folder: Path) -> Iterator[Shipped]:
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
        yield Shipped(path.name, path.stat().st_size, digest.hexdigest())
