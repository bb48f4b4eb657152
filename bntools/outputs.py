"""What a forward gives, however nested, as named tensors in a fixed order."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, MappingView, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import InputError

__all__ = ["Outputs", "flatten", "tensors", "tensors_only"]

Outputs = dict[str, Tensor]


def flatten(value: Any, name: str = "output") -> Outputs:
    """The tensors, numbers and texts in an output, by names such as "output.boxes[0]".

    Dicts are entered in their order, objects by their attributes. Numbers become tensors, and
    texts the codes of their letters. Raises `InputError` for a value that contains itself, and for
    one that cannot be compared: an iterator, a set of tensors.
    """
    return dict(_entered(name, value, ()))


def tensors_only(value: Any, name: str = "output") -> list[str]:
    """The names of those outputs that are tensors: what an exporter keeps."""
    return list(tensors(value, name))


def tensors(value: Any, name: str = "output") -> Outputs:
    """Those outputs that are tensors: what an exporter keeps."""
    return dict(_entered(name, value, (), tensors=True))


def _entered(
    name: str, value: Any, above: tuple[int, ...], *, tensors: bool = False
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, _plain(value.detach() if value.requires_grad else value)
    elif isinstance(value, _PLAIN):
        if not tensors:
            yield name, _of_value(value)
    elif type(value).__module__ == "numpy":
        if not tensors:
            yield from _entered(name, _of_numpy(value), above)
    elif id(value) in above:
        raise InputError(
            f"Cannot compare {name}: the output contains itself. Return what is to be compared."
        )
    elif len(above) > _DEEPEST:
        raise InputError(
            f"Cannot compare {name[:60]}...: the output is nested more than {_DEEPEST} deep. Return"
            " what is to be compared."
        )
    else:
        for part, item in _parts(name, value):
            yield from _entered(part, item, (*above, id(value)), tensors=tensors)


_DEEPEST = 200
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
)


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            # repr tells 1 from "1", and "a.b" from b in a
            plain = isinstance(key, str) and key.isidentifier()
            yield f"{name}.{key}" if plain else f"{name}[{key!r}]", item
    elif isinstance(value, (Sequence, MappingView)):
        items: Any = value
        for index, item in enumerate(items):
            yield f"{name}[{index}]", item
    elif isinstance(value, Set):
        if any(not isinstance(item, _PLAIN) for item in value):
            raise _incomparable(name, "a set has no order")
        for index, item in enumerate(sorted(value, key=repr)):
            yield f"{name}[{index}]", item
    elif isinstance(value, Iterator):
        raise _incomparable(name, "an iterator can be read only once")
    else:
        for attribute in _attributes(value):
            yield f"{name}.{attribute}", getattr(value, attribute, None)


def _incomparable(name: str, why: str) -> InputError:
    return InputError(f"Cannot compare {name}: {why}. Return a list, a tuple or a dict.")


def _of_value(value: Any) -> Tensor:
    if isinstance(value, (str, bytes, bytearray)):
        letters = map(ord, value) if isinstance(value, str) else value
        return torch.tensor(list(letters) or [0], device="cpu")
    return _plain(torch.tensor(value, device="cpu"))


def _of_numpy(value: Any) -> Any:
    """An array or number of NumPy as a tensor; where it is of something else, as a list."""
    try:
        return torch.from_numpy(value.reshape(value.shape).copy())
    except (AttributeError, TypeError, ValueError):
        return value.tolist() if hasattr(value, "tolist") else None


def _attributes(value: Any) -> list[str]:
    """What an object holds: in its dict, and in the slots of its classes."""
    if value is None or isinstance(value, _CODE):
        return []
    slots = (getattr(cls, "__slots__", ()) for cls in type(value).__mro__)
    named = [s for each in slots for s in ([each] if isinstance(each, str) else each)]
    return [n for n in (*getattr(value, "__dict__", {}), *named) if not n.startswith("__")]


_CODE = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
    functools.partial, nn.Module,
)  # fmt: skip


def _plain(tensor: Tensor) -> Tensor:
    """A dense tensor of ordinary numbers."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
