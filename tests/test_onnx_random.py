"""Random ONNX graphs and damaged files: no fold fails its check, and nothing but errors of ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_folds import FOLDS, Net

import bntools
from bntools.errors import BNToolsError


class Grower:
    """Grows a graph of images, operation by operation; every value is (name, channels, size)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.net = Net(2, 4, 12, 12, seed=seed)
        self.values: list[tuple[str, int, int]] = [("x", 4, 12)]
        self.count = 0
        self.used: set[str] = set()

    def grow(self, steps: int) -> onnx.ModelProto:
        """A model of so many operations, whose outputs are all that nobody uses."""
        for _ in range(steps):
            self.random.choice(self.kinds)(self)
        ends = [name for name, *_ in self.values if name not in self.used and name != "x"]
        self.net.outputs = dict.fromkeys(ends, onnx.TensorProto.FLOAT)
        return self.net.model()

    def take(self) -> tuple[str, int, int]:
        value = self.random.choice(self.values[-4:])
        self.used.add(value[0])
        return value

    def give(self, channels: int, size: int) -> str:
        self.count += 1
        name = f"v{self.count}"
        self.values.append((name, channels, size))
        return name

    def conv(self) -> None:
        data, channels, size = self.take()
        kernel = self.random.choice([1, 3]) if size > 4 else 1
        groups = 2 if channels % 2 == 0 and self.random.random() < 0.3 else 1
        pads = self.random.choice([0, kernel // 2])
        out = self.give(4, size - kernel + 1 + 2 * pads)
        shape = (4, channels // groups, kernel, kernel)
        bias = self.random.random() < 0.5
        self.net.conv(data, out, shape, bias=bias, group=groups, pads=[pads] * 4)

    def norm(self) -> None:
        data, channels, size = self.take()
        positive = self.random.random() < 0.5
        self.net.bn(data, self.give(channels, size), channels, positive=positive)

    def arithmetic(self) -> None:
        data, channels, size = self.take()
        out, kind = self.give(channels, size), self.random.choice(["Mul", "Add", "Sub", "Div"])
        self.net.weight(f"{out}_k", *self.random.choice([(channels, 1, 1), (1,)]))
        self.net.weights[f"{out}_k"] += np.float32(3)
        swap = kind != "Div" and self.random.random() < 0.3
        self.net.add(kind, f"{out}_k {data}" if swap else f"{data} {out}_k", out)

    def unary(self) -> None:
        data, channels, size = self.take()
        kind = self.random.choice(["Relu", "LeakyRelu", "Identity", "Dropout", "Sigmoid", "Neg"])
        self.net.add(kind, data, self.give(channels, size))

    def pool(self) -> None:
        data, channels, size = self.take()
        kind = self.random.choice(["MaxPool", "AveragePool"])
        if size < 4:
            self.net.add("Relu", data, self.give(channels, size))
            return
        more = (
            {"count_include_pad": 1} if kind == "AveragePool" and self.random.random() < 0.5 else {}
        )
        pads = [1] * 4
        self.net.add(kind, data, self.give(channels, size), kernel_shape=[3, 3], pads=pads, **more)

    def join(self) -> None:
        first, second = self.take(), self.take()
        if first[1:] != second[1:]:
            return
        if self.random.random() < 0.5:
            self.net.add(
                "Concat", f"{first[0]} {second[0]}", self.give(2 * first[1], first[2]), axis=1
            )
        else:
            kind = self.random.choice(["Add", "Sub", "Sum", "Mean", "Mul"])
            self.net.add(kind, f"{first[0]} {second[0]}", self.give(*first[1:]))

    def shuffle(self) -> None:
        data, channels, size = self.take()
        order = list(range(channels))
        self.random.shuffle(order)
        out = self.give(channels, size)
        self.net.ints(f"{out}_order", *order).add("Gather", f"{data} {out}_order", out, axis=1)

    def pad(self) -> None:
        data, channels, size = self.take()
        out, mode = self.give(channels, size + 1), self.random.choice(["constant", "edge"])
        self.net.ints(f"{out}_pads", 0, 0, 1, 1, 0, 0, 0, 0)
        self.net.add("Pad", f"{data} {out}_pads", out, mode=mode)

    kinds: tuple[Callable[[Grower], None], ...] = (
        conv, conv, conv, norm, norm, norm, arithmetic, unary, pool, join, join, shuffle, pad,
    )  # fmt: skip


def folds_of(seed: int) -> int:
    """Fold one random graph; how many norms fold."""
    model = Grower(seed).grow(14)
    report = bntools.fold_onnx(model, seed=seed).report
    if report.folds:
        assert report.check
        assert report.check.rolled_back == (), (seed, report.kept)
        assert report.check.float64 is not None
    assert not any(each.reason is bntools.Reason.CHECK_FAILED for each in report.kept)
    return len(report.folds)


def test_no_fold_of_a_random_graph_fails_its_check():
    """The planner folds only what is exact, and there is something to fold."""
    assert sum(map(folds_of, range(25))) > 20


@pytest.mark.slow
def test_no_fold_of_many_random_graphs_fails_its_check():
    """The same, for an hour's worth of doubt."""
    assert sum(map(folds_of, range(1000, 1600))) > 500


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file with bits flipped, bytes put in, taken out or overwritten, or its end cut off."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        place, how = draw.randrange(len(data) or 1), draw.random()
        if how < 0.5 and data:
            data[place] ^= 1 << draw.randrange(8)
        elif how < 0.7:
            data[place:place] = draw.randbytes(draw.randrange(1, 9))
        elif how < 0.8:
            del data[place:]
        else:
            del data[place : place + draw.randrange(1, 16)]
    return bytes(data)


def refused_of(seed: int, cases: int, folder: Path) -> int:
    """Plan damaged files; how many are refused."""
    draw = random.Random(seed)
    names, refused = list(FOLDS), 0
    for _ in range(cases):
        path = folder / "damaged.onnx"
        path.write_bytes(damaged(FOLDS[draw.choice(names)][0]().SerializeToString(), draw))
        try:
            bntools.plan_onnx(path)
        except BNToolsError as error:
            refused += "\n" not in str(error)
            lines = str(error).splitlines()
        else:
            lines = []
        assert len(lines) <= 1
    return refused


def test_a_damaged_file_is_planned_or_refused(tmp_path: Path):
    """One line, whatever is wrong; nothing else is raised."""
    assert refused_of(0, 80, tmp_path) > 20


@pytest.mark.slow
def test_many_damaged_files_are_planned_or_refused(tmp_path: Path):
    """The same for thousands."""
    assert refused_of(1, 4000, tmp_path) > 1000
