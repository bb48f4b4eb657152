"""Versions of tensors: which value a tensor holds now, and which tensors share its memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from bntools.dataflow.graph import Value
from bntools.dataflow.guard import storage_key
from bntools.dataflow.layers import Ownership

__all__ = ["Versions"]


class Versions:
    """The current `Value` of every live tensor, keyed weakly, and its aliases.

    Ids are reused after collection and holding activations costs memory, hence weak keys. A live
    alias is another tensor on the same storage.
    """

    def __init__(self, owners: Ownership) -> None:
        self._owners = owners
        self._values: dict[int, tuple[TensorWeakRef, Value]] = {}
        self._aliases: dict[int, list[TensorWeakRef]] = {}
        self.parameters: dict[str, Value] = {}
        for name, tensor in owners.tensors.items():
            value = Value(tuple(tensor.shape), constant=True, parameter=name)
            self.parameters[name] = value
            self.bind(tensor, value)

    def get(self, tensor: Tensor) -> Value | None:
        """The current version of a tensor, or None for a tensor never seen."""
        entry = self._values.get(id(tensor))
        return entry[1] if entry is not None and entry[0].ref() is tensor else None

    def bind(self, tensor: Tensor, value: Value) -> None:
        """Make a value the current version of a tensor."""
        entry = self._values.get(id(tensor))
        if entry is not None and entry[0].ref() is tensor:
            self._values[id(tensor)] = (entry[0], value)
            return
        self._values[id(tensor)] = (TensorWeakRef(tensor), value)
        self.moved(tensor)

    def moved(self, tensor: Tensor) -> None:
        """Note on which memory a known tensor lies now."""
        key = storage_key(tensor)
        if key is not None:
            self._aliases.setdefault(key, []).append(self._values[id(tensor)][0])

    def aliases(self, tensor: Tensor) -> list[Tensor]:
        """The other live tensors on the same storage."""
        key = storage_key(tensor)
        if key is None or key not in self._aliases:
            return []
        live = [(reference, reference()) for reference in self._aliases[key]]
        # storage addresses are reused: what no longer lies on this one is an older tensor
        live = [(r, alias) for r, alias in live if alias is not None and storage_key(alias) == key]
        self._aliases[key] = [reference for reference, _ in live]
        return [alias for _, alias in live if alias is not tensor]

    def parameter_name(self, tensor: Tensor) -> str | None:
        """The name of the parameter or buffer that a tensor object is."""
        return self._owners.names.get(id(tensor))

    def survivors(self) -> Iterator[Value]:
        """What operations made and is still alive; parameters, buffers and inputs left out."""
        for reference, value in self._values.values():
            if value.producer is not None:
                tensor = reference()
                if tensor is not None and self.parameter_name(tensor) is None:
                    yield value
