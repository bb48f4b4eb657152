"""`bntools.ship` and `bntools ship`: the whole way into one folder, or nothing."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import onnx
import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from randomise import randomise
from torch import nn

import bntools
from bntools import shipping
from bntools.errors import SaveError, ShipError
from bntools.report import ShipStep

SAMPLES = Path(__file__).parent.parent / "samples"
FILES = ["certificate.json", "model.onnx", "model.pt", "report.html"]


def small(seed: int = 0) -> nn.Module:
    """A network with random statistics."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(1), nn.Linear(4 * 4 * 4, 5),
    )  # fmt: skip
    randomise(model)
    return model.eval()


def images(count: int = 64) -> list[torch.Tensor]:
    """Batches of images."""
    generator = torch.Generator().manual_seed(3)
    return list((torch.randn(count, 3, 8, 8, generator=generator) * 2 + 1).split(16))


def left(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_shipment_holds_what_is_deployed_and_its_proof(tmp_path):
    """The files load, give the same, and have the sums of the certificate."""
    model = small()
    result = bntools.ship(model, tmp_path / "out", data=images())
    assert result.report
    assert left(tmp_path) == ["out"]
    assert left(tmp_path / "out") == FILES
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text("utf-8"))
    assert certificate["shipped"] is True
    for file in certificate["files"]:
        content = (tmp_path / "out" / file["name"]).read_bytes()
        assert len(content) == file["size"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    shipped = bntools.load(tmp_path / "out" / "model.pt")
    expected = bntools.recalibrate(model, images()).model
    assert bntools.verify(expected, shipped)
    assert bntools.verify(expected, tmp_path / "out" / "model.onnx")
    nodes = {node.op_type for node in onnx.load(str(tmp_path / "out" / "model.onnx")).graph.node}
    assert "BatchNormalization" not in nodes


def test_the_argument_is_left_as_it_was(tmp_path):
    """Recalibration and fold happen on copies; flags stay."""
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = bntools.ship(model, tmp_path / "out", data=images())
    assert model.training
    assert "training mode" in result.report.notes[0]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_without_data_nothing_is_recalibrated(tmp_path):
    """The statistics are those of the model."""
    model = small()
    report = bntools.ship(model, tmp_path / "out", example_inputs=torch.rand(2, 3, 8, 8)).report
    assert report.recalibration is None
    assert list(report.steps) == [step for step in ShipStep if step is not ShipStep.RECALIBRATE]
    assert bntools.verify(model, tmp_path / "out" / "model.onnx")


def test_the_page_has_the_pictures_in_it_and_needs_no_other_file(tmp_path):
    """Two figures as SVG, and no link to anything outside."""
    bntools.ship(small(), tmp_path / "out", data=images())
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count("<figure>") == 2
    assert "src=" not in page
    assert "<link" not in page
    assert "<script" not in page


def test_names_from_outside_cannot_become_markup(tmp_path):
    """What the model is called is data."""
    options = bntools.ShipOptions(source="<script>alert(1)</script>")
    bntools.ship(small(), tmp_path / "out", options=options)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_without_matplotlib_the_page_says_that_it_has_no_pictures(tmp_path, monkeypatch):
    """Matplotlib is optional."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = bntools.ship(small(), tmp_path / "out", data=images()).report
    assert report
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "No pictures: Cannot draw: matplotlib is not installed" in page
    assert "<figure>" not in page


def test_a_model_that_the_doctor_finds_broken_is_not_shipped(tmp_path):
    """NaN statistics are an error."""
    model = small()
    model[1].running_mean[0] = float("nan")
    report = bntools.ship(model, tmp_path / "out").report
    assert not report
    assert report.failed is ShipStep.INSPECT
    assert report.folder is None
    assert report.files == ()
    assert left(tmp_path) == []


def test_warnings_stop_a_shipment_where_that_is_asked_for(tmp_path):
    """A net that never saw data has statistics 0 and 1: a warning."""
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    strict = bntools.ShipOptions(fail_on="warning")
    assert bntools.ship(fresh, tmp_path / "a", options=strict).report.failed is ShipStep.INSPECT
    assert bntools.ship(fresh, tmp_path / "b").report


def test_a_recalibration_that_makes_it_worse_stops_the_shipment(tmp_path):
    """The score is the gate."""
    scores = iter([0.9, 0.1])
    options = bntools.ShipOptions(evaluate=lambda _model: next(scores))
    report = bntools.ship(small(), tmp_path / "out", data=images(), options=options).report
    assert report.failed is ShipStep.RECALIBRATE
    assert "recalibrate failed" in report.summary()
    assert left(tmp_path) == []


def test_a_file_that_computes_something_else_is_not_shipped(tmp_path, monkeypatch):
    """A fault planted between export and verification is found by the last step."""
    export = shipping.export_onnx

    def faulty(model, examples, path, **settings):
        result = export(model, examples, path, **settings)
        proto = onnx.load(str(path))
        weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0] *= 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(proto, str(path))
        return result

    monkeypatch.setattr(shipping, "export_onnx", faulty)
    report = bntools.ship(small(), tmp_path / "out").report
    assert report.failed is ShipStep.VERIFY
    assert left(tmp_path) == []


def test_a_step_that_cannot_be_done_is_named(tmp_path):
    """ONNX Runtime has no convolution in float64 on the CPU."""
    with pytest.raises(ShipError, match="Cannot export: cannot run the ONNX model") as raised:
        bntools.ship(small().double(), tmp_path / "out")
    assert raised.value.step == "export"
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["inspect", "recalibrate", "fold", "save", "export_onnx", "page", "write_report"]
)
def test_an_interruption_leaves_nothing(name, tmp_path, monkeypatch):
    """Ctrl-C at any step."""

    def interrupted(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(shipping, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        bntools.ship(small(), tmp_path / "out", data=images())
    assert left(tmp_path) == []


def test_a_folder_is_replaced_only_when_asked_and_only_by_a_shipment(tmp_path):
    """Files that bntools did not write are never removed."""
    target = tmp_path / "out"
    bntools.ship(small(), target)
    with pytest.raises(SaveError, match="it exists"):
        bntools.ship(small(), target)
    first = (target / "model.onnx").read_bytes()
    bntools.ship(small(seed=1), target, force=True)
    assert (target / "model.onnx").read_bytes() != first
    (target / "certificate.json").unlink()
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(SaveError, match="it holds other files"):
        bntools.ship(small(), target, force=True)
    assert (target / "thesis.tex").read_text() == "mine"
    assert left(tmp_path) == ["out"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    """The old shipment stays whole."""
    target = tmp_path / "out"
    bntools.ship(small(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    broken = small()
    broken[1].running_var[0] = float("nan")
    assert not bntools.ship(broken, target, force=True).report
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("file", "it is a file"), ("missing/out", "there is no folder"), ("loop", "Cannot write")],
)
def test_a_folder_that_cannot_be_is_refused_before_any_work(name, problem, tmp_path, monkeypatch):
    """Nothing is recorded first."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(shipping, "inspect", None)
    with pytest.raises(SaveError, match=problem):
        bntools.ship(small(), tmp_path / name)


def test_empty_data_are_refused(tmp_path):
    """There is nothing to re-estimate on."""
    with pytest.raises(bntools.BNToolsError, match="the data have no batch"):
        bntools.ship(small(), tmp_path / "out", data=[])
    assert left(tmp_path) == []


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the sample network."""
    (tmp_path / "model.pt").write_bytes((SAMPLES / "digits_cnn.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, code=0):
    result = CliRunner().invoke(program, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_the_command_ships_with_data(folder):
    """From a folder of images to a folder to deploy."""
    digits = SAMPLES / "digits"
    result = run("ship", "model.pt", "--data", digits, "--grayscale")
    assert result.stdout.splitlines()[-1].startswith("shipped 2 files, ")
    assert "wrote model.shipped\n" in result.stderr
    assert left(folder) == ["model.pt", "model.shipped"]
    assert left(folder / "model.shipped") == FILES
    again = run("ship", "model.pt", code=3)
    assert "it exists" in again.stderr


def test_a_score_that_falls_stops_the_command(folder):
    """On the digits themselves, new statistics cost one image of 397."""
    digits = SAMPLES / "digits"
    words = ("--data", digits, "--grayscale", "--eval-data", digits)
    result = run("ship", "model.pt", *words, code=12)
    assert result.stderr.endswith("failed: recalibrate, so nothing was written\n")
    assert left(folder) == ["model.pt"]


def test_the_exit_code_names_the_step(folder):
    """11 for the doctor, 14 for the export."""
    torch.save(small().double(), folder / "double.pt")
    result = run("ship", "double.pt", code=14)
    assert result.stderr.splitlines()[-1].startswith("Error: Cannot export: ")
    broken = small()
    broken[1].running_mean[0] = float("inf")
    torch.save(broken, folder / "broken.pt")
    result = run("ship", "broken.pt", "--json", code=11)
    assert json.loads(result.stdout)["failed"] == "inspect"
    assert left(folder) == ["broken.pt", "double.pt", "model.pt"]


@pytest.mark.parametrize(
    "words",
    [
        ("--only", "1"),
        ("--eval-data", "x.npz"),
        ("-o", "model.pt"),
        ("-o", "a", "--report", "a"),
        ("--mean", "0.5"),
    ],
)
def test_options_that_contradict_each_other_are_malformed(words, folder):
    """Before anything is loaded."""
    run("ship", "model.pt", *words, code=2)
    assert left(folder) == ["model.pt"]
