"""Writes in place that a norm stands in the way of: it gives a copy, an Identity would not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from bntools.dataflow.graph import Kind, Node, Value

__all__ = ["written_between"]

_ALIAS = "a write through an alias"
_REPLACED = (_ALIAS, "a replaced .data")
# what has got hold of memory may write to it, whenever it likes
_LEAVING = {"numpy()", "dlpack", "untyped_storage()", "storage()", "data_ptr()"}
_COPIES = {
    "cat", "stack", "clone", "_to_copy", "roll", "flip", "repeat", "index", "index_select",
    "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "native_channel_shuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
}  # fmt: skip


def written_between(sites: Sequence[Node], hosts: Sequence[Node], folded: Set[Node]) -> Node | None:
    """What writes to memory that a norm reads, after the norm and before its last host ran.

    Without the norm that host would read what was written.
    """
    last = max(host.order for host in hosts)
    for site in sites:
        for value in _sharing(site.inputs[0], folded):
            for node in value.consumers:
                replaced = node.name in _REPLACED and node.inputs[0] is value
                leaves = node.kind is Kind.OUTPUT and node.name in _LEAVING
                writes = value in node.writes or replaced
                if node.order < last and (leaves or (writes and site.order < node.order)):
                    return node
    return None


def _sharing(value: Value, folded: Set[Node]) -> Iterator[Value]:
    """All values that may lie on the same memory as one, earlier and later versions included."""
    seen: set[Value] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        yield item
        if item.producer is not None:
            stack.extend(_shared(item.producer, item, folded))
        for node in item.consumers:
            if item in _shared(node, None, folded):
                stack.extend(node.outputs)


def _shared(node: Node, output: Value | None, folded: Set[Node]) -> list[Value]:
    """The inputs of which the outputs of an operation (or one of them) may be views."""
    if node.writes or node.name == _ALIAS:
        return [value for value in node.inputs if value in node.writes or node.name == _ALIAS]
    if node.kind is Kind.MOVE and node.name not in _COPIES:
        return node.inputs[:1]
    if node in folded and (output is None or output is node.outputs[0]):
        return node.inputs[:1]
    return []
