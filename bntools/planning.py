"""From a model to a plan: one decision for every norm layer, and what its fold would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bntools.backward import BackwardPlanner, NormFold, Outcome
from bntools.dataflow.graph import Graph, NormLayer
from bntools.dataflow.reach import Refused
from bntools.errors import PlanError
from bntools.observing import Observation, observe, observe_again
from bntools.report import Action, Decision, Plan, Reason

__all__ = ["plan_fold", "plan_observed"]

Patterns = str | Sequence[str]


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
    return plan_observed(observe(model, example_inputs), only=only, skip=skip)


def plan_observed(
    seen: Observation,
    *,
    only: Patterns = "*",
    skip: Patterns = (),
    refused: Mapping[str, Refused] | None = None,
) -> Plan:
    """Plan on recordings that are there already; `refused` are layers ruled out by other means."""
    chosen = _select(seen.graphs[0].layers, only, skip)
    outcomes = [BackwardPlanner(g, chosen, dict(refused or {})).run() for g in seen.graphs]
    if _differences(outcomes) and seen.examples.shapes != seen.second.shapes:
        seen = observe_again(seen)
    decisions, folds = _decide(seen.graphs, chosen, dict(refused or {}))
    inputs = f"{seen.examples}{' (inferred)' if seen.examples.inferred else ''}"
    return Plan(decisions, inputs, seen.warnings, folds)


def _select(layers: Sequence[NormLayer], only: Patterns, skip: Patterns) -> set[str]:
    """The paths of the norm layers that the patterns leave in; a pattern must match something."""
    wanted = [only] if isinstance(only, str) else list(only)
    unwanted = [skip] if isinstance(skip, str) else list(skip)
    paths = [layer.path for layer in layers]
    for pattern in (*wanted, *unwanted):
        if pattern != "*" and not any(fnmatchcase(path, pattern) for path in paths):
            some = ", ".join(paths[:3]) or "none"
            raise PlanError(
                f"Cannot select {pattern!r}: no norm layer has such a path (there are: {some}"
                f"{', ...' if len(paths) > 3 else ''}). Use a glob such as 'layer1.*'."
            )
    return {
        path for path in paths
        if any(fnmatchcase(path, p) for p in wanted)
        and not any(fnmatchcase(path, p) for p in unwanted)
    }  # fmt: skip


def _decide(
    graphs: Sequence[Graph], chosen: set[str], forced: dict[str, Refused]
) -> tuple[tuple[Decision, ...], tuple[NormFold, ...]]:
    """Decide on every norm layer of graphs recorded from one model with different inputs.

    A fold must come out the same in every graph; where it does not, the layer is kept as
    data-dependent, and whatever was to fold through it is decided again.
    """
    while True:
        outcomes = [BackwardPlanner(graph, chosen, forced).run() for graph in graphs]
        differing = _differences(outcomes)
        if not differing:
            return _decisions(graphs[0], outcomes[0])
        forced.update(differing)


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
            decisions.append(
                Decision(layer.path, layer.kind, Action.FOLD, hosts, detail=found.via)
            )
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


