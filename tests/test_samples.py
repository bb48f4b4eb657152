"""Every sample that needs no download runs from end to end, in a reduced mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SAMPLES = Path(__file__).parent.parent / "samples"


def run(name: str, *words: object, folder: Path) -> str:
    """What a sample prints; it has to end with 0."""
    command = [sys.executable, str(SAMPLES / name), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_pipeline_leaves_a_model_a_file_and_their_proof(tmp_path):
    """`deploy.py` on the digits."""
    printed = run("deploy.py", folder=tmp_path)
    assert "folded 9 of 9 norm layers" in printed
    assert "all 20 layers agree" in printed
    left = sorted(path.name for path in (tmp_path / "deployed").iterdir())
    assert left == ["model.onnx", "model.pt", "verification.json"]


def test_the_pipeline_has_an_exit_code_for_what_cannot_be_done(tmp_path):
    """One line on stderr, and 3."""
    command = [sys.executable, str(SAMPLES / "deploy.py"), "missing.pt"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 3
    assert result.stderr.startswith("Error: Cannot load missing.pt")
    assert len(result.stderr.splitlines()) == 1


def test_a_norm_that_is_taught_is_folded(tmp_path):
    """`custom_norm.py`."""
    printed = run("custom_norm.py", folder=tmp_path)
    assert "before: 0 of 2 affines would fold" in printed
    assert "after: folded 2 of 2 norm layers" in printed


def test_processes_find_what_one_finds(tmp_path):
    """`torchrun_recalibrate.py`, by torchrun, in two processes."""
    sample = str(SAMPLES / "torchrun_recalibrate.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", sample,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes: recalibrated 9 norm layers" in result.stdout
    assert (tmp_path / "digits.recalibrated.pt").is_file()


def test_an_average_is_better_with_statistics_of_its_own(tmp_path):
    """`averaged_model.py`."""
    lines = run("averaged_model.py", "--quick", folder=tmp_path).splitlines()
    score = {
        name: float(share.strip("%"))
        for name, _, share in (line.partition(": ") for line in lines)
        if name.startswith("average,")
    }
    assert score["average, recalibrated"] > score["average, averaged statistics"]


@pytest.fixture
def made_up(tmp_path):
    """Images that anybody can tell apart, in the form of Fashion-MNIST."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 512), ("test", 128)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 60, (count, 28, 28)) + 15 * labels[:, None, None]
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    np.savez(tmp_path / "made_up.npz", **arrays)
    return tmp_path / "made_up.npz"


def test_the_study_takes_every_step(made_up, tmp_path):
    """`fashion_lenet.py` writes its figures, numbers and the ONNX file."""
    run("fashion_lenet.py", made_up, "--quick", "--out", "out", folder=tmp_path)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["calibration.png", "lenet.onnx", "results.json", "training.png", "without.onnx"]
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["freeze"]["frozen: statistics changed of 8"] == 0
    assert results["freeze"]["plain: statistics changed of 8"] == 8
    assert results["to-batchnorm"]["largest difference of 10,000 outputs"] < 1e-5
    assert results["fold"]["by hand"].startswith("folded 4 of 4")
    assert results["fold"]["nn"].startswith("folded 4 of 4")
    gaps = [v for name, v in results["recalibrate"].items() if name.startswith("recurrence")]
    assert gaps
    assert max(gaps) < 1e-6
