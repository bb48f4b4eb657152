"""The attributes of ONNX nodes."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

__all__ = ["attribute", "is_standard"]


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute; texts are strings."""
    for each in node.attribute:
        if each.name == name:
            value = helper.get_attribute_value(each)
            return value.decode(errors="replace") if isinstance(value, bytes) else value
    return default


def is_standard(node: NodeProto) -> bool:
    """Whether an operation is one of ONNX itself."""
    return node.domain in ("", "ai.onnx")
