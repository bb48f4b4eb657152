"""Random networks from the whole vocabulary of rules: whatever folds must fold right, at any size.

A network is a program: instructions that read some of the registers and fill a new one. Modules are
shared, tensors are written in place and used twice, and channels, batch and image sizes collide on
purpose. `python tests/random_graphs.py --cases 5000` makes a recorded run: it writes
`random_graphs.json`, and a program that fails is printed as small as it gets.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from randomise import difference, norms, outputs, randomise
from test_traps import changes, fingerprint
from torch import Tensor, nn

import bntools
from bntools.report import Action, Plan
from bntools.surgery.folding import fold_copy

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_BATCH, _SIZE, _CHANNELS = 2, 4, 4

Step = Callable[["Program", list[Tensor]], Any]


class Program(nn.Module):
    """A module that runs instructions; each appends what it makes to the registers."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.parts = nn.ModuleList()
        self.steps: list[Step] = []
        self.returned: list[int] = [-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        registers = [x]
        for step in self.steps:
            made = step(self, registers)
            registers.extend(made if isinstance(made, (list, tuple)) else [made])
        return [registers[i] for i in self.returned]


@dataclass
class Writer:
    """Writes a program from small numbers, so that hypothesis can shrink it."""

    program: Program
    channels: list[int] = field(default_factory=lambda: [_CHANNELS])
    hosts: list[tuple[int, int, int]] = field(default_factory=list)
    normed: list[tuple[int, int]] = field(default_factory=list)

    def source(self, pick: int) -> int:
        """A register, mostly the newest."""
        return len(self.channels) - 1 - max(0, pick - 7) % len(self.channels)

    def part(self, module: nn.Module) -> int:
        self.program.parts.append(module)
        return len(self.program.parts) - 1

    def emit(self, step: Step, *channels: int) -> None:
        self.program.steps.append(step)
        self.channels.extend(channels)

    def unary(self, source: int, change: Callable[[Tensor], Tensor], channels: int = 0) -> None:
        self.emit(lambda _, r: change(r[source]), channels or self.channels[source])

    def write(self, kind: str, pick: int, number: int) -> None:
        source = self.source(pick)
        getattr(self, f"do_{kind}")(source, self.channels[source], number)

    # hosts

    def do_host(self, source: int, channels: int, number: int) -> None:
        out = number % 6 + 1
        self.run_host(source, self.part(self.make_host(channels, out, number // 6)), out)

    def do_block(self, source: int, channels: int, number: int) -> None:
        """A host, sometimes movement, a norm, and sometimes an activation in place."""
        self.do_host(source, channels, number)
        for kind in ("pass", "there_and_back", "shuffle", "activation")[
            number % 8 : number % 8 + 1
        ]:
            if kind != "activation":
                self.write(kind, 0, number // 8)
        self.write("norm_again" if number % 5 == 0 and self.normed else "norm", 0, number // 3)
        if number % 2:
            self.unary(len(self.channels) - 1, torch.relu_)

    def do_host_again(self, source: int, channels: int, number: int) -> None:
        fitting = [(part, out) for part, known, out in self.hosts if known == channels]
        if fitting:
            part, out = fitting[number % len(fitting)]
            self.run_host(source, part, out)

    def do_tied_host(self, source: int, channels: int, number: int) -> None:
        fitting = [(part, out) for part, known, out in self.hosts if known == channels]
        if fitting and self.program.rank:
            part, out = fitting[number % len(fitting)]
            if isinstance(self.program.parts[part], nn.Linear):
                twin = nn.Linear(channels, out)
                twin.weight = self.program.parts[part].weight
                self.run_host(source, self.part(twin), out)

    def make_host(self, channels: int, out: int, number: int) -> nn.Module:
        bias, rank, kind = bool(number & 1), self.program.rank, number // 2 % 8
        if rank == 0 or kind == 0:
            return nn.Linear(channels, out, bias=bias)
        if kind in (5, 6, 7):
            mode = ("zeros", "reflect", "circular")[kind - 5]
            size = (1, 0) if kind == 5 else (3, 1)
            return _CONVS[rank](
                channels, out, *size[:1], padding=size[1], padding_mode=mode, bias=bias
            )
        groups = {2: _common(channels, out), 3: channels}.get(kind, 1)
        if kind == 3:
            return _Depthwise(_CONVS[rank](channels, channels, 3, 1, 1, 1, channels, bias), out)
        if kind == 4:
            groups = _common(channels, out)
            return _TRANSPOSED[rank](channels, out, 3, 1, 1, 0, groups, bias)
        return _CONVS[rank](channels, out, 3, 1, 1, 1, groups, bias)

    def run_host(self, source: int, part: int, out: int) -> None:
        module = self.program.parts[part]
        if isinstance(module, _Depthwise):
            out = self.channels[source]
        self.hosts.append((part, self.channels[source], out))
        last = isinstance(module, nn.Linear) and self.program.rank

        def run(program: Program, r: list[Tensor]) -> Any:
            if last:
                return program.parts[part](r[source].movedim(1, -1)).movedim(-1, 1)
            return program.parts[part](r[source])

        self.emit(run, out)

    # norms

    def do_norm(self, source: int, channels: int, number: int) -> None:
        part = self.part(self.make_norm(channels, number))
        self.normed.append((part, channels))
        self.emit(lambda program, r: program.parts[part](r[source]), channels)

    def do_norm_again(self, source: int, channels: int, number: int) -> None:
        fitting = [part for part, known in self.normed if known == channels]
        if fitting:
            part = fitting[number % len(fitting)]
            self.emit(lambda program, r: program.parts[part](r[source]), channels)

    def do_norm_of_groups(self, source: int, channels: int, number: int) -> None:
        """The groups of the channels become a part of the batch."""
        if channels % 2 or self.program.rank == 0:
            return
        part = self.part(self.make_norm(channels // 2, number))

        def run(program: Program, r: list[Tensor]) -> Tensor:
            x = r[source]
            halves = x.reshape(2 * x.shape[0], channels // 2, *x.shape[2:])
            return program.parts[part](halves).reshape(x.shape)

        self.emit(run, channels)

    def do_norm_of_two(self, source: int, channels: int, number: int) -> None:
        """Two tensors after each other, along the batch or the first axis of the image."""
        other = self.source(number % 11)
        if self.channels[other] != channels:
            return
        part = self.part(self.make_norm(channels, number // 11))
        axis = 2 if self.program.rank and number % 2 else 0

        def run(program: Program, r: list[Tensor]) -> Any:
            return program.parts[part](torch.cat([r[source], r[other]], axis)).chunk(2, axis)

        self.emit(run, channels, channels)

    def make_norm(self, channels: int, number: int) -> nn.Module:
        options: dict[str, Any] = {"affine": number % 4 != 3, "eps": (1e-5, 1e-3, 0.1)[number % 3]}
        if number % 5 == 4:
            options["momentum"] = None
        kind = nn.SyncBatchNorm if number % 7 == 6 else _NORMS[self.program.rank]
        return kind(channels, **options)

    # movement

    def do_pass(self, source: int, channels: int, number: int) -> None:
        part = self.part((nn.Dropout(0.3), nn.Identity(), nn.Dropout1d())[number % 2])
        self.emit(lambda program, r: program.parts[part](r[source]), channels)

    def do_shuffle(self, source: int, channels: int, number: int) -> None:
        groups = (1, 2, 3)[number % 3]
        if channels % groups == 0:
            self.unary(source, lambda x: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2))

    def do_there_and_back(self, source: int, channels: int, number: int) -> None:
        def permuted(x: Tensor) -> Tensor:
            return x.movedim(1, -1).contiguous().movedim(-1, 1)

        def merged(x: Tensor) -> Tensor:
            return x.flatten(0, 1).reshape(x.shape)

        def swapped(x: Tensor) -> Tensor:
            return x.transpose(0, 1).clone().transpose(0, 1)

        self.unary(source, (permuted, merged, swapped, lambda x: x.flip(1))[number % 4])

    def do_transposed_image(self, source: int, channels: int, number: int) -> None:
        """Channels and pixels change places for good, where there are as many of them."""
        if self.program.rank == 1 and number % 2:
            self.unary(source, lambda x: x.transpose(1, 2)[:, :channels].contiguous())

    def do_chunk(self, source: int, channels: int, number: int) -> None:
        if channels > 1:
            self.emit(lambda _, r: r[source].chunk(2, 1), (channels + 1) // 2, channels // 2)

    def do_slice(self, source: int, channels: int, number: int) -> None:
        keep = number % channels + 1
        self.unary(source, lambda x: x[:, channels - keep :], keep)

    def do_cat(self, source: int, channels: int, number: int) -> None:
        other = self.source(number % 9)
        total = channels + self.channels[other]
        if total <= 8:
            self.emit(lambda _, r: torch.cat([r[source], r[other]], 1), total)

    def do_pixel_shuffle(self, source: int, channels: int, number: int) -> None:
        if self.program.rank == 2 and channels % 4 == 0:
            host = self.part(nn.Conv2d(channels, 4 * channels, 1, bias=bool(number & 1)))
            norm = self.part(self.make_norm(channels, number))

            def run(program: Program, r: list[Tensor]) -> Tensor:
                large = nn.functional.pixel_shuffle(program.parts[host](r[source]), 2)
                return nn.functional.avg_pool2d(program.parts[norm](large), 2)

            self.emit(run, channels)

    def do_expand(self, source: int, channels: int, number: int) -> None:
        """One pixel for all: what is written there in place is shared memory."""
        self.unary(source, lambda x: x.flatten(2).mean(2)[..., None].expand(x.flatten(2).shape))
        if self.program.rank:
            self.program.steps[-1] = lambda _, r: (
                r[source].amax(2, keepdim=True).expand_as(r[source])
            )

    # what lets an affine pass, under conditions

    def do_average_pool(self, source: int, channels: int, number: int) -> None:
        """Same size, or one less: the padding is counted or not, the divisor a window's or not."""
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}.get(self.program.rank)
        if pool is None:
            return
        kernel, padding = ((3, 1), (3, 1), (1, 0), (2, 0))[number % 4]
        ceil, included = bool(number & 4), bool(number & 8)
        divisor: dict[str, Any] = {}
        if self.program.rank > 1 and number % 3 == 0:
            divisor["divisor_override"] = number % 5 + 1
        self.unary(source, lambda x: pool(x, kernel, 1, padding, ceil, included, **divisor))

    def do_max_pool(self, source: int, channels: int, number: int) -> None:
        pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}.get(self.program.rank)
        if pool is not None:
            self.unary(source, lambda x: pool(x, 3, 1, 1, 1, bool(number & 1)))

    def do_adaptive_pool(self, source: int, channels: int, number: int) -> None:
        name = f"adaptive_{('avg', 'max')[number % 2]}_pool{self.program.rank}d"
        if self.program.rank:
            pool = getattr(F, name)
            fixed = number // 2 % 2
            self.unary(source, lambda x: pool(x, tuple(1 if fixed else n for n in x.shape[2:])))

    def do_reduce(self, source: int, channels: int, number: int) -> None:
        """Over the image, the batch or the channels; an axis of one stays."""
        function = (torch.mean, torch.amax, torch.sum, torch.mean)[number % 4]
        dims = (tuple(range(2, self.program.rank + 2)), (-1,), (0,), (1,))[number // 4 % 8 % 4]
        if dims and not (dims in ((1,), (-1,)) and self.program.rank == 0):
            kept = 1 if dims == (1,) else channels
            self.unary(source, lambda x: function(x, dims, keepdim=True), kept)

    def do_interpolate(self, source: int, channels: int, number: int) -> None:
        """Larger and back to size, in a way that fits."""
        modes = {1: ("nearest", "linear"), 2: ("nearest", "bilinear", "bicubic"), 3: ("trilinear",)}
        if self.program.rank:
            known = (*modes[self.program.rank], "area", "nearest-exact")
            mode, back = known[number % len(known)], ("nearest", "area")[number // 5 % 2]

            def resized(x: Tensor) -> Tensor:
                size = tuple(x.shape[2:])
                return F.interpolate(F.interpolate(x, scale_factor=2, mode=mode), size, mode=back)

            self.unary(source, resized)

    def do_rectify(self, source: int, channels: int, number: int) -> None:
        functions = (F.relu, F.relu_, lambda x: F.leaky_relu(x, 0.1), lambda x: x.clamp(min=0))
        if number % 5 == 4:
            part = self.part(nn.PReLU(channels if number % 2 else 1))
            self.emit(lambda program, r: program.parts[part](r[source]), channels)
        else:
            self.unary(source, functions[number % 5])

    def do_zero_pad(self, source: int, channels: int, number: int) -> None:
        """One pixel further along the last axis; zeros or ones come in."""
        if self.program.rank:
            value = 1.0 if number % 5 == 0 else 0.0
            self.unary(source, lambda x: F.pad(x, (1, 0), value=value)[..., :-1])

    def do_zeros_beside(self, source: int, channels: int, number: int) -> None:
        if channels < 6:

            def padded(x: Tensor) -> Tensor:
                return torch.cat([x, torch.zeros_like(x[:, :1])], 1)

            self.unary(source, padded, channels + 1)

    def do_times(self, source: int, channels: int, number: int) -> None:
        functions = (
            lambda x: x * 0.5, lambda x: -x, lambda x: x / 3, lambda x: x.mul_(-2), lambda x: 2 * x,
        )  # fmt: skip
        self.unary(source, functions[number % 5])

    def do_parameter(self, source: int, channels: int, number: int) -> None:
        """A constant per channel, or one for all, is added, subtracted or multiplied."""
        shape = (channels, *[1] * self.program.rank) if number % 4 else (1,)
        part = self.part(nn.ParameterList([torch.randn(shape), torch.randn(shape)]))

        def run(program: Program, r: list[Tensor]) -> Tensor:
            first, second = program.parts[part]
            if number % 3 == 0:
                return r[source] * first + second
            return r[source] + first if number % 3 == 1 else first - r[source]

        self.emit(run, channels)

    def do_stack(self, source: int, channels: int, number: int) -> None:
        other = self.source(number % 9)
        if self.channels[other] == channels:
            function = (torch.sum, torch.mean, torch.amax)[number // 9 % 3]
            self.emit(lambda _, r: function(torch.stack([r[source], r[other]]), 0), channels)

    def do_weighted_sum(self, source: int, channels: int, number: int) -> None:
        other = self.source(number % 9)
        if self.channels[other] == channels:
            first, second = (0.5, 1, -1, 2)[number % 4], (1, -1, 3)[number // 4 % 3]
            self.emit(lambda _, r: torch.add(first * r[source], r[other], alpha=second), channels)

    def do_gentle_norm(self, source: int, channels: int, number: int) -> None:
        """A norm that an activation or a max-pool lets pass: no shift, or no negative scale."""
        norm = self.make_norm(channels, number)
        norm.gentle = number % 4  # type: ignore[assignment]
        part = self.part(norm)
        self.emit(lambda program, r: program.parts[part](r[source]), channels)

    def do_sum_block(self, source: int, channels: int, number: int) -> None:
        """Two hosts, something in between, their sum, and a norm."""
        out = number % 5 + 1
        made = []
        for turn in range(2):
            self.run_host(source, self.part(self.make_host(channels, out, number // 6 + turn)), out)
            if self.channels[-1] != out:
                return
            if (number >> turn) & 1:
                self.write(_THROUGH[number // 3 % len(_THROUGH)], 0, number)
            made.append(len(self.channels) - 1)
        if self.channels[made[0]] == self.channels[made[1]]:
            first, second = made
            sign = -1 if number % 3 == 0 else 1
            self.emit(lambda _, r: r[first] + sign * r[second], self.channels[first])
            self.write("gentle_norm" if number % 2 else "norm", 0, number // 7)

    def do_through_block(self, source: int, channels: int, number: int) -> None:
        """A host, one or two operations that may let a norm pass, and a norm."""
        self.do_host(source, channels, number)
        for turn in range(number % 2 + 1):
            self.write(_THROUGH[number // 3 % 97 * (turn + 1) % len(_THROUGH)], 0, number // 5)
        self.write("gentle_norm" if number % 3 else "norm", 0, number // 7)

    def do_forward_block(self, source: int, channels: int, number: int) -> None:
        """A norm, sometimes one or two operations, and a host that takes it in, or two."""
        self.write("gentle_norm" if number % 4 == 0 else "norm", 0, number // 7)
        for turn in range(number % 3):
            self.write(_THROUGH[number // 3 % 89 * (turn + 1) % len(_THROUGH)], 0, number // 5)
        newest = len(self.channels) - 1
        self.do_host(newest, self.channels[newest], number)
        if number % 5 == 0:
            self.do_host(newest, self.channels[newest], number // 11)

    # everything else

    def do_activation(self, source: int, channels: int, number: int) -> None:
        functions = (torch.relu, torch.relu_, torch.tanh, nn.functional.silu, torch.tanh_)
        self.unary(source, functions[number % len(functions)])

    def do_sum(self, source: int, channels: int, number: int) -> None:
        other = self.source(number % 9)
        if self.channels[other] != channels:
            return
        if number % 2:
            self.emit(lambda _, r: r[source].add_(r[other]), channels)
        else:
            self.emit(lambda _, r: r[source] + r[other], channels)

    def do_read_weight(self, source: int, channels: int, number: int) -> None:
        if self.hosts:
            part = self.hosts[number % len(self.hosts)][0]
            self.emit(
                lambda program, r: (
                    r[source] + 0.01 * next(program.parts[part].parameters()).square().mean()
                ),
                channels,
            )


class _Depthwise(nn.Module):
    """A host one module further down."""

    def __init__(self, conv: nn.Module, _: int) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _common(a: int, b: int) -> int:
    return next(n for n in (3, 2, 1) if a % n == 0 and b % n == 0)


_THROUGH = (
    "average_pool", "max_pool", "adaptive_pool", "reduce", "interpolate", "rectify", "zero_pad",
    "times", "parameter", "shuffle", "there_and_back", "pass", "cat", "slice", "stack",
    "weighted_sum", "zeros_beside", "rectify", "max_pool", "average_pool",
)  # fmt: skip
_BLOCKS = ("block", "sum_block", "through_block", "forward_block")
_OFTEN = ("host", "norm", "norm", "gentle_norm", *_BLOCKS * 6)
KINDS = (*_OFTEN, *sorted(n[3:] for n in vars(Writer) if n.startswith("do_")))
Instruction = tuple[str, int, int]


def write(rank: int, instructions: list[Instruction], returned: list[int]) -> Program:
    """The program that the numbers stand for, in float64, with statistics that show mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(instructions))
        writer = Writer(Program(rank))
        for kind, pick, number in instructions:
            writer.write(kind, pick, number)
        program = writer.program.double()
    nn.Module.train(program, False)
    randomise(program, len(instructions))
    for module in program.modules():
        soften(module, getattr(module, "gentle", 3))
    program.returned = [-1, *(i % len(writer.channels) for i in returned)]
    return program


@torch.no_grad()
def soften(norm: Any, gentle: int) -> None:
    """Take the negative scales of a norm (0, 1), or its shift (0, 2)."""
    if gentle in (0, 1) and getattr(norm, "weight", None) is not None:
        norm.weight.abs_()
    if gentle in (0, 2):
        norm.running_mean.zero_()
        if norm.bias is not None:
            norm.bias.zero_()


def image(rank: int, batch: int, size: int) -> Tensor:
    """An input of the rank's shape; the same numbers on every call."""
    numbers = torch.Generator().manual_seed(batch + size)
    shape = (batch, _CHANNELS, *[size] * rank)
    return torch.randn(shape, generator=numbers, dtype=torch.float64) + 0.3


def runs(program: Program, inputs: Tensor) -> list[Tensor] | None:
    """The outputs; None where the program is none that runs, or that gives no finite numbers."""
    try:
        found = outputs(program, inputs)
    except (RuntimeError, ValueError, IndexError):
        return None
    return found if all(t.isfinite().all() and t.norm() > 1e-6 for t in found) else None


def check(program: Program, counts: Counter[str], *, pad_forward: bool = False) -> Plan | None:
    """The plan is whole, the argument untouched, and the unchecked fold right at three sizes.

    None where the program is none.
    """
    sizes = [(_BATCH, _SIZE), (_BATCH + 1, _SIZE), (_BATCH - 1, _SIZE + 2)]
    examples = [image(program.rank, *size) for size in sizes]
    truths = [runs(program, example) for example in examples]
    if truths[0] is None:
        return None
    before = fingerprint(program, examples[0])
    plan = bntools.plan_fold(program, examples[0], pad_forward=pad_forward)
    folds = plan.compiled.folds if plan.decisions else ()
    folded = fold_copy(program, folds).model
    assert changes(before, fingerprint(program, examples[0])) == []
    layers = norms(program)
    known = [d for d in plan.decisions if d.path in layers]
    assert sorted(d.path for d in known) == sorted(layers)
    assert norms(folded).keys() == {d.path for d in known if d.action is Action.KEEP}
    for example, truth in zip(examples, truths, strict=True):
        if truth is not None:
            assert difference(outputs(folded, example), truth) < 1e-10, str(plan)
    tally(plan, counts)
    return plan


def tally(plan: Plan, counts: Counter[str]) -> None:
    """Count what was decided, and what norms folded through."""
    counts["checked"] += 1
    for decision in plan.decisions:
        counts["norms"] += 1
        if decision.action is Action.KEEP and decision.reason is not None:
            counts[f"kept: {decision.reason.value}"] += 1
            continue
        counts["folded"] += 1
        counts["folded forward"] += decision.forward
        counts["folded into a norm that stays"] += "into a norm" in decision.detail
        through = decision.detail.partition("through ")[2].split(", ")
        counts.update(f"through {name}" for name in through if name)


# A recorded run


@dataclass(frozen=True)
class Draw:
    """The numbers of one network."""

    rank: int
    instructions: list[Instruction]
    returned: list[int]
    pad_forward: bool

    @classmethod
    def of(cls, seed: int) -> Draw:
        """The network of a seed."""
        draw = random.Random(seed)
        count = draw.randint(2, 9)
        instructions = [
            (draw.choice(KINDS), draw.randint(0, 9), draw.randint(0, 999)) for _ in range(count)
        ]
        returned = [draw.randint(0, 20)] if draw.random() < 0.3 else []
        return cls(draw.randint(0, 3), instructions, returned, draw.random() < 0.3)

    def failure(self, counts: Counter[str] | None = None) -> str:
        """What is wrong with the plan of this network; nothing, if it is right or no network."""
        try:
            program = write(self.rank, self.instructions, self.returned)
            check(program, Counter() if counts is None else counts, pad_forward=self.pad_forward)
        except Exception as error:  # noqa: BLE001 - whatever is raised is the failure
            return f"{type(error).__name__}: {error}"
        return ""

    def smallest(self) -> Draw:
        """This network without what it still fails without."""
        for i in range(len(self.instructions)):
            fewer = self.instructions[:i] + self.instructions[i + 1 :]
            smaller = Draw(self.rank, fewer, self.returned, self.pad_forward)
            if fewer and smaller.failure():
                return smaller.smallest()
        return self


def record(seeds: Iterable[int]) -> tuple[Counter[str], list[str]]:
    """Check the networks of these seeds; gives the counts, and what failed."""
    counts: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        counts["cases"] += 1
        drawn = Draw.of(seed)
        if drawn.failure(counts):
            small = drawn.smallest()
            failures.append(f"seed {seed}: {small}: {small.failure()}")
            print(failures[-1], file=sys.stderr, flush=True)  # noqa: T201 - a runner tells
    return counts, failures


def main() -> int:
    """Make a recorded run."""
    parser = argparse.ArgumentParser(description="Fold random networks, and compare.")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    counts, failures = record(range(options.start, options.start + options.cases))
    report = {
        "command": f"python tests/random_graphs.py --cases {options.cases} --start {options.start}",
        "torch": torch.__version__,
        "cpu seconds": round(time.process_time() - started),
        "failures": failures,
        "counts": dict(sorted(counts.items())),
    }
    options.record.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))  # noqa: T201 - a runner tells
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
