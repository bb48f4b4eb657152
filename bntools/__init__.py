"""Surgery on pretrained networks with BatchNorm, with proof that the result is right.

The names below are loaded when they are first used: importing bntools does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bntools.affine import Affine
    from bntools.applying import apply_recipe
    from bntools.calibrating import CalibrationStats, calibration_stats, read_stats
    from bntools.calibration.options import RecalibrationOptions
    from bntools.data import Data, read_data
    from bntools.depth import compare_layers
    from bntools.distributed import Processes, processes
    from bntools.drawing import check_plot, write_plot
    from bntools.drift import diff
    from bntools.errors import BNToolsError
    from bntools.evaluation import Accuracy, accuracy, read_function, read_metric
    from bntools.formats.exported import from_exported
    from bntools.handwritten import to_batchnorm
    from bntools.inputs import read_inputs, shaped_inputs
    from bntools.inspection import inspect
    from bntools.loading import check_takes, is_onnx, load, read_model
    from bntools.naming import named_target
    from bntools.onnx_surgery.inspecting import inspect_onnx
    from bntools.onnx_surgery.pipeline import fold_onnx, plan_onnx
    from bntools.pipeline import fold
    from bntools.planning import plan_fold
    from bntools.preprocessing import Preprocessing
    from bntools.publishing import ExportOptions, export_onnx
    from bntools.recalibrating import recalibrate
    from bntools.recipe import Recipe
    from bntools.registry import register_host, register_norm
    from bntools.replacing import ReplaceOptions, replace
    from bntools.report import (
        Action,
        ConversionReport,
        Decision,
        Difference,
        Equivalence,
        ExportReport,
        FreezeReport,
        Inspection,
        Plan,
        Progress,
        Reason,
        RecalibrationReport,
        ReplacementReport,
        Report,
        Result,
        ShipReport,
        UnfoldReport,
    )
    from bntools.saving import check_format, save
    from bntools.shipping import ShipOptions, check_ship, ship
    from bntools.surgery.freezing import freeze, unfreeze, unsync
    from bntools.surgery.unfolding import unfold
    from bntools.targets import (
        ToEvoNormB0,
        ToEvoNormS0,
        ToGroupNorm,
        ToInstanceNorm,
        ToLayerNorm,
    )
    from bntools.verifying import Reference, verify
    from bntools.writing import check_writable, write_report

__version__ = "0.1.0"

_HOMES = {
    "Accuracy": "evaluation",
    "Action": "report",
    "Affine": "affine",
    "BNToolsError": "errors",
    "CalibrationStats": "calibrating",
    "ConversionReport": "report",
    "Data": "data",
    "Decision": "report",
    "Difference": "report",
    "Equivalence": "report",
    "ExportOptions": "publishing",
    "ExportReport": "report",
    "FreezeReport": "report",
    "Inspection": "report",
    "Plan": "report",
    "Preprocessing": "preprocessing",
    "Processes": "distributed",
    "Progress": "report",
    "Reason": "report",
    "RecalibrationOptions": "calibration.options",
    "RecalibrationReport": "report",
    "Recipe": "recipe",
    "Reference": "verifying",
    "ReplaceOptions": "replacing",
    "ReplacementReport": "report",
    "Report": "report",
    "Result": "report",
    "ShipOptions": "shipping",
    "ShipReport": "report",
    "ToEvoNormB0": "targets",
    "ToEvoNormS0": "targets",
    "ToGroupNorm": "targets",
    "ToInstanceNorm": "targets",
    "ToLayerNorm": "targets",
    "UnfoldReport": "report",
    "accuracy": "evaluation",
    "apply_recipe": "applying",
    "calibration_stats": "calibrating",
    "check_format": "saving",
    "check_plot": "drawing",
    "check_ship": "shipping",
    "check_takes": "loading",
    "check_writable": "writing",
    "compare_layers": "depth",
    "diff": "drift",
    "export_onnx": "publishing",
    "fold": "pipeline",
    "fold_onnx": "onnx_surgery.pipeline",
    "freeze": "surgery.freezing",
    "from_exported": "formats.exported",
    "inspect": "inspection",
    "inspect_onnx": "onnx_surgery.inspecting",
    "is_onnx": "loading",
    "load": "loading",
    "named_target": "naming",
    "plan_fold": "planning",
    "plan_onnx": "onnx_surgery.pipeline",
    "processes": "distributed",
    "read_data": "data",
    "read_function": "evaluation",
    "read_inputs": "inputs",
    "read_metric": "evaluation",
    "read_model": "loading",
    "read_stats": "calibrating",
    "recalibrate": "recalibrating",
    "register_host": "registry",
    "register_norm": "registry",
    "replace": "replacing",
    "save": "saving",
    "shaped_inputs": "inputs",
    "ship": "shipping",
    "to_batchnorm": "handwritten",
    "unfold": "surgery.unfolding",
    "unfreeze": "surgery.freezing",
    "unsync": "surgery.freezing",
    "verify": "verifying",
    "write_plot": "drawing",
    "write_report": "writing",
}

__all__ = [
    "Accuracy",
    "Action",
    "Affine",
    "BNToolsError",
    "CalibrationStats",
    "ConversionReport",
    "Data",
    "Decision",
    "Difference",
    "Equivalence",
    "ExportOptions",
    "ExportReport",
    "FreezeReport",
    "Inspection",
    "Plan",
    "Preprocessing",
    "Processes",
    "Progress",
    "Reason",
    "RecalibrationOptions",
    "RecalibrationReport",
    "Recipe",
    "Reference",
    "ReplaceOptions",
    "ReplacementReport",
    "Report",
    "Result",
    "ShipOptions",
    "ShipReport",
    "ToEvoNormB0",
    "ToEvoNormS0",
    "ToGroupNorm",
    "ToInstanceNorm",
    "ToLayerNorm",
    "UnfoldReport",
    "accuracy",
    "apply_recipe",
    "calibration_stats",
    "check_format",
    "check_plot",
    "check_ship",
    "check_takes",
    "check_writable",
    "compare_layers",
    "diff",
    "export_onnx",
    "fold",
    "fold_onnx",
    "freeze",
    "from_exported",
    "inspect",
    "inspect_onnx",
    "is_onnx",
    "load",
    "named_target",
    "plan_fold",
    "plan_onnx",
    "processes",
    "read_data",
    "read_function",
    "read_inputs",
    "read_metric",
    "read_model",
    "read_stats",
    "recalibrate",
    "register_host",
    "register_norm",
    "replace",
    "save",
    "shaped_inputs",
    "ship",
    "to_batchnorm",
    "unfold",
    "unfreeze",
    "unsync",
    "verify",
    "write_plot",
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
