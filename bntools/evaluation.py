"""Scores of a model on labelled data: what a recalibration has to keep or raise."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import BNToolsError, DataError, LoadError
from bntools.imports import import_object, one_line, working_folder_first
from bntools.modules import floating_tensors, named_modules

__all__ = ["Accuracy", "accuracy", "read_function", "read_metric"]


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """The share of samples whose largest output is that of their class.

    `batches` are pairs (inputs, labels); the model answers with (N, classes), or with (N, classes,
    ...) for dense labels. It is run in eval mode, on the device and in the dtype of its first
    floating tensor; its mode flags come back. Labels are class numbers; those below 0 do not count.

    Raises DataError.

    Example:
        >>> import torch, bntools
        >>> bntools.accuracy(torch.nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    described = getattr(batches, "described", "batches")
    right = counted = seen = 0
    with _eval_mode(model), torch.inference_mode():
        for batch in batches:
            seen += 1
            inputs, labels = _labelled(batch, described)
            outputs = _run(model, inputs)
            hits, known = _hits(outputs, labels.to(outputs.device), described)
            right += hits
            counted += known
    if not seen:
        raise DataError(
            f"Cannot evaluate on the {described}: there is no batch. Of few batches none is held"
            " out; make them smaller (--batch-size)."
        )
    if not counted:
        raise DataError(f"Cannot evaluate on the {described}: no sample has a label.")
    return right / counted


@dataclass(frozen=True)
class Accuracy:
    """`accuracy` on the same data each time: `recalibrate(..., evaluate=Accuracy(data))`."""

    data: Iterable[Any]

    def __call__(self, model: nn.Module) -> float:
        """The accuracy of a model."""
        return accuracy(model, self.data)


def read_function(name: str) -> Callable[..., Any]:
    """The user's function "package.module:function", from the working folder or the Python path.

    Raises LoadError.
    """
    module, _, path = name.partition(":")
    function = import_object(module, path, what=f"use {name}")
    if not callable(function):
        raise LoadError(f"Cannot use {name}: it is no function.")
    found: Callable[..., Any] = function
    return found


def read_metric(name: str, data: Iterable[Any] | None = None) -> Callable[..., float]:
    """The user's metric "package.module:function": `function(model)` or `function(model, batches)`.

    It returns a number, the higher the better. With `data`, what is returned takes a model alone;
    without, it takes what the function takes. The model is in eval mode.

    Raises LoadError; a DataError on use, where it raises or gives no number.
    """
    function = read_function(name)
    wants_data = _positional(function) > 1

    def score(model: nn.Module, *batches: Any) -> float:
        try:
            with working_folder_first(), _eval_mode(model), torch.no_grad():
                found = float(function(model, *batches))
        except BNToolsError:
            raise
        except Exception as error:
            raise DataError(
                f"Cannot use the metric {name}: it raised {type(error).__name__}:"
                f" {one_line(error)}."
            ) from error
        if math.isnan(found):
            raise DataError(
                f"Cannot use the metric {name}: it gave NaN, which compares to nothing."
            )
        return found

    def on_batches(model: nn.Module, batches: Iterable[Any]) -> float:
        return score(model, batches)

    def alone(model: nn.Module) -> float:
        return score(model, data) if wants_data else score(model)

    return on_batches if wants_data and data is None else alone


def _positional(function: Any) -> int:
    """How many arguments without a default a function takes; one where it does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _labelled(batch: Any, described: str) -> tuple[Any, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise DataError(
        f"Cannot evaluate on the {described}: there are no labels. Give class folders, arrays"
        " with labels, or a metric of your own with --metric."
    )


def _run(model: nn.Module, inputs: Any) -> Tensor:
    first = next(floating_tensors(model), None)
    outputs = model(inputs if first is None else _moved(inputs, first))
    if isinstance(outputs, Tensor):
        return outputs
    if hasattr(outputs, "logits"):
        outputs = outputs.logits
    elif isinstance(outputs, dict):
        outputs = next(iter(outputs.values()), None)
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"Cannot evaluate the model: it gives a {type(outputs).__name__}, and accuracy takes a"
            " tensor (N, classes). Give a metric of your own with --metric."
        )
    return outputs


def _moved(value: Any, like: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _moved(item, like) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, like) for item in value)
    return value


def _hits(outputs: Tensor, labels: Tensor, described: str) -> tuple[int, int]:
    expected = (outputs.shape[0], *outputs.shape[2:])
    if outputs.ndim < 2 or labels.shape != expected or labels.is_floating_point():
        raise DataError(
            f"Cannot evaluate on the {described}: the model gives {_shape(outputs)}, and the"
            f" labels are {str(labels.dtype).removeprefix('torch.')} of shape {_shape(labels)}."
            " Class numbers (N,) go with outputs (N, classes); else give --metric."
        )
    known = labels >= 0
    if known.any() and int(labels.max()) >= outputs.shape[1]:
        raise DataError(
            f"Cannot evaluate on the {described}: there is a class {int(labels.max())}, and"
            f" the model has {outputs.shape[1]}, counted from 0."
        )
    return int(((outputs.argmax(1) == labels) & known).sum()), int(known.sum())


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own flag back at the end."""
    flags = [(module, module.training) for _, module in named_modules(model)]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
