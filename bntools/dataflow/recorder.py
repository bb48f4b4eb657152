"""Seeing a model: one real forward becomes a neutral graph.

Every ATen operation of the forward is seen by a `TorchDispatchMode`, whatever Python code, control
flow or scripted helper issued it, and becomes a node. Values are versions of tensors, keyed weakly:
an operation that writes in place gives a new version to what it writes and to every live alias.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bntools.dataflow.graph import Graph
from bntools.dataflow.guard import Guard, Watch
from bntools.dataflow.operations import operation
from bntools.dataflow.tape import Tape, tensors_in
from bntools.modules import loose_tensors, preserved
from bntools.resources import one_thread

__all__ = ["record"]

_SMALL = 1 << 16
_ALONE = threading.RLock()  # what a recording patches and sets is the whole process's
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]

_LEAVING = {
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.__array__: "numpy()",
    torch.Tensor.__dlpack__: "dlpack",
    torch.Tensor.__reduce_ex__: "pickle",
    torch.Tensor.untyped_storage: "untyped_storage()",
    torch.Tensor.storage: "storage()",
    torch.Tensor.data_ptr: "data_ptr()",
}


def record(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    calls: bool = False,
) -> Graph:
    """Run one eval-mode forward and return what it did, with `calls` also what each module gave.

    The model is as it was afterwards: flags, attributes, RNG, and the parameters and buffers that
    an operation wrote. Whatever the forward raises comes through.
    """
    with _ALONE, preserved(model):
        if model.training:
            model.eval()
        tape = Tape(model, calls=calls)
        guard = Guard((*tape.owners.tensors.values(), *loose_tensors(model)))
        small = sum(tensor.numel() for tensor in tensors_in((args, kwargs))) < _SMALL
        with (
            torch.no_grad(),
            _compiled_code_runs_eagerly(),
            one_thread() if small else nullcontext(),
            _watched(tape, guard),
        ):
            for value in tensors_in((args, kwargs)):
                tape.source(value)
            out = model(*args, **(kwargs or {}))
            tape.use("returned", tensors_in(out))
            del out
        return tape.finish()


@contextmanager
def _compiled_code_runs_eagerly() -> Iterator[None]:
    """Compiled submodules would hide their operations; importing dynamo costs seconds."""
    loaded = "torch._dynamo" in sys.modules
    stance: AbstractContextManager[Any] = (
        torch.compiler.set_stance("force_eager") if loaded else nullcontext()
    )
    with stance:
        yield


@contextmanager
def _watched(tape: Tape, guard: Guard) -> Iterator[None]:
    """Feed the tape with every call, function and operation; restore what they wrote."""
    try:
        with _patched_calls(tape), _Functions(tape), _Operations(tape, guard):
            yield
    finally:
        guard.restore()


@contextmanager
def _patched_calls(tape: Tape) -> Iterator[None]:
    """Replace `nn.Module.__call__`, for this thread and the modules of this model only."""
    original = nn.Module.__call__
    thread = threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = tape.owners.paths.get(id(module))
        if path is None or threading.get_ident() != thread:
            return original(module, *args, **kwargs)
        return tape.call(module, path, original, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


class _Functions(TorchFunctionMode):
    """Sees what the dispatcher does not: tensors that become numbers, and some functions whole.

    These are `F.linear` and circular padding.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaving = _LEAVING.get(func)
        if leaving is not None:
            self.tape.use(leaving, [args[0]])
        whole = func is nn.functional.linear or _pads_around(func, args, kwargs)
        plain = all(each is torch.Tensor for each in types)
        if not (whole and plain) or _wrapped((args, kwargs)):
            out = func(*args, **kwargs)
            if func == _SET_DATA:  # a new object on every look-up
                self.tape.overwrite(args[0], args[1])
            return out
        start = self.tape.position
        out = func(*args, **kwargs)
        if func is nn.functional.linear:
            self.tape.linear_function(start, args, kwargs, out)
        else:
            self.tape.circular_pad(start, args[0], args[1], out)
        return out


def _pads_around(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function pads with what is at the other end, which ATen does by writing slices."""
    if func is not nn.functional.pad or len(args) < 2 or not isinstance(args[0], torch.Tensor):
        return False
    return (args[2] if len(args) > 2 else kwargs.get("mode")) == "circular"


def _wrapped(arguments: Any) -> bool:
    """Whether vmap, grad or jvp stands between these tensors and what operations will see."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001 - no public name
    return any(wrapped(tensor) for tensor in tensors_in(arguments))


class _Operations(Watch):  # type: ignore[no-untyped-call]
    """Sees every ATen operation, after composite ones are taken apart."""

    def __init__(self, tape: Tape, guard: Guard) -> None:
        super().__init__()
        self.tape = tape
        self.guard = guard

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            with self:  # composite operations arrive whole in inference mode
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - looking at tensors is no function of the model
            written = list(operation(func).written(args, kwargs))
            if written:
                self.guard.keep(written)
            out = func(*args, **kwargs)
            self.tape.operation(func, args, kwargs, out, written)
        return out
