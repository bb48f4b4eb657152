"""The first layer that differs: two models compared layer by layer against float64 truth."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntools.baseline import Baseline, plain
from bntools.equivalence import device_of, dtype_of
from bntools.examples import Examples, given
from bntools.measuring import Measure
from bntools.modules import unwrap
from bntools.report import DepthReport, LayerError, NotCompared, OutputError
from bntools.scopes import OnnxLayers
from bntools.tolerance import Limit
from bntools.watching import Key, Layered, Point, TorchLayers

__all__ = ["compare_layers"]

Model = nn.Module | str | os.PathLike[str] | bytes
_MEMORY = 512 << 20
_UNSURE = 0.3
"""Beyond this relative error of its own, the reference says nothing about a layer."""

_BLIND = "the reference does not run in float64: limits are fixed at 80 roundings"
_FOLDED = "as a norm is folded into them"
_ABSENT = "as the candidate has no such layer"
_ONLY = "as only the candidate has them"
_CALLS = "as the models call them a different number of times"


def compare_layers(
    reference: Model,
    candidate: Model,
    inputs: Any,
    *,
    provider: str = "cpu",
    allow_tf32: bool = False,
    memory: int = _MEMORY,
) -> DepthReport:
    """Compare what the layers of two models give, in execution order, against float64 truth.

    Layers are matched by module path and call; ONNX models (a path, or bytes) by the module names
    that torch's exporter leaves in them. Layers are judged like outputs, every channel with a limit
    of its own. Where norms are folded away, the layers that carry them hold something else by
    design and are compared with the norm's output, or not at all. At most `memory` bytes of the
    reference's activations are held at a time: the models run once for each part.

    Raises `InputError` where a model does not run on the inputs.

    Example:
        >>> import copy, torch, bntools
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> other = copy.deepcopy(model.eval())
        >>> _ = other[2].bias.data[1].add_(1e-3)
        >>> found = bntools.compare_layers(model, other, torch.ones(5, 4))
        >>> found.first_different.path, found.first_different.where, found.last_agreeing.path
        ('2', 'channel 1', '1')
    """
    examples = given(inputs)
    sides = [_subject(each, examples, provider, allow_tf32) for each in (reference, candidate)]
    pairs, skipped = _paired(*sides)
    truth = Baseline(*sides)
    layers: list[LayerError] = []
    for part in _parts(pairs, memory):
        seen, unseen = _judged(part, truth, sides[1])
        layers += seen
        skipped += unseen
    return DepthReport(
        tuple(layers),
        tuple(skipped),
        truth="float64" if truth.is_float64 else _name(truth.dtype),
        dtype=_name(truth.dtype),
        inputs=str(examples),
        notes=() if truth.is_float64 else (_BLIND,),
    )


def _subject(model: Model, examples: Examples, provider: str, allow_tf32: bool) -> Layered:  # noqa: FBT001
    if not isinstance(model, nn.Module):
        source = model if isinstance(model, bytes) else Path(model)
        return OnnxLayers(source, examples, provider=provider, allow_tf32=allow_tf32)
    model = unwrap(model)
    fed = examples.cast(dtype_of(model), device_of(model))
    return TorchLayers(model, fed, allow_tf32=allow_tf32)


# ---- which layers are compared -------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A point of the reference and the key of the one in the candidate that has to equal it."""

    truth: Point
    candidate: Key
    shown: Key
    kind: str
    calls: int = 1
    carries: str = ""
    host: str = ""


def _paired(reference: Layered, candidate: Layered) -> tuple[list[_Pair], list[NotCompared]]:
    """The points at which both must agree, and the paths that have none, with the reason."""
    ours, theirs = (_Side.of(reference, candidate), _Side.of(candidate, reference))
    pairs: list[_Pair] = []
    skipped: dict[str, str] = {}
    for point in reference.points:
        found = _pair(point, ours, theirs)
        if isinstance(found, str):
            skipped.setdefault(point.key.path, found)
        else:
            pairs.append(found)
    covered = _covered(ours, [pair.truth.key for pair in pairs])
    listed = [NotCompared(path, why) for path, why in skipped.items() if path not in covered]
    covered = _covered(theirs, [pair.candidate for pair in pairs]) | ours.calls.keys()
    only = dict.fromkeys(key.path for key in theirs.points if key.path not in covered)
    return list(_distinct(pairs, theirs)), [*listed, *(NotCompared(p, _ONLY) for p in only)]


def _covered(side: _Side, compared: Sequence[Key]) -> set[str]:
    """The paths of modules of which all tensors are compared, if under another name."""
    values = {side.points[key].value for key in compared}
    left = {key.path for key, point in side.points.items() if point.value not in values}
    return side.calls.keys() - left


@dataclass(frozen=True)
class _Side:
    """The points of one model, and what folds that only the other one has change on its side."""

    points: dict[Key, Point]
    calls: Counter[str]
    changed: frozenset[Any]
    carried: dict[Any, list[Point]]
    hosts: dict[Key, str]

    @classmethod
    def of(cls, subject: Layered, other: Layered) -> _Side:
        folded = subject.folded(subject.norms - other.keeps)
        alike: dict[Any, list[Point]] = {}
        for point in subject.points:
            alike.setdefault(point.value, []).append(point)
        carried = {
            value: [p for p in alike.get(out, ()) if _is_in(p.key.path, norm)]
            for value, (out, norm) in folded.carried.items()
        }
        calls = Counter({p.key.path: p.key.call for p in subject.points})
        points = {point.key: point for point in subject.points}
        hosts = {p.key: alike[v][0].key.path for v, ps in carried.items() if v in alike for p in ps}
        return cls(points, calls, frozenset(folded.changed), carried, hosts)


def _pair(point: Point, ours: _Side, theirs: _Side) -> _Pair | str:
    key = point.key
    twin = theirs.points.get(key)
    calls = ours.calls[key.path]
    if twin is not None and calls != theirs.calls[key.path]:
        return _CALLS
    if point.value in ours.changed:
        target = _carried(ours, point, theirs)
        if twin is None or target is None:
            return _FOLDED
        return _Pair(target, key, key, point.kind, calls, carries=target.key.path)
    if twin is None:
        return _ABSENT
    if twin.value in theirs.changed:
        target = _carried(theirs, twin, ours)
        if target is None:
            return _FOLDED
        return _Pair(point, target.key, key, point.kind, calls, carries=target.key.path)
    host = ours.hosts.get(key) or theirs.hosts.get(key, "")
    return _Pair(point, key, key, point.kind, calls, host=host)


def _carried(side: _Side, host: Point, other: _Side) -> Point | None:
    """The norm's output that a host holds on the other side, unless that has it under its name."""
    points = side.carried.get(host.value, [])
    if any(point.key in other.points for point in points):
        return None
    return points[-1] if points else None


def _is_in(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _distinct(pairs: Sequence[_Pair], theirs: _Side) -> Iterator[_Pair]:
    """The same two tensors are compared once: a container gives what its last layer gave."""
    seen = set()
    for pair in pairs:
        both = (pair.truth.value, theirs.points[pair.candidate].value)
        if both not in seen:
            seen.add(both)
            yield pair


def _parts(pairs: Sequence[_Pair], memory: int) -> Iterator[list[_Pair]]:
    part: list[_Pair] = []
    held = 0
    for pair in pairs:
        size = pair.truth.size * 16  # the truth and the noise, in float64
        if part and held + size > memory:
            yield part
            part, held = [], 0
        part.append(pair)
        held += size
    if part:
        yield part


# ---- how they are judged -------------------------------------------------------------------------

_LATE = "as what they give could not be seen every time"


def _judged(
    part: Sequence[_Pair], truth: Baseline, candidate: Layered
) -> tuple[list[LayerError], list[NotCompared]]:
    exact, native = truth.at([pair.truth.key for pair in part])
    wanted: dict[Key, list[_Pair]] = {}
    for pair in part:
        wanted.setdefault(pair.candidate, []).append(pair)
    found: dict[int, LayerError | NotCompared] = {}

    def see(key: Key, tensor: Tensor) -> None:
        for pair in wanted[key]:
            there = pair.truth.key
            if there in exact and there in native:
                both = exact[there], native[there]
                found[id(pair)] = _judge(pair, *both, plain(tensor), truth.limit)

    candidate.visit(list(wanted), see)
    each = [found.get(id(pair)) or NotCompared(pair.shown.path, _LATE) for pair in part]
    layers = [row for row in each if isinstance(row, LayerError)]
    return layers, [row for row in each if isinstance(row, NotCompared)]


def _judge(
    pair: _Pair, exact: Tensor, native: Tensor, tensor: Tensor, limit: Limit
) -> LayerError | NotCompared:
    path = pair.shown.path
    if not exact.numel():
        return NotCompared(path, "as they give nothing")
    if bool(exact.isnan().any()):
        return NotCompared(path, "as the reference itself gives NaN")
    measure = Measure(path, limit)
    measure.add(exact, native, tensor)
    judged = measure.result()
    if exact.is_floating_point() and judged.reference_error > _UNSURE:
        share = f"{judged.reference_error:.0%}"
        return NotCompared(path, f"as the reference's own error in its own dtype is {share}")
    return _row(pair, judged)


def _row(pair: _Pair, judged: OutputError) -> LayerError:
    """The numbers of the worst slice, where it differs or is nearer to its limit than the whole."""
    worst: Any = judged
    where = ""
    part = judged.part
    nearer = part is not None and part.error * judged.limit > judged.error * part.limit
    if part is not None and (nearer or part.error > part.limit):
        worst, where = part, f"{part.kind.removeprefix('position along ')} {part.index}"
    key = pair.shown
    return LayerError(
        key.path,
        pair.kind,
        worst.error,
        worst.reference_error,
        worst.limit,
        judged.passed,
        where,
        call=key.call,
        calls=pair.calls,
        output=key.output,
        carries=pair.carries,
        host=pair.host,
        note="" if part is not None and judged.note == str(part) else judged.note,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
