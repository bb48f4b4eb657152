"""Memory and threads: what a piece of work takes at its peak, and how many cores it keeps busy."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "one_thread", "peak_memory"]

_STATM = Path("/proc/self/statm")
_PERIOD = 0.005


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on one core: on small operations threads cost more than they bring, they spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Peak:
    """The growth of the process's resident memory in bytes; None where it cannot be read."""

    bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch the resident memory of this process while the body runs (Linux; every 5 ms)."""
    peak = Peak()
    before = _resident()
    if before is None:
        yield peak
        return
    peak.bytes = 0
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PERIOD):
            peak.bytes = max(peak.bytes or 0, (_resident() or before) - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.bytes = max(peak.bytes, (_resident() or before) - before)


def _resident() -> int | None:
    try:
        return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return None
