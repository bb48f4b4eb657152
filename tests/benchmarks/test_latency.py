"""Latency of eager PyTorch before and after `bntools.fold`, with and without merges.

    pytest tests/benchmarks/test_latency.py -s

Each model runs as it is, folded, and folded with `merge_branches=True`, in turn in one process, so
that all see the same machine; the ratios to the model as it is are printed as a table for the
README. On a GPU, where there is one, the same with CUDA events. Times are never asserted.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from randomise import randomise
from torch import Tensor, nn

import bntools

BATCHES = (1, 16)
ROUNDS = {1: 20, 16: 6}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


class Bottleneck(nn.Module):
    """Of YOLOv5: two convolutions with norm and SiLU, and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(channels, channels, 1), conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class CSP(nn.Module):
    """YOLOv5's C3: one branch through bottlenecks, one past them."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = conv(inputs, half, 1), conv(inputs, half, 1)
        self.m = nn.Sequential(*(Bottleneck(half) for _ in range(depth)))
        self.cv3 = conv(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.SiLU(inplace=True),
    )


def csp() -> nn.Module:
    """A stem and two stages, as in a small YOLO's backbone."""
    return nn.Sequential(
        conv(3, 32, 6, 2), conv(32, 64, 3, 2), CSP(64, 64, 1), conv(64, 128, 3, 2), CSP(128, 128, 2)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: torchvision.models.resnet50(weights=None),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(weights=None),
    "densenet121": lambda: torchvision.models.densenet121(weights=None),
    "repvgg_a0": lambda: timm.create_model("repvgg_a0"),
    "mobileone_s0": lambda: timm.create_model("mobileone_s0"),
    "CSP (YOLO)": csp,
}
ROWS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    """The rows of all models, at the end, in the README's form."""
    yield
    head = "| model | device | batch | original | folded | folded and merged |"
    print("\n".join(["", head, "|---|---|---|---|---|---|", *ROWS]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_latency(name, device):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    randomise(model)
    image = torch.randn(1, 3, 224, 224)
    folded = bntools.fold(model, image).model
    merged = bntools.fold(model, image, merge_branches=True).model
    candidates = [copy.deepcopy(each).to(device) for each in (model, folded, merged)]
    for batch in BATCHES:
        own, *others = seconds(candidates, image.expand(batch, -1, -1, -1).to(device))
        ratios = " | ".join(f"{1000 * other:.1f} ms ({other / own:.2f}x)" for other in others)
        ROWS.append(f"| {name} | {device} | {batch} | {1000 * own:.1f} ms | {ratios} |")
        print(f"\n{ROWS[-1]}")


def seconds(models: list[nn.Module], images: Tensor) -> list[float]:
    """The median time of a forward of each model, in turn, after two that do not count."""
    clock = on_gpu if images.is_cuda else on_cpu
    spent: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_ in range(ROUNDS[len(images)] + 2):
            for model, times in zip(models, spent, strict=True):
                took = clock(model, images)
                if round_ >= 2:
                    times.append(took)
    return [statistics.median(times) for times in spent]


def on_cpu(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def on_gpu(model: nn.Module, images: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    model(images)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
