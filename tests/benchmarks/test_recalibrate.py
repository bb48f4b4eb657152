"""Recalibration of resnet50 (224 px, batches of 32) beside its peers, and its peak memory.

    pytest tests/benchmarks/test_recalibrate.py -s

CPU time, so that other processes do not count; ratios in one run, never asserted. fvcore is
measured where it is installed, else its algorithm as tests/recalibration_peers.py has it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measures import built, cpu_seconds
from recalibration_peers import with_fvcore
from torch.optim.swa_utils import update_bn

import bntools
from bntools.modules import named_tensors
from bntools.moments import moments_of

BATCHES = 1
ROUNDS = 2
QUIET = bntools.RecalibrationOptions(compare_samples=0)
CHANNELS_LAST = bntools.RecalibrationOptions(compare_samples=0, layout="channels_last")
KEPT = bntools.RecalibrationOptions(compare_samples=0, layout="keep")


def fvcores(model, batches):
    """The update_bn_stats of fvcore with only the norms in training mode."""
    try:
        from fvcore.nn import update_bn_stats
    except ImportError:
        return with_fvcore(model, batches)
    model = copy.deepcopy(model)
    for module in model.modules():
        module.training = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    update_bn_stats(model, batches, len(batches))
    return model


def forwards(model, batches):
    """Plain eval forwards."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def channels_last(model, batches):
    """The same model and images, channels last."""
    like = {"memory_format": torch.channels_last}
    return copy.deepcopy(model).to(**like), [batch.contiguous(**like) for batch in batches]


@pytest.mark.timeout(1800)
def test_speed():
    model, batches = built("resnet50"), list(torch.randn(BATCHES * 32, 3, 224, 224).split(32))
    nhwc, nhwc_batches = channels_last(model, batches)
    work = {
        "plain eval forward": lambda: forwards(model, batches),
        "the same, channels last": lambda: forwards(nhwc, nhwc_batches),
        "update_bn": lambda: update_bn(batches, copy.deepcopy(model)),
        "update_bn, channels last": lambda: update_bn(nhwc_batches, copy.deepcopy(nhwc)),
        "fvcore": lambda: fvcores(model, batches),
        "bntools cumulative": lambda: bntools.recalibrate(model, batches, options=QUIET),
        "bntools pooled": lambda: bntools.recalibrate(
            model, batches, method="pooled", options=QUIET
        ),
        "bntools cumulative, channels last": lambda: bntools.recalibrate(
            model, batches, options=CHANNELS_LAST
        ),
        "bntools pooled, layout kept": lambda: bntools.recalibrate(
            model, batches, method="pooled", options=KEPT
        ),
        "bntools pooled, with the comparison": lambda: bntools.recalibrate(
            model, batches, method="pooled"
        ),
    }
    seconds = dict(zip(work, cpu_seconds(*work.values(), rounds=ROUNDS), strict=True))
    plain = seconds["plain eval forward"]
    print(f"\nresnet50, {BATCHES * 32} images of 224 px, {torch.get_num_threads()} threads")
    for name, found in seconds.items():
        print(
            f"{name:38} {found:7.2f} CPU s  {BATCHES * 32 / found:6.2f} images/s"
            f"  {found / plain:.2f}x"
        )


@pytest.mark.parametrize("shape", [(32, 64, 112, 112), (32, 256, 56, 56), (32, 2048, 7, 7)])
def test_exact_reduction(shape):
    """What exact moments cost beside the norm kernel's own, in both layouts."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape).contiguous(memory_format=layout)
        exact, kernel = cpu_seconds(
            lambda x=x: moments_of(x),
            lambda x=x: torch.batch_norm_update_stats(x, None, None, 0.0),
        )
        name = "channels last" if layout is torch.channels_last else "contiguous"
        per = 1e9 / x.numel()
        print(f"\n{shape} {name}: exact {exact * per:.2f} ns, kernel {kernel * per:.2f} ns a value")


BEGIN = """
import sys, copy, torch
sys.path[:0] = {paths!r}
from measures import PeakMemory, built
from torch.optim.swa_utils import update_bn
import bntools
torch.set_num_threads(2)
model, batches = built("resnet50"), list(torch.randn(64, 3, 224, 224).split(32))
small = built("resnet18")  # what is loaded and cached at the first use is nobody's peak
bntools.recalibrate(small, batches[0][:2].split(1))
"""
WORK = {
    "update_bn": "update_bn(batches, model)",
    "update_bn, copy": "kept = copy.deepcopy(model); update_bn(batches, kept)",
    "bntools": "kept = bntools.recalibrate(model, batches, method='pooled').model",
    "bntools, layout kept": "kept = bntools.recalibrate(model, batches, method='pooled',"
    " options=bntools.RecalibrationOptions(layout='keep')).model",
    "bntools, in place": "bntools.recalibrate(model, batches, method='pooled',"
    " options=bntools.RecalibrationOptions(inplace=True))",
}


def peak(work):
    """The peak of a piece of work in MB, in a process of its own that returns freed memory."""
    here = Path(__file__).parent
    code = BEGIN.format(paths=[str(here), str(here.parent)])
    code += f"\nwith PeakMemory() as peak:\n    {WORK[work]}\nprint(peak.bytes / 2**20)"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory():
    size = sum(t.numel() * t.element_size() for *_, t in named_tensors(built("resnet50"))) / 2**20
    batch = 32 * 3 * 224 * 224 * 4 / 2**20
    print(f"\nresnet50 has {size:.0f} MB, a batch of inputs {batch:.0f} MB; peaks above both")
    for work in WORK:
        print(f"{work:22} {peak(work):6.0f} MB")
