"""Folding TorchScript: what torch's pass made, brought back to its dtypes, and proven or undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bntools.equivalence import Truth, compare, find_truth, run
from bntools.errors import SurgeryError
from bntools.examples import Examples
from bntools.modules import duplicate, named_tensors
from bntools.planning import Compiled, FoldOptions
from bntools.planning.scripts import ADVICE
from bntools.recipe import Edit, Recipe, mark, recipe_of
from bntools.report import Action, Check, Decision, Equivalence, Plan, Reason
from bntools.tolerance import float64_limit

__all__ = ["Proven", "prove_script"]


@dataclass(frozen=True)
class Proven:
    """A compiled model, folded if its check allows it: all that torch's pass did, or nothing."""

    model: nn.Module
    plan: Plan
    recipe: Recipe
    check: Check | None = None
    truth: Truth | None = None


def prove_script(
    plan: Plan, compiled: Compiled, options: FoldOptions, examples: Examples
) -> Proven:
    """Check what torch's pass folded, in float64 and in the model's dtypes, and undo it if need be.

    Raises `SurgeryError` for options that take a model apart.
    """
    if options.merge or options.pad_forward or options.keep_originals:
        raise SurgeryError(
            "Cannot merge, pad forward or keep originals in TorchScript, which torch's own pass"
            f" folds as a whole. Leave these options out, or {ADVICE}."
        )
    source = compiled.seen.model
    before = recipe_of(source)
    if compiled.script is None or not plan.folds:
        return Proven(_unchanged(source), plan, before)
    truth = find_truth(source, examples)
    candidate = _in_dtypes(compiled.script, source)
    check = _checked(truth, compiled.script, candidate, examples)
    if not check:
        undone = replace(plan, decisions=tuple(_undone(d, check) for d in plan.decisions))
        passed = _checked(truth, None, source, examples)
        rolled_back = tuple(decision.path for decision in plan.folds)
        return Proven(_unchanged(source), undone, before, replace(passed, rolled_back=rolled_back))
    recipe = before.then(Recipe(tuple(_edits(plan, source, candidate))))
    mark(candidate, recipe)
    return Proven(candidate, plan, recipe, check, truth)


def _unchanged(source: nn.Module) -> nn.Module:
    copied = duplicate(source)
    copied.eval()
    return copied


def _in_dtypes(exact: nn.Module, source: nn.Module) -> nn.Module:
    """A copy of the folded model in the dtypes and on the device of the original, rounded once."""
    made = duplicate(exact)
    old = {_name(path, name): tensor for path, _, name, tensor in named_tensors(source)}
    wanted: dict[int, Tensor] = {}
    for path, _, name, tensor in named_tensors(made):
        like = old.get(_name(path, name), old.get(_name(path, "weight")))
        if like is not None:
            wanted[id(tensor)] = like

    def cast(tensor: Tensor) -> Tensor:
        like = wanted.get(id(tensor))
        return tensor if like is None else tensor.to(like.device, like.dtype)

    with torch.no_grad():
        made._apply(cast)  # type: ignore[no-untyped-call]  # noqa: SLF001 - what .to() does, tensor by tensor
    return made


def _name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _checked(
    truth: Truth, exact: nn.Module | None, candidate: nn.Module, examples: Examples
) -> Check:
    native = _judged(truth, candidate, examples, None)
    double = None
    if truth.is_float64 and exact is not None:
        noise = (o.reference_error for o in compare(truth, truth.exact).outputs)
        allowed = float64_limit(max(noise, default=0.0), truth.coarsest)
        double = _judged(truth, exact, examples.cast(torch.float64, "cpu"), allowed)
    return Check(native, double, 0, str(examples))


def _judged(
    truth: Truth, candidate: nn.Module, examples: Examples, allowed: float | None
) -> Equivalence:
    try:
        outputs, _ = run(candidate, examples)
    except Exception:  # noqa: BLE001 - a fold that does not run gives no output
        outputs = {}
    return compare(truth, outputs, inputs=str(examples), allowed=allowed)


def _undone(decision: Decision, check: Check) -> Decision:
    if decision.action is not Action.FOLD:
        return decision
    judged = check.native if not check.native or check.float64 is None else check.float64
    worst = judged.worst
    why = "it does not run"
    if worst is not None:
        why = worst.note or f"{worst.name} is off by {worst.error:.2g} (limit {worst.limit:.2g})"
    detail = f"undone: torch's pass folds the model wrong, {why}; {ADVICE}"
    return replace(
        decision, action=Action.KEEP, hosts=(), reason=Reason.CHECK_FAILED, detail=detail
    )


def _edits(plan: Plan, source: nn.Module, folded: nn.Module) -> Iterator[Edit]:
    """What a fold of the Python model would have been."""
    old, new = _shapes(source), _shapes(folded)
    for host in dict.fromkeys(host for decision in plan.folds for host in decision.hosts):
        bias = _name(host, "bias")
        if bias in new and bias not in old:
            yield Edit("add-bias", host, new[bias][0])
    for decision in plan.folds:
        yield Edit("drop-norm", decision.path)


def _shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    return {_name(path, name): tensor.shape for path, _, name, tensor in named_tensors(model)}
