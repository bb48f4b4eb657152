"""Train the shipped sample: a small residual network with BatchNorm on handwritten digits.

Run `python samples/train_digits.py`. The data are the 8x8 digits that come with scikit-learn, so
nothing is downloaded. The network is made of torch.nn and torchvision classes only: it loads with
`weights_only=True` and an allow-list of these two packages.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

SEED = 0
HELD_OUT = 397
BATCH = 100
MAX_SHIFT = 1


@dataclass(frozen=True)
class Digits:
    """8-bit images of shape (n, 8, 8), their classes, and their row numbers in the data set."""

    pixels: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def split_digits() -> tuple[Digits, Digits]:
    """The training and the held-out images, every class in the same proportion in both."""
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    rows = np.arange(len(pixels))
    parts = train_test_split(rows, test_size=HELD_OUT, stratify=data.target, random_state=SEED)
    train, held_out = (Digits(pixels[part], data.target[part], part) for part in parts)
    return train, held_out


def as_input(pixels: np.ndarray) -> Tensor:
    """Images as the model takes them: float32 of shape (n, 1, 8, 8) in [0, 1]."""
    return torch.from_numpy(pixels).float().div(255).unsqueeze(1)


def residual_block(channels: int, out_channels: int, stride: int = 1) -> BasicBlock:
    """A torchvision block, with a projection on the shortcut where the shape changes."""
    if stride == 1 and channels == out_channels:
        return BasicBlock(channels, out_channels)
    projection = nn.Sequential(
        nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )
    return BasicBlock(channels, out_channels, stride, projection)


def build_model() -> nn.Sequential:
    """A residual network with nine norm layers and about 41,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        residual_block(16, 16),
        residual_block(16, 32, stride=2),
        residual_block(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(inplace=True),
        nn.Linear(64, 10),
    )


def shifted(images: Tensor) -> Tensor:
    """The batch moved by up to MAX_SHIFT pixels in each direction, filled with background."""
    size = images.shape[-1]
    top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    return F.pad(images, [MAX_SHIFT] * 4)[..., top : top + size, left : left + size]


def train(model: nn.Module, digits: Digits, epochs: int) -> None:
    """Train in place with a one-cycle schedule; the model ends in eval mode."""
    images, labels = as_input(digits.pixels), torch.from_numpy(digits.labels)
    steps = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.01, epochs=epochs, steps_per_epoch=steps
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(shifted(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    model.eval()


def write_images(digits: Digits, folder: Path) -> None:
    """Write each image as FOLDER/CLASS/ROW.png, 8-bit greyscale."""
    for pixels, label, row in zip(digits.pixels, digits.labels, digits.rows, strict=True):
        path = folder / str(label) / f"{row:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, optimize=True)


def count_correct(model: nn.Module, folder: Path) -> tuple[int, int]:
    """How many of the images below the folder the model gets right, and how many there are."""
    paths = sorted(folder.glob("*/*.png"))
    images = as_input(np.stack([np.asarray(Image.open(path)) for path in paths]))
    labels = torch.tensor([int(path.parent.name) for path in paths])
    with torch.inference_mode():
        return int((model(images).argmax(1) == labels).sum()), len(paths)


def main() -> None:
    """Train, write the model and the held-out images, and print the accuracy on the latter."""
    parser = argparse.ArgumentParser(description="Train the sample model on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(1)  # the order of float sums depends on the number of threads
    start = time.perf_counter()
    training, held_out = split_digits()
    model = build_model()
    train(model, training, args.epochs)
    write_images(held_out, args.out / "digits")
    torch.save(model, args.out / "digits_cnn.pt")

    correct, total = count_correct(model, args.out / "digits")
    print(f"trained on {len(training.rows)} images in {time.perf_counter() - start:.0f} s")
    print(f"accuracy on {total} held-out images: {correct / total:.2%} ({correct} right)")


if __name__ == "__main__":
    main()
