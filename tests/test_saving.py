"""`save`: what is written loads again, and the old file or the new one is there, whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from bntools import writing
from bntools.errors import SaveError
from bntools.loading import load, read_model
from bntools.recipe import Recipe
from bntools.report import Action, Check, Decision, Equivalence, OutputError, Report, Result
from bntools.saving import save
from bntools.writing import (
    check_writable,
    write_atomically,
    write_report,
    write_text_atomically,
)

EDITS = {"version": 1, "edits": [{"edit": "add-bias", "path": "0", "channels": 4}]}


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BasicBlock(4, 4)).eval()


def result(error: float = 1e-7) -> Result:
    output = OutputError("output", error, 1e-7, 4e-7, 1e-6, passed=True)
    check = Check(Equivalence((output,), "float64", "float32", 4, 4), None, 0, "1x3x8x8")
    decision = Decision("1", "BatchNorm2d", Action.FOLD, ("0",))
    return Result(small(), Report("fold", (decision,), check), Recipe.from_dict(EDITS))


def in_fresh_process(script: str, *arguments: object, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(writing.__file__).parent.parent)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=cwd
    )
    return done.stdout


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FRESH = """
import sys, torch
from bntools.loading import load
torch.set_num_threads(1)
inputs, expected = torch.load("expected.pt")
for path, output in expected.items():
    assert torch.equal(load(path)(inputs), output), path
"""


def test_saved_models_give_the_same_numbers_in_a_fresh_process(tmp_path):
    inputs, expected = torch.rand(1, 3, 64, 64), {}
    for name in ("small", "torchvision:mobilenet_v3_small", "timm:resnet10t"):
        model = load(name) if ":" in name else small()
        save(model, tmp_path / f"{name}.pt")
        with torch.no_grad():
            expected[f"{name}.pt"] = model(inputs)
    torch.save((inputs, expected), tmp_path / "expected.pt")
    in_fresh_process(FRESH, cwd=tmp_path)


def test_a_result_is_saved_with_its_recipe(tmp_path):
    done = result()
    save(done, tmp_path / "m.pt")
    loaded = read_model(tmp_path / "m.pt")
    assert loaded.recipe == EDITS
    assert loaded.notes == ()
    assert torch.equal(loaded.model[0].weight, done.model[0].weight)


def test_the_file_is_a_plain_dict_with_three_keys(tmp_path):
    save(small(), str(tmp_path / "m.pt"))
    content = torch.load(tmp_path / "m.pt", weights_only=False)
    assert list(content) == ["model", "bntools_recipe", "bntools_version"]
    assert content["bntools_recipe"] is None
    assert isinstance(content["bntools_version"], str)


def test_saving_the_same_model_twice_gives_the_same_bytes(tmp_path):
    model = small()
    for name in ("a.pt", "b.pt"):
        save(model, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(SaveError, match=r"Cannot save a OrderedDict: give an nn\.Module"):
        save(small().state_dict(), tmp_path / "m.pt")


# ---- the target ---------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_with_force(tmp_path):
    path = tmp_path / "m.pt"
    path.write_text("precious")
    for write in (lambda: save(small(), path), lambda: check_writable(path)):
        with pytest.raises(SaveError, match=r"m\.pt: it exists\. .*--force"):
            write()
        assert path.read_text() == "precious"
    save(small(), path, force=True)
    assert isinstance(load(path), nn.Sequential)
    assert left_behind(tmp_path) == ["m.pt"]


def test_targets_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"m\.pt: there is no folder .*none\. Make it first"):
        check_writable(tmp_path / "none" / "m.pt")
    with pytest.raises(SaveError, match=r"it is a folder\. Give a file name in it"):
        check_writable(tmp_path, force=True)
    with pytest.raises(SaveError, match=r"there is no folder .*file"):
        check_writable(tmp_path / "file" / "m.pt")
    with pytest.raises(SaveError, match=r"[Ff]ile name too long"):
        check_writable(tmp_path / ("m" * 300))


def test_a_folder_that_is_closed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SaveError, match=r"the folder .* cannot be written to"):
        save(small(), tmp_path / "m.pt")


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(SaveError, match=r"Cannot write .*a: "):
        write_text_atomically(tmp_path / "a", "x", force=True)


def test_a_new_file_has_the_permissions_of_the_umask_and_an_old_one_keeps_its_own(tmp_path):
    before = os.umask(0o027)
    try:
        write_text_atomically(tmp_path / "new", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_text_atomically(tmp_path / "new", "y", force=True)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_and_stays(exists, tmp_path):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "v1.pt", tmp_path / "m.pt"
    if exists:
        target.write_text("old")
    link.symlink_to(Path("store") / "v1.pt")
    write_text_atomically(link, "new", force=exists)
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert left_behind(tmp_path / "store") == ["v1.pt"]


def test_devices_and_pipes_are_written_to_and_stay(tmp_path):
    write_text_atomically("/dev/null", "x")
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    write_text_atomically(pipe, "through")
    reader.join(timeout=10)
    assert received == ["through"]


def test_a_file_that_appears_meanwhile_is_not_replaced_without_force(tmp_path):
    path = tmp_path / "report.json"

    def write(stream):
        path.write_text("of another process")
        stream.write(b"mine")

    with pytest.raises(SaveError, match="it exists"):
        write_atomically(path, write)
    assert path.read_text() == "of another process"
    assert left_behind(tmp_path) == ["report.json"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_system_without_links_is_written_all_the_same(exists, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "f"

    def write(stream):
        stream.write(b"new")
        if exists:
            path.write_text("old")

    if exists:
        with pytest.raises(SaveError, match="it exists"):
            write_atomically(path, write)
    else:
        write_atomically(path, write)
    assert path.read_text() == ("old" if exists else "new")


# ---- failures in the middle ---------------------------------------------------------------------


class Failing:
    """A stream that fails after some bytes."""

    def __init__(self, stream, error, after=1000):
        self.stream, self.error, self.room = stream, error, after

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.stream.write(data)


@pytest.fixture
def fail_with(monkeypatch):
    """Let every write fail with an error after its first 1000 bytes."""

    def arrange(error):
        watched = writing._Watched

        class Broken(watched):
            def __init__(self, stream):
                super().__init__(Failing(stream, error))

        monkeypatch.setattr(writing, "_Watched", Broken)

    return arrange


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "existing"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(old, fail_with, tmp_path):
    path = tmp_path / "m.pt"
    if old is not None:
        path.write_bytes(old)
    fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(SaveError, match=r"Cannot write .*m\.pt: no space left on device\.$"):
        save(small(), path, force=True)
    assert left_behind(tmp_path) == ([] if old is None else ["m.pt"])
    assert old is None or path.read_bytes() == old


def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(fail_with, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    fail_with(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        save(small(), path, force=True)
    assert left_behind(tmp_path) == ["m.pt"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_after_writing_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(SaveError, match="input/output error"):
        save(small(), path, force=True)
    monkeypatch.undo()
    assert left_behind(tmp_path) == ["m.pt"]
    assert path.read_bytes() == b"old"


LIMITED = """
import resource, signal, sys, torch
from bntools.errors import SaveError
from bntools.saving import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(torch.nn.Linear(300, 300), sys.argv[1], force=True)
except SaveError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limits")
def test_a_real_limit_of_the_system_is_reported(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    said = in_fresh_process(LIMITED, path, cwd=tmp_path)
    assert said == f"Cannot write {path}: file too large.\n"
    assert left_behind(tmp_path) == ["m.pt"]
    assert path.read_bytes() == b"old"


def test_two_writers_leave_one_whole_file(tmp_path):
    texts = [str(n) * 200_000 for n in range(8)]
    path = tmp_path / "f"
    writers = [
        threading.Thread(target=write_text_atomically, args=(path, text), kwargs={"force": True})
        for text in texts
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in texts
    assert left_behind(tmp_path) == ["f"]


# ---- models that cannot be pickled --------------------------------------------------------------


def local_class() -> nn.Module:
    class Local(nn.Module):
        pass

    return nn.Sequential(nn.ReLU(), Local())


def lambda_attribute() -> nn.Module:
    model = nn.Sequential(nn.ReLU())
    model[0].scale = lambda x: 2 * x
    return model


def lock_attribute() -> nn.Module:
    model = nn.ReLU()
    model.guard = {"lock": threading.Lock()}
    return model


def local_hook() -> nn.Module:
    model = nn.Sequential(nn.ReLU())

    def hook(*_):
        return None

    model[0].register_forward_hook(hook)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            local_class,
            r"the class .*test_saving\.local_class\.<locals>\.Local at 1 cannot be found",
        ),
        (lambda_attribute, r"the attribute 0\.scale \(function .*<lambda>\) cannot be pickled"),
        (lock_attribute, r"the attribute guard \(dict\) cannot be pickled"),
        (local_hook, r"the attribute 0\._forward_hooks \(OrderedDict\) cannot be pickled"),
        (lambda: nn.Sequential(torch.jit.script(nn.ReLU())), "the module at 0 is TorchScript"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            r"the class .*ParametrizedLinear cannot be found by that name",
        ),
    ],
)
def test_a_model_that_cannot_be_pickled_is_an_error_that_names_the_cause(build, message, tmp_path):
    with pytest.raises(SaveError, match=message) as caught:
        save(build(), tmp_path / "m.pt")
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []


# ---- reports ------------------------------------------------------------------------------------


def test_a_report_is_written_as_json_with_null_for_what_is_not_finite(tmp_path):
    write_report(tmp_path / "r.json", result(error=float("inf")))
    text = (tmp_path / "r.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["decisions"][0]["hosts"] == ["0"]
    assert data["recipe"] == EDITS
    assert data["check"]["native"]["outputs"][0]["error"] is None
    assert text.endswith("}\n")
