"""The moments of what norm layers see, to keep, merge and compare."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as packed
from torch import Tensor, nn

from bntools.calibration.feeding import Feeder
from bntools.calibration.options import RecalibrationOptions
from bntools.distributed import exchange
from bntools.errors import InputError, LoadError
from bntools.modules import duplicate, unwrap
from bntools.moments import Moments, Statistics
from bntools.report import LayerDrift
from bntools.report.schema import SCHEMA_VERSION
from bntools.selection import Patterns
from bntools.statistics import layer_drift, tracked_norms
from bntools.surgery.recalibration import choose, estimate, made, runner
from bntools.writing import write_atomically, write_text_atomically

__all__ = ["CalibrationStats", "LayerMoments", "calibration_stats", "read_stats"]

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What one layer saw: its class, its eps, and the moments of each channel on the CPU."""

    kind: str
    eps: float
    moments: Moments

    def statistics(self) -> Statistics:
        """Mean and population variance."""
        return Statistics(self.moments.mean, self.moments.variance())


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """The moments of what every norm layer saw in `samples` samples, by path."""

    layers: Mapping[str, LayerMoments]
    samples: int

    def merge(self, other: CalibrationStats) -> CalibrationStats:
        """The moments of both together, as if their data had been one.

        Raises InputError where they are not of the same layers.
        """
        theirs = other.layers
        if self.layers.keys() != theirs.keys():
            odd = min(self.layers.keys() ^ theirs.keys())
            raise InputError(f"Cannot merge moments: only one of them has the layer {odd!r}.")
        merged = {}
        for path, layer in self.layers.items():
            _check_channels(path, layer, theirs[path])
            moments = layer.moments.merge(theirs[path].moments)
            merged[path] = replace(layer, moments=moments)
        return CalibrationStats(merged, self.samples + other.samples)

    def compare(self, other: CalibrationStats | nn.Module) -> tuple[LayerDrift, ...]:
        """How far the layers that both have are apart: from these moments to the other's.

        With a model, to the running statistics that it has.
        """
        drifts = []
        for path, (statistics, has_mean) in _statistics_of(other).items():
            mine = self.layers.get(path)
            if mine is None:
                continue
            if mine.moments.mean.numel() != statistics.mean.numel():
                raise InputError(
                    f"Cannot compare {path}: it has {mine.moments.mean.numel()} channels in one and"
                    f" {statistics.mean.numel()} in the other."
                )
            drifts.append(
                layer_drift(
                    path, mine.kind, mine.statistics(), statistics, eps=mine.eps, has_mean=has_mean
                )
            )
        return tuple(drifts)

    def to_dict(self) -> dict[str, Any]:
        """The moments as JSON data: float64 numbers in full."""
        layers = [
            {
                **_described(path, layer),
                "mean": layer.moments.mean.tolist(),
                "m2": layer.moments.m2.tolist(),
            }
            for path, layer in self.layers.items()
        ]
        return {"schema": SCHEMA_VERSION, "samples": self.samples, "layers": layers}

    def save(self, path: StrPath, *, force: bool = False) -> None:
        """Write a `.json` or `.safetensors` file, whole or not at all.

        Raises SaveError, and InputError for another ending.
        """
        if _ending(path) == ".json":
            text = json.dumps(self.to_dict(), allow_nan=False) + "\n"
            write_text_atomically(path, text, force=force)
            return
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.mean"] = layer.moments.mean.contiguous()
            tensors[f"{name}.m2"] = layer.moments.m2.contiguous()
        described = [_described(name, layer) for name, layer in self.layers.items()]
        head = {"schema": SCHEMA_VERSION, "samples": self.samples, "layers": described}
        content = packed(tensors, {"bntools_moments": json.dumps(head)})
        write_atomically(path, lambda stream: stream.write(content), force=force)


def calibration_stats(
    model: nn.Module,
    batches: Any,
    *,
    by: Literal["running", "batch"] = "running",
    only: Patterns = "*",
    skip: Patterns = (),
    options: RecalibrationOptions | None = None,
) -> CalibrationStats:
    """Take the moments of what every norm layer sees, float64, without changing the model.

    `by="running"`: the layers normalise with their running statistics, as deployed; the moments do
    not depend on how the data comes in batches, and those of parts merge to those of the whole.
    `by="batch"`: they normalise with each batch, as in a first pass of `recalibrate`. The other
    arguments are those of `recalibrate`.

    Raises `PlanError`, `CalibrationError`, `DistributedError` as `recalibrate` does.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).eval()
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> stats = bntools.calibration_stats(model, [x[:1], x[1:]])
        >>> stats.layers["0"].moments.mean, stats.samples
        (tensor([2., 0.], dtype=torch.float64), 2)
    """
    settings = options or RecalibrationOptions()
    if by not in ("running", "batch"):
        raise InputError(f'Cannot take moments with by={by!r}: give "running" or "batch".')
    work = duplicate(unwrap(model))
    made(work, lambda made_up: Feeder(batches, made_up, replace(settings, layout="keep")))
    norms = choose(work, only, skip)
    target = runner(work, settings.device)
    layout = "channels_last" if settings.layout == "auto" else settings.layout
    feeder = Feeder(batches, target, replace(settings, layout=layout))
    meeting = exchange()
    feeder.may_be_empty = meeting is not None
    chosen = [norm for path, norm in tracked_norms(target).items() if path in norms]
    found = estimate(target, chosen, feeder, meeting, method="pooled", running=by == "running")
    layers = {
        norm.path: LayerMoments(norm.kind, norm.eps, seen.moments.to("cpu"))
        for tap, seen in zip(found.taps, found.estimate.seen, strict=True)
        for norm in tap.norms
        if seen.moments is not None
    }
    return CalibrationStats(layers, found.estimate.samples)


def read_stats(path: StrPath) -> CalibrationStats:
    """Read what `CalibrationStats.save` wrote.

    Raises LoadError.
    """
    try:
        if _ending(path) == ".json":
            head = json.loads(Path(path).read_text("utf-8"))
            tensors = {
                f"{layer['path']}.{name}": torch.tensor(layer[name], dtype=torch.float64)
                for layer in head["layers"]
                for name in ("mean", "m2")
            }
        else:
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {})["bntools_moments"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        return CalibrationStats(
            {layer["path"]: _read(layer, tensors) for layer in head["layers"]}, head["samples"]
        )
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise LoadError(f"Cannot read the moments {path}: {why}.") from error
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise LoadError(
            f"Cannot read the moments {path}: it is no file that CalibrationStats.save wrote."
        ) from error


def _described(path: str, layer: LayerMoments) -> dict[str, Any]:
    return {"path": path, "kind": layer.kind, "eps": layer.eps, "elements": layer.moments.count}


def _read(layer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerMoments:
    mean, m2 = (tensors[f"{layer['path']}.{name}"] for name in ("mean", "m2"))
    moments = Moments(int(layer["elements"]), mean, m2)
    return LayerMoments(str(layer["kind"]), float(layer["eps"]), moments)


def _ending(path: StrPath) -> str:
    ending = Path(path).suffix.lower()
    if ending not in (".json", ".safetensors"):
        raise InputError(
            f"Cannot keep moments in {path}: give a name that ends in .json or .safetensors."
        )
    return ending


def _check_channels(path: str, a: LayerMoments, b: LayerMoments) -> None:
    if a.moments.mean.numel() != b.moments.mean.numel():
        raise InputError(
            f"Cannot merge moments: {path} has {a.moments.mean.numel()} channels in one and"
            f" {b.moments.mean.numel()} in the other."
        )


def _statistics_of(other: CalibrationStats | nn.Module) -> dict[str, tuple[Statistics, bool]]:
    if isinstance(other, CalibrationStats):
        return {path: (layer.statistics(), True) for path, layer in other.layers.items()}
    norms = tracked_norms(unwrap(other)).items()
    return {
        path: (_on_cpu(norm.statistics()), norm.rule.has_mean)
        for path, norm in norms
        if norm.tracks
    }


def _on_cpu(statistics: Statistics) -> Statistics:
    return Statistics(statistics.mean.cpu(), statistics.variance.cpu())
