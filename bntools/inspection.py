"""Inspecting: every norm layer, its health, and where it would fold or why not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntools.affine import Affine
from bntools.dataflow.graph import Kind
from bntools.dataflow.layers import BatchNorm, may_have_chains, norm_layers
from bntools.errors import BNToolsError
from bntools.examples import Examples, given
from bntools.health import NormFacts, findings
from bntools.modules import named_modules, unwrap
from bntools.planning import Absorption, absorptions, compiled_of, plan_fold
from bntools.report import Decision, Inspection, LayerHealth, Plan, Range, Reason

__all__ = ["inspect"]

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_INPUT_DEPENDENT = (
    *_INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)  # fmt: skip
_INPUT_DEPENDENT_NAME = re.compile(
    r"(Layer|Group|Instance|RMS|Rms|Response|Evo|Simple)Norm(\d?d|\d|Act|Exp|Tlu|Fp32|[BS]\da?)*$"
)
_VALUES = {"mean": "running_mean", "variance": "running_var", "gamma": "weight", "beta": "bias"}


def inspect(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Examine every norm layer of a model: statistics, findings, and what a fold would do with it.

    The model is run as `plan_fold` runs it, and is left as it was. Where it does not run, or no
    input can be inferred, the layers have no decision and a warning says why. Layers are in
    execution order, and behind them those that no plan has: input-dependent ones (LayerNorm,
    GroupNorm and the like), and instance norms with running statistics. `frozen` layers have
    statistics that no forward changes, also in training mode: FrozenBatchNorm2d and its like, and
    layers with momentum 0 (which, in training mode, normalise with batch statistics all the same).

    Arithmetic with constants (LayerScale, a batch norm by hand) is listed, with `affine` set.

    The codes of the findings; "half" is half of a layer's channels or more:

    - error: `nan-or-inf` (statistics, gamma, beta, or the scale and shift that they give),
      `negative-variance`
    - warning: `uninitialized` (lazy, or on the meta device), `training-mode` (a norm below a model
      in eval mode), `no-running-statistics`, `never-updated` (all means 0, all variances 1),
      `fold-overflow` (the folded weight does not fit into its dtype, so it is not folded)
    - warning for half, else info: `tiny-variance` (0 or more, and under eps; trained networks have
      that), `dead-channels` (|gamma| under 1e-5)
    - info: `huge-variance` (over 1e8: values near the largest float16), `fold-subnormal`,
      `biased-conv` (its bias is redundant), `not-planned`, and about the whole model:
      `training-mode`, `no-batches-counted` (though there are statistics), `zero-momentum`,
      `mixed-eps`, `mixed-momentum`

    Raises `InputError` for example inputs of a type that no model takes.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> inspection = bntools.inspect(model, torch.zeros(1, 3, 8, 8))
        >>> [(f.path, f.severity.value, f.code) for f in inspection.findings]
        [('1', 'warning', 'never-updated'), ('1', 'info', 'biased-conv')]
    """
    examples = None if example_inputs is None else given(example_inputs)
    source = _bare(model)
    modules = dict(named_modules(source))
    norms = {layer.path: layer.kind for layer in norm_layers(source)}
    plan, warnings = _plan(source, examples) if norms or may_have_chains(source) else (None, ())
    if not norms and (plan is None or not plan.decisions):
        plan, warnings = None, ()
    facts = tuple(_all_facts(source, plan, modules, norms))
    return Inspection(
        tuple(f.health for f in facts),
        findings(facts, training=source.training),
        inputs=plan.inputs if plan is not None else "",
        warnings=warnings,
        plan=plan,
    )


def _all_facts(
    model: nn.Module,
    plan: Plan | None,
    modules: Mapping[str, nn.Module],
    norms: Mapping[str, str],
) -> Iterator[NormFacts]:
    """In execution order, and behind it what no plan has."""
    seen = _Seen(model.training, plan is not None)
    if plan is not None:
        seen.add(plan)
    for path in dict.fromkeys((*seen.decisions, *norms)):
        if path in norms:
            yield _facts(modules[path], path, norms[path], seen)
        else:
            yield _affine_facts(seen.decisions[path], seen)
    for path in _uncounted_paths(modules, norms):
        yield _uncounted(modules[path], path, seen)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is known about the model, and by a plan about each norm layer, by its path.

    `training` is the mode of the model, `affines` are the maps that the layers apply, `biased` the
    hosts that have a bias, `flushed` the numbers of values that the folds would set to zero.
    """

    training: bool
    planned: bool
    decisions: dict[str, Decision] = field(default_factory=dict)
    affines: dict[str, Affine] = field(default_factory=dict)
    biased: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flushed: Counter[str] = field(default_factory=Counter)

    def add(self, plan: Plan) -> None:
        """Take over what a plan knows."""
        compiled = compiled_of(plan)
        graph = compiled.seen.graphs[0]
        self.decisions.update({decision.path: decision for decision in plan.decisions})
        for node in graph.of_kind(Kind.AFFINE):
            if isinstance(node.norm.affine, Affine):
                self.affines[node.norm.owner] = node.norm.affine
        last: dict[str, str] = {}
        for fold in compiled.folds:
            after = [host for host in fold.hosts if not host.before]
            linear = [h for h in after if h.path not in self.affines]
            own = [h for h in linear if h.weight not in last and h.bias and not h.gains_bias]
            self.biased[fold.layer.path] = tuple(host.path for host in own)
            last.update({host.weight: fold.layer.path for host in fold.hosts})
        for weight, absorption in absorptions(compiled.folds).items():
            self.flushed[last[weight]] += _flushed(absorption, graph.tensors)


def _flushed(absorption: Absorption, tensors: Mapping[str, Tensor]) -> int:
    host = absorption.host
    if host.registered:
        return 0
    bias = tensors.get(host.bias) if host.bias is not None else None
    with torch.no_grad():
        return absorption.absorbed(tensors[host.weight], bias).flushed


def _bare(model: nn.Module) -> nn.Module:
    return model if isinstance(model, torch.jit.ScriptModule) else unwrap(model)


def _plan(model: nn.Module, examples: Examples | None) -> tuple[Plan | None, tuple[str, ...]]:
    """The plan and its warnings; a model that cannot be planned is still examined."""
    try:
        plan = plan_fold(model, examples)
    except Exception as error:  # noqa: BLE001 (whatever a model raises is part of the answer)
        known = isinstance(error, BNToolsError)
        why = " ".join(str(error if known else f"{type(error).__name__}: {error}").split())
        return None, (f"health only, without the decisions of a plan: {why}",)
    return plan, plan.warnings


def _uncounted_paths(modules: Mapping[str, nn.Module], norms: Mapping[str, str]) -> Iterator[str]:
    """The layers that normalise, but are in no plan; each once."""
    seen = {id(modules[path]) for path in norms}
    for path, module in modules.items():
        if id(module) not in seen and _is_input_dependent(module):
            yield path
        seen.add(id(module))


def _is_input_dependent(module: nn.Module) -> bool:
    if isinstance(module, _INPUT_DEPENDENT):
        return True
    names = [_kind(module), *(cls.__name__ for cls in type(module).__mro__)]
    return any(_INPUT_DEPENDENT_NAME.search(name) for name in names)


def _kind(module: nn.Module) -> str:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return str(getattr(module, "original_name", "")) if scripted else type(module).__name__


def _uncounted(module: nn.Module, path: str, seen: _Seen) -> NormFacts:
    facts = _facts(module, path, _kind(module), seen)
    tracked = _tensor(module, "running_mean") is not None
    health = replace(facts.health, input_dependent=not tracked)
    return replace(facts, health=health, stateless=False, unplanned=tracked and seen.planned)


def _facts(module: nn.Module, path: str, kind: str, seen: _Seen) -> NormFacts:
    tensors = {name: _tensor(module, attribute) for name, attribute in _VALUES.items()}
    values = {name: _values(t) for name, t in tensors.items() if t is not None and _readable(t)}
    health = _health(module, path, kind, values)
    return NormFacts(
        replace(health, decision=seen.decisions.get(path)),
        values,
        affine=seen.affines.get(path) or _affine(values, health.eps),
        uninitialized=any(t is not None and not _readable(t) for t in tensors.values()),
        stateless=isinstance(module, (BatchNorm, torch.jit.ScriptModule))
        and (tensors["mean"] is None or tensors["variance"] is None),
        in_training=_stays_in_training(module, path, seen),
        biased=seen.biased.get(path, ()),
        flushed=seen.flushed[path],
    )


def _affine_facts(decision: Decision, seen: _Seen) -> NormFacts:
    """An affine that is no norm layer: its scale is shown as a gamma."""
    found = seen.affines.get(decision.path)
    health = LayerHealth(decision.path, decision.kind, decision=decision, affine=True)
    if found is not None:
        health = replace(health, channels=found.channels, gamma=_range(found.scale))
    return NormFacts(health, affine=found, flushed=seen.flushed[decision.path])


def _health(module: nn.Module, path: str, kind: str, values: dict[str, Tensor]) -> LayerHealth:
    momentum = _number(module, "momentum")
    tracked = _tensor(module, "num_batches_tracked")
    return LayerHealth(
        path,
        kind,
        channels=_channels(module, values),
        eps=_number(module, "eps"),
        momentum=momentum,
        batches_tracked=int(tracked) if tracked is not None and _readable(tracked) else None,
        mean=_range(values.get("mean")),
        variance=_range(values.get("variance")),
        gamma=_range(values.get("gamma")),
        frozen="Frozen" in kind or (momentum == 0 and "mean" in values),
    )


def _stays_in_training(module: nn.Module, path: str, seen: _Seen) -> bool:
    decision = seen.decisions.get(path)
    if decision is not None and decision.reason is Reason.TRAINING_MODE:
        return True
    tracked = _tensor(module, "running_mean") is not None
    follows_mode = isinstance(module, (BatchNorm, *_INSTANCE_NORMS, torch.jit.ScriptModule))
    return tracked and follows_mode and module.training and not seen.training


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """A registered tensor or plain attribute; parametrized ones are not computed."""
    if isinstance(module, torch.jit.ScriptModule):
        found = getattr(module, name, None)
    else:
        tables = (module._parameters, module._buffers, module.__dict__)
        found = next((table[name] for table in tables if name in table), None)
    return found if isinstance(found, Tensor) else None


def _readable(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and not tensor.is_meta


def _values(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64).flatten()


def _number(module: nn.Module, name: str) -> float | None:
    value = getattr(module, name, None)
    return float(value) if isinstance(value, (int, float)) else None


def _channels(module: nn.Module, values: dict[str, Tensor]) -> int | None:
    shape: Sequence[int] | None = getattr(module, "normalized_shape", None)
    if shape is not None:
        return shape[0] if len(shape) == 1 else None
    counts = (getattr(module, name, None) for name in ("num_features", "num_channels"))
    made = next((n for n in counts if isinstance(n, int) and n), None)
    return next((len(tensor) for tensor in values.values()), made)


def _range(values: Tensor | None) -> Range | None:
    finite = values[values.isfinite()] if values is not None else None
    if finite is None or not len(finite):
        return None
    return Range(float(finite.min()), float(finite.max()))


def _affine(values: dict[str, Tensor], eps: float | None) -> Affine | None:
    """The map of a layer that did not run, from its statistics."""
    mean, variance = values.get("mean"), values.get("variance")
    if mean is None or variance is None or eps is None:
        return None
    if len({len(tensor) for tensor in values.values()}) != 1:
        return None
    return Affine.of_batch_norm(mean, variance, values.get("gamma"), values.get("beta"), eps=eps)
