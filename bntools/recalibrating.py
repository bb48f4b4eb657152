"""Recalibration as a whole: estimate, judge whether it helped, and keep it or not."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from bntools.calibration.estimation import Method, Passes
from bntools.calibration.feeding import Batch, Feeder
from bntools.calibration.options import RecalibrationOptions
from bntools.calibration.scoring import Held, Score, compared, predictions, scored
from bntools.distributed import Exchange, exchange
from bntools.errors import InputError
from bntools.modules import duplicate, unwrap
from bntools.moments import Statistics, mixed
from bntools.pipeline import timed, versions
from bntools.recipe import Edit, Recipe, mark, recipe_of
from bntools.report import (
    Comparison,
    LayerStatistics,
    LeftAlone,
    PriorScore,
    RecalibrationReport,
    Result,
)
from bntools.selection import Patterns
from bntools.statistics import TrackedNorm, layer_drift, left_alone, tracked_norms
from bntools.surgery.recalibration import (
    Estimated,
    choose,
    estimate,
    given_statistics,
    made,
    runner,
    set_statistics,
)

__all__ = ["recalibrate"]

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_METHODS = ("cumulative", "pooled", "ema")
_LOADER_BOUND = 0.5
_LITTLE_LEFT = 0.1
_LEAST_COMPARED = 8
_COMPARED = 32


def recalibrate(
    model: nn.Module,
    batches: Any,
    *,
    method: Method = "cumulative",
    momentum: float = 0.1,
    passes: Passes = 1,
    prior: float | Literal["auto"] = 0,
    only: Patterns = "*",
    skip: Patterns = (),
    evaluate: Score | None = None,
    options: RecalibrationOptions | None = None,
) -> Result[RecalibrationReport]:
    """Re-estimate the running statistics of a model's norm layers on data.

    `batches` is a loader or list of tensors, (input, target) pairs or dicts of keyword arguments.
    The argument is left as it was; the result is a copy in which only statistics have changed, or
    nothing has, where anything fails: a batch that cannot be read, Ctrl-C, a NaN.

    `method`: "cumulative" is PyTorch's `momentum=None`, the simple average of batch means and
    Bessel-corrected batch variances from reset statistics; "pooled" the population moments (biased
    variance) of all elements, whatever the batch sizes; "ema" goes on from the old statistics with
    `momentum`. In the first pass every layer normalises with the batch; `passes` of 2 and more, or
    "converge", repeat with the statistics found so far, until they are those of what each layer
    really sees. `prior` mixes the old statistics in as so many samples' worth; "auto" tries a grid
    of mixtures and takes the one that `evaluate` likes best. `only` and `skip` are globs on paths.

    `evaluate(model)` returns a score, higher is better; the new statistics are kept only if it is
    not lower than before. With two parameters, `evaluate(model, batches)`, it scores on a part of
    the batches that is held out from the statistics. Under `torch.distributed` each process gives
    its own batches, and the result is that of one process on the global batches.

    Raises `PlanError` where a layer has no running statistics or a pattern selects nothing,
    `CalibrationError` naming layer and batch, `InputError` for options that do not fit together,
    `DistributedError` where another process fails.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> result = bntools.recalibrate(model, torch.rand(64, 3, 8, 8).split(32))
        >>> result.model[1].num_batches_tracked, result.report.samples
        (tensor(2), 64)
    """
    settings = _Settings(method, momentum, passes, prior, evaluate, options or _DEFAULT)
    settings.check()
    return _Recalibration(settings, batches, unwrap(model)).run(only, skip)


_DEFAULT = RecalibrationOptions()


@dataclass(frozen=True, eq=False)
class _Settings:
    """What was asked for."""

    method: Method
    momentum: float
    passes: Passes
    prior: float | Literal["auto"]
    evaluate: Score | None
    options: RecalibrationOptions

    @property
    def fixed_prior(self) -> float:
        """The prior of the passes: "auto" mixes afterwards."""
        return 0.0 if self.prior == "auto" else float(self.prior)

    def check(self) -> None:
        """Refuse what does not fit together, before any work."""
        automatic = self.prior == "auto"
        rules = {
            "method": (self.method in _METHODS, f"one of {', '.join(_METHODS)}"),
            "momentum": (0 < self.momentum <= 1, "above 0 and at most 1"),
            "passes": (
                self.passes == "converge" or _is_count(self.passes),
                '1, 2 ... or "converge"',
            ),
            "prior": (automatic or _is_weight(self.prior), 'a number of samples, or "auto"'),
        }
        for name, (fits, rule) in rules.items():
            if not fits:
                raise InputError(
                    f"Cannot recalibrate with {name}={getattr(self, name)!r}: give {rule}."
                )
        if automatic and self.evaluate is None:
            raise InputError(
                'Cannot choose the prior: prior="auto" takes the mixture with the best score, and'
                " there is no evaluate= to give one (--eval-data, --metric)."
            )


def _is_count(passes: Any) -> bool:
    return isinstance(passes, int) and not isinstance(passes, bool) and passes >= 1


def _is_weight(prior: Any) -> bool:
    return isinstance(prior, (int, float)) and math.isfinite(prior) and prior >= 0


@dataclass(eq=False)
class _Recalibration:
    """One run, step by step."""

    settings: _Settings
    batches: Any
    source: nn.Module
    meeting: Exchange | None = field(default_factory=exchange)
    seconds: dict[str, float] = field(default_factory=dict)
    curve: tuple[PriorScore, ...] = ()
    scores: tuple[float | None, float | None] = (None, None)
    comparison: Comparison | None = None
    accepted: bool = True
    chosen_prior: float = 0.0

    @property
    def options(self) -> RecalibrationOptions:
        """Those of the caller."""
        return self.settings.options

    def run(self, only: Patterns, skip: Patterns) -> Result[RecalibrationReport]:
        """Recalibrate a copy, or the model itself."""
        if self.meeting is not None and self.options.keep_partial:
            raise InputError(
                "Cannot keep a partial result of several processes: they would not have the same."
                " Leave keep_partial (--keep-partial) out."
            )
        work = self.source if self.options.inplace else duplicate(self.source)
        quiet = replace(self.options, layout="keep")
        made(work, lambda model: Feeder(self.batches, model, quiet))
        norms = choose(work, only, skip, adding=self.options.add_statistics)
        lacking = [path for path, norm in norms.items() if not norm.tracks]
        target = runner(work, self.options.device)
        held = Held.of(self.batches, self.settings.evaluate, self.options.held_out)
        with timed(self.seconds, "evaluate"):
            before = self._score(target, held)
        models = [work] if target is work else [work, target]
        undo = [given_statistics(model, lacking) for model in models]
        try:
            found = self._estimated(target, list(norms), held)
            new = self._judged(target, found, held, before, fresh=bool(lacking))
            report = self._report(found, new)
            if self.accepted and target is not work:
                set_statistics(work, new, found.counted(self.settings.method))
        except BaseException:
            for step in undo:
                step()
            raise
        if not self.accepted:
            undo[0]()
            lacking = []
        recipe = recipe_of(work)
        if lacking:
            recipe = recipe.then(Recipe(tuple(Edit("add-statistics", path) for path in lacking)))
            mark(work, recipe)
        ran = {layer.path for layer in report.layers}
        report = replace(report, left_alone=tuple(_left(work, norms, ran)))
        return Result(work, report, recipe)

    def _score(self, model: nn.Module, held: Held) -> float | None:
        if self.settings.evaluate is None:
            return None
        try:
            score = scored(model, self.settings.evaluate, held, inplace=self.options.inplace)
        except BaseException:
            if self.meeting is not None:
                self.meeting.fail()
            raise
        return score if self.meeting is None else self.meeting.agree(score)

    def _estimated(self, target: nn.Module, paths: list[str], held: Held) -> Estimated:
        feeder = self._feeder(target, held)
        if not feeder.repeats and self.settings.passes != 1:
            raise InputError(
                "Cannot go through an iterator more than once. Give a list, a loader, or passes=1."
            )
        feeder.may_be_empty = self.meeting is not None
        norms = tracked_norms(target)
        with timed(self.seconds, "calibrate"):
            return estimate(
                target,
                [norms[path] for path in paths],
                feeder,
                self.meeting,
                method=self.settings.method,
                momentum=self.settings.momentum,
                prior=self.settings.fixed_prior,
                passes=self.settings.passes,
            )

    def _feeder(self, model: nn.Module, held: Held) -> Feeder:
        return Feeder(held.calibration, model, self._laid_out())

    def _laid_out(self) -> RecalibrationOptions:
        """What "auto" means for this method."""
        if self.options.layout != "auto":
            return self.options
        pooled = self.settings.method == "pooled"
        return replace(self.options, layout="channels_last" if pooled else "keep")

    def _judged(
        self, model: nn.Module, found: Estimated, held: Held, before: float | None, *, fresh: bool
    ) -> dict[str, Statistics]:
        """Put the new statistics, or the best mixture, into the model, unless they are worse."""
        new = found.statistics()
        counts = found.counted(self.settings.method)
        first = found.estimate.first if before is None and not fresh else None
        samples = found.estimate.samples
        outputs = self._outputs(model, first, held, samples)
        if self.settings.prior == "auto" and before is not None:
            with timed(self.seconds, "evaluate"):
                new = self._best(model, found, held, before)
        undo = set_statistics(model, new, counts)
        if before is None:
            self.comparison = compared(outputs, self._outputs(model, first, held, samples))
            return new
        try:
            with timed(self.seconds, "evaluate"):
                after = self._score(model, held)
        except BaseException:
            undo()
            raise
        self.scores = (before, after)
        if self.options.gate and after is not None and after < before:
            self.accepted = False
            undo()
        return new

    def _outputs(
        self, model: nn.Module, first: Batch | None, held: Held, samples: int
    ) -> Tensor | None:
        if first is None or not self.options.compare_samples:
            return None
        most = min(self.options.compare_samples, max(_LEAST_COMPARED, samples // _COMPARED))
        with timed(self.seconds, "compare"):
            return predictions(self._feeder(model, held), first, most)

    def _best(
        self, model: nn.Module, found: Estimated, held: Held, before: float
    ) -> dict[str, Statistics]:
        """The mixture of old and new statistics with the best score, the newest of equals."""
        new = found.statistics()
        old = {norm.path: tap.original for tap in found.taps for norm in tap.norms}
        counts = found.counted(self.settings.method)
        samples = found.estimate.samples
        points, best, chosen = [PriorScore(0.0, None, before)], before, old
        self.chosen_prior = math.inf
        for share in _SHARES:
            mixture = {
                path: mixed(old[path], value, prior=1 - share, samples=share)
                for path, value in new.items()
            }
            undo = set_statistics(model, mixture, counts)
            try:
                score = self._score(model, held)
            finally:
                undo()
            prior = samples * (1 - share) / share
            points.append(PriorScore(share, prior, score or 0.0))
            if score is not None and score >= best:
                best, chosen, self.chosen_prior = score, mixture, prior
        self.curve = tuple(points)
        return {path: chosen[path] for path in new}

    def _report(self, found: Estimated, new: dict[str, Statistics]) -> RecalibrationReport:
        estimate, settings = found.estimate, self.settings
        return RecalibrationReport(
            settings.method,
            tuple(_layers(found, new)),
            momentum=settings.momentum if settings.method == "ema" else None,
            prior=self.chosen_prior if settings.prior == "auto" else settings.fixed_prior,
            passes=estimate.passes,
            processes=1 if self.meeting is None else self.meeting.count,
            bad_batches=estimate.bad,
            stopped=estimate.stopped,
            partial=estimate.partial,
            score_before=self.scores[0],
            score_after=self.scores[1],
            accepted=self.accepted,
            comparison=self.comparison,
            curve=self.curve,
            warnings=tuple(self._warnings(found)),
            waiting=estimate.waiting,
            seconds=self.seconds,
            versions=versions(),
        )

    def _warnings(self, found: Estimated) -> Iterator[str]:
        estimate, settings = found.estimate, self.settings
        single = [t.path for t, s in zip(found.taps, estimate.seen, strict=True) if s.one_value]
        if single:
            yield (
                f"{single[0]} saw batches with one value per channel, which it turns into zeros for"
                " the layers behind it: use larger batches, or more than one pass"
            )
        left = (1 - settings.momentum) ** estimate.passes[0].batches
        if settings.method == "ema" and left > _LITTLE_LEFT:
            yield (
                f"after {estimate.passes[0].batches} batches the old statistics still weigh"
                f" {left:.0%}: use more batches, a larger momentum, or another method"
            )
        if estimate.waiting > _LOADER_BOUND and self.seconds.get("calibrate", 0) > 1:
            yield (
                f"loader-bound: {estimate.waiting:.0%} of the time was spent waiting for batches;"
                " use more --workers"
            )
        if settings.prior == "auto" and settings.evaluate is not None:
            yield "the score that chose the mixture is the one reported: judge it on other data"


def _layers(found: Estimated, new: Mapping[str, Statistics]) -> Iterator[LayerStatistics]:
    estimate = found.estimate
    for tap, seen, residual in zip(found.taps, estimate.seen, estimate.residuals, strict=True):
        for norm in tap.norms:
            value = new.get(norm.path)
            if value is None or seen.moments is None:
                continue
            has_mean = norm.rule.has_mean
            yield LayerStatistics(
                norm.path,
                norm.kind,
                estimate.samples,
                seen.moments.count,
                layer_drift(
                    norm.path, norm.kind, tap.original, value, eps=norm.eps, has_mean=has_mean
                ),
                near_zero=int((value.variance < norm.eps).sum()),
                one_value=seen.one_value,
                residual=residual,
            )


def _left(
    model: nn.Module, chosen: Mapping[str, TrackedNorm], ran: Collection[str]
) -> Iterator[LeftAlone]:
    """Every layer with statistics that keeps those that it had, and why."""
    for path, (kind, why) in left_alone(model).items():
        yield LeftAlone(path, kind, why)
    for path, norm in tracked_norms(model).items():
        if path not in chosen:
            yield LeftAlone(path, norm.kind, "it was not selected")
        elif path not in ran:
            yield LeftAlone(path, norm.kind, "it did not run on this data")
