"""Hand-written batch norms become nn.BatchNorm layers, with equal outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntools.dataflow.graph import Graph, Kind, NormLayer
from bntools.equivalence import compare, find_truth, in_float64, run
from bntools.errors import SurgeryError
from bntools.identifying import Identity, NotABatchNorm, Training, identify, observe_training
from bntools.modules import duplicate, get_module, unwrap
from bntools.observing import Observation, observe
from bntools.recipe import Edit, Recipe, apply_edits, mark, recipe_of
from bntools.report import (
    Action,
    ConversionReport,
    ConvertedNorm,
    Decision,
    Equivalence,
    Reason,
    Result,
)
from bntools.selection import Patterns, select
from bntools.tolerance import relative_error

__all__ = ["to_batchnorm"]

_DIMS = {2: 1, 3: 1, 4: 2, 5: 3}
_EXACT = 1e-12
_BLIND = "its momentum could not be found: it is PyTorch's default, 0.1"


@torch.inference_mode(mode=False)
def to_batchnorm(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    only: Patterns = "*",
    skip: Patterns = (),
    seed: int = 0,
) -> Result[ConversionReport]:
    """Turn hand-written batch norms into nn.BatchNorm1d, 2d or 3d, with equal outputs.

    A batch norm is found by what it does: a module of its own that applies a map per channel of
    (N, C, ...), in which its tensors (parameters, buffers or plain ones) work like a mean, a
    variance with an eps, a gamma and a beta. How it behaves in training is tried out on a copy: one
    that uses batch statistics, by its mode or while gradients are enabled, keeps its momentum
    (`moving = m * moving + (1 - m) * batch` is PyTorch's 1 - m); one that never does becomes a
    frozen BatchNorm. Freeze, recalibrate and replace then work on it.

    The argument is left as it was; the result is checked on fresh inputs drawn from `seed`.
    `example_inputs`, `only` and `skip` are those of `plan_fold`, and so are the errors;
    `SurgeryError` is raised where the result is not equal.

    Example:
        >>> import torch, bntools
        >>> class ByHand(torch.nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.m, self.v = torch.zeros(1, channels), torch.ones(1, channels)
        ...     def forward(self, x):
        ...         return (x - self.m) / (self.v + 1e-3).sqrt()
        >>> result = bntools.to_batchnorm(torch.nn.Sequential(torch.nn.Linear(4, 2), ByHand(2)))
        >>> result.report.decisions[0].detail
        'frozen nn.BatchNorm1d: mean m, variance v; eps 0.001'
    """
    seen = observe(model, example_inputs)
    layers = [layer for layer in seen.graphs[0].layers if layer.chain]
    chosen = select([layer.path for layer in layers], only, skip) if layers else set()
    answers = {layer.path: _answer(seen, layer, layer.path in chosen) for layer in layers}
    found = {path: a for path, a in answers.items() if isinstance(a, _Found)}
    decisions = tuple(_decision(layer, answers[layer.path]) for layer in layers)
    inputs = f"{seen.examples}{' (inferred)' if seen.examples.inferred else ''}"
    report = ConversionReport(decisions, inputs=inputs)
    if not found:
        return Result(duplicate(unwrap(model)), report, recipe_of(seen.model))
    recipe = Recipe(tuple(each.edit for each in found.values()))
    converted = apply_edits(duplicate(seen.model), recipe)
    mark(converted, recipe_of(seen.model).then(recipe))
    new = tuple(_converted(converted, seen, each) for each in found.values())
    check, warnings = _checked(seen, converted, seed), tuple(_warnings(found))
    report = replace(report, converted=new, check=check, warnings=warnings)
    return Result(converted, report, recipe_of(converted))


@dataclass(frozen=True)
class _Found:
    """A batch norm that was found."""

    path: str
    rank: int
    channels: int
    identity: Identity
    training: Training

    @property
    def frozen(self) -> bool:
        """Whether it never uses the statistics of a batch."""
        return self.training.observed and not self.training.batch

    @property
    def momentum(self) -> float:
        """The momentum of the layer that takes its place."""
        momentum = self.training.momentum
        return 0.1 if momentum is None else momentum

    @property
    def edit(self) -> Edit:
        """What turns it into an nn.BatchNorm."""
        options: dict[str, Any] = {
            "dims": _DIMS[self.rank],
            "eps": self.identity.eps,
            "momentum": self.momentum,
            **self.identity.roles(),
        }
        options.update({"offset": self.identity.offset} if self.identity.offset else {})
        options.update({"frozen": True} if self.frozen else {})
        return Edit("to-batchnorm", self.path, options=options)


_Answer = _Found | tuple[Reason, str]


def _answer(seen: Observation, layer: NormLayer, chosen: bool) -> _Answer:  # noqa: FBT001 - a fact
    if not chosen:
        return Reason.SKIPPED, "it was left out by --only or --skip"
    if layer.refusal is not None and layer.refusal[0] is not Reason.NOT_NEUTRAL:
        return layer.refusal
    if layer.neutral or layer.refusal is not None:
        return Reason.MORE_THAN_NORM, "its module does more: move it into a module of its own"
    places = [place for graph in seen.graphs for place in _places(graph, layer.path)]
    ranks = {rank for rank, _, _ in places}
    if {_DIMS.get(rank) for rank in ranks} != {_DIMS.get(min(ranks))} or min(ranks) not in _DIMS:
        told = " and ".join(f"{rank} axes" for rank in sorted(ranks))
        return Reason.NO_SUCH_FORM, f"it is given tensors of {told}, which no nn.BatchNorm takes"
    if {dim for _, dim, _ in places} != {1}:
        return Reason.NO_SUCH_FORM, "its channels are not axis 1, as those of nn.BatchNorm are"
    rank, _, channels = places[0]
    module = get_module(seen.model, layer.path)
    try:
        identity = identify(module, channels, rank)
    except NotABatchNorm as answer:
        return Reason.NOT_BATCH_NORM, str(answer)
    except Exception as error:  # noqa: BLE001 - a module may raise anything on other numbers
        told = " ".join(str(error).split())[:200]
        return Reason.NOT_BATCH_NORM, f"with other numbers it raises {type(error).__name__}: {told}"
    found = _Found(
        layer.path, rank, channels, identity, observe_training(module, identity, channels, rank)
    )
    if found.training.odd:
        return Reason.NOT_BATCH_NORM, (
            "in training it does neither what a batch norm does nor what it does in eval mode"
        )
    if found.frozen and found.training.moves:
        return Reason.NOT_BATCH_NORM, "it keeps statistics of batches, but does not use them"
    return found


def _places(graph: Graph, path: str) -> Iterator[tuple[int, int, int]]:
    """(rank, axis of the channels, channels) of each call."""
    for node in graph.of_kind(Kind.AFFINE):
        if node.norm.owner == path:
            shape, dim = node.inputs[0].shape, node.norm.channel_dim
            yield len(shape), dim, shape[dim]


def _decision(layer: NormLayer, answer: _Answer) -> Decision:
    if isinstance(answer, tuple):
        return Decision(
            layer.path, layer.kind, Action.KEEP, reason=answer[0], detail=answer[1], affine=True
        )
    names = ", ".join(f"{role} {name}" for role, name in answer.identity.roles().items())
    kind = f"{'frozen ' if answer.frozen else ''}nn.BatchNorm{_DIMS[answer.rank]}d"
    momentum = "" if answer.frozen else f", momentum {answer.momentum:g}"
    detail = f"{kind}: {names}; eps {answer.identity.eps:g}{momentum}"
    return Decision(layer.path, layer.kind, Action.CONVERT, detail=detail, affine=True)


def _warnings(found: Mapping[str, _Found]) -> Iterator[str]:
    facts = found.values()
    by_gradients = [f.path for f in facts if f.training.by == ("gradients",)]
    if by_gradients:
        yield (
            f"{_some(by_gradients)} chose the mode by whether gradients are enabled; nn.BatchNorm"
            " does it by train() and eval()"
        )
    biased = [f.path for f in facts if f.training.unbiased is False]
    if biased:
        yield (
            f"{_some(biased)} kept the biased variance of batches; nn.BatchNorm keeps the unbiased"
            " one"
        )
    still = [f.path for f in facts if f.training.batch and not f.training.moves]
    if still:
        yield f"{_some(still)} did not move the statistics in training: the momentum is 0"
    unknown = [f.path for f in facts if f.training.momentum is None and not f.frozen]
    if unknown:
        yield f"{_some(unknown)}: {_BLIND}"
    unseen = [f.path for f in facts if not f.training.observed]
    if unseen:
        yield f"{_some(unseen)} did not run in training mode: what it does there was not seen"


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _converted(model: nn.Module, seen: Observation, found: _Found) -> ConvertedNorm:
    """What is reported of one layer, whose output is compared in float64."""
    old, new = (in_float64(get_module(m, found.path)).eval() for m in (seen.model, model))
    generator = torch.Generator().manual_seed(3)
    shape = [4, found.channels, *[3] * (found.rank - 2)]
    data = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        truth: Tensor = old(data)
        error = relative_error(new(data), truth)
    if not error <= _EXACT:
        raise SurgeryError(
            f"Cannot convert {found.path}: its output would be off by {error:.2g}. Leave it out"
            " (--skip)."
        )
    return ConvertedNorm(
        found.path,
        type(get_module(model, found.path)).__name__,
        found.identity.roles(),
        found.identity.eps,
        None if found.frozen else found.momentum,
        found.training.unbiased,
        found.training.by,
        found.frozen,
        error,
    )


def _checked(seen: Observation, converted: nn.Module, seed: int) -> Equivalence:
    """The whole model, on inputs that were not recorded."""
    examples = seen.fresh(seed)
    try:
        outputs, _ = run(converted, examples)
    except Exception as error:
        told = " ".join(str(error).split())[:200].rstrip(".")
        raise SurgeryError(
            f"Cannot convert the model: with nn.BatchNorm it raises {type(error).__name__}: {told}."
            " Skip layers (--skip)."
        ) from error
    check = compare(find_truth(seen.model, examples), outputs, inputs=str(examples))
    if not check:
        raise SurgeryError(f"Cannot convert the model: {check.summary()}. Skip layers (--skip).")
    return check
