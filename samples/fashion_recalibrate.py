"""What recalibration does for accuracy: a LeNet on Fashion-MNIST, and a ResNet-20 on CIFAR-10.

Run `python samples/fashion_recalibrate.py fashion_mnist.npz [--cifar cifar10_subset.npz --resnet20
resnet20-12fca82f.th]`. The first file has x_train, y_train, x_test and y_test (uint8, 28x28).
A LeNet with BatchNorm is trained on clean images, and then meets images that are not: the test set
with noise, less contrast, less light or blur. Its statistics are re-estimated on training images
with the same fault, and the accuracy is measured on the test images. Two more cases are statistics
that were lost, and the average of two networks that were fine-tuned apart, which nobody trained.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from resnet20 import load_resnet20
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

import bntools

SEED = 0
BATCH = 100
SAMPLES = 1000
CLASSES = 10
Recalibrate = Callable[[nn.Module, list[Tensor]], nn.Module]


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W) in [0, 1], and their classes."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> Data:
        """The first of them."""
        return Data(self.images[:count], self.labels[:count])

    def batches(self, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
        """Pairs (images, labels)."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


def read(file: Path, images: str, labels: str) -> Data:
    """Arrays of bytes, (N, H, W) or (N, H, W, 3)."""
    with np.load(file) as arrays:
        pixels, classes = torch.from_numpy(arrays[images]), torch.from_numpy(arrays[labels])
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Data(pixels.float().div(255), classes.long())


# ---- faults --------------------------------------------------------------------------------------


def noise(images: Tensor) -> Tensor:
    """Gaussian noise of standard deviation 0.3."""
    generator = torch.Generator().manual_seed(SEED)
    return (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def contrast(images: Tensor) -> Tensor:
    """Three tenths of the contrast, around the mean of each image."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + 0.3 * (images - mean)


def brightness(images: Tensor) -> Tensor:
    """Light added until the brightest third is white."""
    return (images + 0.35).clamp(0, 1)


def blur(images: Tensor) -> Tensor:
    """A Gaussian blur of sigma 1.5 pixels."""
    return transforms.gaussian_blur(images, [7, 7], [1.5, 1.5])


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "noise": noise,
    "contrast": contrast,
    "brightness": brightness,
    "blur": blur,
}


def faulty(data: Data, fault: str) -> Data:
    """The same images with a fault."""
    return Data(FAULTS[fault](data.images), data.labels)


# ---- the network ---------------------------------------------------------------------------------


def lenet() -> nn.Sequential:
    """LeNet-5 for 28x28 images with a BatchNorm behind every layer but the last."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.BatchNorm1d(120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.BatchNorm1d(84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


def train(model: nn.Module, data: Data, epochs: int, rate: float, seed: int) -> nn.Module:
    """A trained copy, in eval mode."""
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = -(-len(data.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, epochs=epochs, steps_per_epoch=steps
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def average(models: Sequence[nn.Module]) -> nn.Module:
    """The network whose parameters and statistics are the means of those of others."""
    result = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    mean = {
        name: torch.stack([state[name] for state in states]).float().mean(0).to(tensor.dtype)
        for name, tensor in states[0].items()
    }
    result.load_state_dict(mean)
    return result


def reset(model: nn.Module) -> nn.Module:
    """A copy that has lost its statistics."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - the base of all
            module.reset_running_stats()
    return model


# ---- the tables ----------------------------------------------------------------------------------


def methods(validation: Data | None = None) -> dict[str, Callable[[nn.Module, Data], nn.Module]]:
    """Ways of recalibrating a model on data; `validation` chooses the mixture of the last."""

    def run(model: nn.Module, data: Data, **options: object) -> nn.Module:
        return bntools.recalibrate(model, data.batches(), **options).model

    found = {
        "cumulative": partial(run, method="cumulative"),
        "pooled": partial(run, method="pooled"),
        "pooled, converged": partial(run, method="pooled", passes="converge"),
        "ema 0.1": partial(run, method="ema"),
        "prior 256": partial(run, prior=256),
    }
    if validation is not None:
        score = bntools.Accuracy(validation.batches())
        found["prior auto"] = partial(run, prior="auto", evaluate=score)
    return found


def percent(model: nn.Module, data: Data) -> str:
    """The accuracy as text."""
    return f"{100 * bntools.accuracy(model, data.batches(500)):.1f}"


def table(title: str, head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(["", *head]) + " |")
    print("|---" * (len(head) + 1) + "|")
    for name, cells in rows.items():
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


def by_method(model: nn.Module, calibration: Data, test: Data) -> None:
    """Faults against methods, on SAMPLES images."""
    rows: dict[str, list[str]] = {}
    for fault in FAULTS:
        seen, target = faulty(calibration, fault), faulty(test, fault)
        given, validation = seen.first(SAMPLES), Data(seen.images[-500:], seen.labels[-500:])
        cells = [method(model, given) for method in methods(validation).values()]
        rows[fault] = [percent(model, target), *(percent(each, target) for each in cells)]
    title = f"Accuracy (%) on faulty test images, by method, from {SAMPLES:,} faulty images"
    table(title, ["before", *methods(calibration)], rows)


def by_samples(model: nn.Module, calibration: Data, test: Data, prior: float) -> None:
    """Faults against numbers of samples."""
    counts = [n for n in (10, 32, 100, 320, 1000, 3200, 10000) if n <= len(calibration.images)]
    rows: dict[str, list[str]] = {}
    for fault in FAULTS:
        seen, target = faulty(calibration, fault), faulty(test, fault)
        rows[fault] = [percent(model, target)]
        for count in counts:
            batches = seen.first(count).batches()
            new = bntools.recalibrate(model, batches, method="pooled", prior=prior).model
            rows[fault].append(percent(new, target))
    name = f"pooled, prior {prior:g}" if prior else "pooled"
    title = f"Accuracy (%) on faulty test images, by number of images ({name})"
    table(title, ["before", *(f"{count:,}" for count in counts)], rows)


def lost(model: nn.Module, calibration: Data, test: Data) -> None:
    """Statistics that were lost, found again on clean images."""
    given, bare = calibration.first(SAMPLES), reset(model)
    found = {name: method(bare, given) for name, method in methods().items() if "prior" not in name}
    rows = {"accuracy (%)": [percent(m, test) for m in (model, bare, *found.values())]}
    title = f"Statistics reset to 0 and 1, and found again from {SAMPLES:,} clean images"
    table(title, ["original", "reset", *found], rows)


def averaged(model: nn.Module, training: Data, calibration: Data, test: Data, epochs: int) -> None:
    """Two networks fine-tuned apart for two faults, their average, and that recalibrated."""
    half = len(training.images) // 2
    parts = {"noise": slice(None, half), "contrast": slice(half, None)}
    tuned = []
    for seed, (fault, part) in enumerate(parts.items(), 1):
        data = faulty(Data(training.images[part], training.labels[part]), fault)
        tuned.append(train(model, data, epochs, 0.03, seed))
    soup = average(tuned)
    rows: dict[str, list[str]] = {}
    for fault in ("none", *parts):
        given, target = faulty(calibration.first(SAMPLES), fault), faulty(test, fault)
        found = bntools.recalibrate(soup, given.batches(), method="pooled").model
        rows[fault] = [percent(each, target) for each in (model, *tuned, soup, found)]
    table(
        "Accuracy (%) of the average of two networks, fine-tuned apart for noise and for contrast",
        ["original", "for noise", "for contrast", "average", "average recalibrated"],
        rows,
    )


def residual_net(cifar: Path, weights: Path) -> None:
    """A ResNet-20 on CIFAR-10 images that went through JPEG: a blend beats old and new."""
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    model = load_resnet20(weights)

    def prepared(data: Data) -> Data:
        return Data((data.images - mean) / std, data.labels)

    training, test = (read(cifar, f"{part}_images", f"{part}_labels") for part in ("train", "test"))
    rows: dict[str, list[str]] = {}
    shown = ("cumulative", "pooled", "pooled, converged", "ema 0.1", "prior auto")
    for fault in ("none", "noise 0.1", "contrast"):
        change = _CIFAR_FAULTS[fault]
        seen, target = (prepared(Data(change(d.images), d.labels)) for d in (training, test))
        given, validation = seen.first(SAMPLES), Data(seen.images[-500:], seen.labels[-500:])
        found = methods(validation)
        models = [model, *(found[name](model, given) for name in shown)]
        half = bntools.recalibrate(model, given.batches(), prior=SAMPLES).model
        rows[fault] = [percent(each, target) for each in (*models, half)]
    title = f"ResNet-20 on CIFAR-10 images saved as JPEG, accuracy (%), from {SAMPLES:,} images"
    table(title, ["before", *shown, f"prior {SAMPLES}"], rows)


def _less_contrast(images: Tensor) -> Tensor:
    return 0.5 + 0.4 * (images - 0.5)


_CIFAR_FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "noise 0.1": lambda x: (
        x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED))
    ).clamp(0, 1),
    "contrast": _less_contrast,
}


def main() -> None:
    """Train, spoil, recalibrate, and print the tables."""
    parser = argparse.ArgumentParser(description="Recalibration on Fashion-MNIST and CIFAR-10.")
    parser.add_argument("fashion", type=Path, metavar="fashion_mnist.npz")
    parser.add_argument("--cifar", type=Path, metavar="cifar10_subset.npz")
    parser.add_argument("--resnet20", type=Path, metavar="resnet20-12fca82f.th")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="little data, for a smoke test")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of float sums depends on the number of threads
    start = time.perf_counter()
    training = read(args.fashion, "x_train", "y_train")
    test = read(args.fashion, "x_test", "y_test")
    if args.quick:
        training, test = training.first(3600), test.first(500)
    # The last sixth trains nothing: it gives the statistics.
    split = len(training.images) * 5 // 6
    calibration = Data(training.images[split:], training.labels[split:])
    training = training.first(split)
    model = train(lenet(), training, args.epochs, 0.01, SEED)
    print(f"trained on {split:,} images in {time.perf_counter() - start:.0f} s")
    by_method(model, calibration, test)
    by_samples(model, calibration, test, prior=0)
    by_samples(model, calibration, test, prior=32)
    lost(model, calibration, test)
    averaged(model, training, calibration, test, max(1, args.epochs - 1))
    if args.cifar is not None and args.resnet20 is not None:
        residual_net(args.cifar, args.resnet20)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
