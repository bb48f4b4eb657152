"""The documentation: every example runs, and the README says what the program does."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
from bntools_cli.main import program
from click.testing import CliRunner

import bntools
from bntools import registry
from bntools.report import Reason

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MODULES = ["bntools", *(m.name for m in pkgutil.walk_packages(bntools.__path__, "bntools."))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a copy of the samples."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def clean_registry(monkeypatch):
    """What an example teaches bntools is forgotten after it."""
    for table in ("_NORMS", "_HOSTS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return re.split(r"^#+ ", README.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


# Docstrings


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name, clean_registry):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_docstrings_of_the_main_verbs_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("fold", "plan_fold", "verify", "register_norm"):
        assert any(test.examples for test in finder.find(getattr(bntools, name))), name


def test_examples_leave_no_rule_behind():
    assert not [name for name in registry._NORMS if name.endswith(".Scale")]


# The README's blocks


def test_readme_has_blocks_of_each_kind():
    """So that the tests below look at something."""
    assert blocks("python")
    assert len(blocks("console")) == 1
    assert len(blocks("bash")) >= 2


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run_and_print_what_their_comments_say(number, folder):
    block = blocks("python")[number]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, f"README.md, block {number}", "exec"), {"__name__": "readme"})
    promised = re.findall(r"^print\(.*\) +# (.+)$", block, re.MULTILINE)
    assert printed.getvalue().splitlines() == promised


def pattern(line: str) -> str:
    """A regular expression for a line in which measured factors may differ."""
    return re.sub(r"\d+(\\\.\d+)?x(?!\d)", r"[0-9][0-9.e+-]*x", re.escape(line))


def test_measured_factors_may_differ_and_nothing_else():
    line = "folded 9 of 9; worst error 0.57x (limit 8.8x)"
    assert re.fullmatch(pattern(line), "folded 9 of 9; worst error 1.2x (limit 12x)")
    assert not re.fullmatch(pattern(line), "folded 8 of 9; worst error 0.57x (limit 8.8x)")
    assert not re.fullmatch(pattern("input: 1x1x64x64"), "input: 1x1x32x32")


def test_console_block_is_what_the_program_says(folder):
    """Line by line in each stream: the table is on stdout, the rest on stderr."""
    command, *promised = blocks("console")[0].splitlines()
    result = CliRunner().invoke(program, command.removeprefix("$ bntools ").split())
    assert result.exit_code == 0
    aside = [line for line in promised if re.match("input: |wrote ", line)]
    table = [line for line in promised if line not in aside]
    said = [*result.stdout.splitlines(), *result.stderr.splitlines()]
    assert len(said) == len(promised)
    for line, expected in zip(said, [*table, *aside], strict=True):
        assert re.fullmatch(pattern(expected), line), f"{line!r} instead of {expected!r}"
    assert (folder / aside[-1].removeprefix("wrote ")).is_file()


# What the README names


def test_every_reason_has_its_anchor_once_and_no_other_has_one():
    assert re.findall(r'<a id="([^"]+)"></a>', README) == [reason.value for reason in Reason]
    for reason in Reason:
        assert f'<a id="{reason.value}"></a>`{reason.value}` |' in README


def helps() -> str:
    runner = CliRunner()
    words = [[], *([name] for name in program.commands)]
    return "\n".join(runner.invoke(program, [*each, "--help"]).output for each in words)


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))


def test_every_option_in_the_readme_exists():
    code = re.findall(r"`([^`\n]+)`", README)
    ours = [c for c in code if re.match(r"(bntools )|-", c) and not c.startswith("bntools_")]
    named = set().union(*map(options_in, ours))
    assert len(named) > 15
    assert named - options_in(helps()) == set()


def test_every_option_that_exists_is_in_the_readme():
    table = options_in(section("Command line"))
    offered = {
        names
        for command in program.commands.values()
        for option in command.params
        if option.param_type_name == "option"
        for names in (tuple(option.opts),)
    }
    missing = [names for names in offered if not table.intersection(names)]
    assert [names for names in missing if "--help" not in names] == []


def test_every_exit_code_is_in_the_help_and_in_the_readme():
    for code in ("0", "1", "2", "3", "70", "130"):
        assert re.search(rf"Exit codes:.*?\b{code}\b", helps(), re.DOTALL)
        assert re.search(rf"Exit codes:.*?\b{code}\b", section("Command line"), re.DOTALL)


def test_every_name_in_the_table_of_functions_is_public():
    names = re.findall(r"^\| `(\w+)\(", section("From Python"), re.MULTILINE)
    assert len(names) >= 8
    assert set(names) <= set(bntools.__all__)


def test_relative_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_commands_in_the_readme_name_files_that_exist():
    paths = re.findall(r"\b(?:tests|samples)/[\w/.]*\w", README)
    made = {"samples/digits_cnn.folded.pt"}
    assert [path for path in paths if path not in made and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "samples/README.md"])
def test_no_placeholder_is_left(name):
    text = (ROOT / name).read_text("utf-8")
    assert set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)) <= {"NO_COLOR"}
    assert re.findall(r"\b(?:TODO|FIXME|TBD|XXX)\b", text) == []
