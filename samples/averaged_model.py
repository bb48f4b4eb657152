"""Recalibrate an averaged model: `python samples/averaged_model.py [--quick]`.

The weights of several checkpoints are averaged (stochastic weight averaging; Izmailov et al. 2018).
Nobody ever ran the average, so its running statistics belong to none of the checkpoints and have to
be found anew. The same network, fine-tuned with different learning rates, is averaged here, and its
accuracy is measured with averaged statistics, with statistics that were reset, and recalibrated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import bntools

HERE = Path(__file__).parent


def images() -> bntools.Data:
    """The digits of the sample with their classes."""
    gray = bntools.Preprocessing(grayscale=True)
    return bntools.read_data(str(HERE / "digits"), batch_size=64, preprocessing=gray)


def fine_tuned(model: nn.Module, batches: list[tuple[Tensor, Tensor]], rate: float) -> nn.Module:
    """The model after some epochs with a large learning rate."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for pixels, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return model.eval()


def average(models: list[nn.Module]) -> nn.Module:
    """The mean of all parameters and statistics."""
    swa = torch.optim.swa_utils.AveragedModel(models[0], use_buffers=True)
    for model in models:
        swa.update_parameters(model)
    return swa.module.eval()


def main() -> None:
    """Print the accuracy of the checkpoints and of their average."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short checkpoints")
    quick = parser.parse_args().quick
    data = list(images())
    score = bntools.Accuracy(data)
    rates = (0.05, 0.1) if quick else (0.02, 0.05, 0.1, 0.2)
    runs = [bntools.load(HERE / "digits_cnn.pt") for _ in rates]
    models = [
        fine_tuned(m, data * (1 if quick else 4), r) for m, r in zip(runs, rates, strict=True)
    ]
    for rate, model in zip(rates, models, strict=True):
        print(f"fine-tuned at {rate}: {score(model):.1%}")
    averaged = average(models)
    print(f"average, averaged statistics: {score(averaged):.1%}")
    result = bntools.recalibrate(averaged, data, evaluate=score)
    print(f"average, recalibrated: {score(result.model):.1%}")
    print(result.report.summary())


if __name__ == "__main__":
    main()
