"""Rewriting the forward of one submodule: an activation goes, or one call replaces several."""

from bntools.rewriting.bypass import Bypass
from bntools.rewriting.merging import MERGES
from bntools.rewriting.removal import TAKEN_MODULES, is_taken
from bntools.rewriting.rewritten import (
    Rewritten,
    base_of,
    changes_of,
    own_graph,
    remove_activation_after,
    retrace,
    rewrite,
    why_not,
    why_not_removable,
)
from bntools.rewriting.shapes import Shape

__all__ = [
    "MERGES",
    "TAKEN_MODULES",
    "Bypass",
    "Rewritten",
    "Shape",
    "base_of",
    "changes_of",
    "is_taken",
    "own_graph",
    "remove_activation_after",
    "retrace",
    "rewrite",
    "why_not",
    "why_not_removable",
]
