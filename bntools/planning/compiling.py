"""From a model to a plan: one decision for every norm layer, and what its fold would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from bntools.dataflow.layers import may_have_chains, norm_layers
from bntools.dataflow.reach import Refused
from bntools.errors import InputError, PlanError
from bntools.modules import get_module, named_tensors, unwrap
from bntools.norms import padding_of
from bntools.observing import Observation, observe
from bntools.planning.agreement import decisions_of, settled
from bntools.planning.explaining import explain
from bntools.planning.folds import NormFold, Outcome
from bntools.planning.options import PlanOptions
from bntools.planning.scripts import is_scripted, plan_script
from bntools.registry import host_rule
from bntools.report import Decision, Explanation, Plan, Reason
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


_DEFAULT = PlanOptions()


def plan_fold(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    only: Patterns = "*",
    skip: Patterns = (),
    pad_forward: bool = False,
) -> Plan:
    """Decide, for every norm layer of a model, whether it folds, where to, or why not.

    The model is run on two different inputs in eval mode and is left as it was. `example_inputs`
    is a tensor, a tuple of positional arguments, or a dict of keyword arguments; without it an
    input is inferred from the first layer that runs. `only` and `skip` are globs on layer paths.
    A norm folds into the linear layers before it or, where it cannot, into those after it;
    `pad_forward` allows convolutions that pad with zeros among these, which then pad with the value
    that the norm maps to zero.

    Raises `InputError` where the model does not run on the inputs, `PlanError` where a pattern
    selects nothing.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> plan = bntools.plan_fold(model, torch.zeros(1, 3, 8, 8))
        >>> [(d.path, d.action.value, d.hosts) for d in plan.decisions]
        [('1', 'fold', ('0',))]
    """
    options = PlanOptions(pad_forward=pad_forward)
    if norm_layers(unwrap(model)):
        return plan_observed(observe(model, example_inputs), only=only, skip=skip, options=options)
    if not may_have_chains(unwrap(model)):
        return Plan(())
    try:
        seen = observe(model, example_inputs)
    except InputError:  # a model without norm layers need not run
        return Plan(())
    if not seen.graphs[0].layers:
        return Plan(())
    return plan_observed(seen, only=only, skip=skip, options=options)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A plan in the form that can be carried out, on the tensors that it was made for."""

    seen: Observation
    chosen: frozenset[str]
    folds: tuple[NormFold, ...]
    versions: dict[str, tuple[int, int]]
    options: PlanOptions = _DEFAULT
    script: nn.Module | None = None
    """Of TorchScript, the copy in float64 that torch's pass has folded."""

    def explain(self, decision: Decision) -> Explanation:
        """The way from a norm layer to its hosts, or to what stands in between."""
        if is_scripted(self.seen.model):
            return Explanation(decision)
        return explain(self.seen.graphs[0], self.folds, decision)


def plan_observed(
    seen: Observation,
    *,
    only: Patterns = "*",
    skip: Patterns = (),
    options: PlanOptions = _DEFAULT,
) -> Plan:
    """Plan on recordings that are there already."""
    if is_scripted(seen.model):
        decisions, script = plan_script(seen, only, skip)
        versions = _tensor_versions(seen.model)
        compiled = Compiled(seen, frozenset(), (), versions, options, script)
        return Plan(decisions, _inputs(seen), seen.warnings, compiled)
    chosen = frozenset(select([layer.path for layer in seen.graphs[0].layers], only, skip))
    return _planned(seen, chosen, {}, options)


def replan(plan: Plan, refused: Mapping[str, Refused]) -> Plan:
    """The same plan with some layers ruled out, and with them whatever folds through them."""
    compiled = compiled_of(plan)
    return _planned(compiled.seen, compiled.chosen, refused, compiled.options)


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


def _planned(
    seen: Observation,
    chosen: frozenset[str],
    refused: Mapping[str, Refused],
    options: PlanOptions,
) -> Plan:
    refusing = partial(_refused_by_hosts, seen.model)
    outcome = settled(seen.graphs, chosen, refused, options, refusing)
    decisions, folds = decisions_of(seen.graphs[0], outcome)
    compiled = Compiled(seen, chosen, folds, _tensor_versions(seen.model), options)
    return Plan(decisions, _inputs(seen), seen.warnings, compiled)


def _inputs(seen: Observation) -> str:
    return f"{seen.examples}{' (inferred)' if seen.examples.inferred else ''}"


def _refused_by_hosts(model: nn.Module, outcome: Mapping[str, Outcome]) -> dict[str, Refused]:
    """What the rules of registered hosts refuse to absorb, and convolutions that cannot pad."""
    found: dict[str, Refused] = {}
    for path, fold in outcome.items():
        for host in fold.hosts if isinstance(fold, NormFold) else ():
            if not (host.registered or host.padding):
                continue
            module = get_module(model, host.path)
            if host.padding and padding_of(module) != host.padding:
                why = f"{host.path} is no plain convolution, whose padding could be another one"
                found[path] = Refused(Reason.PADDED, why)
            rule = host_rule(module) if host.registered else None
            absorb = None if rule is None else rule.before if host.before else rule.after
            answer = absorb(module, host.affine) if absorb is not None else None
            if isinstance(answer, Reason):
                found[path] = Refused(answer, f"the rule of {host.path} refuses it")
    return found


def _tensor_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        f"{path}.{name}": (id(tensor), -1 if tensor.is_inference() else tensor._version)
        for path, _, name, tensor in named_tensors(model)
    }
