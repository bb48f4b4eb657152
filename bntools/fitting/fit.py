"""Fitting new norm layers to what the old ones gave in the original network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import FitError
from bntools.fitting.agreement import Agreements
from bntools.fitting.families import Fitter, NotAffineError, Solution, fitter_for
from bntools.fitting.lanes import Stop, stopping
from bntools.fitting.running import Budget, Forward, Pair, Stage, plain_forward, still
from bntools.modules import get_module
from bntools.report.fit import FitProgress, FitReport, LayerFit
from bntools.targets import Site

__all__ = ["FitOptions", "fit"]

_FEW = 32
"""Values per channel under which a fit is likely to be to noise."""
_APART = 1e-3


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a fit is carried out.

    `cache_bytes` of activations stay in memory, the rest goes to files in `cache_dir` (by default
    where temporary files are). `forward(model, batch)` runs a batch; by default a tensor is the one
    argument, a dict holds keywords, and of a tuple or list the first item counts, as labels follow.
    """

    cache_bytes: int = 4 << 30
    cache_dir: Path | None = None
    forward: Forward | None = None
    progress: Callable[[FitProgress], None] | None = None
    seed: int = 0


def fit(
    original: nn.Module,
    replaced: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    options: FitOptions | None = None,
) -> FitReport:
    """Fit the new layers of a network to what the old ones gave in the original one.

    In execution order each layer's affine is the least-squares solution, per channel and in closed
    form, for what the old norm (and the activation that was taken with it) gave in the original on
    the same samples, on inputs from the network with all layers before it fitted. The v of EvoNorm
    is searched on a grid, and of several group counts the best is taken.

    All batches are in both networks at once, and are paused at each layer until it is fitted, so
    that the data goes through each network once. A layer that is called several times is fitted to
    all its calls; as the affine of the first call must then be known beforehand, the data goes
    through twice.

    Changes `replaced` at the end, and nothing where it raises: `FitError` for batches that are
    empty, too few, not finite, or do not run.
    """
    options = options or FitOptions()
    if not sites:
        raise FitError("Cannot fit: no norm layer was replaced.")
    start = time.perf_counter()
    budget = Budget(options.cache_bytes, options.cache_dir)
    layers = [get_module(replaced, site.layer) for site in sites]
    with _contents(layers), still(original, replaced, options.forward, budget) as stage:
        work = _Fit(stage, sites, options)
        work.run(batches)
    for layer, solution in work.solutions.items():
        solution.apply(get_module(replaced, layer))
    return work.report(time.perf_counter() - start)


@dataclass(eq=False)
class _Fit:
    """One fit: what of each layer is known so far."""

    stage: Stage
    sites: Sequence[Site]
    options: FitOptions
    solutions: dict[str, Solution] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    passes: int = 0
    samples: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        self.order = {site.layer: index for index, site in enumerate(self.sites)}
        self.layers = {s.layer: get_module(self.stage.replaced, s.layer) for s in self.sites}
        self.norms = {s.layer: get_module(self.stage.original, s.path) for s in self.sites}
        self.fitters: dict[str, Fitter] = {}
        self.fixed: frozenset[str] = frozenset()
        self.agreements = Agreements()

    def run(self, batches: Iterable[Any]) -> None:
        """Fit all layers, in a second round those around layers that are called several times."""
        with stopping(self.layers), stopping(self.norms):
            self._round(batches)
            shared = frozenset(layer for layer, calls in self.calls.items() if calls > 1)
            if not shared:
                return
            if iter(batches) is batches:
                raise FitError(
                    f"Cannot fit {min(shared)}: it is called several times, so the data goes"
                    " through twice, and these batches come once. Give a list."
                )
            for layer in shared & self.solutions.keys():
                self._solve(layer)
            self.fixed = shared
            self._round(batches)

    def report(self, seconds: float) -> FitReport:
        """What was found, layer by layer."""
        return FitReport(
            tuple(self._row(site) for site in self.sites if site.layer in self.solutions),
            self.samples,
            self.batches,
            self.passes,
            self.agreements.result(),
            cache_peak=self.stage.spill.peak,
            spilled=self.stage.spill.written,
            seconds=seconds,
            warnings=tuple(self.warnings.values()),
        )

    def _row(self, site: Site) -> LayerFit:
        solution = self.solutions[site.layer]
        return LayerFit(
            site.path,
            type(self.layers[site.layer]).__name__,
            solution.error,
            solution.carried_error,
            solution.moments.count,
            groups=solution.groups,
            tried=site.groups,
            degenerate=int(solution.line.degenerate.sum()),
            calls=self.calls[site.layer],
        )

    def _round(self, batches: Iterable[Any]) -> None:
        """All batches through both networks, side by side."""
        self.fitters = {}
        self.calls = {}
        self.agreements = Agreements()
        first = self.stage.admit(batches)
        pairs = self.stage.pairs
        self.samples, self.batches = sum(pair.samples for pair in pairs), len(pairs)
        if not pairs:
            raise FitError("Cannot fit to no samples: the batches are empty.")
        while layers := [pair.layer for pair in pairs if pair.layer is not None]:
            layer = min(layers, key=self.order.__getitem__)
            self._serve(layer, [pair for pair in pairs if pair.layer == layer])
        for layer in (layer for layer in self.layers if layer not in self.calls):
            self.warnings[layer] = f"{layer} is not fitted: it does not run on these batches"
        if not self.calls:
            raise FitError(
                f"Cannot fit {self.sites[0].layer}: no new layer runs on these batches. Give"
                " others."
            )
        self._finish(first)
        self.passes += 2

    def _serve(self, layer: str, pairs: Sequence[Pair]) -> None:
        """Fit a layer to the batches that stand there, and let them go on."""
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if layer not in self.fixed and layer not in self.warnings:
            try:
                self._see(layer, pairs)
            except NotAffineError as error:
                self.warnings[layer] = f"{layer} is left as it is: {error}"
        for pair in pairs:
            self.stage.go_on(pair)
            self.stage.settle(pair)
        self._tell(layer)

    def _see(self, layer: str, pairs: Sequence[Pair]) -> None:
        fitter = self.fitters.get(layer)
        known = fitter is not None
        if fitter is None:
            site = self.sites[self.order[layer]]
            fitter = self.fitters[layer] = fitter_for(self.layers[layer], site.groups, layer)
        if fitter.looks and not known:
            generator = torch.Generator().manual_seed(self.options.seed)
            for pair, x, target in self._visit(layer, pairs):
                fitter.look(x, target, pair.samples / self.samples, generator)
            fitter.choose()
        for pair, x, target in self._visit(layer, pairs):
            if not fitter.add(x, target):
                self._refuse_values(layer, pair, target)
        if not known:
            self._solve(layer)

    def _visit(self, layer: str, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Tensor, Tensor]]:
        """What the new layer is given, and what it should give, batch by batch."""
        site, norm = self.sites[self.order[layer]], self.norms[layer]
        for pair in pairs:
            new, old = self.stage.bring(pair)
            x, given = _input(layer, new), _input(layer, old)
            if not x.numel():
                raise FitError(f"Cannot fit {layer}: batch {pair.number} gives it an empty tensor.")
            target = site.teach(norm, given)
            if x.shape != target.shape:
                raise FitError(
                    f"Cannot fit {layer}: its input has the shape {tuple(x.shape)}, and the old"
                    f" norm's output {tuple(target.shape)}. Skip it with --skip."
                )
            yield pair, x, target
            del x, given, target
            self.stage.settle(pair)

    def _solve(self, layer: str) -> None:
        fitter, module = self.fitters[layer], self.layers[layer]
        count = fitter.count
        if count < fitter.unknowns:
            raise FitError(
                f"Cannot fit {layer}: {count} values per channel do not determine"
                f" {fitter.unknowns} parameters. Fit to more samples."
            )
        if count < _FEW:
            self.warnings[f"few {layer}"] = (
                f"{layer} was fitted to {count} values per channel only: fit to more samples"
            )
        solution = fitter.solution()
        if not solution.fits(module):
            raise FitError(
                f"Cannot fit {layer}: a value overflows its dtype. Convert the model to float32."
            )
        self.solutions[layer] = solution
        solution.apply(module)

    def _refuse_values(self, layer: str, pair: Pair, target: Tensor) -> None:
        whose = (
            "the new layer's input" if bool(target.isfinite().all()) else "the old norm's output"
        )
        raise FitError(
            f"Cannot fit {layer}: batch {pair.number} has a NaN or an infinity in {whose}. Remove"
            " the samples that cause it, or convert the model to float32."
        )

    def _finish(self, first: Any) -> None:
        """Compare the outputs of all batches, and those of the first with a plain forward's."""
        for pair in self.stage.pairs:
            new, old = self.stage.finish(pair)
            self.agreements.add(new, old, pair.samples)
            if pair is self.stage.pairs[0]:
                for model, value in ((self.stage.replaced, new), (self.stage.original, old)):
                    self._check_alone(model, value, first)
            if not self.agreements.is_finite:
                raise FitError(
                    f"Cannot fit: with the new layers the outputs of batch {pair.number} are not"
                    " finite. Fit to more samples, or skip layers with --skip."
                )
            del new, old
            self.stage.dismiss(pair)
        self.stage.close()

    def _check_alone(self, model: nn.Module, value: Any, batch: Any) -> None:
        """A model that keeps a batch's values in its modules mixes them up between batches."""
        with torch.no_grad():
            alone = plain_forward(model, batch, self.options.forward)
        apart = Agreements()
        apart.add(value, alone, 1)
        if apart.result().relative_l2 > _APART:
            raise FitError(
                "Cannot fit: the model gives something else where several batches are in it at a"
                " time. It keeps what one layer computes for another (self.x = ...), or draws"
                " random numbers. Give the data as a single batch."
            )

    def _tell(self, layer: str) -> None:
        if self.options.progress is not None:
            done = len(self.calls)
            self.options.progress(FitProgress("fit", layer, done, len(self.sites)))


def _input(layer: str, stop: Stop) -> Tensor:
    inputs = stop.inputs
    x = inputs.args[0] if inputs.args else next(iter(inputs.kwargs.values()), None)
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise FitError(f"Cannot fit {layer}: its input is not a tensor of shape (N, C, ...).")
    return x


@contextmanager
def _contents(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The parameters and buffers of layers have their contents back at the end."""
    tensors = [t for m in layers for t in (*m._parameters.values(), *m._buffers.values())]
    before = [(t, t.detach().clone()) for t in tensors if t is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content in before:
                tensor.copy_(content)
