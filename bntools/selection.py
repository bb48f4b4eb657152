"""Choosing layers by globs on their paths."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from bntools.errors import PlanError

__all__ = ["Patterns", "select"]

Patterns = str | Sequence[str]


def select(paths: Sequence[str], only: Patterns = "*", skip: Patterns = ()) -> set[str]:
    """The paths that the patterns leave in; each pattern must match something.

    Raises PlanError.
    """
    wanted = [only] if isinstance(only, str) else list(only)
    unwanted = [skip] if isinstance(skip, str) else list(skip)
    for pattern in (*wanted, *unwanted):
        if pattern != "*" and not any(fnmatchcase(path, pattern) for path in paths):
            some = ", ".join(paths[:3]) or "none"
            raise PlanError(
                f"Cannot select {pattern!r}: no norm layer has such a path (there are: {some}"
                f"{', ...' if len(paths) > 3 else ''}). Use a glob such as 'layer1.*'."
            )
    return {
        path for path in paths
        if any(fnmatchcase(path, p) for p in wanted)
        and not any(fnmatchcase(path, p) for p in unwanted)
    }  # fmt: skip
