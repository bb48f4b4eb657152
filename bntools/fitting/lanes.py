"""Forwards that can be paused inside of a layer: each in a thread of its own, one at a time.

A lane is a coroutine: its thread runs only while `advance` waits for it, so that there is one order
of events and no race. All kernels run in the thread of the caller: OpenMP and cuBLAS keep a pool
of workers and memory for every thread that uses them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from bntools.dataflow.guard import Watch
from bntools.examples import Examples

__all__ = ["Finished", "Kernel", "Lane", "Stop", "stopping"]

Kernel = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Carries out an operation: (operation, arguments, keyword arguments)."""

_running = threading.local()


@dataclass(frozen=True, eq=False)
class Stop:
    """A lane has come to a layer: which one, for the how-many-th time (from 0), and its inputs."""

    layer: str
    call: int
    inputs: Examples


@dataclass(frozen=True, eq=False)
class Finished:
    """A lane has come to its end, with what the forward returned."""

    value: Any


@dataclass(frozen=True, eq=False)
class _Operation:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: tuple[Any, Any]
    """The dispatch keys of the lane's thread: autograd, for one, has already had its turn."""


@dataclass(frozen=True, eq=False)
class _Raised:
    error: BaseException


class _Closed(BaseException):
    """Ends a lane's forward; no Exception, so that no model code swallows it."""


class Lane:
    """One forward, which stops at every layer that is `stopping`.

    `kernel` carries out each operation, in the thread that calls `advance`. Whoever makes a lane
    closes it: its thread waits until then.
    """

    def __init__(self, forward: Callable[[], Any], kernel: Kernel) -> None:
        self._forward = forward
        self._kernel = kernel
        self._from: SimpleQueue[Any] = SimpleQueue()
        self._to: SimpleQueue[Any] = SimpleQueue()
        self._calls: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._closing = False

    def advance(self) -> Stop | Finished:
        """Run to the next stop, or to the end; raises what the forward raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="bntools lane", daemon=True)
            self._thread.start()
        else:
            self._to.put(None)
        while True:
            message = self._from.get()
            if isinstance(message, _Operation):
                self._to.put(self._carried_out(message))
                continue
            if isinstance(message, _Raised):
                raise message.error
            if not isinstance(message, (Stop, Finished)):
                raise TypeError(message)
            return message

    def close(self) -> None:
        """End the forward where it stands, and its thread."""
        if self._thread is None:
            return
        self._closing = True
        self._to.put(_Raised(_Closed()))
        self._thread.join()

    def stop(self, layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called in the lane's thread: hand the inputs of a layer over, and wait."""
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        self._exchange(Stop(layer, call, Examples(args, kwargs)))

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in the lane's thread: have an operation carried out."""
        if self._closing:  # clean-up code of the model
            return function(*args, **kwargs)
        return self._exchange(_Operation(function, args, kwargs, _dispatch_keys()))

    def _carried_out(self, operation: _Operation) -> Any:
        try:
            with torch._C._ForceDispatchKeyGuard(*operation.keys):  # noqa: SLF001
                return self._kernel(operation.function, operation.args, operation.kwargs)
        except Exception as error:  # noqa: BLE001 - it belongs to the model, which may catch it
            return _Raised(error)

    def _exchange(self, message: Any) -> Any:
        if self._closing:
            raise _Closed
        self._from.put(message)
        del message
        answer = self._to.get()
        if isinstance(answer, _Raised):
            raise answer.error
        return answer

    def _run(self) -> None:
        _running.lane = self
        try:
            with torch.no_grad(), _Handover(self):
                message: Any = Finished(self._forward())
        except BaseException as error:  # noqa: BLE001 - it is raised where the lane is advanced
            message = _Raised(error)
        self._from.put(message)


class _Handover(Watch):  # type: ignore[no-untyped-call]
    """Hands every operation of a lane over."""

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self.lane = lane

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.lane.call(func, tuple(args), kwargs or {})


def _dispatch_keys() -> tuple[Any, Any]:
    state = torch._C  # noqa: SLF001 - what a dispatch mode is left with has no public name
    return state._dispatch_tls_local_include_set(), state._dispatch_tls_local_exclude_set()  # noqa: SLF001


@contextmanager
def stopping(layers: dict[str, nn.Module]) -> Iterator[None]:
    """Lanes stop where they call one of these modules, by `module(x)` or `module.forward(x)`."""
    held = {name: module.__dict__.get("forward") for name, module in layers.items()}
    try:
        for name, module in layers.items():
            module.__dict__["forward"] = _stopping_forward(name, module.forward)
        yield
    finally:
        for name, module in layers.items():
            if held[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = held[name]


def _stopping_forward(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stop_and_forward(*args: Any, **kwargs: Any) -> Any:
        lane = getattr(_running, "lane", None)
        if isinstance(lane, Lane):
            lane.stop(name, args, kwargs)
        return forward(*args, **kwargs)

    return stop_and_forward
