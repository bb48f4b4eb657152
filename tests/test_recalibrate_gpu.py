"""Recalibration on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from randomise import randomise
from torch import nn

import bntools
from bntools import RecalibrationOptions as Options
from bntools.moments import moments_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def model():
    torch.manual_seed(2)
    layers = []
    for channels in (3, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    made = nn.Sequential(*layers)
    randomise(made)
    return made.eval()


def batches():
    generator = torch.Generator().manual_seed(3)
    return list((torch.randn(40, 3, 32, 32, generator=generator) * 2 + 1).split(16))


@pytest.mark.parametrize("shape", [(257, 8), (16, 8, 7, 7), (64, 64, 112, 112)])
def test_moments_on_the_device_are_exact(shape):
    x = torch.randn(shape, device="cuda") * 0.01 + 100
    rows = x.double().transpose(0, 1).flatten(1)
    found = moments_of(x)
    assert torch.allclose(found.mean, rows.mean(1), rtol=1e-12)
    assert torch.allclose(found.variance(), rows.var(1, correction=0), rtol=1e-8)


@pytest.mark.parametrize("method", ["cumulative", "pooled", "ema"])
def test_the_device_makes_no_difference(method):
    """To the rounding of convolutions; by `device=`, or where the model is."""
    expected = bntools.recalibrate(model(), batches(), method=method).model
    moved = bntools.recalibrate(model().cuda(), batches(), method=method).model
    asked = bntools.recalibrate(
        model(), batches(), method=method, options=Options(device="cuda")
    ).model
    assert all(t.is_cuda for t in moved.buffers())
    assert not any(t.is_cuda for t in asked.buffers())
    for name, buffer in expected.named_buffers():
        for other in (moved, asked):
            found = other.get_buffer(name).cpu()
            assert torch.allclose(found.double(), buffer.double(), rtol=1e-4, atol=1e-4), name


def test_cumulative_on_the_device_is_pytorchs_loop():
    start = model().cuda()
    twin = copy.deepcopy(start)
    for module in twin:
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum, module.training = None, True
    with torch.no_grad():
        for batch in batches():
            twin(batch.cuda())
    found = bntools.recalibrate(start, batches()).model
    for name, buffer in twin.named_buffers():
        assert torch.allclose(found.get_buffer(name), buffer, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_statistics_in_float64(dtype):
    found = bntools.recalibrate(
        model().cuda(), batches(), method="pooled", options=Options(autocast=dtype)
    ).model
    plain = bntools.recalibrate(model().cuda(), batches(), method="pooled").model
    assert found[1].running_var.dtype == torch.float32
    assert torch.allclose(found[7].running_var, plain[7].running_var, rtol=0.1)


def test_evaluation_runs_on_the_device_asked_for():
    seen = []

    def evaluate(judged):
        seen.append(next(judged.parameters()).device.type)
        return 1.0

    result = bntools.recalibrate(
        model(), batches(), evaluate=evaluate, options=Options(device="cuda")
    )
    assert seen == ["cuda", "cuda"]
    assert result.report.accepted
    assert not result.model[1].running_var.is_cuda
