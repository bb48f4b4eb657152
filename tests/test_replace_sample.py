"""The sample of replacement runs from end to end, with weights and images that somebody made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.mark.slow
def test_the_sample_prints_its_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    from resnet20 import ResNet20

    state = nn.DataParallel(ResNet20()).state_dict()
    torch.save({"state_dict": state}, tmp_path / "weights.th")
    rng = np.random.default_rng(0)
    images = {p: rng.integers(0, 256, (120, 32, 32, 3), np.uint8) for p in ("train", "test")}
    labels = rng.integers(0, 10, 120)
    np.savez(
        tmp_path / "made_up.npz",
        train_images=images["train"],
        test_images=images["test"],
        test_labels=labels,
    )
    command = [sys.executable, str(SAMPLES / "resnet20_replace.py"), "--quick"]
    command += ["--model", str(tmp_path / "weights.th"), "--data", str(tmp_path / "made_up.npz")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| method",
        "| BatchNorm, the original",
        "| GroupNorm (8 groups), affine copied",
        "| GroupNorm (auto groups), fit",
        "| EvoNorm-S0 (32 groups), fit + distill 5",
    ]
