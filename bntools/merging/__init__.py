"""Merging: parallel linear branches, and consecutive linear layers, become one layer."""

from bntools.merging.carrying import Merged, Start, merge_folded

__all__ = ["Merged", "Start", "merge_folded"]
