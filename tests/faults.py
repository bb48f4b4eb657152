"""Faults planted in folds: what a wrong tool does to a network, small enough to go unnoticed.

`python tests/faults_table.py` plants them all, and prints what is caught.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import timm
import torch
import torchvision
from onnx import numpy_helper
from random_graphs import KINDS as KINDS_OF_STEPS
from random_graphs import image, runs, write
from randomise import randomise, settle
from torch import Tensor, nn

import bntools
from bntools.affine import Affine
from bntools.depth import compare_layers
from bntools.equivalence import in_float64
from bntools.planning import compiled_of
from bntools.report import Equivalence, LayerError
from bntools.surgery.folding import fold_copy
from bntools.verifying import Reference

__all__ = [
    "ARCHITECTURES",
    "KINDS",
    "Fault",
    "Fold",
    "Outcome",
    "correct_folds",
    "fold_of",
    "severity",
]

_SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"
_SEED = 11
SHIFT = 1e-3
"""A shift of one channel, in standard deviations of that channel."""
MATTERS = 10
"""A fault matters where it changes the float64 output by so many limits."""


# Architectures


def _digits() -> tuple[nn.Module, Tensor]:
    return bntools.load(str(_SAMPLE)), torch.rand(4, 1, 8, 8)


def _image_net(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    make = getattr(torchvision.models, name, None) or getattr(torchvision.models.segmentation, name)
    return make(weights=None, **options), torch.randn(2, 3, 64, 64)


def _generator() -> tuple[nn.Module, Tensor]:
    """The generator of DCGAN (Radford et al. 2016), with a grouped and a depthwise layer."""
    layers: list[nn.Module] = []
    widths = [(24, 64, 1, 0, 1), (64, 48, 2, 1, 1), (48, 32, 2, 1, 4), (32, 32, 2, 1, 32)]
    for inside, out, stride, padding, groups in widths:
        conv = nn.ConvTranspose2d(inside, out, 4, stride, padding, groups=groups, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
    layers += [nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers), torch.randn(4, 24, 1, 1)


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "digits": _digits,
    "dcgan": _generator,
    "resnet18": functools.partial(_image_net, "resnet18"),
    "mobilenet_v3_small": functools.partial(_image_net, "mobilenet_v3_small"),
    "efficientnet_b0": functools.partial(_image_net, "efficientnet_b0"),
    "lraspp_mobilenet_v3_large": functools.partial(
        _image_net, "lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=5
    ),
}


# Folds with a fault


@dataclass(frozen=True)
class Fault:
    """What is wrong: the kind, at the norm of a path, in one channel or in all."""

    kind: str
    path: str
    channel: int | None = None

    def __str__(self) -> str:
        where = "" if self.channel is None else f"[{self.channel}]"
        return f"{self.kind} at {self.path}{where}"


def _wrong_eps(norm: nn.Module, _: int) -> None:
    norm.eps = 1e-3 if norm.eps < 5e-4 else 1e-5


def _shifted_bias(norm: nn.Module, channel: int) -> None:
    """The standard deviation of what a settled norm gives is its weight."""
    norm.bias[channel] += SHIFT * norm.weight[channel].abs()


def _shifted_mean(norm: nn.Module, channel: int) -> None:
    norm.running_mean[channel] += SHIFT * norm.running_var[channel].sqrt()


def _swapped(norm: nn.Module, channel: int) -> None:
    order = torch.arange(norm.num_features)
    other = (channel + 1) % norm.num_features
    order[channel], order[other] = other, channel
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.copy_(tensor[order])


PLANTED_IN_NORM: dict[str, Callable[[nn.Module, int], None]] = {
    "wrong eps": _wrong_eps,
    "shifted bias": _shifted_bias,
    "shifted mean": _shifted_mean,
    "swapped channels": _swapped,
}
KINDS = (*PLANTED_IN_NORM, "dropped norm", "bfloat16 weights")
_OF_A_CHANNEL = {"shifted bias", "shifted mean", "swapped channels"}


@dataclass
class Fold:
    """A network, its correct fold, and that fold with faults, on PyTorch and as ONNX."""

    model: nn.Module
    inputs: Tensor
    plan: bntools.Plan
    reference: Reference
    correct: nn.Module
    onnx: onnx.ModelProto | None = field(default=None, repr=False)

    @property
    def paths(self) -> list[str]:
        """The norms that fold, in execution order."""
        return [decision.path for decision in self.plan.folds]

    def faults(self, layers: int | None, channels: int) -> Iterator[Fault]:
        """Every kind of fault at so many layers, spread over the depth, and channels of them."""
        for path in _spread(self.paths, layers):
            width = self.model.get_submodule(path).num_features
            picked = _spread(range(width), channels)
            for kind in KINDS:
                for channel in picked if kind in _OF_A_CHANNEL else [None]:
                    yield Fault(kind, path, channel)

    @torch.no_grad()
    def faulty(self, fault: Fault) -> nn.Module:
        """The fold of the network that has a fault."""
        folds = list(compiled_of(self.plan).folds)
        (at,) = (i for i, fold in enumerate(folds) if fold.layer.path == fault.path)
        if fault.kind in PLANTED_IN_NORM:
            norm = copy.deepcopy(self.model.get_submodule(fault.path))
            PLANTED_IN_NORM[fault.kind](norm, fault.channel or 0)
            affine = Affine.of_batch_norm(
                norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
            (host,) = folds[at].hosts
            folds[at] = replace(folds[at], hosts=(replace(host, affine=affine),))
            return fold_copy(self.model, folds).model
        if fault.kind == "dropped norm":
            folded = fold_copy(self.model, [*folds[:at], *folds[at + 1 :]]).model
            parent, _, child = fault.path.rpartition(".")
            setattr(folded.get_submodule(parent), child, nn.Identity())
            return folded
        folded = fold_copy(self.model, folds).model
        weight = folded.get_parameter(folds[at].hosts[0].weight)
        weight.copy_(weight.bfloat16())
        return folded

    def faulty_onnx(self, folded: nn.Module, path: Path) -> Path:
        """Write the ONNX model of the correct fold with the numbers of another one."""
        assert self.onnx is not None
        proto = onnx.ModelProto()
        proto.CopyFrom(self.onnx)
        initialisers = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name, old in self.correct.state_dict().items():
            new = folded.state_dict().get(name)
            if new is None:  # a dropped norm takes with it the bias that its fold would have given
                new = torch.zeros_like(old)
            if not torch.equal(old, new):
                held = initialisers[name]
                assert torch.equal(torch.tensor(numpy_helper.to_array(held)), old), name
                held.CopyFrom(numpy_helper.from_array(new.numpy(), name))
        onnx.save(proto, path)
        return path

    def exported(self, path: Path) -> Path:
        """Export the correct fold, once."""
        if self.onnx is None:
            program = torch.onnx.export(
                self.correct, (self.inputs,), dynamo=True, optimize=False, verbose=False
            )
            self.onnx = program.model_proto
        onnx.save(self.onnx, path)
        return path

    def outcome(self, fault: Fault, folder: Path | None = None) -> Outcome:
        """Plant a fault and see who catches it; on ONNX Runtime too where there is a folder."""
        faulty = self.faulty(fault)
        candidates: dict[str, nn.Module | Path] = {"torch": faulty}
        if folder is not None:
            candidates["onnxruntime"] = self.faulty_onnx(faulty, folder / "faulty.onnx")
        change = severity(self.reference.judge(in_float64(faulty)))
        caught = {name: not self.reference.judge(each) for name, each in candidates.items()}
        if change >= MATTERS:
            return Outcome(fault, change, caught)
        layers = {
            name: compare_layers(self.model, each, self.inputs).first_different
            for name, each in candidates.items()
        }
        return Outcome(fault, change, caught, layers)


@dataclass(frozen=True)
class Outcome:
    """How much a fault changes the float64 output, in limits, and on which runtimes it is caught.

    `layers` has the first layer that differs, for faults that change the output too little.
    """

    fault: Fault
    change: float
    caught: dict[str, bool]
    layers: dict[str, LayerError | None] = field(default_factory=dict)

    @property
    def matters(self) -> bool:
        """Whether the output has to show it."""
        return self.change >= MATTERS

    def is_named(self, runtime: str) -> bool:
        """Whether the first layer that differs is the one with the fault."""
        first = self.layers.get(runtime)
        return first is not None and self.fault.path in (first.path, first.carries)


def severity(judged: Equivalence) -> float:
    """The largest error of an output, or of a slice of one, as a multiple of its limit."""
    return max(output.severity for output in judged.outputs)


def _spread(items: Any, count: int | None) -> list[Any]:
    """So many of the items, from the first to the last."""
    items = list(items)
    if count is None or count >= len(items):
        return items
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


@functools.cache
def fold_of(name: str) -> Fold:
    """A network of ARCHITECTURES with statistics that fit its inputs, and its correct fold."""
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model, inputs = ARCHITECTURES[name]()
    model.eval()
    if name != "digits":
        randomise(model, _SEED)
        settle(model, inputs)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plan = bntools.plan_fold(model, inputs)
    correct = fold_copy(model, compiled_of(plan).folds).model
    return Fold(model, inputs, plan, Reference(model, inputs), correct)


# Correct folds


def correct_folds(
    count: int, *, nets: bool = True
) -> Iterator[tuple[str, nn.Module, Any, nn.Module]]:
    """So many (name, network, inputs, its correct fold): small nets in turn, and random ones."""
    named = _small_nets() if nets else iter(())
    drawn = _random_networks()
    for index in range(count):
        found = next(named, None) if index % 2 else None
        yield found if found is not None else next(drawn)


def _small_nets() -> Iterator[tuple[str, nn.Module, Any, nn.Module]]:
    for seed, name in itertools.product(range(3), _SMALL):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if name.startswith("timm:"):
                model = timm.create_model(name.removeprefix("timm:"))
            else:
                model = getattr(torchvision.models, name)(weights=None)
            x = torch.randn(2, 3, 64, 64)
        model.eval()
        randomise(model, seed)
        settle(model, x)
        yield f"{name}, seed {seed}", model, x, _fold(model, x)


_SMALL = (
    "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "resnet18", "timm:ghostnet_050",
    "timm:test_efficientnet", "timm:resnet10t", "timm:repvgg_a0",
)  # fmt: skip


def _random_networks() -> Iterator[tuple[str, nn.Module, Any, nn.Module]]:
    """Networks of tests/random_graphs.py, in float32, in which something folds."""
    for seed in itertools.count():
        choose = random.Random(seed)
        rank = choose.randint(0, 3)
        program = [
            (choose.choice(KINDS_OF_STEPS), choose.randint(0, 9), choose.randint(0, 999))
            for _ in range(choose.randint(4, 14))
        ]
        model = write(rank, program, [])
        x = image(rank, 4, 6)
        if runs(model, x) is None:
            continue
        model, x = model.float(), x.float()
        if bntools.plan_fold(model, x).folds:
            yield f"random network {seed}", model, x, _fold(model, x)


def _fold(model: nn.Module, x: Tensor) -> nn.Module:
    return fold_copy(model, compiled_of(bntools.plan_fold(model, x)).folds).model
