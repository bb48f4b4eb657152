"""What can be verified: a PyTorch model, or an ONNX model in ONNX Runtime."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bntools.equivalence import (
    Truth,
    check_repeats,
    device_of,
    dtype_of,
    find_truth,
    forward,
)
from bntools.errors import BNToolsError, InputError
from bntools.examples import Examples
from bntools.modules import is_unmade, named_modules, named_tensors
from bntools.outputs import Outputs, flatten, tensors_only
from bntools.runtimes.devices import torch_placement
from bntools.runtimes.sessions import Session, open_session
from bntools.runtimes.widening import DoubleModel, random_nodes, read_model

__all__ = ["OnnxSubject", "Subject", "TorchSubject", "paired"]


class TorchSubject:
    """A PyTorch model, on the device where it is.

    `order` are the input names of an ONNX model on the other side: inputs with these names are its
    positional arguments, where its forward does not know the names.
    """

    def __init__(self, model: nn.Module, name: str = "", *, allow_tf32: bool = False) -> None:
        _check_made(model)
        self.model = model
        self.name = name or type(model).__name__
        self.allow_tf32 = allow_tf32
        self.order: Sequence[str] = ()
        self.placement = torch_placement(device_of(model), allow_tf32=allow_tf32)

    def outputs(self, examples: Examples, whose: str = "candidate") -> Outputs:
        """What one forward in eval mode gives; nothing of it is left in the model."""
        return self._flat(examples, whose)

    def _flat(self, examples: Examples, whose: str, seed: int = 0) -> Outputs:
        given = self.bound(examples)
        try:
            out = forward(self.model, given, seed=seed, allow_tf32=self.allow_tf32)
        except BNToolsError:
            raise
        except Exception as error:
            raise InputError(
                f"Cannot run the {whose} on {given}: {type(error).__name__}: {_line(error)}."
                " Give inputs that it accepts."
            ) from error
        return flatten(out)

    def check_repeats(self, examples: Examples, first: Outputs, whose: str = "candidate") -> None:
        """Refuse a model that draws random numbers; the module that does is named."""
        again = self._flat(examples, whose, seed=1)
        check_repeats(first, again, f"the {whose}", self.model, self.bound(examples))

    def truth(self, examples: Examples) -> Truth:
        """What it gives in float64, and in its own dtype."""
        given = self.bound(examples)
        return find_truth(self.model, given)

    def tensor_names(self, examples: Examples) -> list[str]:
        """The names of those outputs that are tensors, which are all that an ONNX model has."""
        return tensors_only(forward(self.model, self.bound(examples)))

    def bound(self, examples: Examples) -> Examples:
        """The inputs as this model takes them, in its dtype and on its device."""
        named = examples.kwargs
        if self.order and not examples.args and set(named) == set(self.order):
            try:
                inspect.signature(self.model.forward).bind(**named)
            except (TypeError, ValueError):
                examples = Examples(tuple(named[name] for name in self.order))
        return examples.cast(dtype_of(self.model), device_of(self.model))


class OnnxSubject:
    """An ONNX model in ONNX Runtime.

    `by_order` lets inputs that are named otherwise go by their order: the names are those of a
    PyTorch model on the other side.
    """

    def __init__(self, source: Path | bytes, session: Session, name: str = "") -> None:
        self.source = source
        self.session = session
        self.name = name or "the ONNX model"
        self.by_order = False
        self.placement = session.placement
        self._double: DoubleModel | None = None
        self._why_not = ""

    @property
    def coarsest(self) -> torch.dtype:
        """The coarsest floating dtype of its inputs and outputs."""
        ports = (*self.session.inputs, *self.session.outputs)
        floats = [port.dtype for port in ports if port.dtype.is_floating_point]
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    def outputs(self, examples: Examples, whose: str = "candidate") -> Outputs:
        """What one forward gives, by the names of the ONNX model."""
        del whose
        return self.session.run(self.feeds(examples))

    def feeds(self, examples: Examples) -> dict[str, Tensor]:
        """The inputs by name; floats in the dtype that the model takes."""
        names = [port.name for port in self.session.inputs]
        named = {name: value for name, value in examples.kwargs.items() if value is not None}
        if examples.args or (self.by_order and set(named) != set(names)):
            tensors = examples.tensors()
            if len(tensors) != len(names):
                raise InputError(
                    f"Cannot run {self.name} on {examples}: that is {_count(tensors)}, and its"
                    f" inputs are {self.session.expected}."
                )
            named = dict(zip(names, tensors, strict=True))
        wrong = next((name for name, value in named.items() if not isinstance(value, Tensor)), None)
        if wrong is not None:
            raise InputError(
                f"Cannot run {self.name} on {examples}: {wrong} is no tensor. Its inputs are"
                f" {self.session.expected}."
            )
        wanted = {port.name: port.dtype for port in self.session.inputs}
        return {name: _like(tensor, wanted.get(name)) for name, tensor in named.items()}

    def check_repeats(self, examples: Examples, first: Outputs, whose: str = "candidate") -> None:
        """Refuse a model that draws random numbers; its nodes that do are named."""
        again = self.outputs(examples)
        try:
            check_repeats(first, again, f"the {whose}", None, examples)
        except BNToolsError as error:
            drawing = random_nodes(read_model(self.source))
            if not drawing:
                raise
            raise type(error)(
                f"{error} In {self.name} random numbers are drawn by {', '.join(drawing[:3])}."
            ) from None

    def truth(self, examples: Examples) -> Truth:
        """What it gives in float64 by onnx's reference evaluator, and in ONNX Runtime.

        Where that cannot run it, what ONNX Runtime gives without optimisations.
        """
        native = self.outputs(examples)
        self.check_repeats(examples, native, "reference")
        exact = self._exactly(self.feeds(examples), native)
        if exact is not None:
            note = "the truth of the ONNX file: the same graph in float64, by onnx's evaluator"
            return Truth(
                exact, native, {}, {}, self.coarsest, self.coarsest, is_float64=True, note=note
            )
        plain = open_session(self.source, optimise=False).run(self.feeds(examples))
        note = (
            f"no float64 truth for the ONNX file ({self._why_not}): ONNX Runtime without"
            " optimisations stands in for it"
        )
        return Truth(
            plain, native, {}, {}, self.coarsest, self.coarsest, is_float64=False, note=note
        )

    def _exactly(self, feeds: Mapping[str, Tensor], native: Outputs) -> Outputs | None:
        if self._why_not:
            return None
        try:
            self._double = self._double or DoubleModel(read_model(self.source))
            exact = self._double.run(feeds)
        except Exception as error:  # noqa: BLE001 - the evaluator raises anything
            cause = error.__cause__ or error
            self._why_not = f"{type(cause).__name__}: {_line(cause)}"
            return None
        return {
            name: tensor if tensor.is_floating_point() else tensor.to(native[name].dtype)
            for name, tensor in exact.items()
        }


Subject = TorchSubject | OnnxSubject
"""A model that runs somewhere."""


def paired(outputs: Outputs, names: Sequence[str]) -> Outputs:
    """Outputs under the names of the other side's, in their order; what is left keeps its own."""
    return {
        names[index] if index < len(names) else name: tensor
        for index, (name, tensor) in enumerate(outputs.items())
    }


def _check_made(model: nn.Module) -> None:
    if any(tensor.is_meta for *_, tensor in named_tensors(model)):
        raise InputError(
            "Cannot run a model on the meta device: it has no numbers. Load them first."
        )
    lazy = next((path for path, module in named_modules(model) if is_unmade(module)), None)
    if lazy is not None:
        raise InputError(
            f"Cannot judge the model: {lazy or type(model).__name__} has lazy parameters that no"
            " forward has made yet. Run it once before."
        )


def _like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    both = dtype is not None and dtype.is_floating_point and tensor.is_floating_point()
    return tensor.to(dtype) if both else tensor


def _count(tensors: Sequence[Tensor]) -> str:
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
