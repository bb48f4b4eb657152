"""The sample of recalibration runs from end to end on a little data that somebody made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SAMPLE = Path(__file__).parent.parent / "samples" / "fashion_recalibrate.py"


@pytest.mark.slow
def test_the_sample_prints_its_tables(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 240), ("test", 60)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 60, (count, 28, 28)) + 15 * labels[:, None, None]
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    np.savez(tmp_path / "made_up.npz", **arrays)
    command = [sys.executable, str(SAMPLE), str(tmp_path / "made_up.npz"), "--epochs", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ")[0] for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows.count("| noise") == 4
    assert "| accuracy (%)" in rows
