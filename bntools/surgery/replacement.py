"""Replacing: norms become layers of another kind, by a recipe, on a copy of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntools.activations import Followers, Following, recognised
from bntools.building import channels_of
from bntools.dataflow.graph import Graph, Kind, NormLayer
from bntools.dataflow.layers import BatchNorm, editing_refusal
from bntools.dataflow.reach import Refused
from bntools.errors import SurgeryError
from bntools.modules import duplicate, get_module
from bntools.observing import Observation
from bntools.recipe import Edit, Recipe, apply_edits
from bntools.registry import norm_rule
from bntools.report import Action, Reason, Replacement
from bntools.rewriting import retrace
from bntools.targets import Resolution, Shape, Site, Target

__all__ = [
    "Choices",
    "Planned",
    "plan_replacement",
    "recipe_for",
    "replace_in",
    "standing_in",
    "traced_copy",
]

_LOST = (Reason.SCRIPTED, Reason.HOOKS, Reason.MORE_THAN_NORM)


@dataclass(frozen=True)
class Choices:
    """What the caller chose besides the target.

    `chosen` are the paths of the layers to look at; `fitted` says that the new layers will be
    fitted, which takes an affine; `refused` are layers ruled out after an earlier attempt.
    """

    target: Target
    chosen: frozenset[str]
    keep_activation: bool = False
    no_activation: str = "affine"
    fitted: bool = False
    refused: Mapping[str, Refused] | None = None


@dataclass(frozen=True, eq=False)
class Planned:
    """One norm layer: what the report says of it and, where it is replaced, how.

    `site` is what a fit needs; `following` the activation that has to be removed from the model;
    `takes_remainder` says that the one inside of the layer goes.
    """

    row: Replacement
    site: Site | None = None
    following: Following | None = None
    takes_remainder: bool = False


@dataclass(frozen=True)
class _Activation:
    """What is done about the activation after a norm."""

    module: nn.Module | None = None
    following: Following | None = None
    takes_remainder: bool = False
    said: str = ""


def plan_replacement(seen: Observation, choices: Choices) -> tuple[Planned, ...]:
    """One decision for every norm layer, in execution order; nothing changes."""
    graph = seen.graphs[0]
    order = {path: frames[0].start for path, frames in graph.frames.items()}
    # an affine of arithmetic is no layer to replace: `to_batchnorm` makes one of it where it can
    found = (layer for layer in graph.layers if not layer.chain)
    layers = sorted(found, key=lambda layer: order.get(layer.path, len(graph.nodes)))
    known: dict[tuple[str, str], str] = {}
    followers = tuple(Followers(seen.model, each, known) for each in seen.graphs)
    context = _Context(seen, choices, followers)
    return tuple(_planned(context, layer) for layer in layers)


def recipe_for(planned: Iterable[Planned]) -> Recipe:
    """The edits that a plan asks for, layer by layer."""
    edits: list[Edit] = []
    gone: set[str] = set()
    for each in planned:
        if each.site is None:
            continue
        options: dict[str, Any] = {"target": each.site.target.to_dict()}
        if each.takes_remainder:
            options["takes_remainder"] = True
        edits.append(Edit("replace-norm", each.site.path, options=options))
        found = each.following
        if found is not None and (found.after is not None or found.path not in gone):
            after = {} if found.after is None else {"after": found.after}
            edits.append(Edit("remove-activation", found.path, options=after))
            gone.add(found.path)
    # norms first: they are replaced together
    edits.sort(key=lambda edit: edit.kind != "replace-norm")
    return Recipe(tuple(edits))


def traced_copy(model: nn.Module, planned: Iterable[Planned]) -> nn.Module:
    """A copy in eval mode; forwards that will be rewritten are traced, nothing is removed yet."""
    try:
        copied = duplicate(model)
    except RecursionError as error:
        raise SurgeryError(f"Cannot copy the model: {error}.") from error
    if copied.training:
        copied.eval()
    found = [each.following for each in planned if each.following is not None]
    for path in dict.fromkeys(each.path for each in found if each.after is not None):
        retrace(get_module(copied, path))
    return copied


def standing_in(model: nn.Module, planned: Iterable[Planned]) -> nn.Module:
    """A copy without the activations that go, in which their norms do what they did.

    Raises what rewriting raises.
    """
    taking = [each for each in planned if each.following is not None]
    copied = traced_copy(model, taking)
    for each in taking:
        if each.site is not None and each.site.activation is not None:
            norm = get_module(copied, each.site.path)
            norm.register_forward_hook(_applying(each.site.activation))
    removed = [e for e in recipe_for(taking).edits if e.kind == "remove-activation"]
    return replace_in(copied, Recipe(tuple(removed)))


def _applying(activation: nn.Module) -> Callable[[nn.Module, Any, Any], Any]:
    return lambda _, __, out: activation(out)


def replace_in(
    copied: nn.Module, recipe: Recipe, factory: Callable[[nn.Module], nn.Module] | None = None
) -> nn.Module:
    """Carry a recipe out on a copy of the model."""
    with torch.no_grad():
        return apply_edits(copied, recipe, factory=factory)


@dataclass(frozen=True)
class _Context:
    """What the decisions on all layers share."""

    seen: Observation
    choices: Choices
    followers: tuple[Followers, ...]


def _planned(context: _Context, layer: NormLayer) -> Planned:
    try:
        return _replaced(context, layer)
    except Refused as refusal:
        row = Replacement(
            layer.path, layer.kind, Action.KEEP, reason=refusal.reason, detail=refusal.detail
        )
        return Planned(row)


def _replaced(context: _Context, layer: NormLayer) -> Planned:
    seen, choices = context.seen, context.choices
    module = get_module(seen.model, layer.path)
    _refuse_beforehand(seen.graphs[0], layer, module, choices)
    shape = _shape(seen.graphs[0], layer.path, module)
    activation = _activation(context, layer.path, module)
    found = _resolved(shape, choices, activation)
    if found.target is None:
        reason = Reason.NOT_EXECUTED if shape.positions is None else Reason.ONE_VALUE
        raise Refused(reason, f"{found.note}{_inferred(seen)}")
    site = Site(
        layer.path,
        ".".join(filter(None, [layer.path, "norm"]))
        if _remainder(module) is not None and not activation.takes_remainder
        else layer.path,
        _with_affine(found.target, module) if choices.fitted else found.target,
        activation.module,
        choices.target.candidates(shape) if choices.fitted else (),
    )
    taken = activation.said if activation.module is not None else ""
    notes = ["" if taken else activation.said, found.note, *_baked(module), *_not_seen(shape)]
    row = Replacement(
        layer.path,
        layer.kind,
        Action.REPLACE,
        activation=taken,
        note="; ".join(filter(None, notes)),
    )
    return Planned(row, site, activation.following, activation.takes_remainder)


def _with_affine(target: Target, norm: nn.Module) -> Target:
    """What is fitted needs an affine, also where the old norm had none."""
    has_choice = any(field.name == "affine" for field in fields(target))
    if has_choice and getattr(norm, "weight", None) is None:
        return replace(target, affine=True)  # type: ignore[call-arg] # it has the field
    return target


def _refuse_beforehand(graph: Graph, layer: NormLayer, module: nn.Module, choices: Choices) -> None:
    if layer.path not in choices.chosen:
        raise Refused(Reason.SKIPPED, "it was left out by --only or --skip")
    refused = (choices.refused or {}).get(layer.path)
    if refused is not None:
        raise refused
    if layer.refusal is not None and layer.refusal[0] in _LOST:
        raise Refused(*layer.refusal)
    lost = editing_refusal(module)
    if lost is not None:
        raise Refused(*lost)
    if not isinstance(module, BatchNorm) and not isinstance(
        getattr(module, "running_var", None), Tensor
    ):
        detail = "it is a registered layer without running statistics, and no batch norm"
        raise Refused(Reason.NO_STATISTICS, detail)
    if not layer.plain and not _only_normalises(graph, layer.path):
        cure = "register_norm(...) tells bntools what it does besides"
        raise Refused(Reason.MORE_THAN_NORM, f"its forward does more than normalise; {cure}")


def _only_normalises(graph: Graph, path: str) -> bool:
    """Whether a layer with a forward of its own did nothing but one batch norm at each call."""
    frames = graph.frames.get(path, [])
    for frame in frames:
        made = frame.outputs[0].producer if len(frame.outputs) == 1 else None
        if made is None or len(frame.inputs) != 1 or not made.name.count("batch_norm"):
            return False
        if made.inputs[0] is not frame.inputs[0] or made not in graph.inside(frame):
            return False
        if any(not _is_harmless(n, made) for n in graph.inside(frame)):
            return False
    return bool(frames)


def _is_harmless(node: Any, norm: Any) -> bool:
    if node is norm or all(value.constant for value in node.inputs):
        return True
    return node.kind is Kind.MOVE and not any(out.consumers for out in node.outputs)


def _shape(graph: Graph, path: str, module: nn.Module) -> Shape:
    seen = [f.inputs[0].shape for f in graph.frames.get(path, []) if len(f.inputs) == 1]
    seen = [shape for shape in seen if len(shape) > 1]
    if not seen:
        return Shape(channels_of(module))
    positions = min(math.prod(shape[2:]) for shape in seen)
    return Shape(channels_of(module), positions, min(max(len(seen[0]) - 2, 1), 3))


def _resolved(shape: Shape, choices: Choices, activation: _Activation) -> Resolution:
    found = choices.target.resolved(shape)
    if found.target is None or not choices.target.takes_activation:
        return found
    active = activation.module is not None or bool(activation.said)
    note = found.note if active else ""
    return Resolution(replace(found.target, nonlinearity=active), note)  # type: ignore[call-arg] # it has the field


def _activation(context: _Context, path: str, module: nn.Module) -> _Activation:
    """What to do about the activation after a norm; raises `Refused` where it keeps the layer."""
    choices = context.choices
    if not choices.target.takes_activation:
        return _Activation()
    inside = _remainder(module)
    if choices.keep_activation:
        return _Activation(said=_kept_activation(context, path, inside))
    if inside is not None:
        return _of_layer(inside)
    outcomes = [followers.of(path) for followers in context.followers]
    first, second = outcomes[0], outcomes[1]
    if (first is None) != (second is None) or (first and second and not first.same_as(second)):
        raise Refused(Reason.DATA_DEPENDENT, "what follows depends on the input")
    if first is None:
        if choices.no_activation == "keep":
            raise Refused(Reason.NO_ACTIVATION, "no activation follows, and such were to be kept")
        return _Activation()
    return _Activation(first.module, first, said=str(first))


def _kept_activation(context: _Context, path: str, inside: nn.Module | None) -> str:
    """What the report says of an activation that stays; empty where none follows."""
    if inside is not None:
        return "its own activation stays"
    try:
        found = context.followers[0].of(path)
    except Refused as refusal:
        stays = refusal.reason in (Reason.ACTIVATION_STAYS, Reason.USED_ELSEWHERE)
        return "the activation after it stays" if stays else ""
    return f"{found} stays" if found is not None else ""


def _of_layer(inside: nn.Module) -> _Activation:
    """The activation that is part of the layer (timm's BatchNormAct2d)."""
    parts = list(inside.children()) if type(inside) is nn.Sequential else [inside]
    own = recognised(parts[0]) if len(parts) == 1 else None
    if own is None:
        named = " and ".join(type(part).__name__ for part in parts)
        raise Refused(Reason.ACTIVATION_STAYS, f"it holds {named}, which cannot be taken")
    return _Activation(own, takes_remainder=True, said=f"its own {type(parts[0]).__name__}")


def _remainder(module: nn.Module) -> nn.Module | None:
    rule = norm_rule(module)
    return rule.remainder(module) if rule is not None and rule.remainder is not None else None


def _baked(module: nn.Module) -> Sequence[str]:
    parametrised = hasattr(module, "parametrizations")
    return ["its parametrised affine became plain parameters"] if parametrised else []


def _not_seen(shape: Shape) -> Sequence[str]:
    return ["it did not run: the size of its maps is not known"] if shape.positions is None else []


def _inferred(seen: Observation) -> str:
    if not seen.examples.inferred:
        return ""
    return f" (on {seen.examples}, which was inferred: --input-shape may say otherwise)"
