"""The nesting of a program's inputs and outputs, as plain data: tuples, lists, dicts, leaves."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch.utils import _pytree

from bntools.trust import Refusal

__all__ = ["Tree", "read_tree"]

_DEEPEST = 100
_KINDS = {
    "builtins.tuple": "tuple",
    "builtins.list": "list",
    "builtins.dict": "dict",
    "collections.OrderedDict": "ordered",
    "collections.namedtuple": "named",
    "torch.Size": "tuple",
    "torch.fx.immutable_collections.immutable_dict": "dict",
    "torch.fx.immutable_collections.immutable_list": "list",
}


@dataclass(frozen=True)
class Tree:
    """A container and its children; a leaf has neither.

    `kind` is "leaf", "tuple", "list", "dict", "ordered" or a named tuple's name; `keys` are those
    of a dict, or the fields of a named tuple.
    """

    kind: str = "leaf"
    children: tuple[Tree, ...] = ()
    keys: tuple[Any, ...] = ()

    @property
    def leaves(self) -> int:
        """How many values the tree holds."""
        return 1 if self.kind == "leaf" else sum(child.leaves for child in self.children)

    def flat(self, value: Any, name: str = "the input") -> Iterator[tuple[str, Any]]:
        """The leaves of a value that is nested like this, with what each is called."""
        if self.kind == "leaf":
            yield name, value
            return
        for key, child, item in zip(self._names(), self.children, self._items(value, name)):  # noqa: B905 - _items checks the number
            yield from child.flat(item, f"{name}{key}")

    def built(self, leaves: Iterator[Any]) -> Any:
        """A value nested like this, of these leaves."""
        if self.kind == "leaf":
            return next(leaves)
        items = [child.built(leaves) for child in self.children]
        if self.kind == "tuple":
            return tuple(items)
        if self.kind == "list":
            return items
        if self.kind == "dict":
            return dict(zip(self.keys, items, strict=True))
        if self.kind == "ordered":
            return OrderedDict(zip(self.keys, items, strict=True))
        return _named_tuple(self.kind, self.keys)(*items)

    def _names(self) -> Sequence[str]:
        if self.kind in ("dict", "ordered"):
            return [f"[{key!r}]" for key in self.keys]
        return [f"[{index}]" for index in range(len(self.children))]

    def _items(self, value: Any, name: str) -> Sequence[Any]:
        if self.kind in ("dict", "ordered"):
            if not isinstance(value, Mapping) or set(value) != set(self.keys):
                raise ValueError(f"{name} is no dict of {', '.join(map(str, self.keys))}")
            return [value[key] for key in self.keys]
        if not isinstance(value, (tuple, list)) or len(value) != len(self.children):
            raise ValueError(f"{name} is no {self.kind} of {len(self.children)}")
        return value


def read_tree(text: Any, fields: Mapping[str, Any]) -> Tree:
    """Read what torch's `treespec_dumps` wrote; `fields` has those of named tuples by their type.

    Raises `Refusal` for containers that only their own code could build.
    """
    protocol, spec = json.loads(text)
    if protocol != 1:
        raise ValueError("a nesting of another version")
    return _node(spec, fields, 0)


def _node(spec: Any, fields: Mapping[str, Any], depth: int) -> Tree:
    if depth > _DEEPEST:
        raise ValueError("inputs or outputs nest too deep")
    if spec["type"] is None:
        return Tree()
    children = tuple(_node(child, fields, depth + 1) for child in spec["children_spec"])
    kind = _KINDS.get(spec["type"], "")
    if kind in ("tuple", "list"):
        return Tree(kind, children)
    if kind in ("dict", "ordered"):
        keys = tuple(json.loads(spec["context"]))
        if len(keys) != len(children) or not all(type(key) in (str, int) for key in keys):
            raise ValueError("a dict does not have the keys that it needs")
        return Tree(kind, children, keys)
    if kind == "named" and spec["context"] in fields:
        names = tuple(fields[spec["context"]]["field_names"])
        if len(names) == len(children):
            _named_tuple(spec["context"], names)  # a ValueError for what is no identifier
            return Tree(spec["context"], children, names)
    raise Refusal(
        f"its inputs or outputs are nested in a {spec['context'] if kind else spec['type']}, which"
        " only its own code can build. Export the model with tuples, lists and dicts"
    )


@cache
def _named_tuple(kind: str, fields: tuple[str, ...]) -> Any:
    """A class like the one that the model returned; torch.export is to know it by the same name."""
    name = kind.rpartition(".")[2]
    shown = name if name.isidentifier() else "Output"
    made: Any = namedtuple(shown, fields)  # type: ignore[misc] # its name comes from a file
    if kind not in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        _pytree._register_namedtuple(made, serialized_type_name=kind)  # noqa: SLF001 - the only way that torch.export offers
    return made
