"""Replacing batch norms by layers of another kind, fitted to data where there is some."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bntools.checking import (
    Refusals,
    does_the_same,
    still_running,
    used_in_training,
    wrongly_traced,
)
from bntools.dataflow.graph import Graph
from bntools.dataflow.layers import norm_layers
from bntools.dataflow.reach import Refused
from bntools.dataflow.recorder import record
from bntools.distilling import DistillOptions, distill
from bntools.errors import FitError, SurgeryError, TargetError
from bntools.examples import Examples
from bntools.fitting import FitOptions
from bntools.fitting import fit as fit_sites
from bntools.modules import duplicate, get_module, unwrap
from bntools.naming import ToFactory, target_of
from bntools.observing import Observation, observe
from bntools.pipeline import timed, versions
from bntools.recipe import mark, recipe_of
from bntools.report import Reason, ReplacementReport, Result
from bntools.report.fit import DistillReport, FitProgress, FitReport
from bntools.selection import Patterns, select
from bntools.surgery.replacement import (
    Choices,
    Planned,
    plan_replacement,
    recipe_for,
    replace_in,
    standing_in,
    traced_copy,
)
from bntools.targets import Site, Target

__all__ = ["ReplaceOptions", "replace"]

Factory = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, kw_only=True)
class ReplaceOptions:
    """What is rarely asked for.

    `keep_activation` leaves every activation where it is, also after an EvoNorm;
    `no_activation` says what an EvoNorm target does with norms that no activation follows:
    "affine" is the published form without nonlinearity, "keep" keeps the batch norm.
    `distill` steps of training tune the parameters of the new norms alone after a fit; `seed` is
    that of its draws. Activations at the borders of layers are cached in memory up to
    `cache_bytes`, then in `cache_dir` (a temporary folder by default). `progress` is called now
    and then; `forward(model, batch)` runs a batch that is no tensor and no pair with labels.
    """

    keep_activation: bool = False
    no_activation: Literal["affine", "keep"] = "affine"
    distill: int = 0
    seed: int = 0
    cache_bytes: int = 4 << 30
    cache_dir: Path | None = None
    progress: Callable[[FitProgress], None] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.no_activation not in ("affine", "keep"):
            raise TargetError(
                f"Cannot use no_activation={self.no_activation!r}: it is 'affine' or 'keep'."
            )
        if self.distill < 0:
            raise TargetError(f"Cannot distill for {self.distill} steps: give 0 or more.")


@torch.inference_mode(mode=False)
def replace(
    model: nn.Module,
    target: Target | str | Factory,
    example_inputs: Any = None,
    *,
    fit: Iterable[Any] | Tensor | None = None,
    only: Patterns = "*",
    skip: Patterns = (),
    options: ReplaceOptions | None = None,
) -> Result[ReplacementReport]:
    """Replace the batch norms of a model by layers of another kind.

    The argument is left as it was; the result is a copy in eval mode. `target` is one of
    `ToGroupNorm`, `ToLayerNorm`, `ToInstanceNorm`, `ToEvoNormS0`, `ToEvoNormB0`, the name of one
    ("groupnorm"), or a callable that makes a layer of the old norm. Affine, eps, dtype, device and
    grad flags carry over. An EvoNorm takes the activation after the norm with it, at that call
    alone. `fit` are batches (tensors, or pairs with labels): the affine of each new layer is then
    fitted, layer by layer, to what the old layer gives in the original on the same batches.
    `example_inputs`, `only` and `skip` are those of `fold`; without `example_inputs` the first
    samples of `fit` are used.

    Raises `TargetError` for a target that is unknown or cannot be built, `FitError` for data that
    is empty, too small or not finite, `InputError` where the model does not run.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> result = bntools.replace(model, bntools.ToGroupNorm(groups=4), torch.rand(1, 3, 8, 8))
        >>> type(result.model[1]).__name__, result.model[1].num_groups
        ('GroupNorm', 4)
    """
    wanted, options = target_of(target), options or ReplaceOptions()
    if options.distill and fit is None:
        raise FitError("Cannot distill without data: give the batches to fit to (--fit).")
    layers = norm_layers(unwrap(model))
    if not layers:
        report = ReplacementReport(wanted.to_dict(), (), versions=versions())
        return Result(duplicate(unwrap(model)), report, recipe_of(model))
    batches = None if fit is None else _repeatable(fit)
    choices = Choices(
        wanted,
        frozenset(select([layer.path for layer in layers], only, skip)),
        keep_activation=options.keep_activation,
        no_activation=options.no_activation,
        fitted=batches is not None,
    )
    if example_inputs is None and batches is not None and options.forward is None:
        example_inputs = _first_samples(batches)
    return _carried_out(model, example_inputs, choices, batches, options)


def _carried_out(
    model: nn.Module,
    example_inputs: Any,
    choices: Choices,
    batches: Iterable[Any] | None,
    options: ReplaceOptions,
) -> Result[ReplacementReport]:
    """Look at the model, replace, fit, and say what was done."""
    seconds: dict[str, float] = {}
    with timed(seconds, "plan"):
        seen = observe(model, example_inputs)
    with timed(seconds, "replace"):
        planned, replaced = _replaced(seen, choices)
    sites = [each.site for each in planned if each.site is not None]
    report = ReplacementReport(
        choices.target.to_dict(),
        (),
        inputs=f"{seen.examples}{' (inferred)' if seen.examples.inferred else ''}",
        warnings=(*seen.warnings, *_warnings(sites, batches)),
        seconds=seconds,
        versions=versions(),
    )
    if batches is not None and sites:
        with timed(seconds, "fit"):
            fitted = _fitted(seen.model, replaced, sites, batches, options)
        report = dataclasses.replace(report, fit=fitted)
    if options.distill and sites:
        with timed(seconds, "distill"):
            distilled = _distilled(seen.model, replaced, sites, batches, options)
        report = dataclasses.replace(report, distilled=distilled)
    return _result(seen, planned, replaced, report)


def _warnings(sites: list[Site], batches: Any) -> Iterator[str]:
    if sites and batches is None:
        yield (
            "the new layers are not fitted: until it is trained, or fitted to data (--fit), the"
            " model does not give what it gave"
        )


def _repeatable(batches: Iterable[Any] | Tensor) -> Iterable[Any]:
    """Batches that can be gone through more than once; those of an iterator are kept."""
    if isinstance(batches, Tensor):
        return [batches]
    if not isinstance(batches, Iterable):
        raise FitError(
            f"Cannot fit to a {type(batches).__name__}: give batches (tensors, or pairs with"
            " labels), such as a DataLoader."
        )
    return list(batches) if iter(batches) is batches else batches


def _first_samples(batches: Iterable[Any]) -> Any:
    """A small example from the data."""
    first = next(iter(batches), None)
    if first is None:
        raise FitError("Cannot fit: the data holds no batch. Give at least one (--fit).")
    if isinstance(first, (tuple, list)) and first:
        first = first[0]
    if isinstance(first, Tensor):
        return first[:2].clone()
    return first if isinstance(first, dict) else None


def _replaced(seen: Observation, choices: Choices) -> tuple[tuple[Planned, ...], nn.Module]:
    """Plan and carry out; what does not come out as planned is ruled out, and all done again."""
    refused: Refusals = {}
    factory = choices.target.factory if isinstance(choices.target, ToFactory) else None
    while True:
        planned = plan_replacement(seen, dataclasses.replace(choices, refused=refused))
        taken = {p.row.path: p.following for p in planned if p.following is not None}
        wrong = used_in_training(seen, taken)
        if not wrong:
            replaced = traced_copy(seen.model, planned)
            wrong = wrongly_traced(seen, replaced, taken)
        if not wrong:
            wrong = _elsewhere(seen, planned)
        if not wrong:
            replaced = replace_in(replaced, recipe_for(planned), factory)
        if not wrong:
            sites = {p.site.path for p in planned if p.site is not None}
            after = _recorded(replaced, seen.examples)
            wrong = still_running(seen.graphs[0], after, taken, sites)
        if not wrong:
            return planned, replaced
        refused |= wrong


def _elsewhere(seen: Observation, planned: Iterable[Planned]) -> Refusals:
    """The norms without whose activation the model does something else besides.

    Its code may ask for the layer that goes, or apply another activation in training mode.
    """
    why = "without it the model does something else besides (in training mode, perhaps)"
    return {
        each.row.path: Refused(
            Reason.ACTIVATION_STAYS, f"{each.following} cannot be removed: {why}"
        )
        for each in _blamed(seen, [each for each in planned if each.following is not None])
    }


def _blamed(seen: Observation, taking: list[Planned]) -> list[Planned]:
    """Those of some norms whose activations cannot go, by halves."""
    if not taking or does_the_same(seen, standing_in(seen.model, taking)):
        return []
    half = len(taking) // 2
    if not half:
        return taking
    return [*_blamed(seen, taking[:half]), *_blamed(seen, taking[half:])] or taking


def _recorded(model: nn.Module, examples: Examples) -> Graph:
    fed = examples.copied()
    try:
        return record(model, fed.args, fed.kwargs)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SurgeryError(
            f"Cannot run the model with its new layers on {examples}: {why}. Leave out layers with"
            " --skip, or take another target."
        ) from error


def _fitted(
    original: nn.Module, replaced: nn.Module, sites: list[Site], batches: Any, o: ReplaceOptions
) -> FitReport:
    options = FitOptions(
        cache_bytes=o.cache_bytes,
        cache_dir=o.cache_dir,
        forward=o.forward,
        progress=o.progress,
        seed=o.seed,
    )
    return fit_sites(original, replaced, sites, batches, options)


def _distilled(
    original: nn.Module, replaced: nn.Module, sites: list[Site], batches: Any, o: ReplaceOptions
) -> DistillReport:
    options = DistillOptions(
        steps=o.distill,
        cache_bytes=o.cache_bytes,
        cache_dir=o.cache_dir,
        forward=o.forward,
        progress=o.progress,
        seed=o.seed,
    )
    return distill(original, replaced, sites, batches, options)


def _result(
    seen: Observation,
    planned: tuple[Planned, ...],
    replaced: nn.Module,
    report: ReplacementReport,
) -> Result[ReplacementReport]:
    """The result, with the group counts that a fit has chosen in the rows and in the recipe."""
    final = tuple(_as_built(each, replaced) for each in planned)
    recipe = recipe_of(seen.model).then(recipe_for(final))
    if recipe.edits:
        mark(replaced, recipe)
    rows = tuple(each.row for each in final)
    return Result(replaced, dataclasses.replace(report, layers=rows), recipe)


def _as_built(planned: Planned, replaced: nn.Module) -> Planned:
    if planned.site is None:
        return planned
    site, layer = planned.site, get_module(replaced, planned.site.layer)
    groups = getattr(layer, "num_groups", None) or getattr(layer, "groups", None)
    count = groups if isinstance(groups, int) else None
    if count is not None and hasattr(site.target, "groups"):
        target = dataclasses.replace(site.target, groups=count)  # type: ignore[call-arg] # it has
        site = dataclasses.replace(site, target=target)
    row = dataclasses.replace(planned.row, becomes=_named(layer), groups=count)
    return dataclasses.replace(planned, row=row, site=site)


def _named(layer: nn.Module) -> str:
    """The layer in one line."""
    said = " ".join(repr(layer).split())
    return said if len(said) <= 80 else type(layer).__name__
