"""BatchNorm replaced in a trained network: what accuracy is kept, by method and without training.

Run `python samples/resnet20_replace.py --model resnet20-12fca82f.th --data cifar10_subset.npz`.
The model is a CIFAR-10 ResNet-20 (github.com/akamaster/pytorch_resnet_cifar10, BSD licence); the
data are uint8 NHWC images `train_images` and `test_images` with `test_labels`. New layers are
fitted to the first training images, without labels, and judged on the test images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from resnet20 import load_resnet20
from torch import Tensor, nn

import bntools

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 50


@dataclass(frozen=True)
class Method:
    """A row of the table: what replaces the norms, and what is done to it besides."""

    name: str
    target: bntools.Target
    fresh: bool = False
    fit: bool = False
    distill: bool = False


METHODS = (
    Method("GroupNorm (8 groups), plain swap", bntools.ToGroupNorm(8), fresh=True),
    Method("GroupNorm (8 groups), affine copied", bntools.ToGroupNorm(8)),
    Method("LayerNorm over the sample, affine copied", bntools.ToLayerNorm()),
    Method("GroupNorm (auto groups), fit", bntools.ToGroupNorm("auto"), fit=True),
    Method("GroupNorm (8 groups), fit", bntools.ToGroupNorm(8), fit=True),
    Method("LayerNorm over the sample, fit", bntools.ToLayerNorm(), fit=True),
    Method("LayerNorm over channels, fit", bntools.ToLayerNorm(over="channels"), fit=True),
    Method("InstanceNorm, fit", bntools.ToInstanceNorm(), fit=True),
    Method("EvoNorm-S0 (32 groups), fit", bntools.ToEvoNormS0(), fit=True),
    Method("EvoNorm-S0 (auto groups), fit", bntools.ToEvoNormS0(groups="auto"), fit=True),
    Method("EvoNorm-B0, fit", bntools.ToEvoNormB0(), fit=True),
    Method("LayerNorm over channels", bntools.ToLayerNorm("channels"), fit=True, distill=True),
    Method("EvoNorm-S0 (32 groups)", bntools.ToEvoNormS0(), fit=True, distill=True),
    Method("EvoNorm-B0", bntools.ToEvoNormB0(), fit=True, distill=True),
)


def as_input(images: np.ndarray) -> Tensor:
    """Images as the model takes them: float32 of shape (n, 3, 32, 32), normalised."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that are classified right."""
    found = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return float((found == labels).double().mean())


def replaced(model: nn.Module, method: Method, images: Tensor, steps: int) -> nn.Module:
    """The network with other norms."""
    options = bntools.ReplaceOptions(distill=steps if method.distill else 0)
    batches = list(images.split(BATCH)) if method.fit else None
    result = bntools.replace(model, method.target, images[:2], fit=batches, options=options).model
    if method.fresh:
        for module in result.modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
    return result


def label(method: Method, steps: int) -> str:
    """The name of a method, with the steps where it is distilled."""
    return f"{method.name}, fit + distill {steps}" if method.distill else method.name


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Print the table; returns the accuracies by method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="resnet20-12fca82f.th")
    add("--data", type=Path, required=True, help="an .npz file of CIFAR-10 images")
    add("--images", type=int, default=500, help="training images to fit to")
    add("--steps", type=int, default=100, help="distillation steps per block and for the outputs")
    add("--quick", action="store_true", help="a few methods on few images, in seconds")
    asked = parser.parse_args(arguments)
    methods, count, steps, tests = METHODS, asked.images, asked.steps, 2000
    if asked.quick:
        methods, count, steps, tests = (METHODS[1], METHODS[3], METHODS[12]), 100, 5, 500
    model = load_resnet20(asked.model)
    with np.load(asked.data) as data:
        images = as_input(data["train_images"][:count])
        test_images = as_input(data["test_images"][:tests])
        labels = torch.from_numpy(data["test_labels"][:tests].astype(np.int64)).flatten()
    found = {"BatchNorm, the original": accuracy(model, test_images, labels)}
    whole = found["BatchNorm, the original"]
    print(f"{len(labels)} test images, fitted to {count} training images\n")
    print("| method | accuracy | kept | seconds |\n|---|---|---|---|")
    print(f"| BatchNorm, the original | {whole:.1%} | 100 % | |")
    for method in methods:
        start = time.perf_counter()
        new = replaced(model, method, images, steps)
        seconds = time.perf_counter() - start
        name = label(method, steps)
        found[name] = accuracy(new, test_images, labels)
        print(
            f"| {name} | {found[name]:.1%} | {found[name] / whole:.1%} | {seconds:.0f} |",
            flush=True,
        )
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
