"""Is a norm kept for a reason? Try every change of the other layers' parameters, by least squares.

`python tests/brute_force.py --cases 400` draws small random networks, takes each norm layer out of
the folded network, and lets what is left move until the network gives what it gave before
(Levenberg-Marquardt in float64, on more numbers than there are parameters, judged on fresh inputs,
some of them far out). Where that works, the norm need not be there. What may move is widened step
by step (`FREEDOMS`), which tells a rewriting that moves the norm's affine along the graph from one
that changes other layers. Norms that do fold are treated in the same way, which shows how much the
search finds. What layers come before and after a norm is measured, not taken from the planner.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_graphs import Draw, image, runs, write
from randomise import norms, outputs
from torch import Tensor, nn

import bntools
from bntools.modules import replace_modules
from bntools.report import Action
from bntools.surgery.folding import fold_copy

FREEDOMS = {
    "back": "a scale and shift of each output channel of the layers before it are enough",
    "forward": "a scale of each input channel, and the bias, of the layers after it are enough",
    "both ways": "it takes both at once: its scale goes one way, its shift the other",
    "undone": "it takes another layer that undoes the scale, on its other side or beside the norm",
    "weights": "it takes other weights, of layers that take over from each other",
}
IDLE = "another norm of the network has no effect on what it gives, and is all that is in the way"
_MOST = 120  # parameters; a finite difference costs a forward each
_STEPS, _STARTS, _CLOSE = 25, 3, 1e-7
_STEP = 1e-6
_FAR = 30.0

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, eq=False)
class Knob:
    """Numbers that may move, where they start, and what puts them into the model."""

    start: Tensor
    put: Callable[[Tensor], Any]


def everything(model: nn.Module) -> list[Knob]:
    """Every parameter but those of norms."""
    fixed = {id(p) for norm in norms(model).values() for p in norm.parameters()}
    moving = [p.data for p in model.parameters() if id(p) not in fixed and p.is_floating_point()]
    return [_whole(tensor) for tensor in moving]


def by_channel(model: nn.Module, before: Set[str], after: Set[str]) -> list[Knob]:
    """By channel the outputs of layers `before` a norm, and the inputs of those `after` it.

    Norms that stay, and parameters that are added, may change as a whole.
    """
    knobs, seen = [], set()
    for path, module in _parts(model).items():
        if isinstance(module, _LAYERS) and path in before | after:
            if id(module.weight) not in seen:
                seen.add(id(module.weight))
                knobs.append(_scales(module, outer=path in before, inner=path in after))
            knobs.append(_whole(module.bias.data))
        elif path in before | after:
            knobs += [_whole(p.data) for p in module.parameters()]
    return knobs


def _whole(tensor: Tensor) -> Knob:
    return Knob(tensor.flatten().clone(), lambda numbers: tensor.copy_(numbers.view_as(tensor)))


def _scales(layer: Any, *, outer: bool, inner: bool) -> Knob:
    """A factor for each output channel of a layer, and one for each input channel."""
    weight = layer.weight.data
    exact, groups = weight.clone(), getattr(layer, "groups", 1)
    transposed = getattr(layer, "transposed", False)
    rows, columns = weight.shape[0], weight.shape[1] * groups
    counts = [rows * (inner if transposed else outer), columns * (outer if transposed else inner)]

    def put(numbers: Tensor) -> None:
        by_row, by_column = numbers.split(counts)
        new = exact.flatten(2) if exact.dim() > 2 else exact.unsqueeze(2)
        if len(by_row):
            new = new * by_row.reshape(-1, 1, 1)
        if len(by_column):
            spread = by_column.reshape(groups, 1, -1).expand(-1, rows // groups, -1)
            new = new * spread.reshape(rows, -1, 1)
        weight.copy_(new.reshape(weight.shape))

    return Knob(torch.ones(sum(counts), dtype=weight.dtype), put)


class Search:
    """Least squares over what moves of a model, towards given outputs."""

    def __init__(
        self, model: nn.Module, knobs: list[Knob], inputs: Tensor, truth: list[Tensor]
    ) -> None:
        self.model, self.knobs, self.inputs = model, knobs, inputs
        self.sizes = [len(knob.start) for knob in knobs]
        self.goal = _flat(truth)
        self.start = torch.cat([knob.start for knob in knobs])

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def residual(self, point: Tensor) -> Tensor:
        for knob, numbers in zip(self.knobs, point.split(self.sizes), strict=True):
            knob.put(numbers)
        found = _flat(outputs(self.model, self.inputs)) - self.goal
        return found.nan_to_num(1e6, 1e6, -1e6)

    def jacobian(self, point: Tensor) -> Tensor:
        columns = []
        for i in range(len(point)):
            away = torch.zeros_like(point)
            away[i] = _STEP
            columns.append(self.residual(point + away) - self.residual(point - away))
        return torch.stack(columns, 1) / (2 * _STEP)

    def solve(self, seed: int) -> Tensor:
        """The best point from one start: the parameters as they are, or scaled at random."""
        noise = torch.Generator().manual_seed(seed)
        point = self.start.clone()
        if seed:
            point *= torch.rand(point.shape, generator=noise, dtype=point.dtype) + 0.5
            point += 0.1 * torch.randn(point.shape, generator=noise, dtype=point.dtype)
        error, damping = self.residual(point), 1e-3
        for _ in range(_STEPS):
            slopes = self.jacobian(point)
            square, downhill = slopes.mT @ slopes, slopes.mT @ error
            for _ in range(8):
                weight = damping * (square.diagonal().mean() + 1e-12)
                step = torch.linalg.lstsq(
                    square + weight * torch.eye(len(point), dtype=point.dtype), downhill
                ).solution
                tried = self.residual(point - step)
                if tried.norm() < error.norm():
                    break
                damping *= 8
            else:
                break
            slow = float(tried.norm()) > 0.999 * float(error.norm())
            point, error, damping = point - step, tried, damping / 8
            if error.norm() <= 1e-11 * self.goal.norm() or (slow and damping > 1e-2):
                break
        self.residual(point)  # leaves the best parameters in the model
        return error.norm() / self.goal.norm()


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def is_needless(model: nn.Module, path: str, inputs: Tensor, others: list[Tensor]) -> str:
    """What becomes of a model without one norm: a key of `FREEDOMS`, "idle", "needed", "too large".

    Idle norms have no effect on what the model gives. A norm is needed where nothing was found.
    """
    examples = [inputs, *others]
    truths = [outputs(model, example) for example in examples]
    if _is_idle(model, path, examples, truths):
        return "idle"
    before, after = _around(model, path, inputs)
    model = replace_modules(model, {path: nn.Identity()})
    for module in model.modules():
        if isinstance(module, _LAYERS) and module.bias is None:
            outs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(module.weight.new_zeros(outs))
    everywhere = _parts(model).keys()
    tries = {
        "back": (by_channel(model, before, set()), 1),
        "forward": (by_channel(model, set(), after), 1),
        "both ways": (by_channel(model, before, after), 1),
        "undone": (by_channel(model, everywhere, everywhere), 2),
        "weights": (everything(model), _STARTS),
    }
    for name, (knobs, starts) in tries.items():
        if not knobs:
            continue
        search = Search(model, knobs, inputs, truths[0])
        if search.size > _MOST or search.goal.numel() < 2 * search.size:
            return "too large"
        for seed in range(starts):
            search.solve(seed)
            if _error(model, examples, truths) < _CLOSE:
                return name
        search.residual(search.start)
    return "needed"


def _is_idle(
    model: nn.Module, path: str, examples: list[Tensor], truths: list[list[Tensor]]
) -> bool:
    """Whether what a norm gives makes no difference; a copy keeps writes in place away from it."""
    hook = norms(model)[path].register_forward_hook(lambda _, given, __: given[0].clone() * 1.25)
    try:
        return _error(model, examples, truths) < _CLOSE
    finally:
        hook.remove()


def _around(model: nn.Module, path: str, inputs: Tensor) -> tuple[set[str], set[str]]:
    """What has an effect on the input of a norm, and what is behind it."""
    parts = _parts(model)
    usual = _inputs_of(model, inputs, "")
    changed = {other: _inputs_of(model, inputs, other) for other in parts}
    before = {o for o in parts if o != path and _differ(changed[o], usual, path)}
    added = {other for other, part in parts.items() if isinstance(part, nn.ParameterList)}
    after = {o for o in usual if o != path and _differ(changed[path], usual, o)}
    return before, after | (added - before)


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, norms, and parameters that are added."""
    kinds = (*_LAYERS, nn.ParameterList)
    return {p: m for p, m in model.named_modules() if isinstance(m, kinds)} | norms(model)


@torch.no_grad()
def _inputs_of(model: nn.Module, inputs: Tensor, moved: str) -> dict[str, list[Tensor]]:
    """What goes into each layer, where one of them gives something else than usual."""
    layers = {p: m for p, m in _parts(model).items() if not isinstance(m, nn.ParameterList)}
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, p=path: found[p].append(args[0].clone()))
        for path, layer in layers.items()
    ]
    held = [] if moved in layers or not moved else list(model.get_submodule(moved).parameters())
    if moved in layers:
        handles.append(layers[moved].register_forward_hook(lambda _, __, out: out * 1.3 + 0.1))
    for parameter in held:
        parameter.data.add_(0.1)
    outputs(model, inputs)
    for parameter in held:
        parameter.data.sub_(0.1)
    for handle in handles:
        handle.remove()
    return found


def _differ(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]], path: str) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(one[path], other[path], strict=True))


def _error(model: nn.Module, examples: list[Tensor], truths: list[list[Tensor]]) -> float:
    worst = 0.0
    for example, truth in zip(examples, truths, strict=True):
        found, wanted = _flat(outputs(model, example)), _flat(truth)
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


def judgements(seed: int) -> Iterator[tuple[str, str, str]]:
    """For each norm of a drawn network: what was decided, what the search says, and a line."""
    drawn = Draw.of(seed)
    rank = drawn.rank % 2
    program = write(rank, drawn.instructions[:5], drawn.returned)
    inputs, others = image(rank, 40, 4), [image(rank, 3, 4), image(rank, 2, 6)]
    others.append(_FAR * image(rank, 20, 4))
    truths = [runs(program, example) for example in (inputs, *others)]
    if any(truth is None for truth in truths):
        return
    plan = bntools.plan_fold(program, inputs)
    layers = norms(program)
    for decision in plan.decisions:
        if decision.path not in layers:
            continue
        reason = decision.reason.value if decision.reason else "fold"
        # all others fold; of two that only fold together the other one is kept with this one
        skip = decision.path if decision.action is Action.FOLD else ()
        without = bntools.plan_fold(program, inputs, skip=skip)
        model = fold_copy(program, without.compiled.folds).model
        answer = is_needless(model, decision.path, inputs, others)
        if decision.action is Action.KEEP and answer in FREEDOMS and _beside_idle(model, inputs):
            answer = "beside idle"
        why = f"{decision.detail}; forward: {decision.forward_detail}"
        yield reason, answer, f"seed {seed}: {decision.path} {reason}: {why}"


def _beside_idle(model: nn.Module, inputs: Tensor) -> bool:
    truth = outputs(model, inputs)
    return any(_is_idle(model, path, [inputs], [truth]) for path in norms(model))


def main() -> int:
    """Make a recorded run."""
    parser = argparse.ArgumentParser(description="Try to explain away each norm that is kept.")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    counts: Counter[str] = Counter()
    listed: dict[str, list[str]] = {}
    for seed in range(options.start, options.start + options.cases):
        for reason, answer, line in judgements(seed):
            counts[f"{'folded' if reason == 'fold' else 'kept'}: {answer}"] += 1
            if reason != "fold" and answer in {*FREEDOMS, "beside idle"}:
                listed.setdefault(answer, []).append(line)
                print(f"{answer}: {line}", file=sys.stderr, flush=True)  # noqa: T201 - a runner tells
    known = {**FREEDOMS, "beside idle": IDLE}
    report = {
        "command": f"python tests/brute_force.py --cases {options.cases} --start {options.start}",
        "cpu seconds": round(time.process_time() - started),
        "counts": dict(sorted(counts.items())),
        "needless": {n: {"means": known[n], "norms": listed[n]} for n in known if n in listed},
    }
    options.record.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))  # noqa: T201 - a runner tells
    return 0


if __name__ == "__main__":
    sys.exit(main())
