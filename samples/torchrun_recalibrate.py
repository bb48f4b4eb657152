"""Recalibrate in several processes: `torchrun --nproc-per-node=2 samples/torchrun_recalibrate.py`.

Each process reads its own share of every batch; mean, variance and count are reduced before the
layers normalise, so that the statistics are those of one process on the whole batches. The process
of rank 0 writes the model, and compares it with what it finds alone. Started with plain `python`
it runs in one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import bntools

HERE = Path(__file__).parent
BATCH = 64


def images() -> bntools.Data:
    """The digits of the sample, in batches over all processes."""
    gray = bntools.Preprocessing(grayscale=True)
    return bntools.read_data(str(HERE / "digits"), batch_size=BATCH, preprocessing=gray)


def main() -> None:
    """Recalibrate the sample network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits.recalibrated.pt"))
    options = parser.parse_args()
    model = bntools.load(HERE / "digits_cnn.pt")
    with bntools.processes() as here:
        result = bntools.recalibrate(model, images().shard(here.rank, here.count))
        rank, count = here.rank, here.count
    if rank:
        return
    print(f"{count} process{'es' if count > 1 else ''}: {result.report.summary()}")
    bntools.save(result, options.out, force=True)
    alone = bntools.recalibrate(model, images()).model.state_dict()
    worst = max(
        float((tensor - alone[name]).abs().max() / alone[name].abs().max())
        for name, tensor in result.model.state_dict().items()
        if torch.is_floating_point(tensor)
    )
    print(f"largest difference from one process: {worst:.1e} of the largest value")
    if worst > 1e-5:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
