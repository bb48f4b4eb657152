"""Passes over the data: what the taps see becomes the statistics of each layer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from bntools.calibration.confidence import Confidence
from bntools.calibration.feeding import Batch, Feeder
from bntools.calibration.options import RecalibrationOptions
from bntools.calibration.taps import LastNorm, Tap, Taps
from bntools.distributed import Exchange
from bntools.errors import BNToolsError, CalibrationError, DistributedError
from bntools.moments import (
    Cumulative,
    Ema,
    Estimator,
    Moments,
    Pooled,
    Statistics,
    mixed,
    residual,
)
from bntools.report.recalibration import PassSummary, Progress

__all__ = ["Estimate", "Estimation", "Method", "Passes", "Seen"]

Method = Literal["cumulative", "pooled", "ema"]
Passes = int | Literal["converge"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What one tap saw in a pass: its estimate, all moments, and batches of one value."""

    estimator: Estimator
    moments: Moments | None = None
    one_value: int = 0

    def after(self, batch: Moments) -> Seen:
        """With one call more."""
        return Seen(
            self.estimator.after(batch),
            batch if self.moments is None else self.moments.merge(batch),
            self.one_value + (batch.count == 1),
        )


@dataclass(eq=False)
class _Pass:
    """One pass in progress."""

    number: int
    seen: list[Seen]
    batches: int = 0
    samples: int = 0
    calls: int = 0
    last: int | None = None
    reached: bool = False
    bad: list[str] = field(default_factory=list)

    def follow(self, order: Sequence[int]) -> None:
        """Note how many calls a batch made, and which layer is always the last and only then."""
        if not order:
            return
        last = order[-1] if order.count(order[-1]) == 1 else -1
        self.last = last if self.last in (None, last) else -1
        self.calls = max(self.calls, len(order))


@dataclass(frozen=True, eq=False)
class Estimate:
    """The outcome: by tap, in their order, new statistics (None for one that did not run)."""

    statistics: tuple[Statistics | None, ...]
    seen: tuple[Seen, ...]
    residuals: tuple[float | None, ...]
    passes: tuple[PassSummary, ...]
    bad: tuple[str, ...] = ()
    stopped: str = ""
    partial: bool = False
    waiting: float = 0.0
    first: Batch | None = None

    @property
    def samples(self) -> int:
        """The samples of the first pass."""
        return self.passes[0].samples


@dataclass(eq=False)
class Estimation:
    """Takes the statistics of a tapped model in one pass or more."""

    feeder: Feeder
    taps: Taps
    method: Method
    momentum: float
    prior: float
    exchange: Exchange | None = None
    stopped: str = ""
    partial: bool = False
    first: Batch | None = None

    @property
    def options(self) -> RecalibrationOptions:
        """Those of the feeder."""
        return self.feeder.options

    def run(self, passes: Passes) -> Estimate:
        """Go through the data and give what every tap saw."""
        start = time.perf_counter()
        done = self._pass(1)
        current = self._statistics(done)
        summaries = [PassSummary(done.batches, done.samples)]
        residuals: list[float | None] = [None] * len(self.taps.taps)
        bad = done.bad
        for number in range(2, self._limit(passes, done) + 1):
            seen = self._again(number, current)
            if seen is None:
                break
            new = self._statistics(seen, current)
            residuals = self._residuals(current, new)
            final = self._final(seen) if passes == "converge" else None
            if final is not None:
                residuals[final] = 0.0
            largest = self._agreed(max((r for r in residuals if r is not None), default=0.0))
            summaries.append(PassSummary(seen.batches, seen.samples, largest))
            done, bad = seen, [*bad, *seen.bad]
            if passes == "converge" and largest <= self.options.tolerance:
                # the residuals are those of the statistics in use; they stay, but for the final one
                current = [
                    n if i == final else c
                    for i, (c, n) in enumerate(zip(current, new, strict=True))
                ]
                break
            current = new
        waiting = self.feeder.waited / max(time.perf_counter() - start, 1e-9)
        return Estimate(
            tuple(current), tuple(done.seen), tuple(residuals), tuple(summaries), tuple(bad),
            self.stopped, self.partial, waiting, self.first,
        )  # fmt: skip

    def _limit(self, passes: Passes, first: _Pass) -> int:
        if self.partial:
            return 1
        if passes == "converge":
            # after as many passes as there are norms in sequence each has seen settled inputs
            return min(self.options.max_passes, first.calls)
        return passes

    def _final(self, seen: _Pass) -> int | None:
        """The tap behind all others: no norm sees what its new statistics do, so they fit."""
        return None if self.method == "ema" or seen.last == -1 else seen.last

    def _again(self, number: int, current: list[Statistics | None]) -> _Pass | None:
        """A pass in which every layer normalises with the statistics that it has by now."""
        self.taps.from_batch = False
        for tap, statistics in zip(self.taps.taps, current, strict=True):
            if statistics is not None:
                tap.write(statistics.mean, statistics.variance)
        done = self._pass(number, current)
        return None if self.partial else done

    def _pass(self, number: int, current: list[Statistics | None] | None = None) -> _Pass:
        starts = current or [None] * len(self.taps.taps)
        taps = zip(self.taps.taps, starts, strict=True)
        done = _Pass(number, [Seen(self._estimator(tap, start)) for tap, start in taps])
        try:
            self._all_batches(done)
        except BaseException as error:
            if self.exchange is not None and not isinstance(error, DistributedError):
                with suppress(KeyboardInterrupt):
                    self.exchange.fail()
            kept = done.batches or number > 1
            if not self.options.keep_partial or not kept or not _is_failure(error):
                raise
            self.partial = True
            why = " ".join(str(error).split()) or type(error).__name__
            self.stopped = f"stopped after {done.batches} batches of pass {number}: {why}"
        if not done.batches:
            raise CalibrationError(
                "Cannot recalibrate: there is no batch to take statistics from"
                f"{' but non-finite ones' if done.bad else ''}. Give data."
            )
        return done

    def _estimator(self, tap: Tap, start: Statistics | None) -> Estimator:
        correction = tap.first.rule.correction
        if self.method == "pooled":
            return Pooled()
        if self.method == "ema":
            return Ema(self.momentum, start or tap.original, correction)
        return Cumulative(correction)

    def _all_batches(self, done: _Pass) -> None:
        start = time.perf_counter()
        limit = self.options.max_error if done.number == 1 else None
        enough = {tap.index: Confidence(tap.first.eps) for tap in self.taps.taps} if limit else {}
        for batch, samples in self._batches(done):
            if self._one(batch, done):
                done.batches += 1
                done.samples += samples
                for tap, moments in self.taps.calls if enough else ():
                    enough[tap.index].add(moments)
            self._tell(done, start)
            if limit is not None:
                ran = [c for c in enough.values() if c.means is not None]
                done.reached = bool(ran) and max(c.error() for c in ran) <= limit
        if done.reached:
            self.stopped = (
                f"stopped after {done.samples} samples: every channel's mean and variance is known"
                f" to {limit:g} (95 % confidence)"
            )

    def _batches(self, done: _Pass) -> Iterator[tuple[Batch | None, int]]:
        """Batches with the samples of all processes; None for one that has run out."""
        if self.exchange is None:
            for one in self.feeder:
                yield one, one.samples
                if done.reached:
                    return
            return
        own = iter(self.feeder)
        while True:
            batch = next(own, None)
            samples = None if batch is None else batch.samples
            total = self.exchange.begin(samples, stop=done.reached)
            if total is None:
                return
            yield batch, total

    def _one(self, batch: Batch | None, done: _Pass) -> bool:
        """Run a batch and count what its layers saw; False where it is left out."""
        taps = self.taps
        taps.calls.clear()
        if batch is not None and batch.samples:
            if self.options.compare_samples:
                self.first = self.first or batch
            self._forward(batch)
        if self.exchange is not None:
            channels = [tap.variance.numel() for tap in taps.taps]
            self.exchange.finish(taps.missed, channels)
            if not taps.calls:
                return False
        bad = _non_finite(taps.calls)
        if bad is not None:
            where = f"batch {done.batches + len(done.bad) + 1}"
            if not self.options.skip_nonfinite:
                raise CalibrationError(
                    f"Cannot use {where}: what {bad.path} sees in it is not finite (NaN or"
                    " infinity). The model is as it was. Leave such batches out with"
                    " --skip-nonfinite (skip_nonfinite=True)."
                )
            done.bad.append(f"{where} (at {bad.path})")
            return False
        for tap, moments in taps.calls:
            done.seen[tap.index] = done.seen[tap.index].after(moments)
        done.follow([tap.index for tap, _ in taps.calls])
        return True

    def _forward(self, batch: Batch) -> None:
        taps = self.taps
        taps.batch = str(batch)
        taps.mask = self._mask(batch)
        self.feeder.lay_out(batch.content)
        taps.stop_after = taps.course.length(batch.content)
        try:
            with taps.course.noted(batch.content, taps.calls):
                self.feeder.run(batch)
        except LastNorm:
            pass
        except BNToolsError:
            raise
        except Exception as error:
            behind = f" behind {taps.calls[-1][0].path}" if taps.calls else ""
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CalibrationError(
                f"Cannot run {batch}: the model fails{behind} ({why}). The model is as it was. Give"
                " batches that it accepts, or a forward= that runs them."
            ) from error

    def _mask(self, batch: Batch) -> torch.Tensor | None:
        """The positions that count, as the caller's function says."""
        if self.options.mask is None:
            return None
        try:
            mask: Any = self.options.mask(batch.content)
        except BNToolsError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CalibrationError(
                f"Cannot use the mask on {batch}: it raised {why}. The model is as it was. Give a"
                " function of a batch."
            ) from error
        if not isinstance(mask, torch.Tensor) or mask.dim() == 0:
            raise CalibrationError(
                f"Cannot use the mask on {batch}: it is a {type(mask).__name__}. Give a boolean"
                " tensor (N, ...) of the positions that count."
            )
        return mask

    def _tell(self, done: _Pass, start: float) -> None:
        if self.options.progress is not None:
            seconds = time.perf_counter() - start
            self.options.progress(
                Progress(done.number, done.batches, done.samples, seconds, self.feeder.waited)
            )

    def _statistics(
        self, done: _Pass, current: list[Statistics | None] | None = None
    ) -> list[Statistics | None]:
        """What the layers get; one that did not run in this pass keeps what it has."""
        found: list[Statistics | None] = []
        for index, (tap, seen) in enumerate(zip(self.taps.taps, done.seen, strict=True)):
            value = seen.estimator.value if seen.moments is not None else None
            if value is None:
                found.append(current[index] if current else None)
            elif self.prior:
                found.append(mixed(tap.original, value, prior=self.prior, samples=done.samples))
            else:
                found.append(value)
        return found

    def _residuals(
        self, running: list[Statistics | None], seen: list[Statistics | None]
    ) -> list[float | None]:
        found: list[float | None] = []
        for tap, old, new in zip(self.taps.taps, running, seen, strict=True):
            if old is None or new is None:
                found.append(None)
                continue
            distance = residual(_seen_by(tap, old), _seen_by(tap, new), tap.first.eps)
            found.append(float(distance.max()))
        return found

    def _agreed(self, value: float) -> float:
        return value if self.exchange is None else self.exchange.agree(value)


def _seen_by(tap: Tap, statistics: Statistics) -> Statistics:
    """A layer that keeps no mean is not judged by it."""
    if tap.mean is not None:
        return statistics
    return replace(statistics, mean=torch.zeros_like(statistics.mean))


def _is_failure(error: BaseException) -> bool:
    return isinstance(error, (Exception, KeyboardInterrupt))


def _non_finite(calls: list[tuple[Tap, Moments]]) -> Tap | None:
    """The first tap that saw a NaN or infinity."""
    if not calls:
        return None
    finite = torch.stack([(m.mean + m.m2).isfinite().all() for _, m in calls])
    if bool(finite.all()):  # one look for all layers: on an accelerator each is a wait
        return None
    return next(tap for (tap, _), good in zip(calls, finite.tolist(), strict=True) if not good)
