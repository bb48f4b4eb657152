"""Where two models part: the error of each layer, in execution order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools import tables
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["DepthReport", "LayerError", "NotCompared"]


@dataclass(frozen=True)
class LayerError:
    """How far what a layer gives is from the float64 truth.

    `call` counts the calls of a module from 1, of `calls`; `output` its tensors from 0. The numbers
    are those of the slice that comes nearest to its limit: `where` is "" for the whole tensor, or
    such as "channel 3", and they are relative to the average slice of the truth. Of a norm that is
    folded into one layer, `host` is the path of that layer; where only that layer has a name, it is
    compared with the norm's output, and `carries` is the norm's path.
    """

    path: str
    kind: str
    error: float
    reference_error: float
    limit: float
    agrees: bool
    where: str = ""
    call: int = 1
    calls: int = 1
    output: int = 0
    carries: str = ""
    host: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """The path, with the call where there are several."""
        name = self.path or "(the model)"
        if self.calls > 1:
            name += f" (call {self.call})"
        return f"{name}[{self.output}]" if self.output else name

    @property
    def title(self) -> str:
        """The name, and with which other layer it has become one."""
        if self.carries:
            return f"{self.name} with {self.carries}"
        return f"{self.name} in {self.host}" if self.host else self.name


@dataclass(frozen=True)
class NotCompared:
    """A layer that could not be compared, and why."""

    path: str
    why: str


@dataclass(frozen=True)
class DepthReport:
    """The layers that two models share, in execution order: falsy where one of them differs.

    `truth` is "float64", or the dtype of the reference where that cannot run in float64; `inputs`
    describes what they ran on.
    """

    layers: tuple[LayerError, ...]
    skipped: tuple[NotCompared, ...] = ()
    truth: str = "float64"
    dtype: str = "float32"
    inputs: str = ""
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.layers) and self.first_different is None

    @property
    def first_different(self) -> LayerError | None:
        """The first layer, in execution order, that is off by more than its limit."""
        return next((layer for layer in self.layers if not layer.agrees), None)

    @property
    def last_agreeing(self) -> LayerError | None:
        """The layer before the first that differs; the last of all where none does."""
        first = self.first_different
        before = self.layers if first is None else self.layers[: self.layers.index(first)]
        return before[-1] if before else None

    def summary(self) -> str:
        """One line: the first layer that differs and the last that agreed."""
        if not self.layers:
            return "no layer could be compared"
        first = self.first_different
        if first is None:
            nearest = max(self.layers, key=lambda x: x.error / x.limit if x.limit else 0.0)
            count = len(self.layers)
            agree = f"all {count} layers agree" if count > 1 else "the one layer agrees"
            return f"{agree}; nearest to its limit: {_told(nearest)}"
        last = self.last_agreeing
        agreed = f"{last.name} is the last that agrees" if last else "none before it agrees"
        return f"the first layer that differs: {_told(first)}; {agreed}"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON data."""
        first, last = self.first_different, self.last_agreeing
        return {
            "schema": SCHEMA_VERSION,
            "agrees": bool(self),
            "first_different": first.name if first else None,
            "last_agreeing": last.name if last else None,
            **as_json(self),
        }

    def __str__(self) -> str:
        return tables.text(
            tables.depth(self.layers),
            tables.not_compared(self.skipped),
            *self.notes,
            self.summary(),
        )


def _told(layer: LayerError) -> str:
    if layer.note:
        return tables.plain(f"{layer.title}: {layer.note}")
    where = f" at {layer.where}" if layer.where else ""
    return tables.plain(f"{layer.title}, error {layer.error:.2g}{where} (limit {layer.limit:.2g})")
