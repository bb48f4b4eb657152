"""What the doctor looks for in a norm layer: one small function per finding, in a table.

Thresholds are chosen so that healthy published networks give no errors and few warnings: trained
nets have channels with a variance of exactly 0, and whole layers under eps. `inspect` has the list
of the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bntools.affine import Affine
from bntools.report import Finding, LayerHealth, Reason, Severity

__all__ = ["DEAD", "HUGE", "NormFacts", "findings"]

DEAD = 1e-5
HUGE = 1e8
_MOST = 0.5

Verdict = tuple[Severity, str] | None


@dataclass(frozen=True, eq=False)
class NormFacts:
    """What is known about one norm layer, for the rules to judge.

    `values` are "mean", "variance", "gamma" and "beta" in float64, as far as there are any;
    `affine` is the map that the layer applies. `uninitialized` layers have tensors without values,
    `stateless` ones are batch norms without running statistics, `in_training` ones use batch
    statistics although the model is in eval mode; `unplanned` ones are no concern of a fold though
    they have statistics. `biased` are the hosts that have a bias, `flushed` counts the values that
    the fold would set to zero.
    """

    health: LayerHealth
    values: Mapping[str, Tensor] = field(default_factory=dict)
    affine: Affine | None = None
    uninitialized: bool = False
    stateless: bool = False
    in_training: bool = False
    unplanned: bool = False
    biased: tuple[str, ...] = ()
    flushed: int = 0


def findings(layers: Sequence[NormFacts], *, training: bool) -> tuple[Finding, ...]:
    """All findings, the worst first, else in the order of the layers; path "" is the whole model.

    `training` says that the model itself is in training mode.
    """
    found = [*_of_layers(layers), *_of_model(layers, training=training)]
    order = list(Severity)
    return tuple(sorted(found, key=lambda f: order.index(f.severity), reverse=True))


def _of_layers(layers: Sequence[NormFacts]) -> Iterator[Finding]:
    for facts in layers:
        for code, rule in _LAYER_RULES.items():
            verdict = rule(facts)
            if verdict is not None:
                yield Finding(facts.health.path, verdict[0], code, verdict[1])


def _of_model(layers: Sequence[NormFacts], *, training: bool) -> Iterator[Finding]:
    counted = [facts.health for facts in layers if not facts.health.input_dependent]
    if training and counted:
        message = "the model is in training mode; what is said here is about its eval() version"
        yield Finding("", Severity.INFO, "training-mode", message)
    for code, rule in _MODEL_RULES.items():
        message = rule(counted)
        if message:
            yield Finding("", Severity.INFO, code, message)


def _uninitialized(facts: NormFacts) -> Verdict:
    if not facts.uninitialized:
        return None
    return Severity.WARNING, "its tensors have no values yet: it is lazy, or on the meta device"


def _nan_or_inf(facts: NormFacts) -> Verdict:
    bad = {name: int((~t.isfinite()).sum()) for name, t in facts.values.items()}
    parts = [f"{n} of {len(facts.values[name])} in {name}" for name, n in bad.items() if n]
    if parts:
        return Severity.ERROR, f"values are NaN or infinite: {', '.join(parts)}"
    if facts.affine is None or facts.affine.is_finite() or _negative(facts):
        return None
    if facts.health.affine:
        return Severity.ERROR, "its constants give a NaN or infinite scale or shift"
    return Severity.ERROR, "its statistics are finite, but give a NaN or infinite scale or shift"


def _negative(facts: NormFacts) -> int:
    return int((facts.values["variance"] < 0).sum()) if "variance" in facts.values else 0


def _negative_variance(facts: NormFacts) -> Verdict:
    count = _negative(facts)
    if not count:
        return None
    low = float(facts.values["variance"].nan_to_num(nan=0.0).min())
    channels = _of_channels(facts, count)
    return Severity.ERROR, f"the variance of {channels} is negative (down to {low:.2g})"


def _tiny_variance(facts: NormFacts) -> Verdict:
    variance, eps = facts.values.get("variance"), facts.health.eps
    if variance is None or eps is None or facts.health.input_dependent:
        return None
    count = int(((variance >= 0) & (variance < eps)).sum())
    if not count:
        return None
    zeros = int((variance == 0).sum())
    also = f", {zeros} of them 0" if zeros else ""
    message = f"the variance of {_of_channels(facts, count)} is under eps ({eps:g}){also}"
    return _by_share(count, len(variance)), message


def _huge_variance(facts: NormFacts) -> Verdict:
    variance = facts.values.get("variance")
    count = 0 if variance is None else int((variance.isfinite() & (variance > HUGE)).sum())
    if not count:
        return None
    return Severity.INFO, (
        f"the variance of {_of_channels(facts, count)} is over {HUGE:g}: what it is given may not"
        " fit into float16"
    )


def _never_updated(facts: NormFacts) -> Verdict:
    mean, variance = facts.values.get("mean"), facts.values.get("variance")
    if mean is None or variance is None or not len(mean) or facts.uninitialized:
        return None
    if bool(mean.any()) or bool((variance != 1).any()):
        return None
    tracked = facts.health.batches_tracked
    although = f", although {tracked} batches were counted" if tracked else ""
    return Severity.WARNING, f"its statistics were never updated (mean 0, variance 1){although}"


def _dead_channels(facts: NormFacts) -> Verdict:
    gamma = facts.values.get("gamma")
    if gamma is None or facts.health.input_dependent:
        return None
    count = int((gamma.abs() < DEAD).sum())
    if not count:
        return None
    message = (
        f"|gamma| of {_of_channels(facts, count)} is under {DEAD:g}: they give next to a constant"
    )
    return _by_share(count, len(gamma)), message


def _in_training(facts: NormFacts) -> Verdict:
    if not facts.in_training:
        return None
    return Severity.WARNING, (
        "it is in training mode below a model in eval mode: it normalises with batch statistics;"
        " call eval() on it"
    )


def _no_running_statistics(facts: NormFacts) -> Verdict:
    if not facts.stateless:
        return None
    return Severity.WARNING, (
        "it has no running statistics: what it gives for one input depends on the others in the"
        " batch"
    )


def _fold_overflow(facts: NormFacts) -> Verdict:
    decision = facts.health.decision
    if decision is None or decision.reason is not Reason.NON_FINITE:
        return None
    if facts.affine is None or not facts.affine.is_finite():
        return None
    return Severity.WARNING, f"it cannot be folded: {decision.detail}; fold in float32, then cast"


def _fold_subnormal(facts: NormFacts) -> Verdict:
    if not facts.flushed:
        return None
    return Severity.INFO, (
        f"{facts.flushed} values of the folded {_hosts(facts)} are under the smallest normal"
        " float32 and would be set to 0, as they slow CPU convolutions down"
    )


def _biased_conv(facts: NormFacts) -> Verdict:
    if not facts.biased:
        return None
    return Severity.INFO, f"the bias of {', '.join(facts.biased)} is redundant before this norm"


def _not_planned(facts: NormFacts) -> Verdict:
    if not facts.unplanned:
        return None
    return Severity.INFO, "it has running statistics, but folding its kind is not supported"


def _of_channels(facts: NormFacts, count: int) -> str:
    total = max((len(tensor) for tensor in facts.values.values()), default=0)
    return f"{count} of {total} channels"


def _by_share(count: int, total: int) -> Severity:
    return Severity.WARNING if count >= _MOST * total else Severity.INFO


def _hosts(facts: NormFacts) -> str:
    decision = facts.health.decision
    return ", ".join(decision.hosts) if decision else "layers"


def _no_batches_counted(layers: Sequence[LayerHealth]) -> str:
    found = [x for x in layers if x.batches_tracked == 0 and not _fresh(x)]
    if not found:
        return ""
    return f"num_batches_tracked is 0, with real statistics, in {_some(found)}: a converted file"


def _fresh(layer: LayerHealth) -> bool:
    """Whether a layer has the statistics that it was made with, or none."""
    if layer.mean is None or layer.variance is None:
        return True
    return layer.mean.low == layer.mean.high == 0 and layer.variance.low == layer.variance.high == 1


def _zero_momentum(layers: Sequence[LayerHealth]) -> str:
    found = [layer for layer in layers if layer.momentum == 0]
    if not found:
        return ""
    return f"the momentum of {_some(found)} is 0: training does not change the statistics"


def _mixed_eps(layers: Sequence[LayerHealth]) -> str:
    return _mixed("eps", [layer.eps for layer in layers])


def _mixed_momentum(layers: Sequence[LayerHealth]) -> str:
    return _mixed("momentum", [layer.momentum for layer in layers])


def _mixed(name: str, values: Sequence[float | None]) -> str:
    different = sorted({value for value in values if value is not None})
    if len(different) < 2:
        return ""
    return f"the norm layers differ in {name}: {', '.join(f'{v:g}' for v in different)}"


def _some(layers: Sequence[LayerHealth]) -> str:
    names = ", ".join(layer.path or "the model" for layer in layers[:3])
    return names if len(layers) <= 3 else f"{len(layers)} norm layers ({names}, ...)"


_LAYER_RULES: dict[str, Callable[[NormFacts], Verdict]] = {
    "nan-or-inf": _nan_or_inf,
    "negative-variance": _negative_variance,
    "uninitialized": _uninitialized,
    "training-mode": _in_training,
    "no-running-statistics": _no_running_statistics,
    "never-updated": _never_updated,
    "tiny-variance": _tiny_variance,
    "huge-variance": _huge_variance,
    "dead-channels": _dead_channels,
    "fold-overflow": _fold_overflow,
    "fold-subnormal": _fold_subnormal,
    "biased-conv": _biased_conv,
    "not-planned": _not_planned,
}
_MODEL_RULES: dict[str, Callable[[Sequence[LayerHealth]], str]] = {
    "no-batches-counted": _no_batches_counted,
    "zero-momentum": _zero_momentum,
    "mixed-eps": _mixed_eps,
    "mixed-momentum": _mixed_momentum,
}
