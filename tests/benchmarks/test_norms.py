"""Speed of EvoNorm-S0: the ratio of our forward to timm's, and to GroupNorm with SiLU.

Run `pytest tests/benchmarks/test_norms.py -s`; pytest-benchmark prints times, the ratios are
printed as they are measured and go into `extra_info`. The layers take turns on the same tensor and
the fastest run of each counts. With a GPU the same is measured there.
"""

from __future__ import annotations

import time

import pytest
import torch
from timm.layers.evo_norm import EvoNorm2dS0 as TimmEvoNorm2dS0
from torch import nn

from bntools.norms import EvoNorm2dS0

REPEATS = 15
SHAPES = [(16, 64, 56, 56), (16, 256, 14, 14), (16, 512, 7, 7)]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def seconds(call, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest(calls, device):
    """The least time of each, the calls taking turns."""
    for call in calls:
        call()
    rounds = [[seconds(call, device) for call in calls] for _ in range(REPEATS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def forward(layer, x):
    with torch.no_grad():
        return layer(x)


def trained(layer, x, gradient):
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evo_norm_s0_against_its_peers(benchmark, device, training, shape):
    channels = shape[1]
    layers = [
        EvoNorm2dS0(channels).to(device),
        TimmEvoNorm2dS0(channels).to(device),
        nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU()).to(device),
    ]
    x = torch.randn(shape, device=device, requires_grad=training)
    gradient = torch.randn(shape, device=device)
    calls = [
        (lambda layer=layer: trained(layer, x, gradient))
        if training
        else (lambda layer=layer: forward(layer, x))
        for layer in layers
    ]
    ours, timm, silu = fastest(calls, device)
    benchmark.extra_info.update(timm=ours / timm, group_norm_silu=ours / silu)
    benchmark.pedantic(calls[0], rounds=3, iterations=1)
    what = "forward and backward" if training else "forward"
    print(
        f"\n{device} {shape}, {what}: {ours * 1e3:.2f} ms; {ours / timm:.2f}x timm's EvoNorm2dS0"
        f" ({timm * 1e3:.2f} ms), {ours / silu:.2f}x GroupNorm + SiLU ({silu * 1e3:.2f} ms)"
    )
