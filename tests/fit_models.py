"""Small networks with batch norms, the same with new norms, and the sites to fit."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from randomise import randomise, settle
from torch import nn
from torch.nn import functional as F

from bntools.modules import get_module, replace_modules
from bntools.targets import Shape, Site, Target


class Residual(nn.Module):
    """Three norms: one with an activation, one before a sum, one on (N, C) at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-3)
        self.linear = nn.Linear(8, 12)
        self.bn3 = nn.BatchNorm1d(12)

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.bn3(self.linear(x.mean((2, 3))))


ACTIVATIONS = {"bn1": "act1"}


def made(cls: type[nn.Module] = Residual, images=None, dtype=torch.float64) -> nn.Module:
    """A network with random affine parameters and the statistics of what it sees."""
    model = cls().eval().to(dtype)
    randomise(model)
    settle(model, data(dtype=dtype) if images is None else images)
    return model


def data(count: int = 24, size: int = 6, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Images whose channels have other means and deviations."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=random, dtype=torch.float64)
    x *= torch.rand(count, 1, 1, 1, generator=random, dtype=torch.float64) + 0.5
    return (x + torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1)).to(dtype)


def swapped(
    model: nn.Module, target: Target, paths=("bn1", "bn2", "bn3"), positions: int = 36
) -> tuple[nn.Module, list[Site]]:
    """A copy with other norms, which take the activations of ACTIVATIONS where they can."""
    new, gone, sites = {}, {}, []
    for path in paths:
        norm = get_module(model, path)
        on_vectors = isinstance(norm, nn.BatchNorm1d)
        shape = Shape(norm.num_features, 1 if on_vectors else positions, 1 if on_vectors else 2)
        found = target.resolved(shape).target
        if found is None:
            continue
        takes = target.takes_activation and path in ACTIVATIONS
        activation = nn.ReLU() if takes else None
        if takes:
            gone[ACTIVATIONS[path]] = nn.Identity()
        new[path] = found.build(norm, activation)
        sites.append(Site(path, path, found, activation, target.candidates(shape)))
    return replace_modules(copy.deepcopy(model), {**new, **gone}), sites


def with_groups(site: Site, groups: int) -> Site:
    """A site whose number of groups is decided."""
    return replace(site, target=replace(site.target, groups=groups), groups=())


def parameters_of(model: nn.Module, sites) -> dict[str, torch.Tensor]:
    """The tensors of the new layers."""
    return {
        f"{site.layer}.{name}": tensor.detach().clone()
        for site in sites
        for name, tensor in get_module(model, site.layer).state_dict().items()
    }
