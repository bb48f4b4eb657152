"""Merging a folded model: decide, merge, fold what folds then, until nothing changes; prove it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape

import torch
from torch import Tensor, nn

from bntools.absorb import SMALLEST_NORMAL
from bntools.dataflow.graph import Graph
from bntools.dataflow.recorder import record
from bntools.dataflow.twins import first_difference
from bntools.equivalence import in_float64
from bntools.errors import PlanError, SurgeryError
from bntools.examples import Examples
from bntools.merging.branches import Found, branch_merges, places
from bntools.merging.chains import chain_merges
from bntools.merging.merges import Key, Planned, Undone, carry_out, tensor_of
from bntools.merging.probing import Probed, probed
from bntools.merging.sizes import size_of
from bntools.modules import duplicate
from bntools.observing import observe
from bntools.planning import FoldOptions, NormFold, absorptions, compiled_of, plan_observed
from bntools.proving import Proof, Prover
from bntools.recipe import Recipe, set_tensors
from bntools.report import Merge, MergeReport, Plan, Reason
from bntools.surgery.folding import Folded, fold_copy, fold_in_place

__all__ = ["Merged", "Start", "merge_folded"]

_MOST_CULPRITS = 16
_UNCHECKED = Merge(
    "",
    "branches",
    (),
    reason=Reason.CHECK_FAILED,
    detail="the model's outputs are empty or NaN, so that no merge could be checked",
)


@dataclass(frozen=True, eq=False)
class Start:
    """A folded model: of which original, by which folds, and on which two inputs it was recorded.

    `chosen` are the paths of the norm layers that may go, `stuck` those whose own fold was undone.
    """

    original: nn.Module
    folded: nn.Module
    folds: tuple[NormFold, ...]
    inputs: tuple[Examples, Examples]
    chosen: frozenset[str]
    options: FoldOptions
    stuck: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged model, and what led to it after the first fold.

    `norms` has the host of each norm layer that was merged; `plans` are the further folds.
    """

    model: nn.Module
    recipe: Recipe
    report: MergeReport
    norms: Mapping[str, str] = field(default_factory=dict)
    plans: tuple[Plan, ...] = ()
    proof: Proof | None = None
    undone: tuple[str, ...] = ()


@dataclass(eq=False)
class _Way:
    """A model on its way, and the steps so far: single merges, and the folds that follow them."""

    model: nn.Module
    steps: list[Planned | tuple[NormFold, ...]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    left: dict[str, tuple[Merge, ...]] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    unmade: dict[Key, str] = field(default_factory=dict)

    @property
    def merges(self) -> list[Planned]:
        """The merges among the steps."""
        return [step for step in self.steps if isinstance(step, Planned)]


def merge_folded(start: Start, prover: Prover) -> Merged:
    """Merge what a folded model's options ask for; a merge that fails the check is undone.

    The folded model is left as it was.
    """
    if prover.by_layer:
        return Merged(start.folded, Recipe(), MergeReport(left=(_UNCHECKED,)))
    before = size_of(start.original, _recorded(start.original, start.inputs[0]))
    failed: dict[Key, str] = {}
    way, proof = _checked(start, prover, Undone())
    while not proof and way.merges:
        blamed = _blamed(start, prover, failed, [merge.key for merge in way.merges])
        if len(failed) + len(blamed) > _MOST_CULPRITS:
            blamed = {merge.key: "too many merges fail their check" for merge in way.merges}
        failed |= blamed
        way, proof = _checked(start, prover, Undone(failed))
    left = tuple(row for rows in way.left.values() for row in rows)
    rows = tuple(merge.row for merge in way.merges)
    after = size_of(way.model, _recorded(way.model, start.inputs[0]))
    report = MergeReport(rows, left, before, after)
    undone = tuple(dict.fromkeys(host for *_, host in failed))
    if not way.merges:
        return Merged(start.folded, Recipe(), report, undone=undone)
    norms = {path: merge.host for merge in way.merges for path in merge.norms}
    return Merged(way.model, way.recipe, report, norms, tuple(way.plans), proof, undone)


def _recorded(model: nn.Module, examples: Examples, *, calls: bool = False) -> Graph:
    fed = examples.copied()
    return record(model, fed.args, fed.kwargs, calls=calls)


def _checked(start: Start, prover: Prover, undone: Undone) -> tuple[_Way, Proof]:
    """Merge all but what is undone, and compare the result with the original."""
    way = _Way(duplicate(start.folded))
    try:
        _merge_all(way, start, undone)
        double = _in_float64(start, way)
        _round_once(way, double)
        proof = prover.check(start.folds, Folded(way.model, Recipe(), 0), double=double)
    except Exception:
        if not way.merges:
            raise
        proof = Proof(prover.nothing(), None)
    return way, proof


def _blamed(
    start: Start, prover: Prover, failed: dict[Key, str], keys: Sequence[Key]
) -> dict[Key, str]:
    """The first merge with which the check fails, found by bisection."""

    def failure(count: int) -> str:
        """Why the check fails with the first of the merges only; empty where it passes."""
        _, proof = _checked(start, prover, Undone(failed, frozenset(keys[:count])))
        worst = proof.failure
        if worst is None:
            return ""
        error = f"off by {worst.error:.2g} (limit {worst.limit:.2g})"
        return f"{worst.name}: {worst.note or error}"

    good, bad = 0, len(keys)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if failure(middle) else (middle, bad)
    return {keys[bad - 1]: failure(bad) or "it fails together with others only"}


def _merge_all(way: _Way, start: Start, undone: Undone) -> None:
    while True:
        graphs = [_recorded(way.model, examples) for examples in start.inputs]
        found = list(_found(start, way.model, graphs, undone))
        way.left.update({kind: each.left for kind, each in found})
        merges = next((each.merges for _, each in found if each.merges), ())
        if not merges:
            return
        steps = len(way.steps)
        for merge in merges:
            _apply(way, merge)
        undone = replace(undone, unmade=dict(way.unmade))
        if len(way.steps) > steps:
            _fold_again(way, start)


def _found(
    start: Start, model: nn.Module, graphs: Sequence[Graph], undone: Undone
) -> Iterator[tuple[str, Found]]:
    if start.options.merge_branches:
        yield "branches", _branches(start, model, graphs, undone)
    if start.options.merge_linear:
        each = [chain_merges(model, graph, start.chosen, undone) for graph in graphs]
        yield "linear", _agreed(each)


def _branches(start: Start, model: nn.Module, graphs: Sequence[Graph], undone: Undone) -> Found:
    paths: list[str] = sorted(set().union(*map(places, graphs)))
    if not paths:
        return Found((), ())
    pairs, failures = _probed(start, model, graphs, paths)
    return _agreed([branch_merges(model, p, failures, start.chosen, undone) for p in pairs])


def _probed(
    start: Start, model: nn.Module, graphs: Sequence[Graph], paths: Sequence[str]
) -> tuple[list[Probed], dict[str, str]]:
    """The recordings with probes beside those without; modules that differ then are left out."""
    others: dict[str, str] = {}
    while True:
        wanted = [path for path in paths if path not in others]
        with probed(model, wanted) as failures:
            try:
                pairs = [
                    Probed(graph, _recorded(model, examples, calls=True))
                    for graph, examples in zip(graphs, start.inputs, strict=True)
                ]
            except Exception:  # a forward that was traced may raise anything
                if not wanted:
                    raise
                pairs = []
        if not pairs:
            wrong = [path for path in wanted if not _runs_traced(start, model, path)]
            why = "its forward fails when torch.fx traces it"
            others |= dict.fromkeys(wrong or wanted, why)
            continue
        others |= failures
        found = [first_difference(pair.graph, pair.twin) for pair in pairs]
        node = next((each for each in found if each is not None), None)
        if node is None or not wanted:
            return pairs, others
        blamed = [path for path in node.stack if path in wanted][-1:] or wanted
        why = "torch.fx sees other values in its forward, which writes in place"
        others |= dict.fromkeys(blamed, why)


def _runs_traced(start: Start, model: nn.Module, path: str) -> bool:
    """Whether the model runs where only this one of its modules runs as torch.fx sees it."""
    try:
        with probed(model, [path]):
            for examples in start.inputs:
                _recorded(model, examples)
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


def _agreed(found: Sequence[Found]) -> Found:
    """What all recordings lead to; what only some of them do is left."""
    first = found[0]
    merges, left = [], list(first.left)
    for merge in first.merges:
        if all(any(merge.same_as(m) for m in other.merges) for other in found[1:]):
            merges.append(merge)
            continue
        why = "it does not hold for every input that was recorded"
        left.append(_refused(merge, Reason.DATA_DEPENDENT, why))
    return Found(tuple(merges), tuple(left))


def _refused(merge: Planned, reason: Reason, detail: str) -> Merge:
    return replace(merge.row, into="", rewritten=None, reason=reason, detail=detail)


def _apply(way: _Way, merge: Planned) -> None:
    try:
        way.model = carry_out(way.model, merge)
    except SurgeryError as error:
        way.unmade[merge.key] = str(error).partition(": ")[2].rstrip(".")
        return
    way.steps.append(merge)
    way.recipe = way.recipe.then(Recipe((merge.edit,)))


def _fold_again(way: _Way, start: Start) -> None:
    """Fold the norm layers that follow one layer now."""
    graph = _recorded(way.model, start.inputs[0])
    chosen = start.chosen - start.stuck
    if not chosen.intersection(layer.path for layer in graph.layers):
        return
    seen = observe(way.model, start.inputs[0])
    gone = {layer.path for layer in seen.graphs[0].layers} - chosen
    plan = plan_observed(seen, skip=sorted(map(escape, gone)), options=start.options.plan)
    if not plan.folds:
        return
    folds = compiled_of(plan).folds
    folded = fold_copy(way.model, folds)
    way.model = folded.model
    way.steps.append(folds)
    way.plans.append(plan)
    way.recipe = way.recipe.then(folded.recipe)


def _in_float64(start: Start, way: _Way) -> nn.Module:
    """The same steps on a copy in float64: from the original's parameters to the last kernel."""
    double = fold_in_place(in_float64(start.original), start.folds)
    for step in way.steps:
        double = (
            carry_out(double, step) if isinstance(step, Planned) else fold_in_place(double, step)
        )
    return double


def _round_once(way: _Way, double: nn.Module) -> None:
    """Give what was merged the numbers of the float64 copy, rounded once."""
    mine, exact = tensor_of(way.model), tensor_of(double)
    tensors: dict[str, Tensor] = {}
    for name in _touched(way):
        try:
            old, new = mine(name), exact(name)
        except (KeyError, PlanError):
            continue  # it went with a later merge
        tensors[name] = _rounded(new, old)
    set_tensors(way.model, tensors)


def _touched(way: _Way) -> Iterator[str]:
    for step in way.steps:
        if isinstance(step, Planned):
            yield from (f"{step.host}.weight", f"{step.host}.bias")
            continue
        for absorption in absorptions(step).values():
            if not absorption.host.registered:
                yield absorption.host.weight
                yield from [absorption.host.bias] if absorption.host.bias else []


def _rounded(exact: Tensor, like: Tensor) -> Tensor:
    new = exact.detach().to(like.device, like.dtype, copy=True)
    if new.dtype != torch.float16:
        new[new.abs() < SMALLEST_NORMAL] = 0
    return new
