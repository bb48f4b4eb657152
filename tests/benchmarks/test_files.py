"""Loading and saving a state dict of 500 MB, beside torch's own load and save of the same file.

pytest tests/benchmarks/test_files.py -s

Each piece of work is done in a process of its own, in turn with its peers, with the file in the
page cache; the least CPU and wall time of three rounds counts. `torch + fsync` writes as durably as
bntools does, which is the fair peer on a disk; peak memory is the growth of the resident set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROUNDS, HERE = 3, Path(__file__).parent
LAYERS, WIDTH = 8, 4000


def network() -> nn.Module:
    """512 MB of float32 weights, and norms."""
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(LAYERS))
    return nn.Sequential(*blocks).eval()


BEGIN = """
import os, sys, time, json
sys.path.insert(0, {here!r})
import torch, bntools, bntools.loading, bntools.saving
from measures import PeakMemory
torch.set_num_threads(1)
source, target = sys.argv[1:]
small = torch.nn.Linear(2, 2)
bntools.save(small, target + ".small.pt"), bntools.load(target + ".small.pt")
def sync(path):
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
with PeakMemory() as peak:
    wall, cpu = time.perf_counter(), time.process_time()
{work}
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([wall, cpu, peak.bytes / 2**20]))
"""
LOAD = "    model = bntools.load(source, 'test_files:network')\n"
WORK = {
    "torch": "    torch.save(torch.load(source), target)",
    "torch + fsync": "    torch.save(torch.load(source), target)\n    sync(target)",
    "bntools .pt": LOAD + "    bntools.save(model, target + '.pt', state_dict=True)",
    "bntools whole .pt": LOAD + "    bntools.save(model, target + '.pt')",
    "bntools .safetensors": LOAD + "    bntools.save(model, target + '.safetensors')",
    "torch, load alone": "    torch.load(source)",
    "bntools, load alone": LOAD,
}


def measured(work: str, source: Path, folder: Path) -> list[float]:
    """Wall seconds, CPU seconds and peak memory in MB of one piece of work."""
    code = BEGIN.format(here=str(HERE), work=WORK[work])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(source), str(folder / "out")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    for path in folder.glob("out*"):
        path.unlink()
    return json.loads(done.stdout)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
def test_load_and_save_of_a_large_state_dict(kind, tmp_path):
    """Bntools puts the weights into an architecture; torch only reads and writes the dict."""
    state = network().state_dict()
    source = tmp_path / f"weights{kind}"
    if kind == ".pt":
        torch.save(state, source)
        names = list(WORK)
    else:
        from safetensors.torch import save_file

        save_file(state, source)
        names = [name for name in WORK if name.startswith("bntools")]
    size = source.stat().st_size / 2**20
    del state
    rounds = [{name: measured(name, source, tmp_path) for name in names} for _ in range(ROUNDS)]
    best = {name: [min(r[name][i] for r in rounds) for i in range(3)] for name in names}
    print(f"\n{size:.0f} MB {kind}, of {ROUNDS} rounds the least")
    for name, (wall, cpu, peak) in best.items():
        print(f"{name:22} {wall:6.2f} s wall {cpu:6.2f} s CPU {peak:7.0f} MB peak", end="")
        for peer in ("torch", "torch + fsync"):
            if peer in best and "alone" not in name and name != peer:
                print(f"   {wall / best[peer][0]:4.2f}x {cpu / best[peer][1]:4.2f}x"
                      f" {peak / best[peer][2]:4.2f}x of {peer}", end="")  # fmt: skip
        print()
