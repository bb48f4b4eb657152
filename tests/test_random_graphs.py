"""Random networks from a vocabulary of layers: whatever folds must fold right, at any size.

A network is a program: instructions that read some of the registers and fill a new one. Modules are
shared, tensors are written in place and used twice, and channels, batch and image sizes collide on
purpose. BNTOOLS_EXAMPLES sets the number of networks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from randomise import difference, norms, outputs, randomise
from test_traps import changes, fingerprint
from torch import Tensor, nn

import bntools
from bntools.surgery.folding import fold_copy

EXAMPLES = int(os.environ.get("BNTOOLS_EXAMPLES", "150"))
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
        bias, rank, kind = bool(number & 1), self.program.rank, number // 2 % 5
        if rank == 0 or kind == 0:
            return nn.Linear(channels, out, bias=bias)
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
            assume(sum(self.channels[-2:]) == channels)

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


_OFTEN = ("host", "norm", "norm", *["block"] * 9)
KINDS = (*_OFTEN, *sorted(n[3:] for n in vars(Writer) if n.startswith("do_")))
_INSTRUCTIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 999)),
    min_size=2,
    max_size=14,
)


def write(rank: int, instructions: list[tuple[str, int, int]], returned: list[int]) -> Program:
    """The program that the numbers stand for, in float64, with statistics that show mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(instructions))
        writer = Writer(Program(rank))
        for kind, pick, number in instructions:
            writer.write(kind, pick, number)
        program = writer.program.double()
    nn.Module.train(program, False)
    randomise(program, len(instructions))
    program.returned = [-1, *(i % len(writer.channels) for i in returned)]
    return program


def image(rank: int, batch: int, size: int) -> Tensor:
    random = torch.Generator().manual_seed(batch + size)
    shape = (batch, _CHANNELS, *[size] * rank)
    return torch.randn(shape, generator=random, dtype=torch.float64) + 0.3


def runs(program: Program, inputs: Tensor) -> list[Tensor] | None:
    """The outputs; None where the program is none that runs, or that gives no finite numbers."""
    try:
        found = outputs(program, inputs)
    except (RuntimeError, ValueError, IndexError):
        return None
    return found if all(t.isfinite().all() and t.norm() > 1e-6 for t in found) else None


def check(program: Program, counts: Counter[str]) -> None:
    """The plan is whole, the argument untouched, and the unchecked fold right at three sizes."""
    sizes = [(_BATCH, _SIZE), (_BATCH + 1, _SIZE), (_BATCH - 1, _SIZE + 2)]
    examples = [image(program.rank, *size) for size in sizes]
    truths = [runs(program, example) for example in examples]
    assume(truths[0] is not None)
    before = fingerprint(program, examples[0])
    plan = bntools.plan_fold(program, examples[0])
    folds = plan.compiled.folds if plan.decisions else ()
    folded = fold_copy(program, folds).model
    assert changes(before, fingerprint(program, examples[0])) == []
    assert sorted(d.path for d in plan.decisions) == sorted(norms(program))
    assert norms(folded).keys() == {d.path for d in plan.kept}
    for example, truth in zip(examples, truths, strict=True):
        if truth is not None:
            assert difference(outputs(folded, example), truth) < 1e-10, str(plan)
    counts["norms"] += len(plan.decisions)
    counts["folded"] += len(plan.folds)
    counts["checked"] += 1


@pytest.mark.timeout(3600)
def test_whatever_folds_in_a_random_network_folds_right():
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES == 150,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(st.integers(0, 3), _INSTRUCTIONS, st.lists(st.integers(0, 20), max_size=1))
    def network_folds_right(rank, instructions, returned):
        check(write(rank, instructions, returned), counts)

    network_folds_right()
    assert counts["checked"] > EXAMPLES // 2
    assert counts["folded"] > counts["norms"] // 5, counts
    if EXAMPLES != 150:
        print(dict(counts))  # noqa: T201 (asked for by the one who set the number)
