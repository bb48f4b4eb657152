"""Peak memory of planning and folding, and of the check, beside one batch-1 forward.

pytest tests/benchmarks/test_memory.py -s
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from measures import built

from bntools.modules import named_tensors

BEGIN = """
import sys, torch
sys.path.insert(0, {here!r})
from measures import PeakMemory, built, plan_and_fold
import bntools
torch.set_num_threads(2)
model, image = built({name!r}), torch.rand(1, 3, 224, 224)
small = built("resnet18")  # what is loaded and cached at the first use is nobody's peak
with torch.no_grad():
    small(image)
bntools.fold(small, image)
"""
WORK = {
    "forward": "with torch.no_grad():\n        model(image)",
    "float64 forward": "with torch.no_grad():\n        model(image)",
    "fold": "kept = plan_and_fold(model, image)",
    "fold and check": "kept = bntools.fold(model, image).model",
}
PREPARE = {"float64 forward": "model, image = model.double(), image.double()"}


def peak(name: str, work: str) -> float:
    """The peak of a piece of work in MB, in a process of its own that returns freed memory."""
    code = BEGIN.format(here=str(Path(__file__).parent), name=name) + PREPARE.get(work, "")
    code += f"\nwith PeakMemory() as peak:\n    {WORK[work]}\nprint(peak.bytes / 2**20)"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["resnet50", "resnet152", "efficientnet_b0"])
def test_peak_memory(name):
    size = sum(t.numel() * t.element_size() for *_, t in named_tensors(built(name))) / 2**20
    found = {work: peak(name, work) for work in WORK}
    print(
        f"\n{name} ({size:.0f} MB): plan and fold {found['fold'] - size:.0f} MB above both models"
        f" (batch-1 forward {found['forward']:.0f}), with the check"
        f" {found['fold and check'] - size:.0f} MB"
        f" (three models and a float64 forward {3 * size + found['float64 forward']:.0f})"
    )
