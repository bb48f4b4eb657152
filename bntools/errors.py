"""The errors that bntools raises: one line each, with what, where, the rule and the next step."""

from __future__ import annotations

__all__ = [
    "BNToolsError",
    "CalibrationError",
    "DataError",
    "DistributedError",
    "ExportError",
    "FitError",
    "InputError",
    "LoadError",
    "NondeterministicError",
    "PlanError",
    "RuntimeUnavailableError",
    "SaveError",
    "ShipError",
    "SurgeryError",
    "TargetError",
    "UntrustedError",
]


class BNToolsError(Exception):
    """bntools cannot do what was asked; the message says why and what to do next."""


class ExportError(BNToolsError):
    """A model has no form in ONNX, or not in the one that was asked for."""


class LoadError(BNToolsError):
    """A file, an architecture name or a checkpoint cannot be loaded."""


class UntrustedError(LoadError):
    """A file wants what only its reader can allow; `options` of the command line would do so."""

    def __init__(self, message: str, options: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.options = options


class SaveError(BNToolsError):
    """A result cannot be written; nothing is left behind."""


class InputError(BNToolsError):
    """Example inputs are missing, unreadable, or do not fit the model."""


class DataError(BNToolsError):
    """A source of data is missing, unreadable, or not what a model can take."""


class PlanError(BNToolsError):
    """A plan does not belong to the model, or a pattern selects nothing."""


class RuntimeUnavailableError(BNToolsError):
    """A runtime or a device that was asked for is missing, or not really used."""


class SurgeryError(BNToolsError):
    """The model cannot be copied or changed as the plan says."""


class TargetError(BNToolsError):
    """What norms should be replaced by is unknown, malformed, or cannot be built."""


class NondeterministicError(BNToolsError):
    """Two forwards on the same input differ, so equality means nothing."""


class CalibrationError(BNToolsError):
    """Statistics cannot be taken from a batch; the model is as it was."""


class DistributedError(BNToolsError):
    """Another process of the run failed, or cannot be reached; nothing is changed."""


class FitError(BNToolsError):
    """New norm layers cannot be fitted to data; nothing is changed."""


class ShipError(BNToolsError):
    """A step of a shipment cannot be done; `step` is its name, and nothing is written."""

    def __init__(self, message: str, step: str) -> None:
        super().__init__(message)
        self.step = step
