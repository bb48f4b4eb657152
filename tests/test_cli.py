"""The command line: its streams, its exit codes, every option, and every mistake."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from torch import nn

import bntools
from bntools.report import Inspection, LayerHealth, Plan, Range, Report

SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"
COMMANDS = pytest.mark.parametrize("command", ["fold", "inspect"])

NETS = """
import time
from pathlib import Path

import torch
from torch import nn


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        print("mine says hello")
        return self.bn(self.conv(x))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, ids, mask):
        return self.bn(self.linear(self.embedding(ids).mean(1))) * mask


class Sleepy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        Path("asleep").touch()
        time.sleep(60)
        return self.bn(self.linear(x))


def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def kept():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.BatchNorm2d(4))


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def half():
    return small().half()


def sick():
    model = small()
    model[1].running_mean.fill_(0.5)
    model[1].running_var[0] = -1.0
    return model


def broken():
    raise RuntimeError("no luck today")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the sample as model.pt, and a module `nets` to import."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model.pt").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "nets.py").write_text(NETS)
    yield tmp_path
    sys.modules.pop("nets", None)


LONG = "x" * 5000


def files():
    """What is in the working folder."""
    return sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")


def run(*arguments, code=0, **env):
    """Run a command in this process."""
    result = CliRunner().invoke(program, [str(a) for a in arguments], env=env)
    assert result.exit_code == code, f"{result.exit_code}\n{result.output}"
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return result


def fails(*arguments, code=3, says):
    """Run a command that cannot succeed: one line says why, and nothing else happens."""
    before = files()
    result = run(*arguments, code=code)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(says, line), line
    assert files() == before
    return result


def started(*arguments, **options):
    """Start the program as a process of its own."""
    command = [sys.executable, "-m", "bntools_cli", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, **options)


def corrupted(monkeypatch, host):
    """Make every fold into one layer a wrong one."""
    from bntools.surgery import folding

    absorb = folding._absorb

    def wrong(model, fold):
        tensors, flushed = absorb(model, fold)
        if fold.host.path == host:
            tensors = {name: tensor * 1.01 for name, tensor in tensors.items()}
        return tensors, flushed

    monkeypatch.setattr(folding, "_absorb", wrong)


# ---- the main job --------------------------------------------------------------------------------


def test_fold_needs_no_option(folder):
    result = run("fold", "model.pt")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["norm", "layer", "kind", "outcome"]
    assert lines[2].split() == ["1", "BatchNorm2d", "->", "0"]
    assert lines[-1].startswith("folded 9 of 9 norm layers; worst error ")
    assert result.stderr.splitlines()[-1] == "wrote model.folded.pt"
    assert re.match(
        r"input: 1x1x\d+x\d+ float32 \(inferred; override with --input-shape\)\n", result.stderr
    )


def test_what_fold_writes_is_the_same_network_without_norms(folder):
    run("fold", "model.pt")
    model, folded = bntools.load("model.pt"), bntools.load("model.folded.pt")
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert bntools.verify(model, folded, torch.rand(4, 1, 8, 8))


def test_the_model_is_not_changed(folder):
    run("fold", "model.pt")
    assert Path("model.pt").read_bytes() == SAMPLE.read_bytes()


def test_inspect_needs_no_option(folder):
    result = run("inspect", "model.pt")
    assert result.stdout.splitlines()[0].split()[:4] == ["norm", "layer", "kind", "channels"]
    assert result.stdout.splitlines()[-1].startswith("9 of 9 norm layers would fold; 0 errors,")
    assert files() == ["model.pt", "nets.py"]


# ---- streams -------------------------------------------------------------------------------------


def test_json_is_one_document_with_a_schema(folder):
    document = json.loads(run("fold", "model.pt", "--json").stdout)
    assert document["schema"] == 1
    assert document["output"] == "model.folded.pt"
    assert document["model"] == "model.pt"
    assert document["summary"].startswith("folded 9 of 9 norm layers")
    assert {d["action"] for d in document["decisions"]} == {"fold"}
    first = document["decisions"][0]
    assert first.pop("float64_error") < 1e-14
    assert first.pop("native_error") < 1e-6
    assert first == {
        "path": "1",
        "kind": "BatchNorm2d",
        "action": "fold",
        "hosts": ["0"],
        "reason": None,
        "detail": "",
        "affine": False,
        "forward": False,
        "forward_reason": None,
        "forward_detail": "",
    }
    assert document["check"]["native"]["outputs"][0]["passed"] is True
    assert document["recipe"]["version"] == 1


def test_json_of_inspect_and_of_a_plan(folder):
    document = json.loads(run("inspect", "model.pt", "--json").stdout)
    assert document["schema"] == 1
    assert len(document["layers"]) == 9
    assert document["layers"][0]["decision"]["hosts"] == ["0"]
    plan = json.loads(run("fold", "model.pt", "--json", "-n").stdout)
    assert plan["schema"] == 1
    assert len(plan["decisions"]) == 9
    assert plan["output"] is None


def test_json_has_no_nan_and_no_infinity(folder, monkeypatch):
    layer = LayerHealth("bn", "Odd", eps=float("inf"), mean=Range(float("nan"), 1.5))
    monkeypatch.setattr(bntools, "inspect", lambda *_: Inspection((layer,)))
    answer = json.loads(run("inspect", "model.pt", "--json").stdout, parse_constant=pytest.fail)
    assert answer["layers"][0]["eps"] is None
    assert answer["layers"][0]["mean"] == {"low": None, "high": 1.5}


def test_a_report_is_the_same_document(folder):
    result = run("fold", "model.pt", "--json", "--report", "report.json")
    report, document = json.loads(Path("report.json").read_text()), json.loads(result.stdout)
    assert {**report, "seconds": {}} == {**document, "seconds": {}}
    assert "wrote report.json" in result.stderr


@pytest.mark.parametrize("arguments", [("inspect", "model.pt"), ("fold", "model.pt", "-n")])
def test_a_report_comes_without_a_model_too(folder, arguments):
    run(*arguments, "--report", "report.json")
    assert json.loads(Path("report.json").read_text())["model"] == "model.pt"
    assert not Path("model.folded.pt").exists()


def test_quiet_leaves_the_summary(folder):
    result = run("fold", "model.pt", "-q")
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert line.startswith("folded 9 of 9")
    assert Path("model.folded.pt").exists()
    (line,) = run("fold", "model.pt", "-n", "--quiet").stdout.splitlines()
    assert line.startswith("9 of 9")
    (line,) = run("inspect", "model.pt", "-q").stdout.splitlines()
    assert line.startswith("9 of 9")


def test_verbose_tells_about_the_check(folder):
    result = run("fold", "model.pt", "-v")
    for expected in ("time: plan ", "versions: python ", "check in float64:", "check in float32:"):
        assert f"\n{expected}" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("folded 9 of 9")


def test_what_a_model_prints_does_not_mix_with_the_answer(folder):
    result = run("fold", "nets:Mine", "--json")
    assert json.loads(result.stdout)["output"] == "Mine.folded.pt"
    assert "mine says hello" in result.stderr


@pytest.mark.parametrize("columns", ["60", "100", "200"])
def test_tables_are_as_wide_as_columns_say(folder, columns):
    for arguments in (("fold", "model.pt", "-n"), ("inspect", "model.pt")):
        *table, summary = run(*arguments, COLUMNS=columns).stdout.splitlines()
        assert max(map(len, table)) <= int(columns)
        assert "4.downsample.1" in "\n".join(table)
        assert summary


class Terminal:
    """A text stream that says that it is a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def isatty(self):
        return True

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_colour_is_for_terminals_and_only_without_no_color(folder, monkeypatch, capsys):
    from bntools_cli.console import Console

    monkeypatch.setattr("sys.stdout", Terminal(sys.stdout))
    monkeypatch.setenv("TERM", "xterm")
    text = "layer  outcome\n-------\n\nbn     kept, returned: why\nerror  bn  DIFFERS\n\nsummary"
    Console().table(text)
    coloured = capsys.readouterr().out
    assert "\x1b[33mkept, returned\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == f"{text}\n"
    monkeypatch.setenv("NO_COLOR", "1")
    Console().table(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_progress_is_for_terminals(folder, monkeypatch, capsys):
    from bntools_cli.console import Console

    with Console().working("thinking"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr", Terminal(sys.stderr))
    monkeypatch.setenv("TERM", "xterm")
    with Console(quiet=True).working("thinking"):
        pass
    assert capsys.readouterr().err == ""
    with Console().working("thinking [bold]\x1b[2J"):
        pass
    shown = capsys.readouterr().err
    assert "thinking [bold]" in shown
    assert "\x1b[2J" not in shown


def test_names_that_stdout_cannot_show_are_escaped():
    from bntools_cli.console import Console

    with CliRunner(charset="latin-1").isolation() as (stdout, *_):
        Console().table("größe: нормаль")
        assert stdout.getvalue().startswith(b"gr\\xf6\\xdfe: \\u043d\\u043e")


# ---- the options ---------------------------------------------------------------------------------


def test_output_and_force(folder):
    run("fold", "model.pt", "-o", "small.pt")
    first = Path("small.pt").read_bytes()
    fails("fold", "model.pt", "-o", "small.pt", says="it exists. .* --force")
    assert Path("small.pt").read_bytes() == first
    run("fold", "model.pt", "-o", "small.pt", "-f", "--only", "9")
    assert Path("small.pt").read_bytes() != first


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("sub/model.pth", "sub/model.folded.pt"),
        ("net.pth.tar", "net.folded.pt"),
        ("net-v1.2", "net-v1.2.folded.pt"),
        ("nets:small", "small.folded.pt"),
    ],
)
def test_the_output_is_beside_the_input_by_default(folder, model, output):
    if ":" not in model:
        Path(model).parent.mkdir(exist_ok=True)
        Path("model.pt").rename(model)
    assert json.loads(run("fold", model, "--json").stdout)["output"] == str(Path(output))
    assert Path(output).exists()


def test_a_dry_run_writes_nothing(folder):
    before = files()
    result = run("fold", "model.pt", "--dry-run")
    assert result.stdout.splitlines()[-1].startswith("9 of 9")
    assert result.stderr.endswith("would write model.folded.pt\n")
    assert files() == before
    Path("model.folded.pt").touch()
    assert "which exists: that takes --force" in run("fold", "model.pt", "-n").stderr


def test_only_and_skip_choose_layers(folder):
    arguments = ("--only", "3.*", "--only", "4.*", "--skip", "*.bn2", "--json")
    document = json.loads(run("fold", "model.pt", *arguments).stdout)
    folded = [d["path"] for d in document["decisions"] if d["action"] == "fold"]
    assert folded == ["3.bn1", "4.bn1", "4.downsample.1"]
    assert {d["reason"] for d in document["decisions"] if d["action"] == "keep"} == {"skipped"}
    inspected = json.loads(run("inspect", "model.pt", *arguments).stdout)
    assert [layer["path"] for layer in inspected["layers"]] == folded


@COMMANDS
@pytest.mark.parametrize("option", ["--only", "--skip"])
def test_a_glob_that_matches_nothing_is_a_mistake(folder, command, option):
    fails(command, "model.pt", option, "layer9.*", says=r"Cannot select 'layer9\.\*'.*1, 3\.bn1")


@COMMANDS
def test_shapes_are_used_in_the_models_own_type(folder, command):
    assert "input: 2x1x16x16 float32\n" in run(
        command, "model.pt", "--input-shape", "2x1x16x16"
    ).stderr  # fmt: skip
    assert "input: 1x3x8x8 float16\n" in run(
        command, "nets:half", "--input-shape", "1x3x8x8"
    ).stderr  # fmt: skip


@COMMANDS
def test_several_arguments_with_types(folder, command):
    shapes = ("--input-shape", "2x5:int64", "--input-shape", "2x6")
    result = run(command, "nets:Words", *shapes)
    assert "input: 2x5 int64, 2x6 float32\n" in result.stderr
    assert "-> linear" in result.stdout


@COMMANDS
@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_inputs_come_from_a_file(folder, command, kind):
    ids, mask = np.ones((2, 5), int), np.ones((2, 6))
    if kind == "npz":
        np.savez("inputs.npz", arg0=ids, mask=mask)
    else:
        torch.save({"ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask)}, "inputs.pt")
    result = run(command, "nets:Words", "--inputs", f"inputs.{kind}")
    assert "mask=2x6 float32\n" in result.stderr
    assert "-> linear" in result.stdout


def test_arch_builds_the_network_of_a_state_dict(folder):
    from torchvision.ops import Conv2dNormActivation

    torch.save({"0.weight": torch.ones(4, 3, 3, 3)}, "broken.pt")
    sys.path.insert(0, str(folder))
    try:
        import nets
    finally:
        sys.path.remove(str(folder))
    torch.save({"state_dict": nets.small().state_dict()}, "weights.pt")
    result = run("fold", "weights.pt", "--arch", "nets:small")
    assert "note: took the weights at 'state_dict'" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("folded 1 of 1 norm layers")
    torch.save(Conv2dNormActivation(3, 4), "whole.pt")
    assert "--arch nets:small is not used" in run("fold", "whole.pt", "--arch", "nets:small").stderr


def test_allow_names_a_class_of_the_users(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    import nets

    torch.save(nets.Mine(), "mine.pt")
    fails("fold", "mine.pt", says=r"--allow nets\.Mine")
    assert "folded 1 of 1" in run("fold", "mine.pt", "--allow", "nets.Mine").stdout


def test_the_seed_decides_the_check(folder):
    seeds = [
        json.loads(run("fold", "model.pt", "--json", "-f", "--seed", seed).stdout)["check"]
        for seed in (0, 0, 7)
    ]
    errors = [check["native"]["outputs"][0]["max_abs"] for check in seeds]
    assert errors[0] == errors[1] != errors[2]
    assert [check["seed"] for check in seeds] == [0, 0, 7]


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", LONG),
        ("fold", f"{LONG}.onnx"),
        ("verify", "model.pt", LONG),
        ("recalibrate", "model.pt", "--data", LONG),
        ("fold", "model.pt", "--inputs", LONG),
        ("fold", "model.pt", "-o", LONG),
        ("ship", "model.pt", "-o", LONG),
    ],
)
def test_a_name_that_no_file_system_takes(folder, arguments):
    """Asking for its status raises an error, where a file that is not there does not."""
    fails(*arguments, says="file name too long|no such file")


def test_a_device_by_its_name(folder):
    run("fold", "model.pt", "--device", "cpu")
    assert next(bntools.load("model.folded.pt").parameters()).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@COMMANDS
def test_a_device_that_is_not_there(folder, command):
    fails(command, "model.pt", "--device", "cuda", says="Cannot use the device cuda: .*")


def test_fail_on_sets_the_exit_code(folder):
    run("inspect", "nets:sick")
    result = run("inspect", "nets:sick", "--fail-on", "error", code=1)
    assert "negative-variance" in result.stdout
    assert "failed: 1 finding (--fail-on error)\n" in result.stderr
    run("inspect", "nets:small", "--fail-on", "error")
    run("inspect", "nets:small", "--fail-on", "warning", code=1)
    run("inspect", "model.pt", "--fail-on", "warning")
    assert json.loads(run("inspect", "nets:sick", "--fail-on", "error", "--json", code=1).stdout)


def test_a_fold_that_fails_its_check_is_undone_and_told(folder, monkeypatch):
    corrupted(monkeypatch, "3.conv1")
    result = run("fold", "model.pt")
    assert "warning: the fold of 3.bn1 failed its check and was undone" in result.stderr
    assert "kept, check-failed" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("folded 8 of 9 norm layers")
    folded = bntools.load("model.folded.pt")
    assert bntools.verify(bntools.load("model.pt"), folded, torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_strict_writes_nothing_where_a_fold_fails(folder, monkeypatch, json_option):
    corrupted(monkeypatch, "3.conv1")
    before = files()
    options = ("--strict", "--report", "report.json", *json_option)
    result = run("fold", "model.pt", *options, code=1)
    assert "failed: " in result.stderr
    assert "check-failed" in result.stdout
    assert files() == before
    if json_option:
        assert json.loads(result.stdout)["output"] is None


def test_strict_is_no_matter_where_all_is_well(folder):
    run("fold", "model.pt", "--strict")
    assert Path("model.folded.pt").exists()


# ---- malformed options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fold",), "Missing argument 'MODEL'"),
        (("fold", "model.pt", "more"), "unexpected extra argument"),
        (("fold", "model.pt", "--frobnicate"), "No such option"),
        (("fold", "model.pt", "--input-shape", "1,3,8,8"), "--input-shape.*'1,3,8,8'"),
        (("fold", "model.pt", "--input-shape", "1x3:int"), "--input-shape.*no type 'int'"),
        (("fold", "model.pt", "--input-shape", "1", "--inputs", "x.npz"), "not both"),
        (("fold", "model.pt", "--seed", "one"), "--seed.*'one'"),
        (("fold", "model.pt", "--seed", "-1"), "--seed.*-1"),
        (("fold", "model.pt", "-q", "-v"), "contradict"),
        (("fold", "model.pt", "-o", "-"), "--output.*it is a file"),
        (("fold", "model.pt", "--report", "-"), "--json prints"),
        (("fold", "model.pt", "-o", "a.pt", "--report", "./a.pt"), "same file"),
        (("fold", "model.pt", "-f", "--report", "./model.pt"), "the file of the model"),
        (("inspect", "model.pt", "--fail-on", "doom"), "--fail-on.*'doom'"),
        (("inspect", "model.pt", "-o", "x.pt"), "No such option"),
        (("fnord",), "No such command 'fnord'"),
    ],
)
def test_malformed_options_are_exit_code_2(folder, arguments, says):
    fails(*arguments, code=2, says=says)


# ---- bad input -----------------------------------------------------------------------------------


def write_malicious(path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch canary",)

    path.write_bytes(pickle.dumps(Evil(), 2))


def write_malicious_zip(path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch canary",)

    torch.save({"model": Evil()}, path)


def write_truncated(path):
    path.write_bytes(SAMPLE.read_bytes()[:100_000])


BAD_FILES = {
    "missing": (lambda path: None, "there is no such file"),
    "a folder": (lambda path: path.mkdir(), "it is a folder"),
    "empty": (lambda path: path.touch(), "it is empty"),
    "truncated": (write_truncated, "damaged or incomplete"),
    "text": (lambda path: path.write_text("hello\n"), "it is a text file"),
    "a malicious pickle": (write_malicious, "Cannot load"),
    "a malicious zip": (write_malicious_zip, "system"),
    "weights alone": (
        lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
        "it holds weights only .*--arch torchvision",
    ),
}


@COMMANDS
@pytest.mark.parametrize(("write", "says"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_explained_and_leaves_nothing_behind(folder, command, write, says):
    write(Path("bad.pt"))
    fails(command, "bad.pt", says=rf"Cannot load bad\.pt: .*{says}" if says[0] != "C" else says)
    assert not Path("canary").exists()


@COMMANDS
@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ("nets:small", r"does not fit nets:small: .*missing \(0\.weight.*\(weight, bias\)"),
        ("nets:nothing", "nets has no 'nothing'"),
        ("nowhere:net", "no module named 'nowhere'"),
        ("nets:broken", "it raised RuntimeError: no luck today"),
        ("torchvision:resnet5o", "near are torchvision:resnet50"),
        ("resnet50", "did you mean torchvision:resnet50"),
    ],
)
def test_a_wrong_arch_is_explained(folder, command, arch, says):
    torch.save(nn.Linear(2, 2).state_dict(), "weights.pt")
    fails(command, "weights.pt", "--arch", arch, says=says)


def test_a_class_that_cannot_be_allowed(folder):
    fails("fold", "model.pt", "--allow", "os.system", says="Cannot allow os.system")


@pytest.mark.parametrize("options", [(), ("-n",)])
def test_a_model_without_norm_layers_is_told_and_not_written(folder, options):
    before = files()
    result = run("fold", "nets:bare", *options)
    assert result.stdout == "the model has no norm layer to fold\n"
    assert files() == before
    document = json.loads(run("fold", "nets:bare", "--json", *options).stdout)
    assert document["decisions"] == []
    assert document["output"] is None
    assert "no norm layer" in run("inspect", "nets:bare").stdout


def test_a_model_that_keeps_all_its_norms_is_not_written(folder):
    before = files()
    result = run("fold", "nets:kept", "-o", "small.pt")
    assert "kept, not-after-linear" in result.stdout
    assert "nothing was folded, so no model is written" in result.stderr
    assert files() == before


@COMMANDS
def test_a_shape_that_the_model_refuses(folder, command):
    fails(command, "model.pt", "--input-shape", "1x3x8x8", says="Cannot run .* 1x3x8x8 float32")


@COMMANDS
def test_inputs_that_cannot_be_read(folder, command):
    fails(command, "model.pt", "--inputs", "none.npz", says="Cannot read the inputs none.npz: no")
    Path("inputs.npz").write_text("1 2 3")
    fails(command, "model.pt", "--inputs", "inputs.npz", says="it is neither arrays")


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_a_file_that_cannot_be_written_is_found_before_the_work(folder, option, monkeypatch):
    monkeypatch.setattr(bntools, "read_model", pytest.fail)
    Path("there").mkdir()
    Path("file").touch()
    fails("fold", "model.pt", option, "nowhere/x.pt", says="there is no folder .*nowhere")
    fails("fold", "model.pt", option, "there", says="it is a folder")
    fails("fold", "model.pt", option, "file", says="it exists")
    fails("fold", "model.pt", option, "file/x.pt", says="Cannot write file/x.pt")
    monkeypatch.setattr(os, "access", lambda *_: False)
    fails("fold", "model.pt", option, "x.pt", says="cannot be written to")


def test_a_report_of_inspect_is_replaced_only_by_force(folder):
    Path("report.json").write_text("precious")
    fails("inspect", "model.pt", "--report", "report.json", says="it exists")
    assert Path("report.json").read_text() == "precious"
    run("inspect", "model.pt", "--report", "report.json", "--force")


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch, there):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if there:
        Path("model.folded.pt").write_text("precious")
    monkeypatch.setattr(os, "fsync", full)
    fails("fold", "model.pt", "-f", says="Cannot write model.folded.pt: no space left on device")
    if there:
        assert Path("model.folded.pt").read_text() == "precious"


# ---- what must not happen ------------------------------------------------------------------------


def test_a_bug_is_told_in_one_line(folder, monkeypatch):
    def buggy(*_, **__):
        raise KeyError("layer7")

    monkeypatch.setattr(bntools, "fold", buggy)
    fails(
        "fold", "model.pt", code=70, says=r"a bug in bntools [\d.]+ \(KeyError: 'layer7'\).*report"
    )
    result = CliRunner().invoke(program, ["fold", "model.pt", "-v"])
    assert "Traceback" in result.stderr
    assert "in buggy" in result.stderr
    assert result.exit_code == 70


def test_verbose_shows_where_an_error_comes_from(folder):
    result = CliRunner().invoke(program, ["fold", "model.pt", "-v", "--input-shape", "1x3x8x8"])
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: Cannot run the model")
    assert result.exit_code == 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_no_bug(folder, monkeypatch, error):
    def hungry(*_, **__):
        raise error

    monkeypatch.setattr(bntools, "fold", hungry)
    fails("fold", "model.pt", says="not enough memory .*smaller --input-shape")


def test_an_interruption_is_exit_code_130(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bntools, "fold", interrupted)
    result = run("fold", "model.pt", code=130)
    assert result.stdout == ""
    assert result.stderr.endswith("interrupted\n")


def test_an_interruption_while_writing_leaves_nothing(folder, monkeypatch):
    before = files()

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    run("fold", "model.pt", code=130)
    assert files() == before


def test_control_c_ends_the_program(folder):
    process = started("fold", "nets:Sleepy", "--input-shape", "2x4", stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not Path("asleep").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert not [name for name in files() if name.endswith((".tmp", "folded.pt"))]


def test_a_reader_that_has_gone_is_no_error(folder):
    reader, writer = os.pipe()
    os.close(reader)
    process = started("fold", "model.pt", stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert stderr.splitlines()[-1] == "wrote model.folded.pt"
    assert len(stderr.splitlines()) == 2
    assert Path("model.folded.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_answer_that_cannot_be_written_is_an_error(folder):
    with Path("/dev/full").open("w") as full:
        process = started("inspect", "model.pt", stdout=full)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3
    assert stderr.splitlines()[-1] == (
        "Error: Cannot write the answer to stdout: no space left on device."
    )


# ---- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("fold",), ("inspect",)])
def test_help_has_an_example(arguments):
    result = run(*arguments, "--help")
    assert "Examples:\n    bntools " in result.stdout
    assert result.stdout == run(*arguments, "-h").stdout


def test_version():
    assert run("--version").stdout == f"bntools {bntools.__version__}\n"


def test_the_examples_of_the_help_are_well_formed(folder, monkeypatch):
    """Every one is parsed; only the commands' work is left out."""
    text = "".join(run(*arguments, "--help").stdout for arguments in ((), ("fold",), ("inspect",)))
    examples = re.findall(r"^    bntools (.*)$", text, re.MULTILINE)
    assert len(examples) >= 9
    monkeypatch.setattr(bntools, "read_model", lambda *_: pytest.fail("not that far"))
    monkeypatch.setattr(bntools, "check_writable", lambda *_, **__: sys.exit(99))
    for example in examples:
        words = example.partition("|")[0].replace("'", "").split()
        run(*words, "--report", "x.json", code=99)


def test_help_takes_less_than_a_third_of_a_second(folder):
    """CPU time, torch is not imported; the best of three, as the machine may be busy."""
    import resource

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = spent()
        process = started("--help", stdout=subprocess.DEVNULL)
        process.communicate(timeout=60)
        times.append(spent() - before)
    assert min(times) < 0.3


def test_the_installed_program_is_this_one():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="bntools")
    assert entry.value == "bntools_cli.__main__:main"
    from bntools_cli import __main__

    assert entry.load() is __main__.main


def test_results_have_the_parts_that_the_command_line_uses():
    assert Report("fold", ()).summary() == "the model has no norm layer to fold"
    assert Plan(()).to_dict()["schema"] == 1
