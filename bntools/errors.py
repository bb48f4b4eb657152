"""The errors that bntools raises: one line each, with what, where, the rule and the next step."""

from __future__ import annotations

__all__ = [
    "BNToolsError",
    "InputError",
    "LoadError",
    "NondeterministicError",
    "PlanError",
    "SaveError",
    "SurgeryError",
]


class BNToolsError(Exception):
    """bntools cannot do what was asked; the message says why and what to do next."""


class LoadError(BNToolsError):
    """A file, an architecture name or a checkpoint cannot be loaded."""


class SaveError(BNToolsError):
    """A result cannot be written; nothing is left behind."""


class InputError(BNToolsError):
    """Example inputs are missing, unreadable, or do not fit the model."""


class PlanError(BNToolsError):
    """A plan does not belong to the model, or a pattern selects nothing."""


class SurgeryError(BNToolsError):
    """The model cannot be copied or changed as the plan says."""


class NondeterministicError(BNToolsError):
    """Two forwards on the same input differ, so equality means nothing."""
