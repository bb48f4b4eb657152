"""Is a norm kept for a reason? Try every change of the other layers' parameters, by least squares.

`python tests/brute_force.py --cases 400` draws small random networks, takes each norm layer out of
the folded network, and lets all weights, biases and constants that are left move until the network
gives what it gave before (Levenberg-Marquardt in float64, on more numbers than there are
parameters, judged on fresh inputs). Where that works, the norm need not be there: it is listed.
Norms that do fold are treated in the same way, which shows how much the search finds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from random_graphs import Draw, image, runs, write
from randomise import norms, outputs
from torch import Tensor, nn

import bntools
from bntools.modules import replace_modules
from bntools.surgery.folding import fold_copy

_MOST = 120  # parameters; a finite difference costs a forward each
_STEPS, _STARTS, _CLOSE = 25, 3, 1e-7
_STEP = 1e-6


def moving(model: nn.Module) -> list[Tensor]:
    """Every parameter but those of norms; layers without a bias get one of zeros."""
    fixed = {id(p) for norm in norms(model).values() for p in norm.parameters()}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is None:
            outs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(module.weight.new_zeros(outs))
    return [p.data for p in model.parameters() if id(p) not in fixed and p.is_floating_point()]


class Search:
    """Least squares over the parameters of a model, towards given outputs."""

    def __init__(self, model: nn.Module, inputs: Tensor, truth: list[Tensor]) -> None:
        self.model, self.inputs = model, inputs
        self.tensors = moving(model)
        self.sizes = [t.numel() for t in self.tensors]
        self.goal = _flat(truth)
        self.start = torch.cat([t.flatten() for t in self.tensors])

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def residual(self, point: Tensor) -> Tensor:
        for tensor, values in zip(self.tensors, point.split(self.sizes), strict=True):
            tensor.copy_(values.view_as(tensor))
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
    """What becomes of a model without one norm: "needless", "needed", "idle" or "too large".

    Idle norms have no effect on what the model gives.
    """
    examples = [inputs, *others]
    truths = [outputs(model, example) for example in examples]
    model = replace_modules(model, {path: nn.Identity()})
    if _error(model, examples, truths) < _CLOSE:
        return "idle"
    if not moving(model):
        return "needed"
    search = Search(model, inputs, truths[0])
    if search.size > _MOST or search.goal.numel() < 2 * search.size:
        return "too large"
    for seed in range(_STARTS):
        search.solve(seed)
        if _error(model, examples, truths) < _CLOSE:
            return "needless"
    return "needed"


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
        without = bntools.plan_fold(program, inputs, skip=decision.path)
        model = fold_copy(program, without.compiled.folds).model
        answer = is_needless(model, decision.path, inputs, others)
        why = f"{decision.detail}; forward: {decision.forward_detail}"
        yield reason, answer, f"seed {seed}: {decision.path} {reason}: {why}"


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
    listed = []
    for seed in range(options.start, options.start + options.cases):
        for reason, answer, line in judgements(seed):
            counts[f"{reason}: {answer}"] += 1
            if reason != "fold" and answer == "needless":
                listed.append(line)
                print(line, file=sys.stderr, flush=True)  # noqa: T201 - a runner tells
    report = {
        "command": f"python tests/brute_force.py --cases {options.cases} --start {options.start}",
        "cpu seconds": round(time.process_time() - started),
        "counts": dict(sorted(counts.items())),
        "needless": listed,
    }
    options.record.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))  # noqa: T201 - a runner tells
    return 0


if __name__ == "__main__":
    sys.exit(main())
