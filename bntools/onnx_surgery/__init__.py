"""Folding the norms of ONNX files: planned, carried out on a copy, proven, and written."""

from bntools.onnx_surgery.inspecting import inspect_onnx
from bntools.onnx_surgery.pipeline import fold_onnx, plan_onnx

__all__ = ["fold_onnx", "inspect_onnx", "plan_onnx"]
