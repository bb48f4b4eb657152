"""Whatever happens while a file is written, the old or the new one is there, whole."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import bntools
from bntools import artifacts, writing
from bntools.errors import SaveError
from bntools.writing import write_atomically, write_text_atomically

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
LEFT = re.compile(r"\.bntools-[0-9a-f]{16}\.tmp")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()


class Outcome:
    """What a report is: something with a dict."""

    def to_dict(self):
        return {"schema": 1, "values": list(range(300))}


def write_model(path: Path, **options: bool) -> None:
    bntools.save(model(), path, **options)


def write_json(path: Path, **options: bool) -> None:
    bntools.write_report(path, Outcome(), **options)


def write_plot(path: Path, **options: bool) -> None:
    pytest.importorskip("matplotlib")
    bntools.write_plot(bntools.diff(model(), model()), path, **options)


def write_stats(path: Path, **options: bool) -> None:
    bntools.calibration_stats(model(), [torch.rand(2, 3, 8, 8)]).save(path, **options)


WRITERS = {
    "m.pt": write_model,
    "m.safetensors": write_model,
    "m.pt2": write_model,
    "m.onnx": write_model,
    "r.json": write_json,
    "p.png": write_plot,
    "p.svg": write_plot,
    "s.json": write_stats,
    "s.safetensors": write_stats,
}
EVERY_WRITER = pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)


class Failing:
    """A stream that fails after some bytes."""

    def __init__(self, stream, error, after):
        self.stream, self.error, self.room = stream, error, after

    def write(self, data):
        self.room -= len(bytes(data))
        if self.room < 0:
            raise self.error
        return self.stream.write(data)

    def flush(self):
        self.stream.flush()


def failing_after(monkeypatch, count: int, error: BaseException) -> None:
    watched = writing._Watched

    class Broken(watched):
        def __init__(self, stream):
            super().__init__(Failing(stream, error, count))

    monkeypatch.setattr(writing, "_Watched", Broken)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@EVERY_WRITER
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_every_writer_leaves_the_old_file_where_it_fails(name, write, error, tmp_path, monkeypatch):
    """At the first byte, in the middle and at the last one."""
    path = tmp_path / name
    write(path)
    size = path.stat().st_size
    expected = SaveError if isinstance(error, OSError) else KeyboardInterrupt
    slow = name in ("m.onnx", "m.pt2")  # they are exported each time
    for after in (size // 2,) if slow else (0, size // 2, size - 1):
        path.write_bytes(b"old")
        with monkeypatch.context() as patched:
            failing_after(patched, after, error)
            with pytest.raises(expected, match=r"no space left on device\.$|^$"):
                write(path, force=True)
        assert path.read_bytes() == b"old"
        assert left_in(tmp_path) == [name]


@EVERY_WRITER
def test_every_writer_follows_links_and_keeps_permissions(name, write, tmp_path):
    """Also onto another file system, and where the link points to nothing yet."""
    elsewhere = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    target = elsewhere / f"bntools-test-{os.getpid()}-{name}"
    link = tmp_path / name
    link.symlink_to(target)
    try:
        write(link)
        assert link.is_symlink()
        first = target.stat()
        target.chmod(0o640)
        write(link, force=True)
        assert link.is_symlink()
        assert target.stat().st_mode & 0o777 == 0o640
        assert target.stat().st_ino != first.st_ino
        assert left_in(tmp_path) == [name]
        assert not list(elsewhere.glob(".bntools-*.tmp"))
    finally:
        target.unlink(missing_ok=True)


@EVERY_WRITER
def test_every_writer_refuses_what_it_cannot_write_to(name, write, tmp_path):
    """A folder, a link to one, a loop of links, a folder that is not there."""
    (tmp_path / "folder").mkdir()
    (tmp_path / f"a{name}").symlink_to(tmp_path / "folder")
    (tmp_path / f"b{name}").symlink_to(tmp_path / f"b{name}")
    for target in (f"a{name}", f"b{name}", f"none/{name}"):
        with pytest.raises(
            SaveError, match=r"^Cannot write .*(folder|[Ss]ymbolic|[Ss]ymlink).*\.$"
        ):
            write(tmp_path / target, force=True)
    assert left_in(tmp_path) == sorted([f"a{name}", f"b{name}", "folder"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_device_is_reported():
    """/dev/full is written to directly."""
    with pytest.raises(SaveError, match=r"Cannot write /dev/full: no space left on device\."):
        write_text_atomically("/dev/full", "x" * 100_000)


def test_the_owner_of_a_file_stays_where_that_may_be(tmp_path):
    """The superuser does not take over what is replaced."""
    path = tmp_path / "f"
    path.write_text("old")
    try:
        os.chown(path, 12345, 54321)
    except PermissionError:
        pytest.skip("only the superuser gives files away")
    write_text_atomically(path, "new", force=True)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_is_no_failure_but_a_broken_disk_is(
    code, fails, tmp_path, monkeypatch
):
    """Some network file systems have nothing to wait for."""

    def sync(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", sync)
    if fails:
        with pytest.raises(SaveError, match="input/output error"):
            write_text_atomically(tmp_path / "f", "x")
    else:
        write_text_atomically(tmp_path / "f", "x")
    assert left_in(tmp_path) == ([] if fails else ["f"])


def test_an_interruption_between_any_two_steps_leaves_nothing(tmp_path):
    """Ctrl-C at every line of the writer, in turn: what is left goes with the process."""
    path = tmp_path / "f"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", EVERY_LINE, path], capture_output=True, text=True, check=True
    )
    count, interrupted = map(int, done.stdout.split())
    assert count > 40
    assert interrupted > 40
    assert left_in(tmp_path) == ["f"]
    assert path.read_text() == "new"


EVERY_LINE = textwrap.dedent("""
    import sys
    from pathlib import Path
    from bntools import writing

    path, at, interrupted = Path(sys.argv[1]), 0, 0

    def trace(frame, event, argument):
        global count
        if frame.f_code.co_filename != writing.__file__:
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    while True:
        at, count = at + 1, 0
        sys.settrace(trace)
        try:
            writing.write_text_atomically(path, "new", force=True)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert path.read_text() in ("old", "new")
    print(count, interrupted)
""")


# ---- processes -----------------------------------------------------------------------------------

SLOW = textwrap.dedent("""
    import signal, sys, time
    from bntools.writing import write_atomically
    from bntools_cli.__main__ import _end_in_order

    _end_in_order()

    def write(stream):
        for _ in range(500):
            stream.write(b"new" * 1000)
            print("on", flush=True)
            time.sleep(0.02)

    write_atomically(sys.argv[1], write, force=True)
""")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_process_that_is_ended_leaves_the_old_file(number, code, tmp_path):
    """Whatever ends it; only `kill -9` leaves the unfinished file, whose name says what it is."""
    path = tmp_path / "f"
    path.write_text("old")
    command = [sys.executable, "-c", SLOW, path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    assert path.read_text() == "old"
    left = [name for name in left_in(tmp_path) if name != "f"]
    assert len(left) == (number == signal.SIGKILL)
    assert all(LEFT.fullmatch(name) for name in left)


WRITE_OWN = textwrap.dedent("""
    import sys, time
    from bntools.errors import SaveError
    from bntools.writing import write_text_atomically

    path, letter, force, start = sys.argv[1], sys.argv[2], sys.argv[3] == "True", float(sys.argv[4])
    time.sleep(max(0, start - time.time()))
    try:
        write_text_atomically(path, letter * 500_000, force=force)
        print("wrote")
    except SaveError as error:
        print(error)
""")


@pytest.mark.parametrize("force", [True, False])
def test_of_processes_that_write_one_file_each_leaves_a_whole_one(force, tmp_path):
    """Without `force` one of them writes it, and all others say that it exists."""
    path, start = tmp_path / "f", str(time.time() + 3)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_OWN, path, letter, str(force), start],
            stdout=subprocess.PIPE,
            text=True,
        )
        for letter in "abcd"
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    text = path.read_text()
    assert text in {letter * 500_000 for letter in "abcd"}
    assert left_in(tmp_path) == ["f"]
    if force:
        assert said == ["wrote"] * 4
    else:
        assert max(said) == "wrote"
        assert sum("it exists" in each for each in said) == 3


def fold(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bntools_cli", "fold", "m.pt", "-o", "out.pt", "--force"]
    return subprocess.Popen(
        [*command, "--report", "r.json", "-q"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_end(folder: Path, process: subprocess.Popen[str], *, may_leave: bool) -> None:
    with process:
        process.communicate(timeout=120)
    out, report = folder / "out.pt", folder / "r.json"
    assert out.read_bytes() == b"old" or bntools.load(out)
    assert report.read_text() == "old" or json.loads(report.read_text())
    left = set(left_in(folder)) - {"m.pt", "out.pt", "r.json"}
    assert all(LEFT.fullmatch(name) for name in left)
    assert may_leave or not left


LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("number", "tries"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 40, marks=LONG),
        pytest.param(signal.SIGTERM, 40, marks=LONG),
        pytest.param(signal.SIGKILL, 40, marks=LONG),
    ],
)
def test_a_command_that_is_ended_at_any_moment_leaves_whole_files(number, tries, tmp_path):
    """Python starts, torch is imported, the model runs, files are written: anywhere in that."""
    chance = random.Random(int(number))
    bntools.save(model(), tmp_path / "m.pt")
    start = time.monotonic()
    with fold(tmp_path) as process:
        assert process.wait(timeout=240) == 0
    whole = time.monotonic() - start
    for _ in range(tries):
        (tmp_path / "out.pt").write_bytes(b"old")
        (tmp_path / "r.json").write_text("old")
        process = fold(tmp_path)
        time.sleep(whole * chance.uniform(0.05, 1))
        process.send_signal(number)
        check_end(tmp_path, process, may_leave=number == signal.SIGKILL)
        for name in set(left_in(tmp_path)) - {"m.pt", "out.pt", "r.json"}:
            (tmp_path / name).unlink()


def test_a_model_with_data_beside_it_is_published_data_first(tmp_path, monkeypatch):
    """Ended between the two, the old model finds its old data, and the new data have gone."""
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(artifacts, "LARGEST", 0)
    bntools.save(nn.Linear(64, 64).eval(), path, example_inputs=torch.zeros(1, 64))
    before = {name: (tmp_path / name).read_bytes() for name in left_in(tmp_path)}
    assert len(before) == 2
    failing_after(monkeypatch, 100, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        bntools.save(nn.Linear(64, 64).eval(), path, force=True, example_inputs=torch.zeros(1, 64))
    assert {name: (tmp_path / name).read_bytes() for name in left_in(tmp_path)} == before


def test_a_writer_that_raises_anything_leaves_nothing(tmp_path):
    """Not only what the system raises."""

    def write(stream):
        stream.write(b"half")
        raise ZeroDivisionError("of the writer")

    with pytest.raises(ZeroDivisionError, match="of the writer"):
        write_atomically(tmp_path / "f", write)
    assert left_in(tmp_path) == []
