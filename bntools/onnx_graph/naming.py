"""How decisions call the nodes of an ONNX graph: by module paths, where the file has them."""

from __future__ import annotations

import ast
from collections import Counter

from onnx import NodeProto

__all__ = ["Paths", "class_of", "module_of"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_LONGEST = 10_000


def module_of(node: NodeProto) -> str:
    """The path of the module that a node is of, as torch's exporter notes it; "" where it is not.

    Example:
        >>> from onnx import helper
        >>> node = helper.make_node("Conv", ["x", "w"], ["y"], name="node_conv2d")
        >>> _ = node.metadata_props.add(
        ...     key="pkg.torch.onnx.name_scopes", value="['', 'layer1', 'layer1.0', 'conv2d']"
        ... )
        >>> module_of(node)
        'layer1.0'
    """
    return _told(node, _SCOPES)


def class_of(node: NodeProto) -> str:
    """The class of that module, without its package; "" where it is not noted."""
    return _told(node, _CLASSES).rpartition(".")[2]


def _told(node: NodeProto, key: str) -> str:
    text = next((each.value for each in node.metadata_props if each.key == key), "")
    if not text or len(text) > _LONGEST:
        return ""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
    told = found[-2] if isinstance(found, list) and len(found) > 1 else ""
    return _printable(told) if isinstance(told, str) else ""


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)


class Paths:
    """Unique paths: of several nodes of one module, the later ones are "path (call 2)" and on."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._taken: set[str] = set()

    def of(self, node: NodeProto, *, module: str | None = None) -> str:
        """A path for a node: that of its module, else its own name, else that of its output."""
        output = next((name for name in node.output if name), node.op_type)
        return self.unique(module or module_of(node) or _printable(node.name or output))

    def unique(self, path: str) -> str:
        """The path, or one with a number behind it where it was given before."""
        self._counts[path] += 1
        count, found = self._counts[path], path
        while found in self._taken or count > 1:
            found = f"{path} (call {count})"
            if found not in self._taken:
                break
            count += 1
        self._taken.add(found)
        return found
