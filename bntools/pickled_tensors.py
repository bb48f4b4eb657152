"""The tensors that a pickle describes: they have to lie inside what the file holds for them."""

from __future__ import annotations

import math
from typing import Any

import torch

from bntools.placeholders import Arguments, Global, Sequenced, Stored
from bntools.trust import Refusal

__all__ = ["item_size", "repeated_bytes", "stored"]

_WITH_STORAGE = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
_NESTED = "torch._tensor._rebuild_from_type_v2"
_DTYPE_PLACE = 6


def repeated_bytes(function: str, arguments: Arguments) -> int:
    """The bytes that a tensor has only because it shows the same ones again (`Tensor.expand`).

    Zero for calls that rebuild no tensor. Raises Refusal where a tensor reaches out of its storage:
    torch would make the storage larger.
    """
    if function == _NESTED:
        inner = arguments[2] if len(arguments) == 4 else None
        if not isinstance(inner, Sequenced) or not isinstance(arguments[0], Global):
            raise Refusal("it rebuilds a tensor in a way that torch.save does not write")
        return repeated_bytes(arguments[0].name, inner.items)
    if function not in _WITH_STORAGE:
        return 0
    storage = arguments[0] if len(arguments) >= _WITH_STORAGE[function] else None
    if not isinstance(storage, Stored):
        raise Refusal("it rebuilds a tensor from something that is no storage")
    offset, sizes, strides = arguments[1], _whole(arguments[2]), _whole(arguments[3])
    if len(sizes) != len(strides) or not _is_count(offset):
        raise _out_of_bounds()
    size = storage.item_size
    if function.endswith("_v3"):
        kind = arguments[_DTYPE_PLACE]
        size = item_size(kind.name) if isinstance(kind, Global) else 1
    reach = 0
    if 0 not in sizes:
        reach = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if reach and (offset + reach) * size > storage.size:
        raise _out_of_bounds()
    return max(0, math.prod(sizes) - reach) * size


def stored(kind: str, items: Arguments) -> tuple[str, int, Stored]:
    """The key of a storage in the file, its bytes there, and what a tensor gets of them.

    `items` is a persistent id: "storage", the class, the key, the device, the number of items and,
    in files from before torch 1.6, which part of them.
    """
    key, count = items[2], items[4]
    if not isinstance(key, str) or not _is_count(count):
        raise Refusal("it has a tensor storage without a valid size")
    size = item_size(kind)
    shown = count
    if len(items) > 5 and items[5] is not None:
        view = items[5].items if isinstance(items[5], Sequenced) else ()
        if len(view) != 3 or not _is_count(view[1]) or not _is_count(view[2]):
            raise Refusal("it has a part of a tensor storage without a valid size")
        shown = max(0, min(view[2], count - view[1]))
    return key, count * size, Stored(shown * size, size)


def item_size(name: str) -> int:
    """The bytes of one item of a storage class or dtype, by its full name."""
    found = getattr(torch, name.rpartition(".")[2], None)
    dtype = found if isinstance(found, torch.dtype) else getattr(found, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 1


def _whole(value: Any) -> tuple[int, ...]:
    items = value.items if isinstance(value, Sequenced) else None
    if items is None or not all(_is_count(item) for item in items):
        raise _out_of_bounds()
    return items


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _out_of_bounds() -> Refusal:
    return Refusal("it is damaged: a tensor in it reaches out of what the file holds for it")
