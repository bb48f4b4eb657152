"""A bounded part of the fuzz test, and that the fuzz test would find what it looks for.

`python tests/fuzz.py --cases 10000` is the long run; its record is tests/fuzz_results.json.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import fuzz
import fuzz_samples
import pytest
import torch

from bntools.errors import BNToolsError, LoadError

CASES = 300
KINDS = [
    "whole zip", "weights zip", "whole legacy", "weights legacy", "bntools folded.pt",
    "bntools weights.pt", "bntools weights.safetensors", "inputs npz", "inputs npz, compressed",
    "inputs npy", "inputs pt zip", "inputs pt legacy", "recipe fold", "recipe freeze",
    "recipe replace",
]  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The valid files that take no exporter, which is slow."""
    folder = tmp_path_factory.mktemp("samples")
    parts = (fuzz_samples._models(folder), fuzz_samples._inputs(folder), fuzz_samples._recipes())
    return [sample for part in parts for sample in part]


@pytest.fixture
def in_tests(monkeypatch):
    """The architecture of the samples is a module in this folder."""
    monkeypatch.chdir(Path(__file__).parent)


@pytest.mark.usefixtures("in_tests")
def test_the_valid_files_are_read(known, tmp_path):
    """So that a refusal is about the damage."""
    assert [sample.kind for sample in known] == KINDS
    for sample in known:
        path = tmp_path / sample.name
        path.write_bytes(sample.content)
        assert fuzz_samples.read(sample, path) is not None


@pytest.mark.usefixtures("in_tests")
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_in_one_line(known, tmp_path):
    """And nothing is written, by none of them."""
    outcomes = set()
    for case in range(CASES):
        sample, content, _, _ = fuzz._damaged(7, case, known)
        path = tmp_path / sample.name
        path.write_bytes(content)
        try:
            fuzz_samples.read(sample, path)
            said = "read"
        except BNToolsError as error:
            said = str(error)
        outcomes.add("read" if said == "read" else "refused")
        assert said.isprintable()
        assert [each.name for each in tmp_path.iterdir()] == [sample.name]
        path.unlink()
    assert outcomes == {"read", "refused"}


def test_a_case_is_the_same_in_every_run(known):
    """`--only` repeats what was found."""
    first = [fuzz._damaged(3, case, known)[1] for case in range(60)]
    assert [fuzz._damaged(3, case, known)[1] for case in range(60)] == first
    assert len(set(first)) > 55


def test_every_way_of_damage_changes_a_file(known):
    """The structured ones as well."""
    ways = set()
    for seed in range(600):
        sample = known[seed % len(known)]
        content, way = fuzz_samples.mutated(sample.content, random.Random(seed), [b"other" * 99])
        ways.add(way)
        assert content != sample.content or way in ("number", "removed", "members", "bytes", "bits")
    assert {"bits", "truncated", "spliced", "member", "pickle", "members", "JSON"} <= ways


# ---- the runner would find it --------------------------------------------------------------------


class Hostile:
    """Stands for a sample; reading it does what it is told."""

    kind, name, content, beside = "hostile", "m.pt", b"0123456789", ()


def outcome_of(monkeypatch, tmp_path, reading) -> str:
    monkeypatch.setattr(fuzz_samples, "read", reading)
    watch = fuzz.Watch(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    return fuzz._tried(0, 0, [Hostile()], own, watch).outcome


def raising(error):
    def read(*_):
        raise error

    return read


def writing_elsewhere(*_):
    Path(sys.prefix, "pyvenv.cfg").open("r+b").close()


def writing_beside(_, path):
    path.with_name("other").write_bytes(b"x")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (lambda *_: None, "read"),
        (raising(LoadError("Cannot load it.")), "refused"),
        (raising(LoadError("Cannot load\nit.")), "unprintable"),
        (raising(LoadError("Cannot load it: it needs more memory than there is.")), "memory"),
        (raising(KeyError("x")), "bug"),
        (lambda *_: torch.empty(2**31), "bug"),
        (writing_elsewhere, "acted"),
        (writing_beside, "wrote"),
    ],
)
def test_the_runner_finds_what_it_looks_for(reading, expected, tmp_path, monkeypatch):
    """Each kind of find, once."""
    assert outcome_of(monkeypatch, tmp_path, reading) == expected


def test_the_recorded_run_found_nothing():
    """At least 10,000 cases, over every format."""
    record = json.loads((Path(__file__).parent / "fuzz_results.json").read_text())
    assert record["cases"] >= 10_000
    assert record["finds"] == []
    assert set(record["outcomes"]) == {"read", "refused"}
    assert set(KINDS) < set(record["formats"])
    assert {"pt2", "TorchScript", "TorchScript, trusted", "ONNX", "ONNX with data"} < set(
        record["formats"]
    )
    assert all(counts["refused"] > 100 for counts in record["formats"].values())
