"""The table of formats: what the code has, what the README says, and what the commands do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from torch import nn

import bntools
from bntools.errors import LoadError, SaveError
from bntools.formats.interface import EVERY_VERB
from bntools.formats.table import FORMATS, supported, written_as

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
KEYS = [entry.key for entry in supported()]


def rows() -> dict[str, list[str]]:
    """The rows of the README's table of formats, by the first word of each."""
    table = README.partition("| format | endings |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) == 5 and not row[0].startswith("---")}


def verbs_in(cell: str) -> set[str]:
    named = set(re.findall(r"`([\w-]+)`", cell))
    return set(EVERY_VERB) - named if cell.startswith("all") else named


def test_the_verbs_of_the_table_are_the_commands_of_the_program():
    """Each takes a model; what is in the table can be typed."""
    assert set(program.commands) == set(EVERY_VERB)


@pytest.mark.parametrize("entry", supported(), ids=KEYS)
def test_the_table_in_the_readme_is_the_table_in_the_code(entry):
    endings, verbs, written, carried = rows()[entry.key]
    assert set(re.findall(r"`(\.\w+)`", endings)) == set(entry.endings)
    assert verbs_in(verbs) == set(entry.verbs)
    assert (written == "yes") == (entry.write is not None or entry.key == "ONNX")
    assert {word for word in ("recipe", "originals") if word in carried} == set(entry.carries)


def test_the_table_in_the_readme_has_no_other_row():
    assert set(rows()) == set(KEYS)


def test_every_format_has_a_reader_or_says_what_to_do():
    assert all(entry.read or entry.verbs or entry.advice for entry in FORMATS)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("m.pt", "torch.save"),
        ("m.PTH", "torch.save"),
        ("model", "torch.save"),
        ("v1.2", "torch.save"),
        ("m.folded.safetensors", "safetensors"),
        ("m.SafeTensors", "safetensors"),
        ("m.pt2", "torch.export"),
        ("m.onnx", "ONNX"),
    ],
)
def test_the_ending_chooses_the_format(name, key):
    assert written_as(name).key == key


def onnx_file(path: Path) -> None:
    path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0:\x03abc")


@pytest.mark.parametrize("verb", sorted(EVERY_VERB - {"verify", "diff", "ship"}))
def test_a_command_that_does_not_take_a_format_says_which_do(verb, tmp_path):
    """By the table, before the file is read."""
    path = tmp_path / "m.onnx"
    onnx_file(path)
    takes = next(f for f in FORMATS if f.key == "ONNX").verbs
    more = {
        "recalibrate": ["--data", str(tmp_path)],
        "replace": ["--with", "groupnorm"],
        "export": ["-o", str(tmp_path / "x.onnx")],
    }
    done = CliRunner().invoke(program, [verb, str(path), *more.get(verb, [])])
    if verb in takes:
        assert "only `" not in done.stderr
        return
    assert done.exit_code == 3, done.output
    named = ", ".join(f"`{v}`" for v in sorted(takes)[:-1]) + f" and `{max(takes)}`"
    assert f"Cannot {verb} {path}: it is an ONNX model; only {named} take that." in done.stderr


def test_check_takes_leaves_the_rest_to_load(tmp_path):
    """What is no file, and what no verb takes."""
    bntools.check_takes(tmp_path / "nothing.pt", "fold")
    (tmp_path / "a.txt").write_text("abc")
    bntools.check_takes(tmp_path / "a.txt", "fold")
    onnx_file(tmp_path / "m.onnx")
    bntools.check_takes(tmp_path / "m.onnx", "fold")
    with pytest.raises(LoadError, match=r"Cannot freeze .*m\.onnx: it is an ONNX model; only"):
        bntools.check_takes(tmp_path / "m.onnx", "freeze")


def test_the_content_counts_and_not_the_name(tmp_path):
    """A torch.save file that is called .onnx, and an ONNX model that is not."""
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), tmp_path / "m.onnx")
    onnx_file(tmp_path / "n.pt")
    (tmp_path / "unknown.onnx").write_bytes(bytes(range(1, 200)))
    found = [bntools.is_onnx(tmp_path / name) for name in ("m.onnx", "n.pt", "unknown.onnx")]
    assert found == [False, True, True]
    shape = ["--input-shape", "2x3x8x8"]
    for verb in ("fold", "inspect"):
        done = CliRunner().invoke(program, [verb, str(tmp_path / "m.onnx"), *shape])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "m.folded.pt").is_file()
    pair = [str(tmp_path / "m.onnx"), str(tmp_path / "m.folded.pt")]
    assert CliRunner().invoke(program, ["verify", *pair, *shape]).exit_code == 0


def test_diff_says_which_verbs_take_a_format(tmp_path):
    """Before the file is read, for each of the two."""
    torch.save(nn.Sequential(nn.BatchNorm2d(4)), tmp_path / "m.pt")
    onnx_file(tmp_path / "m.onnx")
    for pair in (("m.pt", "m.onnx"), ("m.onnx", "m.pt")):
        done = CliRunner().invoke(program, ["diff", *(str(tmp_path / name) for name in pair)])
        assert done.exit_code == 3
        assert f"Cannot diff {tmp_path / 'm.onnx'}: it is an ONNX model; only" in done.stderr


def test_a_program_keeps_no_originals_to_unfold(tmp_path):
    bntools.save(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), tmp_path / "m.pt2")
    done = CliRunner().invoke(program, ["unfold", str(tmp_path / "m.pt2")])
    assert done.exit_code == 3
    assert "fold again with --keep-originals, into a .pt or .safetensors file" in done.stderr


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_a_program_is_no_state_dict(name, tmp_path):
    for action in (
        lambda: bntools.check_format(tmp_path / name, state_dict=True),
        lambda: bntools.save(nn.BatchNorm2d(3), tmp_path / name, state_dict=True),
    ):
        with pytest.raises(SaveError, match=r"as a state dict: it is to be a"):
            action()
    assert list(tmp_path.iterdir()) == []


def test_a_command_finds_out_about_its_output_before_it_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), "m.pt")
    for run in (
        ["fold", "m.pt", "-o", "x.pt2", "--state-dict"],
        ["freeze", "m.pt", "-o", "x.onnx", "--state-dict"],
        ["replace", "m.pt", "-o", "x.onnx", "--with", "groupnorm", "--state-dict"],
        ["unfold", "m.pt", "-o", "x.onnx", "--state-dict"],
    ):
        done = CliRunner().invoke(program, run)
        assert done.exit_code == 3, run
        assert "as a state dict" in done.stderr


def test_a_fold_can_be_written_as_onnx(tmp_path, monkeypatch):
    """By the same export that `bntools export` makes: checked before it is there."""
    onnx = pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), "m.pt")
    run = ["fold", "m.pt", "-o", "m.onnx", "--input-shape", "2x3x8x8"]
    done = CliRunner().invoke(program, run)
    assert done.exit_code == 0, done.output
    model = onnx.load("m.onnx")
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]
    assert "bntools_recipe" in {entry.key for entry in model.metadata_props}
    done = CliRunner().invoke(program, ["verify", "m.pt", "m.onnx"])
    assert done.exit_code == 0, done.output
