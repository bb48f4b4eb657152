"""One process of a distributed recalibration: `python distributed_worker.py SCENARIOS OUT`.

Reads RANK and WORLD_SIZE as torchrun sets them. Each scenario's statistics, or what it raised, goes
into a file of OUT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

import bntools
from bntools import RecalibrationOptions as Options

RANK = int(os.environ.get("RANK", "0"))
COUNT = int(os.environ.get("WORLD_SIZE", "1"))

ARGUMENTS = {
    "cumulative": {},
    "pooled": {"method": "pooled"},
    "ema": {"method": "ema", "momentum": 0.3},
    "prior": {"method": "pooled", "prior": 20},
    "converge": {"method": "pooled", "passes": "converge"},
    "two-passes": {"passes": 2},
    "ragged": {"method": "pooled"},
    "ragged-cumulative": {},
    "empty": {"method": "pooled", "passes": 2},
    "nothing": {},
    "hollow": {},
    "ddp": {},
    "sync": {"method": "pooled"},
    "enough": {"options": Options(max_error=0.5)},
    "nan": {},
    "skipped-nan": {"options": Options(skip_nonfinite=True)},
    "broken-loader": {},
    "broken-model": {},
    "diverging": {},
    "gate": {"evaluate": lambda model: float(model[1].num_batches_tracked) + 10 * RANK},
    "partial": {"options": Options(keep_partial=True)},
}


class Ways(nn.Module):
    """Takes another way through its norms for inputs above 50."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.a(self.b(x)) if x.max() > 50 else self.b(self.a(x))


def build(name):
    """A model with four norms in sequence, in eval mode, the same in all processes."""
    torch.manual_seed(11)
    if name == "diverging":
        return Ways().eval()
    layers = []
    for channels in (3, 6, 6, 6):
        norm = nn.BatchNorm2d(6)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        layers += [nn.Conv2d(channels, 6, 3, padding=1), norm, nn.ReLU()]
    model = nn.Sequential(*layers).eval()
    if name == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def shards(name):
    """The batches of each of two processes, which may have different sizes and numbers."""
    x = torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + 3
    if name == "hollow":
        return [list(x[:15].split(5)), [x[15:20], x[20:25], x[:0]]]
    sizes = {
        "ragged": ([8, 8, 8, 1], [8, 8]),
        "ragged-cumulative": ([5, 9, 3], [8, 2]),
        "empty": ([8, 8], []),
        "nothing": ([], []),
        "enough": ([2] * 15, [2] * 15),
    }.get(name, ([8, 8, 8], [8, 8, 4]))
    first = sum(sizes[0])
    parts = [list(x[:first].split(sizes[0])) if sizes[0] else [], []]
    if sizes[1]:
        parts[1] = list(x[first : first + sum(sizes[1])].split(sizes[1]))
    if "nan" in name:
        parts[1][1] = parts[1][1].clone()
        parts[1][1][0, 0, 0, 0] = float("nan")
    if name == "diverging":
        parts[1][1] = parts[1][1] + 100
    return parts


def failing(name, batches):
    """A loader that fails in the second process alone, with its second batch."""
    for number, batch in enumerate(batches):
        if RANK == 1 and number == 1 and name == "broken-loader":
            raise OSError("the disk is gone")
        if RANK == 1 and number == 1 and name == "dies":
            os._exit(9)
        yield batch[:, :2] if RANK == 1 and number == 1 and name == "broken-model" else batch


def run(name):
    model = build(name)
    if name == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    batches = shards(name)[RANK]
    if name.startswith(("broken", "dies")):
        batches = failing(name, batches)
    result = bntools.recalibrate(model, batches, **ARGUMENTS.get(name, {}))
    report = result.report
    return {
        "state": result.model.state_dict(),
        "samples": report.samples,
        "batches": report.batches,
        "passes": len(report.passes),
        "residual": report.residual,
        "bad": report.bad_batches,
        "stopped": report.stopped,
        "score": report.score_after,
        "processes": report.processes,
    }


def main():
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    with bntools.processes(timeout=60) as here:
        assert (here.rank, here.count) == (RANK, COUNT)
        for name in sys.argv[1].split(","):
            try:
                found = run(name)
            except bntools.BNToolsError as error:
                found = {"error": type(error).__name__, "message": str(error)}
            torch.save(found, out / f"{name}.{RANK}.pt")


if __name__ == "__main__":
    main()
