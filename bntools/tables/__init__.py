"""Reports as text."""

from __future__ import annotations

from bntools.tables.judgements import depth, not_compared, outputs
from bntools.tables.layout import WIDTH, plain, text, width
from bntools.tables.norms import decisions, findings, layers
from bntools.tables.surgeries import blocks, drift, fits, replacements

__all__ = [
    "WIDTH",
    "blocks",
    "decisions",
    "depth",
    "drift",
    "findings",
    "fits",
    "layers",
    "not_compared",
    "outputs",
    "plain",
    "replacements",
    "text",
    "width",
]
