"""`bntools recalibrate`: its options, streams, files and exit codes, on one process and two."""

from __future__ import annotations

import json
import os
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
from PIL import Image
from torch import nn

import bntools
from bntools.recipe import recipe_of

SAMPLES = Path(__file__).parent.parent / "samples"

MINE = """
import time
from pathlib import Path
import torch

def half(batch):
    images = batch[0] if isinstance(batch, tuple) else batch
    mask = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)
    mask[..., : images.shape[-1] // 2] = True
    return mask

def doubled(model, batch):
    return model(2 * (batch[0] if isinstance(batch, (tuple, list)) else batch))

def score(model):
    return -float(model[1].running_mean.abs().sum())

def ones(model, batches):
    return float(sum(len(x) for x, _ in batches))

def improves(model):
    return float(model[1].num_batches_tracked)

def nan(model):
    return float("nan")

def fails(model):
    raise RuntimeError("no luck today")

def slow():
    for i in range(100):
        yield torch.randn(4, 3, 8, 8)
        if i == 2:
            Path("asleep").touch()
            time.sleep(60)

def nans():
    yield torch.randn(4, 3, 8, 8)
    yield torch.full((4, 3, 8, 8), float("nan"))

def breaks():
    yield torch.randn(4, 3, 8, 8)
    raise ValueError("no luck today")

class Dies(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        import os
        if os.environ.get("RANK") == "1" and i > 20: os._exit(7)
        return torch.randn(3, 8, 8), i % 4
"""


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
        nn.Flatten(), nn.Linear(80, 4), nn.BatchNorm1d(4),
    ).eval()  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with model.pt, 40 labelled images in x.npz, and a module `mine`."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    torch.save(net(), "model.pt")
    rng = np.random.default_rng(0)
    np.savez(
        "x.npz",
        images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
        labels=rng.permutation(40) % 4,
    )
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("mine", None)


def files():
    return sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")


def run(*arguments, code=0):
    result = CliRunner().invoke(program, ["recalibrate", *map(str, arguments)])
    assert result.exit_code == code, f"{result.exit_code}\n{result.output}"
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return result


def fails(*arguments, code=3, says):
    """A command that cannot succeed: one line says why, and nothing is written."""
    before = files()
    result = run(*arguments, code=code)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(says, line), line
    assert files() == before


def statistics(model):
    return {k: v for k, v in model.state_dict().items() if "running" in k or "batches" in k}


def same(one, other, *, tolerance=0.0):
    return all(
        torch.allclose(value.double(), other[name].double(), rtol=tolerance, atol=tolerance)
        for name, value in one.items()
    )


# ---- what it does --------------------------------------------------------------------------------


def test_statistics_are_those_of_pytorchs_own_loop(folder):
    result = run("model.pt", "--data", "x.npz", "--batch-size", 10)
    truth = net()
    for norm in (truth[1], truth[4], truth[7]):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for images, _ in bntools.read_data("x.npz", batch_size=10):
            truth(images)
    written = bntools.load("model.recalibrated.pt")
    assert same(statistics(written), statistics(truth), tolerance=1e-6)
    assert not any(module.training for module in written.modules())
    assert written[1].momentum == 0.1
    assert result.stdout.splitlines()[-1].startswith(
        "recalibrated 3 norm layers (cumulative) on 40 samples in 4 batches"
    )
    assert "data: 40 samples of x.npz (images with labels)" in result.stderr
    assert "wrote model.recalibrated.pt" in result.stderr
    weights = {k: v for k, v in written.state_dict().items() if k not in statistics(written)}
    assert all(torch.equal(net().state_dict()[k], v) for k, v in weights.items())


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (["--method", "pooled"], {"method": "pooled"}),
        (["--method", "ema", "--momentum", 0.5], {"method": "ema", "momentum": 0.5}),
        (["--passes", 2], {"passes": 2}),
        (["--passes", "converge"], {"passes": "converge"}),
        (["--prior", 20], {"prior": 20}),
        (["--only", "1", "--only", "4", "--skip", "4"], {"only": ["1"]}),
        (["--max-batches", 2], {"options": {"max_batches": 2}}),
        (["--max-error", 100], {"options": {"max_error": 100}}),
        (
            ["--passes", "converge", "--max-passes", 2, "--tolerance", 1e-9],
            {"passes": "converge", "options": {"max_passes": 2, "tolerance": 1e-9}},
        ),
        (["--autocast", "bfloat16"], {"options": {"autocast": torch.bfloat16}}),
    ],
)
def test_each_option_means_the_argument_of_its_name(folder, options, keywords):
    size = 2 if "--max-error" in options else 8
    run("model.pt", "--data", "x.npz", "--batch-size", size, *options)
    keywords = dict(keywords)
    rare = bntools.RecalibrationOptions(**keywords.pop("options", {}))
    data = bntools.read_data("x.npz", batch_size=size)
    truth = bntools.recalibrate(net(), data, options=rare, **keywords).model
    plain = bntools.recalibrate(net(), data).model
    written = bntools.load("model.recalibrated.pt")
    assert same(statistics(written), statistics(truth))
    assert not same(statistics(written), statistics(plain)), "the option changes something"


@pytest.mark.parametrize(("option", "name"), [("--mask", "half"), ("--forward", "doubled")])
def test_functions_of_the_user_are_called(folder, option, name):
    run("model.pt", "--data", "x.npz", option, f"mine:{name}", "--only", "1", "--batch-size", 20)
    images = torch.cat([x for x, _ in bntools.read_data("x.npz")])
    with torch.no_grad():
        seen = net()[0](2 * images if name == "doubled" else images)
    if name == "mask":
        seen = seen[..., : seen.shape[-1] // 2]
    written = bntools.load("model.recalibrated.pt")[1].running_mean
    if name == "doubled":
        assert torch.allclose(written, seen.mean((0, 2, 3)), atol=1e-5)
    else:
        assert not torch.allclose(written, seen.mean((0, 2, 3)), atol=1e-4)


def test_layers_without_statistics_get_some_when_asked(folder):
    model = net()
    model[4] = nn.BatchNorm2d(5, track_running_stats=False)
    torch.save(model, "bare.pt")
    fails("bare.pt", "--data", "x.npz", says=r"4.*no running statistics.*--add-statistics")
    run("bare.pt", "--data", "x.npz", "--add-statistics")
    written = bntools.load("bare.recalibrated.pt")
    assert written[4].running_mean.abs().sum() > 0
    assert [edit.kind for edit in recipe_of(written).edits] == ["add-statistics"]


def test_only_the_data_that_was_asked_for_is_used(folder):
    result = run(
        "model.pt", "--data", "x.npz", "--max-samples", 9, "--shuffle", "--seed", 3, "--json"
    )
    assert json.loads(result.stdout)["samples"] == 9
    data = bntools.read_data("x.npz", max_samples=9, shuffle=True, seed=3)
    truth = bntools.recalibrate(net(), data).model
    assert same(statistics(bntools.load("model.recalibrated.pt")), statistics(truth))


def test_threads_change_nothing(folder):
    run("model.pt", "--data", "x.npz", "--batch-size", 4, "-o", "a.pt")
    run("model.pt", "--data", "x.npz", "--batch-size", 4, "-o", "b.pt", "--workers", 3)
    one, other = (statistics(bntools.load(name)) for name in ("a.pt", "b.pt"))
    assert same(one, other)


def test_images_are_prepared_as_asked(folder):
    image = np.random.default_rng(1).integers(0, 256, (20, 16, 3), dtype=np.uint8)
    Path("images").mkdir()
    for i in range(4):
        Image.fromarray(np.roll(image, i, 0)).save(f"images/{i}.png")
    options = ["--size", 8, "--mean", "0.4,0.5,0.6", "--std", 0.2]
    result = run("model.pt", "--data", "images", *options, "--only", "1")
    assert "data: 4 images of images, size 8x8, mean 0.4,0.5,0.6, std 0.2" in result.stderr
    prepared = bntools.Preprocessing(size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2,))
    truth = bntools.recalibrate(
        net(), bntools.read_data("images", preprocessing=prepared), only="1"
    )
    assert same(statistics(bntools.load("model.recalibrated.pt")), statistics(truth.model))


# ---- proof that it helped ------------------------------------------------------------------------


def spoiled():
    """The sample with its statistics reset, and the command that mends it."""
    model = bntools.load(SAMPLES / "digits_cnn.pt")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    torch.save(model, "spoiled.pt")
    return ["spoiled.pt", "--data", SAMPLES / "digits", "--grayscale", "--max-samples", 200]


def test_a_better_score_is_shown_and_the_result_kept(folder):
    result = run(*spoiled(), "--eval-data", SAMPLES / "digits", "--json")
    data = json.loads(result.stdout)
    assert data["score_before"] < 0.3
    assert data["score_after"] > 0.98
    assert data["accepted"] is True
    evaluation = bntools.read_data(
        SAMPLES / "digits", preprocessing=bntools.Preprocessing(grayscale=True)
    )
    written = bntools.load("spoiled.recalibrated.pt")
    assert bntools.accuracy(written, evaluation) == data["score_after"]
    assert "evaluation: 397 images in 10 class folders" in result.stderr


@pytest.mark.parametrize("json_too", [False, True])
def test_a_worse_score_writes_nothing(folder, json_too):
    before = files()
    extra = ["--json"] if json_too else []
    options = ["--plot", "p.png", "--report", "r.json", *extra]
    result = run("model.pt", "--data", "x.npz", "--metric", "mine:score", *options, code=1)
    assert files() == before
    assert "failed: the score is worse than before, so nothing was written" in result.stderr
    if json_too:
        data = json.loads(result.stdout)
        assert data["accepted"] is False
        assert data["output"] is None
    else:
        assert result.stdout.endswith("worse, the old statistics are kept\n")


def test_without_the_gate_a_worse_score_is_written(folder):
    result = run("model.pt", "--data", "x.npz", "--metric", "mine:score", "--no-gate", "--json")
    data = json.loads(result.stdout)
    assert data["score_after"] < data["score_before"]
    assert Path("model.recalibrated.pt").exists()


def test_a_metric_may_take_data(folder):
    result = run(
        "model.pt", "--data", "x.npz", "--eval-data", "x.npz", "--metric", "mine:ones", "--json",
        "--max-samples", 16,
    )  # fmt: skip
    assert json.loads(result.stdout)["score_after"] == 40, "evaluation takes all of its data"
    result = run(
        "model.pt", "--data", "x.npz", "--metric", "mine:ones", "--json", "--batch-size", 5, "-f"
    )
    data = json.loads(result.stdout)
    assert data["score_after"] + data["samples"] == 40, "held out, or used"


def test_the_best_mixture_is_found_on_batches_that_are_held_out(folder):
    result = run(*spoiled(), "--prior", "auto", "--json", "--batch-size", 20)
    data = json.loads(result.stdout)
    assert data["samples"] == 160
    assert len(data["curve"]) > 4
    assert data["score_after"] == max(point["score"] for point in data["curve"])


def test_without_labels_the_report_says_that_it_is_no_proof(folder):
    assert "no labels: this is no proof" in run("model.pt", "--data", "x.npz").stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--metric", "mine:nan"], "mine:nan: it gave NaN"),
        (["--metric", "mine:fails"], "mine:fails: it raised RuntimeError: no luck today"),
        (["--metric", "mine:nothing"], "mine has no 'nothing'"),
        (["--metric", "nobodys:score"], "no module named 'nobodys'"),
        (["--mask", "mine:MINE"], "mine has no 'MINE'"),
        (["--forward", "sys:path"], "Cannot use sys:path: it is no function"),
        (["--eval-data", "x.npz?labels="], "there are no labels. Give class folders"),
        (["--eval-data", "y.npz"], "there is a class 9, and the model has 4"),
        (["--data", "x.npz?labels=", "--prior", "auto", "--batch-size", 8], "there are no labels"),
        (["--prior", "auto"], "there is no batch.*--batch-size"),
    ],
)
def test_a_score_that_cannot_be_had_is_explained(folder, options, says):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez("y.npz", images=images, labels=np.array([0, 9, 1, 2]))
    fails("model.pt", "--data", "x.npz", *options, says=says)


# ---- files and streams ---------------------------------------------------------------------------


def test_a_dry_run_reports_and_writes_no_model(folder):
    result = run("model.pt", "--data", "x.npz", "-n", "--report", "r.json")
    assert "would write model.recalibrated.pt" in result.stderr
    assert not Path("model.recalibrated.pt").exists()
    assert json.loads(Path("r.json").read_text())["output"] is None
    Path("model.recalibrated.pt").touch()
    assert "which exists: that takes --force" in run("model.pt", "--data", "x.npz", "-n").stderr


def test_json_report_and_plot(folder):
    result = run("model.pt", "--data", "x.npz", "--json", "--report", "r.json", "--plot", "p.png")
    data = json.loads(result.stdout)
    assert json.loads(Path("r.json").read_text()) == data
    assert data["output"] == "model.recalibrated.pt"
    assert data["model"] == "model.pt"
    assert data["data"].startswith("40 samples of x.npz")
    assert [layer["path"] for layer in data["layers"]] == ["1", "4", "7"]
    with Image.open("p.png") as image:
        assert min(image.size) > 500


def test_quiet_and_verbose(folder):
    result = run("model.pt", "--data", "x.npz", "-q")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    result = run("model.pt", "--data", "x.npz", "-v", "-f")
    assert re.search(r"^time: .*calibrate \d", result.stderr, re.MULTILINE)


def test_what_is_broken_is_named_and_left_out_when_asked(folder):
    Path("images").mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(f"images/{i}.png")
    Path("images/2.png").write_bytes(b"broken")
    fails("model.pt", "--data", "images", says=r"images/2\.png: it is no image.*--skip-broken")
    result = run("model.pt", "--data", "images", "--skip-broken")
    assert "warning: left out 1 broken: images/2.png: it is no image" in result.stderr
    assert "on 3 samples" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["model.pt"], 2, "Missing option '--data'"),
        (["none.pt", "--data", "x.npz"], 3, "there is no such file"),
        (["model.pt", "--data", "none"], 3, "there is no such file or folder"),
        (["model.pt", "--data", "x.npz", "--rgb", "--mean", "1,2"], 3, "mean has 2 values"),
        (["model.pt", "--data", "x.npz", "--grayscale"], 3, r"1 channels? instead.*--rgb"),
        (["model.pt", "--data", "x.npz", "--only", "x"], 3, "Cannot select 'x'"),
        (["model.pt", "--data", "mine:nans"], 3, "batch 2"),
        (["model.pt", "--data", "mine:breaks"], 3, "batch 2: ValueError: no luck today"),
        (["model.pt", "--data", "x.npz", "-o", "no/o.pt"], 3, "there is no folder"),
        (["model.pt", "--data", "x.npz", "-o", "x.npz"], 3, "it exists"),
        (["model.pt", "--data", "x.npz", "--plot", "p.gif"], 3, "a figure is a"),
        (["model.pt", "--data", "x.npz", "--preset", "nonsense"], 3, "name of torchvision weights"),
    ],
)
def test_what_cannot_be_done_is_explained(folder, arguments, code, says):
    fails(*arguments, code=code, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--momentum", 0.3], "--momentum is for --method ema"),
        (["--method", "mean"], "'mean' is not one of"),
        (["--passes", 0], "neither a number from 1 nor 'converge'"),
        (["--passes", "many"], "neither a number from 1 nor 'converge'"),
        (["--prior", -1], "neither a number from 0 nor 'auto'"),
        (["--prior", "nan"], "neither a number from 0 nor 'auto'"),
        (["--prior", "inf"], "neither a number from 0 nor 'auto'"),
        (["--max-passes", 3], "are for --passes converge"),
        (["--tolerance", 0.1], "are for --passes converge"),
        (["--metric", "score"], "'score' is not package.module:function"),
        (["--mask", "a b:c"], "is not package.module:function"),
        (["--size", "0"], "'0' is no size"),
        (["--size", "8x8x8"], "'8x8x8' is no size"),
        (["--mean", "a,b"], "'a,b' is no list of numbers"),
        (["--preset", "timm:resnet18", "--size", "8"], "leave these options out"),
        (["--batch-size", 0], "'--batch-size'"),
        (["--workers", -1], "'--workers'"),
        (["--plot", "model.pt"], "--plot names the file of the model"),
        (["--plot", "a.png", "-o", "a.png"], "--output and --plot name the same file"),
        (["--report", "a.pt", "-o", "a.pt"], "--output and --report name the same file"),
        (["--input-shape", "1x3x8x8"], "No such option '--input-shape'"),
        (["--inputs", "x.npz"], "No such option '--inputs'"),
    ],
)
def test_options_that_make_no_sense_are_malformed(folder, options, says):
    fails("model.pt", "--data", "x.npz", *options, code=2, says=says)


def test_batches_that_are_not_finite_can_be_left_out(folder):
    result = run("model.pt", "--data", "mine:nans", "--skip-nonfinite", "--json")
    data = json.loads(result.stdout)
    assert data["samples"] == 4
    assert len(data["bad_batches"]) == 1


def test_what_came_before_a_failure_can_be_kept(folder):
    result = run("model.pt", "--data", "mine:breaks", "--keep-partial", "--json")
    data = json.loads(result.stdout)
    assert data["partial"] is True
    assert data["samples"] == 4


def test_a_model_without_a_norm_is_not_written(folder):
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "bare.pt")
    result = run("bare.pt", "--data", "x.npz")
    assert result.stdout.endswith("no norm layer was recalibrated; the model is unchanged\n")
    assert "nothing was recalibrated, so no model is written" in result.stderr
    assert not Path("bare.recalibrated.pt").exists()


# ---- processes of their own ----------------------------------------------------------------------


def started(*command, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=env, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, **options,
    )  # fmt: skip


def test_an_interrupted_run_writes_nothing(folder):
    before = files()
    process = started("-m", "bntools_cli", "recalibrate", "model.pt", "--data", "mine:slow")
    deadline = time.monotonic() + 60
    while not Path("asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted"
    Path("asleep").unlink()
    assert files() == before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_on_a_terminal_a_bar_shows_images_a_second_and_the_time_left(folder):
    import pty

    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "bntools_cli", "recalibrate", "model.pt", "--data", "x.npz"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(command, env=env, stderr=end, stdout=subprocess.PIPE, text=True)
    os.close(end)
    said = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the program has closed its end
            break
        said += piece
        if not piece:
            break
    os.close(terminal)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    assert re.search(r"calibrating \S+ +0/40 +-:--:--|calibrating \S+ +0/40 +--:--", plain)
    assert re.search(r"calibrating \S+ +40/40 +\d+ images/s +0?0:00", plain)
    assert "\x1b" not in stdout
    assert "images/s" not in stdout


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


def test_two_processes_give_what_one_gives_and_one_of_them_writes(folder):
    process = started(
        *TORCHRUN, "bntools_cli", "recalibrate", "model.pt", "--data", "x.npz", "--batch-size", 13,
        "--method", "pooled", "-o", "two.pt", "--json", "--eval-data", "x.npz", "--no-gate",
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    data = json.loads(stdout)
    assert (data["processes"], data["samples"], data["batches"]) == (2, 40, 4)
    assert stderr.count("wrote two.pt") == 1
    options = ["--batch-size", 13, "--method", "pooled", "-o", "one.pt"]
    run("model.pt", "--data", "x.npz", *options)
    one, two = (statistics(bntools.load(name)) for name in ("one.pt", "two.pt"))
    assert same(one, two, tolerance=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_nothing_is_written(folder):
    before = files()
    process = started(
        *TORCHRUN, "bntools_cli", "recalibrate", "model.pt", "--data", "mine:Dies",
        "--batch-size", 8,
    )  # fmt: skip
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0, stderr
    assert files() == before


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("mine:score", "Cannot use the mask on batch 1.*: it raised "),
        ("math:isnan", "Cannot use the mask on batch 1.*: it raised TypeError"),
        ("builtins:str", "Cannot use the mask on batch 1.*: it is a str. Give a boolean tensor"),
    ],
)
def test_a_mask_that_is_none_is_explained(folder, function, says):
    """It used to be called a bug of bntools."""
    fails("model.pt", "--data", "x.npz", "--mask", function, says=says)


def test_options_that_suit_no_image_are_not_blamed_on_the_first(folder):
    """--skip-broken would leave every image out."""
    Path("photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.png")
    options = ["model.pt", "--data", "photos", "--mean", "1,2", "--skip-broken"]
    fails(*options, says="^Error: Cannot normalise: mean has 2 values, and the images have 3")
