"""What paused forwards hold in memory: counted, and beyond a budget put on disk."""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bntools.errors import FitError

__all__ = ["Held", "Spill"]


class Held:
    """The activations that one forward has made and still holds.

    Only memory that its own operations made counts: views of parameters, buffers or of what came
    from outside do not.
    """

    def __init__(self) -> None:
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self.file: Path | None = None
        self.saved: list[tuple[torch.UntypedStorage, int]] = []
        """What the file has, in its order; valid until the forward goes on."""
        self.away = False

    def note(self, inputs: Iterator[Tensor], outputs: Iterator[Tensor]) -> None:
        """After an operation: its outputs are ours unless they lie on memory that is not."""
        origins = {key: self._has_made(t) for t in inputs if (key := _key(t)) is not None}
        for tensor in outputs:
            key = _key(tensor)
            if key is not None and origins.get(key, True):
                self._made[id(tensor)] = weakref.ref(tensor)

    def storages(self) -> dict[int, torch.UntypedStorage]:
        """The memory that is held now."""
        alive = {i: ref for i, ref in self._made.items() if ref() is not None}
        self._made = alive
        found = {}
        for ref in alive.values():
            tensor = ref()
            if tensor is not None:
                storage = tensor.untyped_storage()
                found[_name(storage)] = storage
        return found

    def _has_made(self, tensor: Tensor) -> bool:
        ref = self._made.get(id(tensor))
        return ref is not None and ref() is tensor


class Spill:
    """Keeps what paused forwards hold within a budget in bytes; the rest lies in a folder.

    `peak` is the most that was held in memory, `written` what went to disk in all.
    """

    def __init__(self, budget: int, folder: Path | None) -> None:
        self.budget = budget
        self.peak = 0
        self.written = 0
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._sizes: dict[Held, int] = {}
        self._away: dict[int, Held] = {}

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sizes.clear()
        self._away.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    def kernel(self, held: Held, before: Callable[..., None]) -> Callable[..., Any]:
        """Carries operations of a forward out, and notes what they make.

        `before` is told of each operation first.
        """

        def carry_out(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._away:  # a cache that models share may have made something of another's
                self._fetch_for(args, kwargs)
            before(function, args, kwargs)
            held.saved = []
            result = function(*args, **kwargs)
            held.note(_tensors((args, tuple(kwargs.values()))), _tensors(result))
            return result

        return carry_out

    def settle(self, held: Held) -> None:
        """After a pause: count what is held, and put it away where it exceeds the budget."""
        if held.away:
            return
        storages = held.storages()
        size = sum(storage.nbytes() for storage in storages.values())
        self._sizes[held] = size
        total = sum(self._sizes.values())
        self.peak = max(self.peak, total)
        if total > self.budget:
            self._put_away(held, storages)

    def fetch(self, held: Held) -> None:
        """Before going on: everything back into memory."""
        if not held.away or held.file is None:
            return
        with held.file.open("rb") as file, _disable_current_modes():
            for storage, size in held.saved:
                storage.resize_(size)
                staged = storage if storage.device.type == "cpu" else _empty(size)
                file.readinto(_memory(staged))
                if staged is not storage:
                    storage.copy_(staged, False)
                self._away.pop(_name(storage), None)
        held.away = False
        self._sizes[held] += sum(size for _, size in held.saved)
        self.peak = max(self.peak, sum(self._sizes.values()))

    def forget(self, held: Held) -> None:
        """A forward is over."""
        self._sizes.pop(held, None)
        if held.file is not None:
            with suppress(OSError):
                held.file.unlink(missing_ok=True)

    def _put_away(self, held: Held, storages: dict[int, torch.UntypedStorage]) -> None:
        if not held.saved:
            held.saved = [
                (s, s.nbytes()) for s in storages.values() if s.nbytes() and s.resizable()
            ]
            self._write(held)
        for storage, size in held.saved:
            self._away[_name(storage)] = held
            storage.resize_(0)
            self._sizes[held] -= size
        held.away = bool(held.saved)

    def _write(self, held: Held) -> None:
        if held.file is None:
            held.file = self._place() / f"{id(held):x}"
        try:
            with held.file.open("wb") as file, _disable_current_modes():
                for storage, size in held.saved:
                    file.write(_memory(_on_cpu(storage)))
                    self.written += size
        except OSError as error:
            held.saved = []
            raise FitError(
                f"Cannot put activations away in {held.file.parent}: {error.strerror}. Raise"
                " cache_bytes, give another cache_dir, or fit on fewer samples."
            ) from error

    def _place(self) -> Path:
        if self._temporary is None:
            try:
                self._temporary = tempfile.TemporaryDirectory(
                    prefix="bntools-fit-", dir=self._folder
                )
            except OSError as error:
                raise FitError(
                    f"Cannot put activations away in {self._folder}: {error.strerror}. Give another"
                    " cache_dir, or raise cache_bytes."
                ) from error
        return Path(self._temporary.name)

    def _fetch_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in _tensors((args, tuple(kwargs.values()))):
            key = _key(tensor)
            owner = self._away.get(key) if key is not None else None
            if owner is not None:
                self.fetch(owner)


def _on_cpu(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    if storage.device.type == "cpu":
        return storage
    return _empty(storage.nbytes()).copy_(storage, False)


def _empty(size: int) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()


def _memory(storage: torch.UntypedStorage) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a storage; `numpy()` would do, but then torch never resizes it again."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _name(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001 - an address of memory is not one: it may be empty


def _key(tensor: Tensor) -> int | None:
    try:
        return _name(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors
        return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
