"""Equivalence of two models, judged against float64 truth."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bntools.dataflow.guard import unwritten
from bntools.errors import InputError, NondeterministicError
from bntools.examples import Examples, given
from bntools.modules import (
    duplicate,
    floating_tensors,
    named_modules,
    named_tensors,
    preserved,
    unwrap,
)
from bntools.report import Equivalence
from bntools.tolerance import BLIND_FACTOR, EPS_FACTOR, FACTOR, judge

__all__ = ["Outputs", "Truth", "compare", "find_truth", "in_float64", "run", "verify"]

Outputs = dict[str, Tensor]
_SAMPLE = 4096


def verify(reference: nn.Module, candidate: nn.Module, inputs: Any) -> Equivalence:
    """Judge whether two models in eval mode give the same outputs.

    The truth is the reference in float64 on the CPU; the candidate's relative L2 error may be
    `max(4 * the reference's own error, 8 * eps of the dtype)`. `inputs` is a tensor, a tuple of
    positional arguments or a dict of keyword arguments. The answer is falsy where the models
    differ; a NaN, another shape, or nothing to compare is never a pass.

    Raises `InputError` where the reference does not run on the inputs, `NondeterministicError`
    where two of its forwards differ.

    Example:
        >>> import copy, torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)).eval()
        >>> other = copy.deepcopy(model)
        >>> x = torch.ones(3, 4)
        >>> bool(bntools.verify(model, other, x))
        True
        >>> _ = other[1].running_mean.add_(0.001)
        >>> bool(bntools.verify(model, other, x))
        False
    """
    examples = given(inputs)
    reference, candidate = unwrap(reference), unwrap(candidate)
    truth = find_truth(reference, examples)
    outputs, _ = run(candidate, examples.cast(_dtype(candidate), _device(candidate)))
    return compare(truth, outputs, inputs=str(examples))


@dataclass(frozen=True)
class Truth:
    """What the reference gives: in float64 (or in its own dtype, where it cannot), and natively.

    `layers` are samples of what some of its layers give in float64.
    """

    exact: Outputs
    native: Outputs
    layers: Outputs
    native_layers: Outputs
    dtype: torch.dtype
    coarsest: torch.dtype
    is_float64: bool
    double: nn.Module | None = None


def find_truth(
    reference: nn.Module, examples: Examples, *, keep: bool = False, watch: Sequence[str] = ()
) -> Truth:
    """Run the reference natively, twice, and in float64 once; `keep` keeps the float64 copy."""
    dtype, coarsest = _dtype(reference), _coarsest(reference)
    native, seen = _natively(reference, examples.cast(dtype, _device(reference)), watch)
    double = in_float64(reference)
    try:
        exact, layers = run(double, examples.cast(torch.float64, "cpu"), watch=watch)
    except Exception:  # noqa: BLE001 - a dtype or device is hard-coded somewhere in the model
        return Truth(native, native, seen, seen, dtype, coarsest, is_float64=False)
    kept = double if keep else None
    return Truth(exact, native, layers, seen, dtype, coarsest, is_float64=True, double=kept)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of a model in float64 (complex numbers in complex128) on the CPU."""

    def widen(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to("cpu", torch.complex128)
        return tensor.to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)

    copied = duplicate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripted modules look at .grad of what is no leaf
        # what .to() does, but that drops imaginary parts
        copied._apply(widen)  # type: ignore[no-untyped-call]  # noqa: SLF001
    return copied


def _natively(
    reference: nn.Module, examples: Examples, watch: Sequence[str]
) -> tuple[Outputs, Outputs]:
    try:
        outputs, layers = run(reference, examples, watch=watch)
        again, _ = run(reference, examples, seed=1)
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"Cannot run the reference on {examples}: {type(error).__name__}: {why}."
            " Give inputs that it accepts."
        ) from error
    for name, tensor in outputs.items():
        other = again.get(name)
        if other is None or other.shape != tensor.shape or not _nearly(tensor, other):
            raise NondeterministicError(
                f"Cannot judge {name}: two forwards of the reference on the same input differ, so"
                " equality means nothing. Turn off what draws random numbers (dropout, sampling)."
            )
    return outputs, layers


def _nearly(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.abs().nan_to_num(0.0).max()) if a.numel() else 0.0
    most = 1000 * torch.finfo(a.dtype).eps * scale
    return torch.allclose(a.double(), b.double(), rtol=0, atol=most, equal_nan=True)


def compare(
    truth: Truth, outputs: Mapping[str, Tensor], *, inputs: str = "", allowed: float | None = None
) -> Equivalence:
    """Judge outputs against the truth; `allowed` is a limit in place of the one that follows."""
    absolute = allowed is not None or not truth.is_float64
    if allowed is None and not truth.is_float64:
        allowed = BLIND_FACTOR * torch.finfo(truth.coarsest).eps
    names = dict.fromkeys((*truth.exact, *outputs))
    nothing = torch.empty(0, device="cpu")
    judged = tuple(
        judge(
            name,
            truth.exact.get(name, nothing),
            truth.native.get(name, nothing),
            outputs.get(name, nothing),
            dtype=truth.coarsest,
            allowed=allowed,
        )
        for name in names
    )
    notes = () if truth.is_float64 else ("the reference does not run in float64: no exact truth",)
    return Equivalence(
        judged,
        truth="float64" if truth.is_float64 else _name(truth.dtype),
        dtype=_name(truth.dtype),
        factor=FACTOR,
        eps_factor=EPS_FACTOR if truth.is_float64 else BLIND_FACTOR,
        inputs=inputs,
        notes=notes,
        absolute=absolute,
    )


def run(
    model: nn.Module, examples: Examples, *, seed: int = 0, watch: Sequence[str] = ()
) -> tuple[Outputs, Outputs]:
    """One forward in eval mode that leaves no trace: the outputs by name, and layers by path.

    For each module in `watch` a sample of at most 4096 evenly spaced values is kept per call.
    """
    layers: dict[str, list[Tensor]] = {}
    with preserved(model), unwritten(model), torch.no_grad(), _watching(model, watch, layers):
        _seed(seed)
        if model.training:
            model.eval()
        fed = examples.copied()
        out = model(*fed.args, **fed.kwargs)
    return dict(_named("output", out)), {path: torch.cat(calls) for path, calls in layers.items()}


@contextmanager
def _watching(
    model: nn.Module, paths: Sequence[str], seen: dict[str, list[Tensor]]
) -> Iterator[None]:
    handles = []
    wanted = set(paths)
    for path, module in named_modules(model) if paths else ():
        if path in wanted:

            def keep(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
                seen.setdefault(path, []).extend(_sample(t) for _, t in _named("", out))

            handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seed(seed: int) -> None:
    """Seed the generators that are in use; seeding CUDA before its start would not be undone."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def _sample(tensor: Tensor) -> Tensor:
    values = tensor.reshape(-1)
    return values[:: max(1, values.numel() // _SAMPLE)][:_SAMPLE].to("cpu", copy=True)


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers in an output; anything else is nothing that could be compared."""
    if isinstance(value, Tensor):
        yield name, _plain(value.detach())
    elif isinstance(value, (bool, int, float, complex)):
        yield name, _plain(torch.tensor(value, device="cpu"))
    elif isinstance(value, str):
        codes = [ord(letter) for letter in value] or [0]
        yield name, torch.tensor(codes, device="cpu")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            # repr tells 1 from "1", and "a.b" from b in a
            plain = isinstance(key, str) and key.isidentifier()
            yield from _named(f"{name}.{key}" if plain else f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _named(f"{name}[{index}]", item)
    else:
        for attribute in _attributes(value):
            yield from _named(f"{name}.{attribute}", getattr(value, attribute, None))


def _attributes(value: Any) -> list[str]:
    """What an object holds: in its dict, and in the slots of its classes."""
    if value is None or isinstance(value, type) or callable(value):
        return []
    slots = (getattr(cls, "__slots__", ()) for cls in type(value).__mro__)
    named = [s for each in slots for s in ([each] if isinstance(each, str) else each)]
    return [n for n in (*getattr(value, "__dict__", {}), *named) if not n.startswith("__")]


def _plain(tensor: Tensor) -> Tensor:
    """A dense tensor of ordinary numbers."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _dtype(model: nn.Module) -> torch.dtype:
    return next((t.dtype for t in floating_tensors(model)), torch.float32)


def _coarsest(model: nn.Module) -> torch.dtype:
    floats = (tensor.dtype for tensor in floating_tensors(model))
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _device(model: nn.Module) -> torch.device:
    return next((t.device for *_, t in named_tensors(model)), torch.device("cpu"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
