"""From a model to an ONNX file that is there only if ONNX Runtime computes the same with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from bntools.artifacts import Artifact, check_publishable, publish, staged
from bntools.dataflow.graph import Graph
from bntools.equivalence import coarsest_of
from bntools.errors import ExportError, InputError, LoadError
from bntools.examples import Examples
from bntools.examples import given as as_given
from bntools.judging import Judge, sizes_that_run
from bntools.modules import duplicate, unwrap
from bntools.observing import Observation, observe
from bntools.outputs import Outputs
from bntools.pipeline import carry_out, timed, versions
from bntools.planning import plan_observed
from bntools.recipe import Recipe, recipe_of
from bntools.report import Equivalence, ExportReport, Reason, Report, Result, as_json
from bntools.runtimes.cleaning import operators, training_norm
from bntools.runtimes.exporting import OPSETS, Exported, export
from bntools.runtimes.sessions import Session, open_session
from bntools.selection import Patterns

__all__ = ["ExportOptions", "export_onnx"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """What is rarely asked for in an export.

    `only` and `skip` choose the norm layers to fold, as in `fold`; `allow_tf32` lets CUDA round
    to TF32; `require_dynamic` refuses a model that fixes its batch size, in place of a note;
    `seed` is that of the inputs it is checked on; `source` is what the file says that it was made
    from.
    """

    only: Patterns = "*"
    skip: Patterns = ()
    allow_tf32: bool = False
    require_dynamic: bool = False
    seed: int = 0
    source: str = ""


@torch.inference_mode(mode=False)
def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    provider: str = "auto",
    fold: bool = True,
    dtype: torch.dtype | str | None = None,
    force: bool = False,
    options: ExportOptions | None = None,
) -> Result[ExportReport]:
    """Fold a model, export it to ONNX, and write the file if ONNX Runtime computes the same.

    The truth is the model as it is given, in float64; what ONNX Runtime gives on `provider` ("cpu",
    "cuda", "auto") is judged like any candidate of `verify`, at several batch sizes where the file
    takes any (`dynamic_batch`). Where it fails, the report is falsy, its `path` None, and nothing
    is written. `fold=False` keeps every BatchNormalization node; `dtype` is "float32", "float16"
    or "bfloat16", to which the model is cast after the fold. With None for `example_inputs` they
    are inferred. The argument is left as it was.

    Raises `ExportError` for a model in training mode, one with norms that use batch statistics,
    and what torch's exporter cannot do; `SaveError` for an existing file without `force`;
    `InputError`, `NondeterministicError` and `RuntimeUnavailableError` as `verify` does.

    Example:
        >>> import tempfile, torch, bntools
        >>> from pathlib import Path
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = bntools.export_onnx(model, None, Path(folder) / "m.onnx", provider="cpu")
        ...     Path(result.report.path).is_file(), result.report.operators
        (True, {'Conv': 1})
    """
    target = Path(path)
    check_publishable(target, force=force)
    _check_runtime(provider)
    chosen = options or ExportOptions()
    asked = _Asked(target, opset, provider, force, chosen)
    job = _begun(model, example_inputs, asked, _dtype(dtype), dynamic=dynamic_batch)
    job.prepare(fold=fold)
    outcome = job.attempt(job.batch)
    return outcome if outcome is not None else job.final_attempt()


@dataclass(frozen=True)
class _Asked:
    path: Path
    opset: int | None
    provider: str
    force: bool
    options: ExportOptions


def _begun(
    model: nn.Module, given: Any, asked: _Asked, dtype: torch.dtype | None, *, dynamic: bool
) -> _Job:
    source = unwrap(model)
    if source.training:
        raise ExportError(
            "Cannot export the model: it is in training mode, in which norms use the statistics of"
            " each batch. Call model.eval() first (--eval on the command line)."
        )
    seconds: dict[str, float] = {}
    if dtype is not None and torch.finfo(coarsest_of(source)).eps > torch.finfo(dtype).eps:
        # A fold is rounded to the dtype of its host: one that is to be finer is made finer first.
        source = duplicate(source).float()
        given = None if given is None else as_given(given).cast(torch.float32)
    with timed(seconds, "record"):
        seen = observe(source, given)
        _refuse_batch_statistics(seen.graphs[0])
    judge = Judge(seen.model, dtype)
    base = (
        seen.fresh(asked.options.seed) if dynamic else seen.examples.varied(asked.options.seed + 1)
    )
    job = _Job(asked, seen, judge, judge.rounded(base), seen.model, seconds)
    if dynamic:
        job.batch = base.shared_size
        if job.batch is None:
            job.fix_batch("its inputs share no first dimension")
    return job


@dataclass
class _Job:
    """One export on its way: `base` is what it is checked on, `others` the same in other sizes.

    `batch` is the size of the free first dimension in `base`, None where it is to be fixed.
    """

    asked: _Asked
    seen: Observation
    judge: Judge
    base: Examples
    candidate: nn.Module
    seconds: dict[str, float]
    batch: int | None = None
    others: list[Examples] = field(default_factory=list)
    fold: Report | None = None
    recipe: Recipe = field(default_factory=Recipe)
    notes: list[str] = field(default_factory=list)

    def prepare(self, *, fold: bool) -> None:
        """The model to export: folded and proven, or a copy; in the dtype that was asked for."""
        asked, seen = self.asked, self.seen
        if fold:
            plan = plan_observed(seen, only=asked.options.only, skip=asked.options.skip)
            carried = carry_out(
                plan, seen.source, self.seconds, seed=asked.options.seed, examples=self.base
            )
            self.fold = carried.result.report
            self.candidate, self.recipe = carried.result.model, carried.result.recipe
            if carried.truth is not None:
                self.judge.know(self.base, carried.truth)
        else:
            self.candidate, self.recipe = duplicate(seen.model), recipe_of(seen.model)
        self.candidate = self.judge.cast(self.candidate)
        with timed(self.seconds, "truth"):
            self.judge.truth(self.base)
            if self.batch is not None:
                self.others = sizes_that_run(
                    self.judge, self.base, self.batch, seed=asked.options.seed
                )
        if self.batch is not None and not self.others:
            self.fix_batch("it runs at no other")

    def attempt(self, batch: int | None) -> Result[ExportReport] | None:
        """Export, check, run, compare, publish; None where the free batch size is not right."""
        with timed(self.seconds, "export"):
            traced = self._traced(batch).cast(self.judge.dtype, "cpu")
            exported = export(
                self.candidate, traced, opset=self.asked.opset, dynamic=batch is not None
            )
            _refuse_training_nodes(exported)
        if batch is not None and not exported.dynamic:
            self.fix_batch("its forward does")
            return None
        return self._published(exported)

    def final_attempt(self) -> Result[ExportReport]:
        """Again, with the batch size of the examples."""
        if self.base.batch != self.seen.examples.batch:
            self.base = self.judge.rounded(self.seen.examples.varied(self.asked.options.seed + 1))
        outcome = self.attempt(None)
        if outcome is None:
            raise AssertionError("a fixed batch size is not tried again")
        return outcome

    def fix_batch(self, why: str) -> None:
        """Give up the free batch size, or refuse where it is required."""
        if self.asked.options.require_dynamic:
            raise ExportError(
                f"Cannot export the model with a free batch size: {why}. Export it with a fixed one"
                " (--static-batch), with example inputs of that size."
            )
        self.notes.append(f"the batch size is fixed at that of the examples: {why}")
        self.batch, self.others = None, []

    def _traced(self, batch: int | None) -> Examples:
        """What the exporter sees: more than one sample where the batch size is to be free."""
        if batch == 1:
            return next((e for e in self.others if (e.shared_size or 0) > 1), self.base)
        return self.base

    def _published(self, exported: Exported) -> Result[ExportReport] | None:
        asked, seconds = self.asked, self.seconds
        with ExitStack() as stack:
            with timed(seconds, "serialise"):
                artifact = stack.enter_context(staged(exported.graph, asked.path))
            with timed(seconds, "session"):
                session = _opened(artifact, asked)
            checks = self._compared(session, exported)
            wrong = next((check for check in checks if not check), None)
            if exported.dynamic and checks[0] and wrong is not None:
                self.fix_batch(f"ONNX Runtime does not give the same on {wrong.inputs}")
                return None
            report = self._report(exported, session, tuple(checks), artifact)
            if report:
                with timed(seconds, "publish"):
                    report = self._written(artifact, report)
        return Result(self.candidate, report, self.recipe)

    def _compared(self, session: Session, exported: Exported) -> list[Equivalence]:
        def candidate(examples: Examples) -> Outputs:
            try:
                return exported.named(session.run(exported.feeds(examples)))
            except InputError as error:
                why = " ".join(str(error.__cause__ or error).split())[:300].rstrip(". ")
                failures.append(f"ONNX Runtime fails on {examples} ({why})")
                return {}

        failures: list[str] = []
        tf32 = bool(session.placement.tf32)
        sizes = (self.base, *(self.others if exported.dynamic else ()))
        with timed(self.seconds, "compare"):
            checks = [
                self.judge.compare(candidate, examples, only=exported.paths, tf32=tf32)
                for examples in sizes
            ]
        self.notes += failures
        return checks

    def _report(
        self, exported: Exported, session: Session, checks: tuple[Equivalence, ...], made: Artifact
    ) -> ExportReport:
        seen = self.seen
        return ExportReport(
            path=None,
            data=None,
            bytes=made.size,
            dtype=str(self.judge.dtype).removeprefix("torch."),
            opset=exported.opset,
            dynamic_batch=exported.dynamic,
            inputs=tuple(map(str, session.inputs)),
            outputs=tuple(map(str, session.outputs)),
            operators=operators(exported.graph),
            checks=checks,
            placement=session.placement,
            fold=self.fold,
            example=f"{seen.examples}{' (inferred)' if seen.examples.inferred else ''}",
            warnings=seen.warnings,
            notes=(*self.notes, *_told(exported)),
            seconds=self.seconds,
            versions=versions() | session.placement.versions,
        )

    def _written(self, artifact: Artifact, report: ExportReport) -> ExportReport:
        asked = self.asked
        metadata = {
            "bntools_version": report.versions.get("bntools", "unknown"),
            "bntools_source": asked.options.source or type(self.seen.source).__qualname__,
            "bntools_recipe": json.dumps(self.recipe.to_dict()),
            "bntools_verification": json.dumps(_figures(report), allow_nan=False),
        }
        data = publish(artifact, asked.path, metadata, force=asked.force)
        return replace(report, path=str(asked.path), data=str(data) if data else None)


def _check_runtime(provider: str) -> None:
    """Find out before long work that a runtime or device is missing."""
    if provider != "auto":
        x, y = (
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"
        )
        node = onnx.helper.make_node("Relu", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "probe", [x], [y])
        opset = [onnx.helper.make_opsetid("", OPSETS[0])]
        model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
        open_session(model.SerializeToString(), provider=provider)


def _opened(artifact: Artifact, asked: _Asked) -> Session:
    tf32 = asked.options.allow_tf32
    try:
        return open_session(artifact.source, provider=asked.provider, allow_tf32=tf32)
    except LoadError as error:
        said = " ".join(str(error.__cause__ or error).split())[:300].rstrip(". ")
        raise ExportError(
            f"Cannot export the model: ONNX Runtime does not take the file ({said}). Choose another"
            " --dtype or --opset."
        ) from error


def _told(exported: Exported) -> Iterator[str]:
    if exported.widened:
        yield "weights are stored in bfloat16 and computed with in float32"
    if exported.compiled:
        yield "torch.export could not run the forward as it is, and compiled it"


def _figures(report: ExportReport) -> dict[str, Any]:
    """What the file says about its check: as little as a reader needs to judge it."""
    checks = [
        {
            "inputs": check.inputs,
            "truth": check.truth,
            "outputs": [
                as_json({n: getattr(o, n) for n in ("name", "error", "reference_error", "limit")})
                for o in check.outputs
            ],
        }
        for check in report.checks
    ]
    return {"equivalent": bool(report), "on": str(report.placement), "checks": checks}


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    found = _DTYPES.get(str(asked).removeprefix("torch."))
    if asked is not None and found is None:
        raise ExportError(f"Cannot export in {asked}: choose one of {', '.join(_DTYPES)}.")
    return found


def _refuse_batch_statistics(graph: Graph) -> None:
    """A norm that ran and normalises each batch by itself gives other numbers in deployment."""
    for layer in graph.layers:
        if layer.refusal is None or layer.path not in graph.frames:
            continue
        reason, detail = layer.refusal
        cure = {
            Reason.TRAINING_MODE: "Call model.eval() first",
            Reason.NO_STATISTICS: "Give it statistics, or replace it",
        }.get(reason)
        if cure is not None:
            why = detail.partition(";")[0].removeprefix("it ")
            raise ExportError(f"Cannot export the model: {layer.path} {why}. {cure}.")


def _refuse_training_nodes(exported: Exported) -> None:
    """What a functional norm leaves: nodes that normalise with batch statistics."""
    where = training_norm(exported.graph)
    if where is not None:
        raise ExportError(
            f"Cannot export the model: {where or 'its forward'} normalises with the statistics of"
            " each batch (batch_norm with training=True). Call it with training=False."
        )
