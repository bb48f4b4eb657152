"""Recalibration: statistics from data become a layer's own, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bntools.calibration.estimation import Estimate, Estimation, Method, Passes
from bntools.calibration.feeding import Feeder
from bntools.calibration.scoring import undisturbed
from bntools.calibration.taps import Tap, Taps
from bntools.distributed import Exchange
from bntools.errors import CalibrationError, PlanError
from bntools.modules import duplicate, get_module, is_unmade, named_modules
from bntools.moments import Statistics
from bntools.selection import Patterns, select
from bntools.statistics import TrackedNorm, add_statistics, tracked_norms

__all__ = [
    "Estimated",
    "choose",
    "estimate",
    "given_statistics",
    "made",
    "runner",
    "set_statistics",
]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class Estimated:
    """An estimate and the taps that it belongs to."""

    taps: tuple[Tap, ...]
    estimate: Estimate

    def statistics(self) -> dict[str, Statistics]:
        """The new statistics of every layer that ran, by path."""
        return {
            norm.path: value
            for tap, value in zip(self.taps, self.estimate.statistics, strict=True)
            if value is not None
            for norm in tap.norms
        }

    def counted(self, method: Method) -> dict[str, int]:
        """What `num_batches_tracked` becomes: the batches used, added to the old ones for ema."""
        counts: dict[str, int] = {}
        for tap, seen in zip(self.taps, self.estimate.seen, strict=True):
            for norm in tap.norms:
                before = 0 if norm.batches is None or method != "ema" else int(norm.batches)
                counts[norm.path] = before + seen.estimator.batches
        return counts


def choose(
    model: nn.Module, only: Patterns, skip: Patterns, *, adding: bool = False
) -> dict[str, TrackedNorm]:
    """The layers that the patterns leave in.

    Raises PlanError where one has no running statistics and gets none, or a pattern is empty.
    """
    norms = tracked_norms(model)
    chosen = select(list(norms), only, skip)
    for path in norms:
        if path in chosen and not norms[path].tracks and not adding:
            raise PlanError(
                f"Cannot recalibrate {path or 'the model'}: it has no running statistics"
                " (track_running_stats=False). Skip it with --skip, or add them with"
                " --add-statistics (add_statistics=True)."
            )
    return {path: norm for path, norm in norms.items() if path in chosen}


def made(model: nn.Module, feeder_of: Callable[[nn.Module], Feeder]) -> None:
    """Make the lazy parameters of a model by one forward on its first batch."""
    if not any(is_unmade(module) for _, module in named_modules(model)):
        return
    feeder = feeder_of(model)
    if not feeder.repeats:
        raise CalibrationError(
            "Cannot use an iterator for a model with lazy layers, which need a batch before the"
            " others. Give a list or a loader."
        )
    flags = {id(module): module.training for _, module in named_modules(model)}
    model.eval()
    with torch.no_grad():
        feeder.run(next(iter(feeder)))
    for _, module in named_modules(model):
        module.training = flags.get(id(module), module.training)


def given_statistics(model: nn.Module, paths: Sequence[str]) -> Callable[[], None]:
    """Give layers without running statistics fresh ones; returns what undoes it."""
    modules: list[Any] = [get_module(model, path) for path in paths]
    for module in modules:
        add_statistics(module)

    def undo() -> None:
        for module in modules:
            module._buffers.update(dict.fromkeys(_STATISTICS))
            module.track_running_stats = False

    return undo


def estimate(
    model: nn.Module,
    norms: Sequence[TrackedNorm],
    feeder: Feeder,
    exchange: Exchange | None = None,
    *,
    method: Method,
    momentum: float = 0.1,
    prior: float = 0.0,
    passes: Passes = 1,
    running: bool = False,
) -> Estimated:
    """Run the data through a model, which is as it was afterwards, whatever happens.

    With `running`, the layers normalise with their own statistics in the first pass too.
    """
    with undisturbed(model, inplace=feeder.options.inplace), _eager(model), feeder.layout_kept():
        taps = Taps(model, norms, exchange)
        taps.kernels = method != "pooled"
        taps.from_batch = not running
        taps.needs_deviation = method != "pooled"
        if exchange is not None:
            exchange.name_layers([tap.path for tap in taps.taps])
        taps.install()
        estimation = Estimation(feeder, taps, method, momentum, prior, exchange)
        found = estimation.run(passes)
    return Estimated(tuple(taps.taps), found)


def set_statistics(
    model: nn.Module, statistics: Mapping[str, Statistics], counts: Mapping[str, int]
) -> Callable[[], None]:
    """Write new statistics, cast once; returns what undoes it.

    Raises CalibrationError, before anything is written, for one that its dtype cannot hold.
    """
    writes: list[tuple[Tensor, Tensor]] = []
    norms = tracked_norms(model)
    for path, new in statistics.items():
        norm = norms[path]
        for name, buffer, value in (
            ("mean", norm.mean, new.mean),
            ("variance", norm.variance, new.variance),
        ):
            if buffer is not None:
                cast = value.to(buffer.device, buffer.dtype)
                if not bool(cast.isfinite().all()):
                    raise CalibrationError(
                        f"Cannot recalibrate {path or 'the model'}: its {name} reaches"
                        f" {float(value.abs().max()):.3g}, which {buffer.dtype} cannot hold. Cast"
                        " its norm layers to float32 first."
                    )
                writes.append((buffer, cast))
        if norm.batches is not None:
            writes.append((norm.batches, torch.full_like(norm.batches, counts[path])))
    before = [(buffer, buffer.detach().clone()) for buffer, _ in writes]

    def write(values: Sequence[tuple[Tensor, Tensor]]) -> None:
        for buffer, value in values:
            with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                buffer.copy_(value)

    write(writes)
    return lambda: write(before)


def runner(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """The model that runs: itself, or a copy on another device."""
    here = {t.device for t in (*model.parameters(), *model.buffers())}
    if device is None or here <= {_full(device)}:
        return model
    return duplicate(model).to(device)


def _full(device: torch.device | str) -> torch.device:
    return torch.empty(0, device=device).device


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Compiled parts would not see the taps."""
    compiled = any(
        module._modules.get("_orig_mod") is not None
        or getattr(module, "_compiled_call_impl", None) is not None
        for _, module in named_modules(model)
        if not isinstance(module, torch.jit.ScriptModule)
    )
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield
