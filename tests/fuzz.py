"""Damaged files of every format, by the thousand: each is read, or refused in one line.

    python tests/fuzz.py --cases 10000 --seed 1 --out tests/fuzz_results.json

A worker process reads one file after the other, its address space limited and every event that
Python audits watched: a program that starts, a file opened for writing, a connection. The parent
ends it where one file takes too long, and starts another where it has died. Case `n` of a seed is
the same in every run: `--only n` repeats it and prints what was said.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pickle
import platform
import random
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 10
EXTRA_MEMORY = 768 * 2**20
"""What reading may take besides twice the file: code that is loaded when it is first needed."""
GOOD = ("read", "refused")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Outcome:
    """What became of one damaged file."""

    case: int
    kind: str
    way: str
    outcome: str
    said: str
    seconds: float


# ---- the worker ----------------------------------------------------------------------------------

_FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "subprocess.Popen", "socket.connect", "socket.bind", "urllib.Request", "os.putenv", "os.chmod",
    "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.mkdir", "os.truncate",
    "shutil.rmtree", "ctypes.dlopen", "webbrowser.open", "pty.spawn",
}  # fmt: skip


class Watch:
    """Notes what Python does that no reader of a file should do."""

    def __init__(self, own: Path) -> None:
        self.own = str(own)
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: Any) -> None:
        if not self.on:
            return
        if event == "open":
            name, mode, flags = arguments
            written = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if written and not str(name).startswith((self.own, "/dev/null")):
                self.seen.append(f"opened {name} for writing")
        elif event in _FORBIDDEN:
            name = str(arguments[0]) if arguments else ""
            if not name.startswith(self.own):
                self.seen.append(f"{event} {name}")


def make(target: Path) -> None:
    """Write the valid files, once for all workers."""
    from fuzz_samples import samples

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        target.write_bytes(pickle.dumps(samples(Path(folder))))


def work(seed: int, first: int, count: int, made: Path, only: str) -> None:
    """Read the damaged files of some cases, and print what became of each as a line of JSON."""
    import torch
    from fuzz_samples import read

    from bntools.errors import BNToolsError

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="bntools-fuzz-") as name:
        folder = Path(name)
        known = [s for s in pickle.loads(made.read_bytes()) if only in s.kind]
        for sample in known:  # imports what reading takes, before the memory is limited
            placed = _placed(folder, sample.name, sample.content, sample.beside)
            with placed as path, contextlib.suppress(BNToolsError):
                read(sample, path)
        watch = Watch(folder.parent)
        for case in range(first, first + count):
            print(json.dumps({"begins": case}), file=answer, flush=True)
            outcome = _tried(seed, case, known, folder, watch)
            print(json.dumps(asdict(outcome)), file=answer, flush=True)


@contextlib.contextmanager
def _placed(folder: Path, name: str, content: bytes, beside: Any) -> Iterator[Path]:
    files = {name: content, **dict(beside)}
    here = folder / "case"
    here.mkdir()
    for each, data in files.items():
        (here / each).write_bytes(data)
    yield here / name
    for path in sorted(here.rglob("*"), reverse=True):
        path.unlink() if path.is_file() or path.is_symlink() else path.rmdir()
    here.rmdir()


def _damaged(seed: int, case: int, known: list[Any]) -> tuple[Any, bytes, tuple[Any, ...], str]:
    from fuzz_samples import mutated

    chance = random.Random(f"{seed}/{case}")
    sample = known[case % len(known)]
    content, beside = sample.content, sample.beside
    others = [each.content for each in known]
    if beside and chance.random() < 0.3:
        data, way = mutated(beside[0][1], chance, others)
        return sample, content, ((beside[0][0], data),), f"data {way}"
    content, way = mutated(content, chance, others)
    return sample, content, beside, way


def _tried(seed: int, case: int, known: list[Any], folder: Path, watch: Watch) -> Outcome:
    from fuzz_samples import read

    from bntools.errors import BNToolsError

    sample, content, beside, way = _damaged(seed, case, known)
    with _placed(folder, sample.name, content, beside) as path:
        before, temporary = _files(path.parent), set(folder.parent.iterdir())
        watch.seen.clear()
        watch.on = True
        _limit(len(content))
        start = time.monotonic()
        try:
            read(sample, path)
            outcome, said = "read", ""
        except BNToolsError as error:
            outcome, said = _judged(str(error), trusted="trusted" in sample.kind)
        except Exception as error:  # noqa: BLE001 - whatever else comes out is a find
            outcome, said = "bug", f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        watch.on = False
        _limit(None)
        if watch.seen:
            outcome, said = "acted", "; ".join(watch.seen)
        elif _files(path.parent) != before or _new_in(folder.parent, temporary):
            new = {*_files(path.parent), *_new_in(folder.parent, temporary)} - set(before)
            outcome, said = "wrote", f"changed, or new: {sorted(new)}"
    if outcome in GOOD and seconds > LONGEST_SECONDS:
        outcome = "slow"
    return Outcome(case, sample.kind, way, outcome, said[:400], round(seconds, 3))


def _judged(message: str, *, trusted: bool = False) -> tuple[str, str]:
    """A refusal is one line that can be printed, and not for want of memory.

    torch.jit asks for as much as a damaged program says, and takes a no: it was trusted.
    """
    if not trusted and "memory" in message and ("alloc" in message or "more memory" in message):
        return "memory", message
    if not message.isprintable():
        return "unprintable", repr(message)
    return "refused", message


def _new_in(folder: Path, before: set[Path]) -> set[str]:
    # ONNX Runtime notes its session in this one when it is first used.
    return {path.name for path in set(folder.iterdir()) - before} - {".ses"}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _limit(size: int | None) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard
    if size is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft = pages * resource.getpagesize() + 2 * size + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- the parent ----------------------------------------------------------------------------------


def fuzz(
    cases: int, seed: int, *, first: int = 0, only: str = "", batch: int = 20_000
) -> Iterator[Outcome]:
    """What becomes of each case; a worker that dies or hangs is an outcome of its case as well."""
    case, end = first, first + cases
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "samples"
        subprocess.run([sys.executable, __file__, "--make", made], check=True, cwd=_HERE)
        while case < end:
            for outcome in _batch(
                seed, case, min(batch, end - case), ["--made", made, "--formats", only]
            ):
                yield outcome
                case = outcome.case + 1


def _batch(seed: int, first: int, count: int, more: list[Any]) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", str(first), str(count), "--seed", str(seed)]
        environment = {**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(_HERE)  # torch makes a folder in TMPDIR for it
        worker = subprocess.Popen(
            [*command, *more], stdout=subprocess.PIPE, env=environment, cwd=_HERE
        )
        try:
            yield from _followed(worker, first, count)
        finally:
            worker.kill()
            worker.wait()


def _followed(worker: subprocess.Popen[bytes], first: int, count: int) -> Iterator[Outcome]:
    assert worker.stdout is not None
    begun, done = None, 0
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        buffer = b""
        while done < count:
            patience = LONGEST_SECONDS + 5 if begun is not None else 300
            if not selector.select(timeout=patience):
                yield _died(begun if begun is not None else first, "hung", f"over {patience} s")
                return
            piece = os.read(worker.stdout.fileno(), 2**16)
            if not piece:
                code = worker.wait()
                if begun is None and not done:
                    raise RuntimeError("the worker does not start")
                how = signal.Signals(-code).name if code < 0 else f"exit {code}"
                yield _died(begun if begun is not None else first, "crashed", how)
                return
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in map(json.loads, lines):
                if "begins" in line:
                    begun = line["begins"]
                else:
                    begun, done = None, done + 1
                    yield Outcome(**line)


def _died(case: int, outcome: str, how: str) -> Outcome:
    return Outcome(case, "?", "?", outcome, how, float(LONGEST_SECONDS))


def summary(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    """The record of a run: how many of each format came to what, and every find."""
    import torch

    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        by_kind[outcome.kind][outcome.outcome] += 1
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python tests/fuzz.py --cases {len(outcomes)} --seed {seed}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cases": len(outcomes),
        "outcomes": dict(collections.Counter(outcome.outcome for outcome in outcomes)),
        "formats": {kind: dict(counts) for kind, counts in sorted(by_kind.items())},
        "slowest": {"seconds": slowest.seconds, "format": slowest.kind, "case": slowest.case},
        "finds": [asdict(outcome) for outcome in outcomes if outcome.outcome not in GOOD],
    }


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--formats", default="", help="only the formats with this in their name")
    parser.add_argument("--only", type=int, help="repeat one case and print what became of it")
    parser.add_argument("--out", type=Path, help="write the record of the run")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    for hidden in ("--make", "--made"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.seed, *asked.work, asked.made, asked.formats)
        return 0
    if asked.make:
        make(asked.make)
        return 0
    first, cases = (asked.only, 1) if asked.only is not None else (asked.first, asked.cases)
    outcomes = []
    for outcome in fuzz(cases, asked.seed, first=first, only=asked.formats):
        outcomes.append(outcome)
        if outcome.outcome not in GOOD or asked.only is not None:
            _say(outcome)
    record = summary(outcomes, asked.seed)
    _say(json.dumps({k: v for k, v in record.items() if k != "finds"}, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(record["finds"]))


if __name__ == "__main__":
    sys.exit(main())
