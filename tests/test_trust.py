"""--allow and --trust: what only the user can decide, and the command line that would say so."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import bntools_cli.main as cli
import click
import pytest
import torch
from click.testing import CliRunner
from hostile import BIRD, SHELL, Calls, dumped, write_zip
from torch import nn

import bntools
from bntools.errors import LoadError, UntrustedError

NETS = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a network of the user, and a bird that sings when it is imported."""
    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "songbird.py").write_text(BIRD)
    monkeypatch.setenv("CANARY", str(tmp_path / "song"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import mynets

    torch.save(mynets.Net().eval(), "my net.pt")
    torch.save(mynets.Net().eval(), "protocol4.pt", pickle_protocol=4)
    write_zip(tmp_path / "hostile.pt", dumped([Calls(__import__, "songbird"), nn.ReLU()]))
    yield tmp_path
    for name in ("mynets", "songbird"):
        sys.modules.pop(name, None)


def run(*arguments: str):
    return CliRunner().invoke(cli.program, [*arguments], prog_name="bntools")


def test_an_error_ends_with_the_command_line_that_would_allow_it(folder):
    """The user's own, as a shell takes it, with the options added; and it works."""
    first = run("inspect", "my net.pt", "--input-shape", "1x3x8x8", "-q")
    assert first.exit_code == 3
    *_, error, advice = first.stderr.splitlines()
    assert error.startswith("Error: Cannot load my net.pt: it holds objects of classes that")
    command = "bntools inspect 'my net.pt' --input-shape 1x3x8x8 -q --allow mynets.Net"
    assert advice == f"To allow it: {command}"
    assert run(*shlex.split(command)[1:]).exit_code == 0


def test_options_come_before_what_ends_them(folder):
    """Behind `--` there are no options."""
    result = run("inspect", "--", "my net.pt")
    assert result.stderr.splitlines()[-1].endswith("inspect --allow mynets.Net -- 'my net.pt'")


def test_nothing_to_paste_is_offered_for_what_can_run_any_code(folder):
    """The sentence names --trust; whoever wants it has to type it."""
    result = run("inspect", "hostile.pt")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert "it asks for builtins.__import__, which can run any code" in result.stderr
    assert "--trust, which runs whatever is in it" in result.stderr
    assert not (folder / "song").exists()


def test_trust_reads_what_cannot_be_read_otherwise_and_warns(folder):
    """The warning comes first, and names the risk."""
    assert run("inspect", "protocol4.pt").exit_code == 3
    result = run("inspect", "protocol4.pt", "--trust", "--input-shape", "1x3x8x8", "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "warning: --trust: protocol4.pt may run code of its own as it is read, with all that you"
        " may do on this computer\n"
    )


def test_trust_really_runs_what_is_in_a_file(folder):
    """So that the warning is no exaggeration."""
    bntools.load("hostile.pt", trust=True)
    assert (folder / "song").exists()


def test_trust_runs_nothing_where_it_is_not_needed(folder, monkeypatch):
    """A file that can be read safely is."""
    torch.save(nn.Sequential(nn.ReLU()), "plain.pt")
    real = torch.load

    def load(*arguments, weights_only, **options):
        assert weights_only
        return real(*arguments, weights_only=weights_only, **options)

    monkeypatch.setattr(torch, "load", load)
    assert isinstance(bntools.load("plain.pt", trust=True), nn.Sequential)


def test_trust_does_not_excuse_an_ambiguous_archive(folder):
    """What is read in two ways is read by nobody."""
    path = folder / "hostile.pt"
    path.write_bytes(b"x" * 10 + path.read_bytes())
    path.write_bytes(b"PK\3\4" + path.read_bytes()[4:])
    with pytest.raises(LoadError, match=r"damaged|two ways"):
        bntools.load(path, trust=True)
    assert not (folder / "song").exists()


def test_the_error_of_the_library_has_the_options(folder):
    """For programs that ask their users themselves."""
    with pytest.raises(UntrustedError, match=r"mynets\.Net") as caught:
        bntools.load("my net.pt")
    assert caught.value.options == ("--allow", "mynets.Net")


@pytest.mark.parametrize("command", sorted(set(cli.program.commands) - {"version"}))
def test_every_command_that_reads_a_model_takes_both(command):
    """--allow and --trust go together."""
    options = {name for each in cli.program.commands[command].params for name in each.opts}
    assert {"--allow", "--trust"} <= options or not {"--allow", "--trust"} & options
    assert isinstance(cli.program.commands[command], click.Command)


def test_a_name_from_a_file_is_not_offered_to_a_shell(folder):
    """What the file says it was saved from may say anything."""
    content = {"state_dict": {"a": torch.zeros(1)}, "bntools_recipe": None}
    torch.save({**content, "bntools_version": "1", "bntools_arch": f"x; {SHELL}"}, "m.pt")
    with pytest.raises(LoadError, match="holds weights only") as caught:
        bntools.load("m.pt")
    assert "touch" not in str(caught.value)
    assert Path("m.pt").exists()
