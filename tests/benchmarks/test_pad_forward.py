"""What `--pad-forward` does to latency, against the same fold without it.

    pytest tests/benchmarks/test_pad_forward.py -s

The models are those whose norms stand before padded convolutions: XCiT, and blocks of a norm and a
3x3 convolution at three sizes of image. The table is printed; times are never asserted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from randomise import randomise
from torch import nn

import bntools


def blocks(channels: int, *, groups: int = 1, depth: int = 4) -> nn.Module:
    """Norm, padded convolution, activation: as in pre-activation nets, without their sums."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        layers += [nn.BatchNorm2d(channels), conv, nn.GELU()]
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "xcit_nano_12_p8_224": (lambda: timm.create_model("xcit_nano_12_p8_224"), (1, 3, 224, 224)),
    "3x3, 32 channels, 112 px": (lambda: blocks(32), (1, 32, 112, 112)),
    "3x3, 128 channels, 28 px": (lambda: blocks(128), (1, 128, 28, 28)),
    "depthwise, 128 channels, 56 px": (lambda: blocks(128, groups=128), (1, 128, 56, 56)),
}


@pytest.mark.parametrize("name", MODELS)
def test_padding_forward_is_compared_with_leaving_the_norm(name, capsys):
    build, shape = MODELS[name]
    model = build().eval()
    randomise(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    report = bntools.fold(model, x, pad_forward=True).report
    with capsys.disabled():
        print(f"\n{name}: {report.latency.summary()}")
    padded = [d for d in report.folds if d.forward]
    assert padded
    assert report.check.rolled_back == ()
