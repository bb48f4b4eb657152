"""Peak memory of planning and folding, and of the check, beside one batch-1 forward.

pytest tests/benchmarks/test_memory.py -s
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys, torch
sys.path.insert(0, {here!r})
from measures import PeakMemory, built, plan_and_fold
from bntools.modules import named_tensors
import bntools
torch.set_num_threads(2)
model, image = built({name!r}), torch.rand(1, 3, 224, 224)
size = sum(t.numel() * t.element_size() for *_, t in named_tensors(model))
plan_and_fold(built("resnet18"), image), bntools.fold(built("resnet18"), image)
with torch.no_grad(), PeakMemory() as forward:
    model(image)
with torch.no_grad(), PeakMemory() as exact:
    double = built({name!r}).double()
    double(image.double())
del double
with PeakMemory() as folding:
    folded = plan_and_fold(model, image)
del folded
with PeakMemory() as all_of_it:
    report = bntools.fold(model, image).report
mb = lambda n: round(n / 2**20)
print(f"{name}: model {{mb(size)}} MB, batch-1 forward {{mb(forward.bytes)}} MB;"
      f" plan and fold above the two models {{mb(folding.bytes - size)}} MB;"
      f" with the check {{mb(all_of_it.bytes - size)}} MB"
      f" (3 models + float64 forward: {{mb(3 * size + exact.bytes - 2 * size)}} MB),"
      f" check as reported {{mb(report.check.peak_bytes)}} MB")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["resnet50", "resnet152", "efficientnet_b0"])
def test_peak_memory(name):
    code = MEASURE.format(here=str(Path(__file__).parent), name=name)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    print(f"\n{done.stdout.strip()}")
