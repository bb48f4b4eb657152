"""Fine-tune the sample network twice: with its BatchNorm statistics frozen, and the plain way.

Run `python samples/finetune_frozen.py` (`--quick` for a few steps). The network learns washed-out
digits, two images at a time: too few for batch statistics. `model.eval(); model.train()` does not
keep the statistics of its norm layers; `bntools.freeze` does, to the last bit.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_digits import SEED, as_input, split_digits

import bntools

FOLDER = Path(__file__).parent
CONTRAST = 0.4
BATCH = 2
STEPS, QUICK = 300, 20
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every running statistic, by its name."""
    named = model.state_dict().items()
    return {name: t.clone() for name, t in named if name.rpartition(".")[2] in STATISTICS}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """How many of the tensors are not bit-identical."""
    return sum(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def fine_tune(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train in training mode on batches of two; the model ends in eval mode."""
    torch.manual_seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model gets right."""
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


def main() -> int:
    """Fine-tune both, print what became of the statistics, and return 1 if that is wrong."""
    parser = argparse.ArgumentParser(description="Fine-tune with frozen BatchNorm statistics.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} steps in place of {STEPS}")
    args = parser.parse_args()

    torch.set_num_threads(1)
    (images, labels), test = (
        (CONTRAST * as_input(part.pixels), torch.from_numpy(part.labels)) for part in split_digits()
    )
    original = bntools.load(FOLDER / "digits_cnn.pt")
    plain = copy.deepcopy(original).eval()  # fine_tune calls train(), which undoes it
    frozen = bntools.freeze(original).model

    if args.quick:
        print(f"{QUICK} steps move statistics, and are too few to learn anything")
    before = statistics(original)
    print(f"before: {accuracy(original, *test):.1%} of the washed-out digits are right")
    changed = {}
    for name, model in {"eval(), train()": plain, "frozen": frozen}.items():
        fine_tune(model, images, labels, QUICK if args.quick else STEPS)
        changed[name] = moved(before, statistics(model))
        print(
            f"{name}: {accuracy(model, *test):.1%}; {changed[name]} of {len(before)} statistics"
            " have changed"
        )
    return int(changed["frozen"] > 0 or changed["eval(), train()"] == 0)


if __name__ == "__main__":
    sys.exit(main())
