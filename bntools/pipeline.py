"""Whole ways: fold and prove, with roll-back."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from bntools.dataflow.reach import Refused
from bntools.equivalence import Truth
from bntools.errors import PlanError
from bntools.examples import Examples
from bntools.latency import compare_latency
from bntools.merging import Start, merge_folded
from bntools.modules import duplicate, unwrap
from bntools.observing import observe
from bntools.originals import keep_originals as keep_copies
from bntools.planning import (
    Compiled,
    FoldOptions,
    Patterns,
    compiled_for,
    compiled_of,
    is_scripted,
    plan_fold,
    plan_observed,
    replan,
)
from bntools.proving import Proof, Prover, watched
from bntools.recipe import mark, recipe_of
from bntools.report import (
    Action,
    Check,
    Decision,
    Latency,
    MergeReport,
    Plan,
    Reason,
    Report,
    Result,
)
from bntools.resources import peak_memory
from bntools.scripted import prove_script
from bntools.surgery.folding import Folded, fold_copy

__all__ = ["Carried", "carry_out", "fold", "timed", "versions"]

_MOST_CULPRITS = 16
_DEFAULT = FoldOptions()
LayerErrors = Mapping[str, tuple[float | None, float]]


@torch.inference_mode(mode=False)
def fold(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    only: Patterns = "*",
    skip: Patterns = (),
    seed: int = 0,
    merge_branches: bool = False,
    merge_linear: bool = False,
    pad_forward: bool = False,
    keep_originals: bool = False,
) -> Result[Report]:
    """Fold the norm layers of a model into its linear layers, and prove the result.

    The argument is left as it was; the result is a copy in eval mode, checked on fresh inputs
    drawn from `seed`, in float64 and in the model's own dtype. A fold that fails its check is
    undone, reported as check-failed, and the rest is delivered. `example_inputs`, `only`, `skip`
    and `pad_forward` are those of `plan_fold`; `plan` is one that it made for this model. With
    `keep_originals` copies of all that was removed or changed travel along with the result, also
    through files, for `unfold`: about as many bytes as the layers concerned have.

    `merge_branches` makes one layer of each sum of linear branches of one value (RepVGG, Ding et
    al. 2021), `merge_linear` of two layers in a row where that is smaller; see `report.merging`.

    Raises `InputError` where the model does not run, `PlanError` for a plan of another model,
    `NondeterministicError` where two forwards on the same input differ.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> result = bntools.fold(model, torch.rand(1, 3, 8, 8))
        >>> result.model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    seconds: dict[str, float] = {}
    options = FoldOptions(merge_branches, merge_linear, pad_forward, keep_originals)
    with timed(seconds, "plan"):
        if plan is None:
            plan = plan_fold(model, example_inputs, only=only, skip=skip, pad_forward=pad_forward)
        elif pad_forward and not compiled_of(plan).options.pad_forward:
            raise PlanError("Cannot pad forward by this plan: make it with pad_forward=True.")
        if plan.compiled is None and options.merge:
            plan = plan_observed(observe(model, example_inputs), options=options.plan)
    result = carry_out(plan, model, seconds, seed=seed, options=options).result
    return _with_originals(unwrap(model), result) if keep_originals else result


def _with_originals(source: nn.Module, result: Result[Report]) -> Result[Report]:
    """The result, with what is not in it any more kept beside it."""
    before, after = len(recipe_of(source).edits), len(result.recipe.edits)
    if after == before:
        return result
    kept = keep_copies(source, result.model, before, after)
    return replace(result, report=replace(result.report, originals_bytes=kept.nbytes()))


@dataclass(frozen=True)
class Carried:
    """A fold, and the truth about the original that its check found on `examples`.

    `truth` is None where nothing was checked, or not by the model's outputs.
    """

    result: Result[Report]
    truth: Truth | None = None
    examples: Examples | None = None


def carry_out(
    plan: Plan,
    model: nn.Module,
    seconds: dict[str, float],
    *,
    seed: int,
    examples: Examples | None = None,
    options: FoldOptions = _DEFAULT,
) -> Carried:
    """Fold as a plan says, and prove it on inputs drawn from `seed`, or on those given."""
    if not plan.decisions and not (options.merge and plan.compiled is not None):
        unchanged = duplicate(unwrap(model))
        return Carried(Result(unchanged, _report(plan, None, 0, seconds), recipe_of(model)))
    compiled = compiled_for(plan, model)
    if is_scripted(compiled.seen.model):
        return _scripted(plan, compiled, seconds, options=options, seed=seed)
    with timed(seconds, "fold"):
        folded = fold_copy(compiled.seen.model, compiled.folds)
    check = prover = merging = latency = None
    if plan.folds or options.merge:
        with timed(seconds, "check"), peak_memory() as peak:
            prover = Prover(
                compiled.seen.model,
                compiled.seen.fresh(seed) if examples is None else examples,
                watched(compiled.folds),
            )
            plan, folded, check, layers = _proven(plan, compiled, folded, prover)
        latency = _latency(plan, folded, prover.examples, seconds)
        if options.merge:
            with timed(seconds, "merge"):
                plan, folded, check, merging = _merged(plan, folded, check, prover, options)
        plan = replace(plan, decisions=_with_errors(plan.decisions, layers))
        check = replace(check, seed=seed, peak_bytes=peak.bytes)
    recipe = recipe_of(compiled.seen.model).then(folded.recipe)
    if recipe.edits:
        mark(folded.model, recipe)
    report = _report(plan, check, folded.flushed, seconds)
    report = replace(report, merging=merging, latency=latency)
    result = Result(folded.model, report, recipe)
    if prover is None or prover.by_layer:
        return Carried(result)
    return Carried(result, prover.truth, prover.examples)


def _scripted(
    plan: Plan, compiled: Compiled, seconds: dict[str, float], *, options: FoldOptions, seed: int
) -> Carried:
    """The same for TorchScript."""
    examples = compiled.seen.fresh(seed)
    with timed(seconds, "check"):
        done = prove_script(plan, compiled, options, examples)
    check = None if done.check is None else replace(done.check, seed=seed)
    report = _report(done.plan, check, 0, seconds)
    return Carried(Result(done.model, report, done.recipe), done.truth, examples)


def _report(plan: Plan, check: Check | None, flushed: int, seconds: dict[str, float]) -> Report:
    return Report(
        "fold",
        plan.decisions,
        check,
        inputs=plan.inputs,
        warnings=plan.warnings,
        flushed=flushed,
        seconds=seconds,
        versions=versions(),
    )


def _proven(
    plan: Plan, compiled: Compiled, folded: Folded, prover: Prover
) -> tuple[Plan, Folded, Check, LayerErrors]:
    """Check a fold, and undo one after the other the folds that make the check fail."""
    refused: dict[str, Refused] = {}
    proof = _attempt(prover, compiled, folded)
    while not proof and compiled.folds:
        blamed = prover.blame(compiled.folds)
        if len(refused) >= _MOST_CULPRITS:
            blamed = {d.path: "too many folds fail their check" for d in plan.folds}
        for path, why in blamed.items():
            refused[path] = Refused(Reason.CHECK_FAILED, f"undone: {why}")
        plan = replan(plan, refused)
        compiled = compiled_of(plan)
        folded = fold_copy(compiled.seen.model, compiled.folds)
        proof = _attempt(prover, compiled, folded)
    check = Check(proof.native, proof.float64, 0, str(prover.examples), tuple(refused))
    return plan, folded, check, proof.layers


def _latency(
    plan: Plan, folded: Folded, examples: Examples, seconds: dict[str, float]
) -> Latency | None:
    """Whether padding forward made the model faster: against the same fold without it."""
    folds = compiled_of(plan).folds
    padded = [fold.layer.path for fold in folds if any(host.padding for host in fold.hosts)]
    if not padded:
        return None
    left_out = Refused(Reason.SKIPPED, "it would pad")
    without = compiled_of(replan(plan, dict.fromkeys(padded, left_out)))
    with timed(seconds, "latency"):
        before = fold_copy(without.seen.model, without.folds).model
        return compare_latency(before, folded.model, examples)


def _merged(
    plan: Plan, folded: Folded, check: Check, prover: Prover, options: FoldOptions
) -> tuple[Plan, Folded, Check, MergeReport]:
    """Merge what a proven fold left; norm layers that went with it are decided anew."""
    compiled = compiled_of(plan)
    seen, stuck = compiled.seen, frozenset(check.rolled_back)
    inputs = seen.examples, seen.second
    start = Start(seen.model, folded.model, compiled.folds, inputs, compiled.chosen, options, stuck)
    merged = merge_folded(start, prover)
    if merged.proof is not None:
        proof = merged.proof
        undone = (*(path for path in check.rolled_back if path not in merged.norms), *merged.undone)
        check = replace(check, native=proof.native, float64=proof.float64, rolled_back=undone)
    decisions = {d.path: d for after in merged.plans for d in after.folds}
    for path, host in merged.norms.items():
        decisions[path] = Decision(path, "", Action.MERGE, (host,))
    rows = tuple(_decided_anew(d, decisions.get(d.path)) for d in plan.decisions)
    folded = replace(folded, model=merged.model, recipe=folded.recipe.then(merged.recipe))
    return replace(plan, decisions=rows), folded, check, merged.report


def _decided_anew(decision: Decision, after: Decision | None) -> Decision:
    if after is None or decision.action is not Action.KEEP:
        return decision
    return replace(after, kind=decision.kind)


def _with_errors(decisions: Sequence[Decision], errors: LayerErrors) -> tuple[Decision, ...]:
    found = ((decision, errors.get(decision.path)) for decision in decisions)
    return tuple(
        decision if both is None else replace(decision, float64_error=both[0], native_error=both[1])
        for decision, both in found
    )


def _attempt(prover: Prover, compiled: Compiled, folded: Folded) -> Proof:
    try:
        return prover.check(compiled.folds, folded)
    except Exception:
        if not compiled.folds:
            raise
        return Proof(prover.nothing(), None)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a step takes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 4)


def versions() -> dict[str, str]:
    """With what this runs."""
    found = {"python": platform.python_version()}
    for package in ("bntools", "torch", "torchvision"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
