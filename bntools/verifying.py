"""`verify`: judge a candidate against a reference, wherever they run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from bntools.artifacts import staged
from bntools.batches import Batches, batches_of, first_examples, repeatable
from bntools.depth import compare_layers
from bntools.equivalence import Comparison, Truth, device_of
from bntools.errors import BNToolsError, ExportError, InputError
from bntools.examples import Examples
from bntools.loading import is_onnx, read_model
from bntools.modules import duplicate, unwrap
from bntools.outputs import Outputs
from bntools.report import Equivalence
from bntools.runtimes.devices import torch_device, torch_placement
from bntools.runtimes.exporting import export
from bntools.runtimes.precision import TF32_EPS
from bntools.runtimes.sessions import open_session
from bntools.subjects import OnnxSubject, Subject, TorchSubject, paired

__all__ = ["Reference", "verify"]

Model = nn.Module | str | os.PathLike[str]

_MOST_KEPT = 2 * 2**30
_RUNTIMES = (None, "torch", "onnxruntime")
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def verify(
    reference: Model,
    candidate: Model,
    inputs: Any = None,
    *,
    runtime: str | None = None,
    provider: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_tf32: bool = False,
    per_layer: bool = False,
    seed: int = 0,
) -> Equivalence:
    """Judge whether two models give the same outputs: PyTorch or ONNX, in either order.

    A model is an `nn.Module`, which is judged in eval mode, or the path of a file that `load` reads
    or that is ONNX. The truth is the reference in float64 on the CPU; the candidate's relative L2
    error may be `max(4 * the reference's own error, 8 * eps of the dtype)`, and every sample,
    channel and position has such a limit of its own.

    `inputs` is a tensor, a tuple of positional arguments, a dict of keyword arguments, or an
    iterable of batches such as `read_data` gives; by default random ones of several batch sizes
    are drawn from `seed`. `runtime="onnxruntime"` exports a PyTorch candidate first. `provider` is
    "cpu", "cuda" or "auto"; by default PyTorch models run where they are, and ONNX models on the
    CPU. With "cuda" nothing runs elsewhere: that is an error. `dtype` judges the candidate in
    that precision, to which a PyTorch candidate is cast. `per_layer` also compares the layers.

    The answer is falsy where the models differ; a NaN, another shape, or nothing to compare is
    never a pass. Raises `InputError` where a model does not run on the inputs,
    `NondeterministicError` where two forwards differ, `RuntimeUnavailableError` where a runtime or
    device is missing, `LoadError`, and `ExportError`.

    Example:
        >>> import copy, torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)).eval()
        >>> other = copy.deepcopy(model)
        >>> bool(bntools.verify(model, other))
        True
        >>> _ = other[1].running_mean.add_(0.001)
        >>> bool(bntools.verify(model, other, torch.ones(3, 4)))
        False
    """
    return Reference(reference, inputs, seed=seed).judge(
        candidate,
        runtime=runtime,
        provider=provider,
        dtype=dtype,
        allow_tf32=allow_tf32,
        per_layer=per_layer,
    )


@dataclass(frozen=True)
class _How:
    """How a candidate is to run."""

    runtime: str | None
    provider: str | None
    dtype: torch.dtype | None
    allow_tf32: bool


class Reference:
    """A model that any number of candidates are judged against; its truth is found once.

    `inputs` and `seed` are those of `verify`. Up to 2 GiB of outputs are kept.

    Example:
        >>> import copy, torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)).eval()
        >>> reference = bntools.Reference(model)
        >>> [bool(reference.judge(each)) for each in (copy.deepcopy(model), model[0])]
        [True, False]
    """

    def __init__(self, model: Model, inputs: Any = None, *, seed: int = 0) -> None:
        self._subject = _opened(model, _How(None, None, None, allow_tf32=False))
        self._inputs = repeatable(inputs)
        self._seed = seed
        self._batches: Batches | None = None
        self._kept: dict[tuple[int, torch.dtype | None], Truth] = {}
        self._room = _MOST_KEPT
        self.seconds = 0.0
        """What finding the truth has taken."""

    def judge(
        self,
        candidate: Model,
        *,
        runtime: str | None = None,
        provider: str | None = None,
        dtype: str | torch.dtype | None = None,
        allow_tf32: bool = False,
        per_layer: bool = False,
    ) -> Equivalence:
        """Judge a candidate as `verify` does."""
        how = _How(_checked_runtime(runtime), provider, _dtype(dtype), allow_tf32)
        first = None
        if how.runtime == "onnxruntime" and not _is_onnx(candidate):
            first = self._first(None)
        with _candidate(candidate, how, first, self._inputs) as subject:
            _introduce(self._subject, subject)
            judged = self._judged(subject, how)
            if not per_layer:
                return judged
            examples = next(iter(self._all(subject)))
            layers = compare_layers(
                _layered(self._subject),
                _layered(subject),
                examples,
                provider=provider or "cpu",
                allow_tf32=allow_tf32,
            )
            return replace(judged, layers=layers)

    def _first(self, subject: Subject | None) -> Examples | None:
        return first_examples(self._subject, subject, self._inputs)

    def _all(self, subject: Subject) -> Batches:
        """The batches; those that are inferred for the first candidate serve all others."""
        if self._batches is None:
            first = self._first(subject)
            self._batches = batches_of(self._subject, subject, self._inputs, first, self._seed)
        return self._batches

    def _judged(self, subject: Subject, how: _How) -> Equivalence:
        comparison: Comparison | None = None
        batches = self._all(subject)
        count, start, before = 0, time.perf_counter(), self.seconds
        for index, examples in enumerate(batches):
            truth = self._truth(index, examples, how.dtype)
            if comparison is None:
                comparison = _comparison(truth, subject, how)
            outputs = subject.outputs(examples)
            if index == 0:
                subject.check_repeats(examples, outputs)
            comparison.add(*_matched(self._subject, subject, truth, outputs, examples))
            count += 1
        if comparison is None:
            raise InputError("Cannot compare the models: there is no batch. Give some inputs.")
        truth_seconds = self.seconds - before
        judged = comparison.result(batches.described, _remarks(subject, how))
        seconds = {
            "truth": round(truth_seconds, 4),
            "candidate": round(time.perf_counter() - start - truth_seconds, 4),
        }
        return replace(judged, batches=count, placement=subject.placement, seconds=seconds)

    def _truth(self, index: int, examples: Examples, dtype: torch.dtype | None) -> Truth:
        key = index, dtype
        if key in self._kept:
            return self._kept[key]
        plain = self._truth(index, examples, None) if dtype is not None else None
        start = time.perf_counter()
        if plain is None or dtype is None:
            truth = self._subject.truth(examples)
        else:
            truth = _in_dtype(plain, self._subject, examples, dtype)
        self.seconds += time.perf_counter() - start
        size = sum(map(_size, (truth.exact, truth.native)))
        if size <= self._room:
            self._room -= size
            self._kept[key] = truth
        return truth


# ---- candidates ----------------------------------------------------------------------------------


def _opened(model: Model, how: _How) -> Subject:
    """A model as a subject, on the device that was asked for."""
    if _is_onnx(model):
        path = Path(model)
        session = open_session(path, provider=how.provider or "cpu", allow_tf32=how.allow_tf32)
        return OnnxSubject(path, session, str(path))
    if how.runtime == "onnxruntime":
        raise InputError("Cannot run the reference in ONNX Runtime: give an ONNX file.")
    name = "" if isinstance(model, nn.Module) else str(model)
    module = model if isinstance(model, nn.Module) else read_model(model).model
    return TorchSubject(unwrap(module), name)


@contextmanager
def _candidate(model: Model, how: _How, first: Examples | None, inputs: Any) -> Iterator[Subject]:
    if _is_onnx(model) and how.runtime == "torch":
        raise InputError(
            f"Cannot run {model} in PyTorch: it is an ONNX model. Leave out runtime (--runtime)."
        )
    if _is_onnx(model):
        yield _opened(model, how)
        return
    module = model if isinstance(model, nn.Module) else read_model(model).model
    module = unwrap(module)
    if how.dtype is not None:
        module = duplicate(module).to(how.dtype)
    name = "" if isinstance(model, nn.Module) else str(model)
    if how.runtime != "onnxruntime":
        yield _torch_candidate(module, name, how)
        return
    if first is None:
        first = next(iter(batches_of(TorchSubject(module), None, inputs, None, 0)), None)
    with _exported(module, first, how) as subject:
        yield subject


def _torch_candidate(module: nn.Module, name: str, how: _How) -> TorchSubject:
    if how.provider is None:
        return TorchSubject(module, name, allow_tf32=how.allow_tf32)
    device, reason = torch_device(how.provider)
    if device_of(module).type != device.type:
        module = duplicate(module).to(device)
    subject = TorchSubject(module, name, allow_tf32=how.allow_tf32)
    subject.placement = torch_placement(device, allow_tf32=how.allow_tf32, reason=reason)
    return subject


@contextmanager
def _exported(module: nn.Module, first: Examples | None, how: _How) -> Iterator[OnnxSubject]:
    """The candidate as an ONNX model in a temporary file."""
    if first is None:
        raise InputError("Cannot export the candidate: there is no batch. Give some inputs.")
    graph = _graph(module, TorchSubject(module).bound(first))
    with (
        tempfile.TemporaryDirectory() as folder,
        staged(graph, Path(folder) / "candidate.onnx") as artifact,
    ):
        session = open_session(
            artifact.source, provider=how.provider or "cpu", allow_tf32=how.allow_tf32
        )
        yield OnnxSubject(artifact.source, session, "the exported candidate")


def _graph(module: nn.Module, examples: Examples) -> Any:
    """The exported graph, with a free batch where the model has one."""
    wide = examples.doubled() if examples.batch == 1 else examples
    if wide is not None:
        with suppress(ExportError):
            return export(module, wide).graph
    return export(module, examples).graph


def _introduce(reference: Subject, candidate: Subject) -> None:
    """Let a PyTorch model and an ONNX model know each other's input names."""
    for one, other in ((reference, candidate), (candidate, reference)):
        if isinstance(one, OnnxSubject):
            one.by_order = isinstance(other, TorchSubject)
        elif isinstance(other, OnnxSubject):
            one.order = [port.name for port in other.session.inputs]
        else:
            one.order = ()


def _matched(
    one: Subject, other: Subject, truth: Truth, outputs: Outputs, examples: Examples
) -> tuple[Truth, Outputs]:
    """Between PyTorch and ONNX outputs pair by their order, and only tensors count."""
    if isinstance(one, OnnxSubject) and isinstance(other, TorchSubject):
        if len(outputs) != len(truth.exact):
            outputs = {name: outputs[name] for name in other.tensor_names(examples)}
        return truth, paired(outputs, list(truth.exact))
    if isinstance(one, TorchSubject) and isinstance(other, OnnxSubject):
        if len(outputs) != len(truth.exact):
            names = one.tensor_names(examples)
            truth = replace(
                truth,
                exact={name: truth.exact[name] for name in names},
                native={name: truth.native[name] for name in names},
            )
        return truth, paired(outputs, list(truth.exact))
    return truth, outputs


def _layered(subject: Subject) -> nn.Module | Path | bytes:
    """What `compare_layers` takes."""
    if isinstance(subject, OnnxSubject):
        return subject.source
    return subject.model


# ---- precision -----------------------------------------------------------------------------------


def _comparison(truth: Truth, subject: Subject, how: _How) -> Comparison:
    """The limits: those of the dtype that was asked for, or of TF32 where it is allowed."""
    eps = torch.finfo(how.dtype).eps if how.dtype is not None else 0.0
    own = torch.finfo(truth.measured).eps
    if subject.placement.tf32:
        eps = max(eps, TF32_EPS)
    return Comparison(eps=eps, coarser=max(1.0, eps / own))


def _remarks(subject: Subject, how: _How) -> list[str]:
    """What the user should know about a precision that was asked for."""
    if how.dtype is None or how.runtime == "onnxruntime" or isinstance(subject, TorchSubject):
        return []
    if torch.finfo(subject.coarsest).eps >= torch.finfo(how.dtype).eps:
        return []
    name = str(how.dtype).removeprefix("torch.")
    return [f"judged in {name} as asked; what the file takes and gives is finer than that"]


def _in_dtype(plain: Truth, subject: Subject, examples: Examples, dtype: torch.dtype) -> Truth:
    """The same truth beside the error that the reference makes in another dtype, if it runs."""
    if not isinstance(subject, TorchSubject) or dtype == plain.coarsest:
        return plain
    cast = TorchSubject(duplicate(subject.model).to(dtype))
    cast.order = subject.order
    try:
        native = cast.outputs(examples, "reference")
    except BNToolsError:
        return plain
    if any(not bool(t.isfinite().all()) for t in native.values()):
        return plain
    return replace(plain, native=native, measured_in=dtype)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if (dtype is not None and found is None) or (found and found not in _DTYPES.values()):
        raise InputError(f"Cannot judge in {dtype}: there are {', '.join(_DTYPES)}.")
    return found


def _checked_runtime(runtime: str | None) -> str | None:
    if runtime not in _RUNTIMES:
        raise InputError(f"Cannot use the runtime {runtime!r}: there are torch and onnxruntime.")
    return runtime


def _is_onnx(model: Model) -> TypeGuard[str | os.PathLike[str]]:
    if not isinstance(model, (str, os.PathLike)):
        unwrap(model)  # says so where it is no model at all
        return False
    return is_onnx(model)


def _size(outputs: Outputs) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in outputs.values())
