"""Several processes give what one gives on the same global batches, or an error in all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch

import bntools

SAME = [
    "cumulative", "pooled", "ema", "prior", "converge", "two-passes", "ragged",
    "ragged-cumulative", "empty", "hollow", "ddp", "sync", "skipped-nan",
]  # fmt: skip
FAILING = ["nothing", "nan", "broken-loader", "broken-model", "diverging", "partial"]


def launch(scenarios, out, count=2):
    """Start the processes as torchrun does, and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(worker.__file__)), ",".join(scenarios), str(out)]
    running = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    return [(process.communicate(timeout=240)[1], process.returncode) for process in running]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What two processes found, by scenario and rank."""
    out = tmp_path_factory.mktemp("two")
    names = [*SAME, *FAILING, "enough", "gate"]
    for said, code in launch(names, out):
        assert code == 0, said
    return {
        name: [torch.load(out / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]
        for name in names
    }


def global_batches(name, count=2):
    """What one process would be given: the batches of all, step by step."""
    shards = worker.shards(name)[:count]
    steps = max(map(len, shards))
    for step in range(steps):
        yield torch.cat([shard[step] for shard in shards if step < len(shard)])


@pytest.mark.parametrize("name", SAME)
def test_two_processes_are_as_good_as_one(name, answers):
    """To 1e-6 relative, with four norms in sequence, shards uneven, empty or of no sample."""
    first, second = answers[name]
    alone = bntools.recalibrate(
        worker.build(name), list(global_batches(name)), **worker.ARGUMENTS[name]
    )
    for key, expected in alone.model.state_dict().items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        if "running" not in key:
            assert torch.equal(first["state"][key], expected), key
            continue
        scale = alone.model.state_dict()[key.replace("mean", "var")]
        scale = scale.sqrt() if "mean" in key else scale
        assert (
            (first["state"][key] - expected).abs() <= 1e-6 * scale.maximum(expected.abs())
        ).all()
    assert first["samples"] == second["samples"] == alone.report.samples
    assert first["batches"] == alone.report.batches
    assert first["passes"] == len(alone.report.passes)
    assert first["processes"] == 2


def test_each_shard_alone_would_differ():
    """So that the test above can tell: statistics of one shard are no near miss."""
    model = worker.build("pooled")
    whole = bntools.recalibrate(model, list(global_batches("pooled")), method="pooled").model
    part = bntools.recalibrate(model, worker.shards("pooled")[0], method="pooled").model
    for key, expected in whole.state_dict().items():
        if "running_var" in key:
            assert not torch.allclose(part.state_dict()[key], expected, rtol=1e-4)


def test_a_converged_run_agrees_on_its_residual(answers):
    first, second = answers["converge"]
    assert first["residual"] == second["residual"] < 1e-3


def test_all_stop_where_enough_is_known(answers):
    first, second = answers["enough"]
    assert first["stopped"] == second["stopped"] != ""
    assert first["samples"] == second["samples"] < 60


def test_a_bad_batch_is_left_out_by_all(answers):
    first, second = answers["skipped-nan"]
    assert first["bad"] == second["bad"] == ("batch 2 (at 1)",)


def test_the_score_is_that_of_process_0(answers):
    assert answers["gate"][0]["score"] == answers["gate"][1]["score"] == 3.0


@pytest.mark.parametrize(
    ("name", "errors", "message"),
    [
        ("nothing", ("CalibrationError", "CalibrationError"), "there is no batch"),
        ("nan", ("CalibrationError", "CalibrationError"), "what 1 sees in it is not finite"),
        ("broken-loader", ("DistributedError", "CalibrationError"), "process 1 of 2 failed"),
        ("broken-model", ("DistributedError", "CalibrationError"), "process 1 of 2 failed"),
        ("diverging", ("DistributedError", "DistributedError"), "process 0 is at a and process 1"),
        ("partial", ("InputError", "InputError"), "Cannot keep a partial result"),
    ],
)
def test_what_fails_in_one_process_fails_in_all(name, errors, message, answers):
    assert tuple(answer["error"] for answer in answers[name]) == errors
    assert message in answers[name][0]["message"]


def test_a_process_that_dies_ends_the_run(tmp_path):
    """The other one raises, soon, and gives no statistics."""
    _, (_, died) = launch(["dies"], tmp_path)
    assert died == 9
    left = torch.load(tmp_path / "dies.0.pt", weights_only=False)
    assert left["error"] == "DistributedError"
    assert "Nothing is changed" in left["message"]


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with bntools.processes() as here:
        assert here == bntools.Processes(0, 1)
    assert not torch.distributed.is_initialized()
