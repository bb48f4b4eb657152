"""Values that options cannot have: one line that says so in words, and nothing is written."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from bntools_cli.main import program
from click.testing import CliRunner

import bntools
from bntools import writing
from bntools.errors import SaveError

SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the sample."""
    shutil.copy(SAMPLE, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words):
    """The exit code and the last line of a command that fails; it has left nothing behind."""
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(program, words)
    assert sorted(Path().rglob("*")) == before
    assert result.stdout == ""
    return result.exit_code, result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", sorted(program.commands))
def test_an_empty_name_of_a_model_is_malformed(folder, command):
    """It was exit code 70 where a result is named after the model."""
    models = ("", "model.pt") if command in ("diff", "verify") else ("",)
    more = {"recalibrate": ("--data", "x.npz"), "replace": ("--with", "groupnorm")}
    code, said = refused(command, *models, *more.get(command, ()))
    assert (code, said.endswith("it is empty. Give a name.")) == (2, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fold", "model.pt", "--seed", "x"], "'x' is not a valid whole number."),
        (["fold", "model.pt", "-o", ""], "it is empty. Give the name of a file."),
        (["fold", "model.pt", "--inputs", "-"], "it is a file; nothing is read from stdin."),
        (["recalibrate", "model.pt", "--data", ""], "it is empty. Give a name."),
        (["verify", "model.pt", "model.pt", "--data", ""], "it is empty. Give a name."),
        (
            ["recalibrate", "model.pt", "--data", "x", "--max-samples", "1" + 30 * "0"],
            f"1{30 * '0'} is too large.",
        ),
        (["recalibrate", "model.pt", "--data", "x", "--max-error", "x"], "not a valid number."),
        (["recalibrate", "model.pt", "--data", "x", "--max-error", "nan"], "not a finite number."),
        (["recalibrate", "model.pt", "--data", "x", "--tolerance", "inf"], "not a finite number."),
        (
            ["replace", "model.pt", "--with", "groupnorm", "--groups", "0"],
            "'0' is neither a whole number from 1 nor 'auto'.",
        ),
    ],
)
def test_a_value_that_cannot_be_is_told_in_words(folder, words, says):
    code, said = refused(*words)
    assert (code, said[-len(says) :]) == (2, says)


@pytest.mark.parametrize("command", ["inspect", "fold", "freeze", "unfreeze", "unsync"])
def test_the_meta_device_is_refused(folder, command):
    """It has no numbers: freeze and recalibrate ended with exit code 70."""
    code, said = refused(command, "model.pt", "--device", "meta")
    assert code == 3
    assert said == (
        "Error: Cannot use the device meta: it holds no numbers. Choose another, such as"
        " --device cpu."
    )


def test_a_question_ends_with_its_mark(folder):
    code, said = refused("fold", "modle.pt")
    assert code == 3
    assert said.endswith("there is no such file; did you mean model.pt?")


def test_a_folder_that_only_seems_writable_is_found_before_the_work(folder, monkeypatch):
    """Network and special file systems refuse what the permissions promise: no model is left."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SaveError, match=r"Cannot write x\.json: permission denied"):
        bntools.check_writable("x.json")
    code, said = refused("fold", "model.pt", "--report", "x.json")
    assert (code, said) == (3, "Error: Cannot write model.folded.pt: permission denied.")


def test_a_picture_without_matplotlib_is_refused_before_the_work(folder, monkeypatch):
    """So that a verdict is not lost for want of its picture."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(bntools, "read_model", None)
    code, said = refused("verify", "model.pt", "model.pt", "--plot", "errors.svg")
    assert code == 3
    assert said.endswith("Install it with: pip install matplotlib")


def test_too_little_memory_is_not_blamed_on_an_image(folder, monkeypatch):
    """`--size 99999999` said that the first image was broken, and no more."""
    from PIL import Image

    Path("images").mkdir()
    Image.new("L", (8, 8)).save("images/a.png")

    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(bntools.Preprocessing, "image", exhausted)
    data = bntools.read_data("images", skip_broken=True)
    with pytest.raises(MemoryError):
        list(data)
