"""Equivalence with a PyTorch model: what it gives in float64, and how a candidate compares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntools.dataflow.guard import unwritten
from bntools.detections import align
from bntools.errors import BNToolsError, InputError, NondeterministicError
from bntools.examples import Examples
from bntools.measuring import Measure
from bntools.modules import (
    duplicate,
    floating_tensors,
    named_modules,
    named_tensors,
    preserved,
)
from bntools.outputs import Outputs, flatten
from bntools.randomness import random_module
from bntools.report import Equivalence
from bntools.runtimes.precision import tf32
from bntools.tolerance import BLIND_FACTOR, EPS_FACTOR, FACTOR, Limit

__all__ = [
    "Comparison",
    "Outputs",
    "Truth",
    "coarsest_of",
    "compare",
    "device_of",
    "dtype_of",
    "find_truth",
    "forward",
    "in_float64",
    "nearly",
    "run",
]

_SAMPLE = 4096


@dataclass(frozen=True)
class Truth:
    """What the reference gives: in float64 (or in its own dtype, where it cannot), and natively.

    `layers` are samples of what some of its layers give in float64. `note` says why there is no
    float64 truth, or how it was found.
    """

    exact: Outputs
    native: Outputs
    layers: Outputs
    native_layers: Outputs
    dtype: torch.dtype
    coarsest: torch.dtype
    is_float64: bool
    double: nn.Module | None = None
    note: str = ""
    measured_in: torch.dtype | None = None

    @property
    def measured(self) -> torch.dtype:
        """The arithmetic in which the reference's own error was measured."""
        return self.measured_in or self.coarsest


def find_truth(
    reference: nn.Module, examples: Examples, *, keep: bool = False, watch: Sequence[str] = ()
) -> Truth:
    """Run the reference natively, twice, and in float64 once; `keep` keeps the float64 copy."""
    dtype, coarsest = dtype_of(reference), coarsest_of(reference)
    native, seen = _natively(reference, examples.cast(dtype, device_of(reference)), watch)
    double = in_float64(reference)
    try:
        exact, layers = run(double, examples.cast(torch.float64, "cpu"), watch=watch)
    except Exception:  # noqa: BLE001 - a dtype or device is hard-coded somewhere in the model
        note = "the reference does not run in float64: no exact truth"
        return Truth(native, native, seen, seen, dtype, coarsest, is_float64=False, note=note)
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
    _widen_plain_tensors(copied, widen)
    return copied


def _widen_plain_tensors(model: nn.Module, widen: Callable[[Tensor], Tensor]) -> None:
    """Those that modules keep without registering them, each once."""
    wide: dict[int, Tensor] = {}
    for _, module in named_modules(model):
        plain = {name: t for name, t in module.__dict__.items() if isinstance(t, Tensor)}
        for name, tensor in plain.items():
            if not tensor.is_meta:
                module.__dict__[name] = wide.setdefault(id(tensor), widen(tensor.detach()))


def _natively(
    reference: nn.Module, examples: Examples, watch: Sequence[str]
) -> tuple[Outputs, Outputs]:
    try:
        outputs, layers = run(reference, examples, watch=watch)
        again, _ = run(reference, examples, seed=1)
    except BNToolsError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"Cannot run the reference on {examples}: {type(error).__name__}: {why}."
            " Give inputs that it accepts."
        ) from error
    check_repeats(outputs, again, "the reference", reference, examples)
    return outputs, layers


def check_repeats(
    first: Outputs, again: Outputs, whose: str, model: nn.Module | None, examples: Examples
) -> None:
    """Refuse a model of which two forwards differ; a module that draws is named.

    Raises `NondeterministicError`.
    """
    for name, tensor in first.items():
        other = again.get(name)
        if other is not None and other.shape == tensor.shape and nearly(tensor, other):
            continue
        guilty = "" if model is None else random_module(model, _seeded(model, examples))
        where = f": {guilty} draws random numbers" if guilty else ""
        raise NondeterministicError(
            f"Cannot judge {name}: two forwards of {whose} on the same input differ{where}, so"
            " equality means nothing. Turn off what draws random numbers (dropout, stochastic"
            " depth, sampling), as model.eval() does."
        )


def _seeded(model: nn.Module, examples: Examples) -> Any:
    return lambda seed: forward(model, examples, seed=seed)


def nearly(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by no more than the order of additions explains."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.abs().nan_to_num(0.0).max()) if a.numel() else 0.0
    most = 1000 * torch.finfo(a.dtype).eps * scale
    return torch.allclose(a.double(), b.double(), rtol=0, atol=most, equal_nan=True)


def compare(
    truth: Truth, outputs: Mapping[str, Tensor], *, inputs: str = "", allowed: float | None = None
) -> Equivalence:
    """Judge outputs against the truth; `allowed` is a limit in place of the one that follows."""
    comparison = Comparison(allowed=allowed)
    comparison.add(truth, outputs)
    return comparison.result(inputs)


@dataclass
class Comparison:
    """Judges a candidate over any number of batches, each with its own truth.

    `eps` is one rounding of the arithmetic that the candidate runs in, where that is coarser than
    its dtypes tell; `coarser` how many times coarser than that of the reference's own error.
    """

    allowed: float | None = None
    eps: float = 0.0
    coarser: float = 1.0
    _measures: dict[str, Measure] = field(default_factory=dict)
    _truth: Truth | None = None

    def add(self, truth: Truth, outputs: Mapping[str, Tensor]) -> None:
        """One batch."""
        self._truth = self._truth if self._truth and not self._truth.is_float64 else truth
        limit = self._limit(truth)
        nothing = torch.empty(0, device="cpu")
        rows = align(truth.exact, truth.native, outputs, eps=limit.eps)
        for name, (own, mine) in rows.odd.items():
            strict = replace(limit, share=0.0)
            measure = self._measures.setdefault(name, Measure(name, strict))
            measure.add(torch.zeros_like(own), own, mine)
        for name in dict.fromkeys((*rows.exact, *rows.given)):
            classes = name not in rows.paired
            self._measures.setdefault(name, Measure(name, limit, classes=classes)).add(
                rows.exact.get(name, nothing),
                rows.native.get(name, nothing),
                rows.given.get(name, nothing),
            )

    def _limit(self, truth: Truth) -> Limit:
        eps = max(self.eps, torch.finfo(truth.coarsest).eps)
        allowed = self.allowed
        if allowed is None and not truth.is_float64:
            allowed = BLIND_FACTOR * eps
        return Limit(eps, allowed, self.coarser)

    def result(self, inputs: str = "", notes: Sequence[str] = ()) -> Equivalence:
        """The judgement over all batches."""
        truth = self._truth
        if truth is None:
            return Equivalence((), "none", "none", FACTOR, EPS_FACTOR, inputs)
        told = [truth.note] if truth.note else []
        return Equivalence(
            tuple(measure.result() for measure in self._measures.values()),
            truth="float64" if truth.is_float64 else _name(truth.dtype),
            dtype=_name(truth.dtype),
            factor=FACTOR,
            eps_factor=EPS_FACTOR if truth.is_float64 else BLIND_FACTOR,
            inputs=inputs,
            notes=(*told, *notes),
            absolute=self.allowed is not None or not truth.is_float64,
        )


def run(
    model: nn.Module,
    examples: Examples,
    *,
    seed: int = 0,
    watch: Sequence[str] = (),
    allow_tf32: bool = False,
) -> tuple[Outputs, Outputs]:
    """One forward in eval mode that leaves no trace: the outputs by name, and layers by path.

    For each module in `watch` a sample of at most 4096 evenly spaced values is kept per call.
    """
    layers: dict[str, list[Tensor]] = {}
    with _watching(model, watch, layers):
        out = forward(model, examples, seed=seed, allow_tf32=allow_tf32)
    return flatten(out), {path: torch.cat(calls) for path, calls in layers.items()}


def forward(
    model: nn.Module, examples: Examples, *, seed: int = 0, allow_tf32: bool = False
) -> Any:
    """What one forward in eval mode gives, with every trace of it undone."""
    on_gpu = device_of(model).type == "cuda"
    precision = tf32(allow_tf32) if on_gpu else nullcontext()
    with preserved(model), unwritten(model), torch.no_grad(), precision:
        _seed(seed)
        if model.training:
            model.eval()
        fed = examples.copied()
        return model(*fed.args, **fed.kwargs)


@contextmanager
def _watching(
    model: nn.Module, paths: Sequence[str], seen: dict[str, list[Tensor]]
) -> Iterator[None]:
    handles = []
    wanted = set(paths)
    for path, module in named_modules(model) if paths else ():
        if path in wanted:

            def keep(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
                seen.setdefault(path, []).extend(map(_sample, flatten(out).values()))

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


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating tensor, which says what inputs have."""
    return next((t.dtype for t in floating_tensors(model)), torch.float32)


def coarsest_of(model: nn.Module) -> torch.dtype:
    """The coarsest floating dtype in a model."""
    floats = (tensor.dtype for tensor in floating_tensors(model))
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is."""
    return next((t.device for *_, t in named_tensors(model)), torch.device("cpu"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
