"""Surgery on pretrained networks with BatchNorm, with proof that the result is right.

The names below are loaded when they are first used: importing bntools does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bntools.affine import Affine
    from bntools.equivalence import verify
    from bntools.errors import BNToolsError
    from bntools.inputs import read_inputs, shaped_inputs
    from bntools.inspection import inspect
    from bntools.loading import load, read_model
    from bntools.pipeline import fold
    from bntools.planning import plan_fold
    from bntools.registry import register_host, register_norm
    from bntools.report import (
        Action,
        Decision,
        Equivalence,
        Inspection,
        Plan,
        Reason,
        Report,
        Result,
    )
    from bntools.saving import check_writable, save, write_report

__version__ = "0.1.0"

_HOMES = {
    "Action": "report",
    "Affine": "affine",
    "BNToolsError": "errors",
    "Decision": "report",
    "Equivalence": "report",
    "Inspection": "report",
    "Plan": "report",
    "Reason": "report",
    "Report": "report",
    "Result": "report",
    "check_writable": "saving",
    "fold": "pipeline",
    "inspect": "inspection",
    "load": "loading",
    "plan_fold": "planning",
    "read_inputs": "inputs",
    "read_model": "loading",
    "register_host": "registry",
    "register_norm": "registry",
    "save": "saving",
    "shaped_inputs": "inputs",
    "verify": "equivalence",
    "write_report": "saving",
}

__all__ = [
    "Action",
    "Affine",
    "BNToolsError",
    "Decision",
    "Equivalence",
    "Inspection",
    "Plan",
    "Reason",
    "Report",
    "Result",
    "check_writable",
    "fold",
    "inspect",
    "load",
    "plan_fold",
    "read_inputs",
    "read_model",
    "register_host",
    "register_norm",
    "save",
    "shaped_inputs",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bntools' has no attribute {name!r}")
    value = getattr(import_module(f"bntools.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
