"""Tuning the parameters of new norm layers by gradient steps, against the original network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntools.dataflow.guard import unwritten
from bntools.errors import FitError
from bntools.fitting.agreement import Agreements, floating
from bntools.fitting.lanes import Stop, stopping
from bntools.fitting.running import Budget, Forward, Pair, Stage, plain_forward, rows_in, still
from bntools.fitting.tuning import Schedule, tuned
from bntools.modules import duplicate, floating_tensors, get_module, preserved
from bntools.report.fit import Agreement, BlockDistillation, DistillReport, FitProgress
from bntools.targets import Site

__all__ = ["DistillOptions", "distill"]

_CONTAINERS = frozenset({nn.Sequential, nn.ModuleList, nn.ModuleDict})
_LARGE = 8
"""Norm layers in a block beyond which its own parts are the blocks."""
_HELD_OUT = 5
"""One batch of so many judges, where there are so many."""

Named = Mapping[tuple[nn.Module, str], Tensor]


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """How a distillation is carried out.

    `steps` of Adam are taken for each block, and as many for the final outputs (`end_to_end`);
    `rate` is the first step size, relative to the size of the parameters, which falls to zero
    along a cosine. `cache_bytes`, `cache_dir` and `forward` are those of `FitOptions`.
    """

    steps: int = 200
    rate: float = 0.01
    end_to_end: bool = True
    cache_bytes: int = 4 << 30
    cache_dir: Path | None = None
    forward: Forward | None = None
    progress: Callable[[FitProgress], None] | None = None
    seed: int = 0


def distill(
    original: nn.Module,
    replaced: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    options: DistillOptions | None = None,
) -> DistillReport:
    """Tune weight, bias and v of the new layers, block by block, then over the final outputs.

    A block is the smallest part of the network such as a residual block: what it gives, on inputs
    from the network with all blocks before it tuned, comes near to what it gives in the original.
    Of all that is tried the best is kept, by the batches that judge: one of five is held out for
    the final outputs, where there are five. Where the final outputs end up farther from the
    original's than before, nothing is changed. Half precision is tuned in float32, in eval mode;
    the same seed gives the same result.

    Changes `replaced` at the end, and nothing where it raises.
    """
    options = options or DistillOptions()
    if options.steps < 1 or not sites:
        raise FitError("Cannot distill: give at least one step, and a model with replaced norms.")
    start = time.perf_counter()
    data = [batch for batch in batches if rows_in(batch)]
    if not data:
        raise FitError("Cannot distill on no samples: the batches are empty.")
    student = _trainable(replaced)
    work = _Distillation(original, student, sites, data, options)
    report = work.run()
    for site in sites:
        _hand_over(get_module(student, site.layer), get_module(replaced, site.layer))
    return replace(report, seconds=time.perf_counter() - start)


@dataclass(frozen=True, eq=False)
class _Block:
    path: str
    sites: tuple[Site, ...]


@dataclass(eq=False)
class _Distillation:
    original: nn.Module
    student: nn.Module
    sites: Sequence[Site]
    batches: Sequence[Any]
    options: DistillOptions
    done: list[BlockDistillation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def run(self) -> DistillReport:
        """Tune the student."""
        before = self._agreement()
        parameters = _parameters(self.student, self.sites)
        start = {key: tensor.clone() for key, tensor in parameters.items()}
        blocks = {block.path: block for block in _blocks(self.student, self.sites)}
        if blocks:
            self._tune_blocks(blocks)
        if self.options.end_to_end:
            self._tune_outputs()
        after = self._agreement()
        if after.relative_l2 > before.relative_l2:
            _set(start)
            after = before
            self.warnings.append("the outputs came no nearer: the fitted parameters are kept")
        return DistillReport(
            tuple(self.done), self.options.steps, before, after, warnings=tuple(self.warnings)
        )

    def _tune_blocks(self, blocks: Mapping[str, _Block]) -> None:
        options = self.options
        new = {path: get_module(self.student, path) for path in blocks}
        old = {path: get_module(self.original, path) for path in blocks}
        budget = Budget(options.cache_bytes, options.cache_dir)
        with (
            still(self.original, self.student, options.forward, budget) as stage,
            stopping(new),
            stopping(old),
        ):
            stage.admit(self.batches)
            order = {path: index for index, path in enumerate(blocks)}
            while paths := [pair.layer for pair in stage.pairs if pair.layer is not None]:
                path = min(paths, key=order.__getitem__)
                here = [pair for pair in stage.pairs if pair.layer == path]
                if all(_call(pair) == 0 for pair in here):
                    self._tune(_Lesson(stage, blocks[path], here, (new[path], old[path])))
                for pair in here:
                    stage.go_on(pair)
                    stage.settle(pair)

    def _tune(self, lesson: _Lesson) -> None:
        block = lesson.block
        if not lesson.is_comparable():
            self.warnings.append(f"{block.path} is not tuned by itself: its outputs do not compare")
            return
        parameters = _parameters(self.student, block.sites)
        everything = range(len(lesson.pairs))
        found = tuned(parameters, lesson.loss, everything, everything, self._schedule(block.path))
        _set(found.values)
        layers = tuple(site.path for site in block.sites)
        before, after = found.before**0.5, found.after**0.5
        self.done.append(BlockDistillation(block.path, layers, before, after))

    def _tune_outputs(self) -> None:
        forward, count = self.options.forward, len(self.batches)
        with preserved(self.original), unwritten(self.original), torch.no_grad():
            nn.Module.train(self.original, False)
            truths = [_floating(plain_forward(self.original, b, forward)) for b in self.batches]

        def loss(number: int) -> Tensor:
            output = plain_forward(self.student, self.batches[number], forward)
            return _loss(_floating(output), truths[number])

        with torch.no_grad():
            first = _floating(plain_forward(self.student, self.batches[0], forward))
        if not _alike(first, truths[0]):
            self.warnings.append("the final outputs are not tuned: they do not compare")
            return
        judging = range(0, count, _HELD_OUT) if count >= _HELD_OUT else range(count)
        training = [n for n in range(count) if n not in judging] or list(judging)
        parameters = _parameters(self.student, self.sites)
        found = tuned(parameters, loss, training, judging, self._schedule("the outputs"))
        _set(found.values)

    def _schedule(self, name: str) -> Schedule:
        progress, steps = self.options.progress, self.options.steps

        def tell(step: int) -> None:
            if progress is not None:
                progress(FitProgress("distill", name, step, steps))

        return Schedule(steps, self.options.rate, self.options.seed, tell)

    def _agreement(self) -> Agreement:
        agreements = Agreements()
        forward = self.options.forward
        with preserved(self.original), unwritten(self.original), torch.no_grad():
            nn.Module.train(self.original, False)
            for batch in self.batches:
                old = plain_forward(self.original, batch, forward)
                agreements.add(plain_forward(self.student, batch, forward), old, rows_in(batch))
        return agreements.result()


@dataclass(eq=False)
class _Lesson:
    """What one block is tuned on: its inputs in the student, and its outputs in the original."""

    stage: Stage
    block: _Block
    pairs: Sequence[Pair]
    modules: tuple[nn.Module, nn.Module]
    activation: nn.Module | None = None

    def is_comparable(self) -> bool:
        """Whether both give tensors of the same shapes.

        Where the activation that the last norm took stood behind the block, it belongs to what the
        block is to give: the nearer one is meant.
        """
        mine, theirs = self._outputs(0)
        if not _alike(mine, theirs):
            return False
        last = self.block.sites[-1].activation
        if last is not None:
            active = {name: last(value) for name, value in theirs.items()}
            if float(_loss(mine, active)) < float(_loss(mine, theirs)):
                self.activation = last
        return True

    def loss(self, number: int) -> Tensor:
        """The squared distance on a batch, relative to the deviation of what is wanted."""
        mine, theirs = self._outputs(number)
        if self.activation is not None:
            theirs = {name: self.activation(value) for name, value in theirs.items()}
        return _loss(mine, theirs)

    def _outputs(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        pair = self.pairs[number]
        new, old = self.stage.bring(pair)
        with torch.no_grad():
            theirs = _floating(_called(self.modules[1], old))
        mine = _floating(_called(self.modules[0], new))
        self.stage.settle(pair)
        return mine, theirs


def _called(module: nn.Module, stop: Stop) -> Any:
    examples = stop.inputs.copied()
    return module(*examples.args, **examples.kwargs)


def _call(pair: Pair) -> int:
    return pair.new.at.call if isinstance(pair.new.at, Stop) else 0


def _blocks(model: nn.Module, sites: Sequence[Site]) -> list[_Block]:
    """The parts of a model with their norms, in execution order; single norms are none."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        path = _block_path(model, site, sites)
        if path is not None:
            found.setdefault(path, []).append(site)
    return [_Block(path, tuple(members)) for path, members in found.items()]


def _block_path(model: nn.Module, site: Site, sites: Sequence[Site]) -> str | None:
    names = site.layer.split(".")
    for depth in range(1, len(names)):
        path = ".".join(names[:depth])
        inside = sum(other.layer.startswith(f"{path}.") for other in sites)
        if type(get_module(model, path)) not in _CONTAINERS and inside <= _LARGE:
            return None if path == site.path else path
    return None


def _trainable(replaced: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32 at least."""
    student = duplicate(replaced)
    if any(t.dtype.itemsize < 4 for t in floating_tensors(student)):
        student = student.float()
    return nn.Module.train(student, False).requires_grad_(False)


def _parameters(model: nn.Module, sites: Sequence[Site]) -> dict[tuple[nn.Module, str], Tensor]:
    layers = [get_module(model, site.layer) for site in sites]
    return {
        (layer, name): parameter
        for layer in layers
        for name in ("weight", "bias", "v")
        if (parameter := layer._parameters.get(name)) is not None
    }


def _set(values: Named) -> None:
    with torch.no_grad():
        for (module, name), tensor in values.items():
            getattr(module, name).copy_(tensor)


def _hand_over(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for name in ("weight", "bias", "v"):
            mine, theirs = target._parameters.get(name), source._parameters.get(name)
            if mine is not None and theirs is not None:
                mine.copy_(theirs)


def _floating(value: Any) -> dict[str, Tensor]:
    """The floating tensors of an output, in float32 at least."""
    found = floating(value)
    return {name: t.float() if t.dtype.itemsize < 4 else t for name, t in found.items()}


def _alike(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> bool:
    shapes = [{name: t.shape for name, t in found.items()} for found in (new, old)]
    return bool(old) and shapes[0] == shapes[1]


def _loss(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensor:
    """The squared distance over the squared deviation, averaged over tensors."""
    parts = []
    for name, truth in old.items():
        wanted = truth.to(new[name].dtype)
        whole = (wanted - wanted.mean()).square().mean().clamp(min=torch.finfo(wanted.dtype).tiny)
        parts.append((new[name] - wanted).square().mean() / whole)
    return torch.stack(parts).mean()
