"""Keeping parameters and buffers as they are while a model runs that may write to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bntools.dataflow.operations import operation
from bntools.modules import loose_tensors, named_tensors

__all__ = ["Guard", "Watch", "rounding", "storage_key", "untouched", "unwritten"]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode without dynamo, which torch would import at the first operation (1 s)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Guard:
    """Copies a parameter or buffer before its first write, and gives it its contents back."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held: dict[int, list[Tensor]] = {}
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}
        """The same memory seen as it was, as a forward may transpose or resize the tensor."""
        for tensor in tensors:
            key = storage_key(tensor)
            if key is not None:
                self._held.setdefault(key, []).append(tensor)

    def keep(self, written: Sequence[Tensor]) -> None:
        """Before a write: copy whatever lies on the same storage."""
        for tensor in written:
            key = storage_key(tensor)
            for held in self._held.get(key, ()) if key is not None else ():
                if id(held) not in self._originals:
                    same = held.detach()
                    self._originals[id(held)] = (same, same.clone())

    def restore(self) -> None:
        """Undo the writes."""
        with torch.no_grad(), _disable_current_modes():
            for tensor, content in self._originals.values():
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(content)


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Whatever operations write to parameters and buffers inside is undone at the end."""
    guard = Guard((*(tensor for *_, tensor in named_tensors(model)), *loose_tensors(model)))
    try:
        with _Writes(guard):
            yield
    finally:
        guard.restore()


@contextmanager
def untouched(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of the model's parameters and buffers that operations inside use."""
    names: dict[int, str] = {}
    for path, _, name, tensor in named_tensors(model):
        key = storage_key(tensor)
        if key is not None and tensor.numel():
            names.setdefault(key, f"{path}.{name}" if path else name)
    used: dict[str, None] = {}
    result: list[str] = []
    with _Uses(names, used):
        yield result
    result.extend(used)


class _Uses(Watch):  # type: ignore[no-untyped-call]
    """Notes which of some tensors operations use."""

    def __init__(self, names: dict[int, str], used: dict[str, None]) -> None:
        super().__init__()
        self.names = names
        self.used = used

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for arg in args:
            for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(tensor, Tensor):
                    name = self.names.get(storage_key(tensor) or 0)
                    if name is not None:
                        self.used[name] = None
        return func(*args, **(kwargs or {}))


@contextmanager
def rounding() -> Iterator[list[str]]:
    """Collects the names of operations inside that round float64 numbers to a smaller dtype."""
    found: list[str] = []
    with _Rounding(found):
        yield found


class _Rounding(Watch):  # type: ignore[no-untyped-call]
    """Notes casts from float64."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        dtype = (kwargs or {}).get("dtype")
        first = args[0] if args else None
        narrower = dtype is not None and dtype.is_floating_point and dtype != torch.float64
        if narrower and isinstance(first, Tensor) and first.dtype == torch.float64:
            self.found.append(operation(func).name)
        return func(*args, **(kwargs or {}))


class _Writes(Watch):  # type: ignore[no-untyped-call]
    """Tells a guard of every write."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = list(operation(func).written(args, kwargs))
        if written:
            self.guard.keep(written)
        return func(*args, **kwargs)


def storage_key(tensor: Tensor) -> int | None:
    """What identifies a tensor's memory while it lives; None for tensors without a storage.

    That is its address, as dlpack and NumPy put another storage object on the same memory.
    """
    try:
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - a recorder is not to see this
            storage = tensor.untyped_storage()
            return storage.data_ptr() or int(storage._cdata)  # noqa: SLF001 - empty: no address
    except (NotImplementedError, RuntimeError):  # sparse tensors
        return None
