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
from bntools.examples import Examples
from bntools.modules import duplicate, unwrap
from bntools.planning import (
    Compiled,
    Patterns,
    compiled_for,
    compiled_of,
    plan_fold,
    replan,
)
from bntools.proving import Proof, Prover
from bntools.recipe import mark, recipe_of
from bntools.report import Check, Decision, Plan, Reason, Report, Result
from bntools.resources import peak_memory
from bntools.surgery.folding import Folded, fold_copy

__all__ = ["Carried", "carry_out", "fold", "timed", "versions"]

_MOST_CULPRITS = 16
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
) -> Result[Report]:
    """Fold the norm layers of a model into its linear layers, and prove the result.

    The argument is left as it was; the result is a copy in eval mode, checked on fresh inputs
    drawn from `seed`, in float64 and in the model's own dtype. A fold that fails its check is
    undone, reported as check-failed, and the rest is delivered. `example_inputs`, `only` and
    `skip` are those of `plan_fold`; `plan` is one that it made for this model.

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
    with timed(seconds, "plan"):
        if plan is None:
            plan = plan_fold(model, example_inputs, only=only, skip=skip)
    return carry_out(plan, model, seconds, seed=seed).result


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
) -> Carried:
    """Fold as a plan says, and prove it on inputs drawn from `seed`, or on those given."""
    if not plan.decisions:
        unchanged = duplicate(unwrap(model))
        return Carried(Result(unchanged, _report(plan, None, 0, seconds), recipe_of(model)))
    compiled = compiled_for(plan, model)
    with timed(seconds, "fold"):
        folded = fold_copy(compiled.seen.model, compiled.folds)
    check = prover = None
    if plan.folds:
        with timed(seconds, "check"), peak_memory() as peak:
            prover = Prover(
                compiled.seen.model,
                compiled.seen.fresh(seed) if examples is None else examples,
                [d.path for d in plan.folds],
            )
            plan, folded, check, layers = _proven(plan, compiled, folded, prover)
        plan = replace(plan, decisions=_with_errors(plan.decisions, layers))
        check = replace(check, seed=seed, peak_bytes=peak.bytes)
    recipe = recipe_of(compiled.seen.model).then(folded.recipe)
    if recipe.edits:
        mark(folded.model, recipe)
    result = Result(folded.model, _report(plan, check, folded.flushed, seconds), recipe)
    if prover is None or prover.by_layer:
        return Carried(result)
    return Carried(result, prover.truth, prover.examples)


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
