"""From a model to a plan: one decision for every norm layer, and what its fold would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bntools.dataflow.graph import Graph
from bntools.dataflow.layers import norm_layers
from bntools.dataflow.reach import Refused
from bntools.errors import PlanError
from bntools.modules import get_module, named_tensors, unwrap
from bntools.observing import Observation, observe
from bntools.planning.deciding import decide
from bntools.planning.folds import NormFold, Outcome
from bntools.registry import host_rule
from bntools.report import Action, Decision, Plan, Reason
from bntools.selection import Patterns, select

__all__ = [
    "Compiled",
    "Patterns",
    "compiled_for",
    "compiled_of",
    "plan_fold",
    "plan_observed",
    "replan",
]


def plan_fold(
    model: nn.Module, example_inputs: Any = None, *, only: Patterns = "*", skip: Patterns = ()
) -> Plan:
    """Decide, for every norm layer of a model, whether it folds, where to, or why not.

    The model is run on two different inputs in eval mode and is left as it was. `example_inputs`
    is a tensor, a tuple of positional arguments, or a dict of keyword arguments; without it an
    input is inferred from the first layer that runs. `only` and `skip` are globs on layer paths.

    Raises `InputError` where the model does not run on the inputs, `PlanError` where a pattern
    selects nothing.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> plan = bntools.plan_fold(model, torch.zeros(1, 3, 8, 8))
        >>> [(d.path, d.action.value, d.hosts) for d in plan.decisions]
        [('1', 'fold', ('0',))]
    """
    if not norm_layers(unwrap(model)):
        return Plan(())
    return plan_observed(observe(model, example_inputs), only=only, skip=skip)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A plan in the form that can be carried out, on the tensors that it was made for."""

    seen: Observation
    chosen: frozenset[str]
    folds: tuple[NormFold, ...]
    versions: dict[str, tuple[int, int]]


def plan_observed(seen: Observation, *, only: Patterns = "*", skip: Patterns = ()) -> Plan:
    """Plan on recordings that are there already."""
    return _planned(
        seen, frozenset(select([layer.path for layer in seen.graphs[0].layers], only, skip)), {}
    )


def replan(plan: Plan, refused: Mapping[str, Refused]) -> Plan:
    """The same plan with some layers ruled out, and with them whatever folds through them."""
    compiled = compiled_of(plan)
    return _planned(compiled.seen, compiled.chosen, refused)


def compiled_of(plan: Plan) -> Compiled:
    """What `plan_fold` keeps with a plan."""
    if not isinstance(plan.compiled, Compiled):
        raise PlanError("Cannot carry out this plan: it was not made by plan_fold in this process.")
    return plan.compiled


def compiled_for(plan: Plan, model: nn.Module) -> Compiled:
    """The same, for the model that the plan was made for, unchanged since."""
    compiled = compiled_of(plan)
    if compiled.seen.source is not unwrap(model):
        raise PlanError("Cannot carry out this plan: it is of another model. Plan this one.")
    if compiled.versions != _tensor_versions(compiled.seen.model):
        raise PlanError("Cannot carry out this plan: the model has changed since. Plan again.")
    return compiled


def _planned(seen: Observation, chosen: frozenset[str], refused: Mapping[str, Refused]) -> Plan:
    forced = dict(refused)
    outcomes = [decide(graph, chosen, forced) for graph in seen.graphs]
    while refusals := _differences(outcomes) or _refused_by_hosts(seen.model, outcomes[0]):
        forced.update(refusals)
        outcomes = [decide(graph, chosen, forced) for graph in seen.graphs]
    decisions, folds = _decisions(seen.graphs[0], outcomes[0])
    inputs = f"{seen.examples}{' (inferred)' if seen.examples.inferred else ''}"
    compiled = Compiled(seen, chosen, folds, _tensor_versions(seen.model))
    return Plan(decisions, inputs, seen.warnings, compiled)


def _refused_by_hosts(model: nn.Module, outcome: Mapping[str, Outcome]) -> dict[str, Refused]:
    """What the rules of registered hosts refuse to absorb."""
    found: dict[str, Refused] = {}
    for path, fold in outcome.items():
        for host in fold.hosts if isinstance(fold, NormFold) else ():
            module = get_module(model, host.path)
            rule = host_rule(module) if host.registered else None
            answer = rule.after(module, host.affine) if rule is not None else None
            if isinstance(answer, Reason):
                found[path] = Refused(answer, f"the rule of {host.path} refuses it")
    return found


def _tensor_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        f"{path}.{name}": (id(tensor), -1 if tensor.is_inference() else tensor._version)
        for path, _, name, tensor in named_tensors(model)
    }


def _differences(outcomes: Sequence[dict[str, Outcome]]) -> dict[str, Refused]:
    found: dict[str, Refused] = {}
    for path, first in outcomes[0].items():
        for other in (outcome[path] for outcome in outcomes[1:]):
            if isinstance(first, NormFold):
                if isinstance(other, Refused):
                    found[path] = _differs(other)
                elif not _same_hosts(first, other):
                    found[path] = Refused(Reason.DATA_DEPENDENT, "its hosts depend on the input")
            elif isinstance(other, NormFold):
                found[path] = _differs(first)
    return found


def _differs(refused: Refused) -> Refused:
    if refused.reason is Reason.BIAS_NOT_USED:
        return refused
    return Refused(
        Reason.DATA_DEPENDENT, f"for some inputs it folds, for others not: {refused.detail}"
    )


def _same_hosts(a: NormFold, b: NormFold) -> bool:
    return len(a.hosts) == len(b.hosts) and all(
        x.same_as(y) for x, y in zip(a.hosts, b.hosts, strict=True)
    )


def _decisions(
    graph: Graph, outcome: dict[str, Outcome]
) -> tuple[tuple[Decision, ...], tuple[NormFold, ...]]:
    decisions = []
    for layer in graph.layers:
        found = outcome[layer.path]
        if isinstance(found, NormFold):
            hosts = tuple(dict.fromkeys(host.path for host in found.hosts))
            decisions.append(Decision(layer.path, layer.kind, Action.FOLD, hosts, detail=found.via))
        else:
            decisions.append(
                Decision(layer.path, layer.kind, Action.KEEP, (), found.reason, found.detail)
            )
    order = _execution_order(graph)
    decisions.sort(key=lambda d: order.get(d.path, len(graph.nodes)))
    folds = [f for f in outcome.values() if isinstance(f, NormFold)]
    folds.sort(key=lambda f: order[f.layer.path])
    return tuple(decisions), tuple(folds)


def _execution_order(graph: Graph) -> dict[str, int]:
    return {path: frames[0].start for path, frames in graph.frames.items()}
