"""What torch.save wrote, as any format may hold it: unpickled without running anything in it."""

from __future__ import annotations

from typing import Any

from bntools.formats.probe import Probe
from bntools.trust import AllowList
from bntools.unpickling import LEGACY_MAGIC, unpickle

__all__ = ["LEGACY_MAGIC", "unpickled"]


def unpickled(probe: Probe, allowed: AllowList, *, trust: bool = False) -> tuple[Any, list[str]]:
    """The content of a file, and what was left out of it; see `bntools.unpickling`."""
    with probe.path.open("rb") as stream:
        return unpickle(stream, allowed, trust=trust)
