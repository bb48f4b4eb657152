"""Reports as text."""

from __future__ import annotations

from bntools.tables.explanations import explanation
from bntools.tables.judgements import depth, not_compared, outputs
from bntools.tables.layout import WIDTH, plain, text, width
from bntools.tables.merging import merges
from bntools.tables.norms import decisions, findings, layers
from bntools.tables.surgeries import blocks, drift, fits, replacements, steps

__all__ = [
    "WIDTH",
    "blocks",
    "decisions",
    "depth",
    "drift",
    "explanation",
    "findings",
    "fits",
    "layers",
    "merges",
    "not_compared",
    "outputs",
    "plain",
    "replacements",
    "steps",
    "text",
    "width",
]
