"""Tuning new norms against the original: better, never worse, the same each time, nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from fit_models import Residual, data, made, parameters_of, swapped
from torch import nn
from torch.nn import functional as F

from bntools.distilling import DistillOptions, distill
from bntools.errors import FitError
from bntools.fitting import fit
from bntools.fitting.tuning import Schedule, tuned
from bntools.modules import replace_modules
from bntools.targets import Site, ToEvoNormB0, ToEvoNormS0, ToGroupNorm, ToLayerNorm

FEW = DistillOptions(steps=60, rate=0.02)


class Net(nn.Module):
    """A stem, two residual blocks in a Sequential, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


PATHS = tuple(f"blocks.{i}.bn{k}" for i in (0, 1) for k in (1, 2))


def fitted(target, model, images, paths=PATHS):
    """A network with new norms, fitted; EvoNorms take the activations of the blocks."""
    replaced, sites = swapped(model, target, paths)
    if target.takes_activation:
        gone = {}
        for index, site in enumerate(sites):
            if site.path.endswith("bn1"):
                new = site.target.build(copy.deepcopy(model).get_submodule(site.path), nn.ReLU())
                gone[site.layer] = new.eval()
                gone[site.layer[:-3] + "act1"] = nn.Identity()
                sites[index] = Site(site.path, site.layer, site.target, nn.ReLU())
        replaced = replace_modules(replaced, gone)
    fit(model, replaced, sites, images.split(8))
    return replaced, sites


def distance(replaced, model, images):
    with torch.no_grad():
        a, b = replaced(images), model(images)
    return float((a - b).norm() / b.norm())


TARGETS = {
    "groupnorm": ToGroupNorm(4),
    "layernorm-channels": ToLayerNorm("channels"),
    "evonorm-s0": ToEvoNormS0(groups=4),
    "evonorm-b0": ToEvoNormB0(),
}
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@each_target
def test_every_block_and_the_outputs_come_nearer(target):
    """On the images that it was tuned on, and on others."""
    model, images, others = made(Net), data(40), data(64, seed=1)
    replaced, sites = fitted(target, model, images)
    before = distance(replaced, model, others)
    report = distill(model, replaced, sites, images.split(8), FEW)
    assert [block.path for block in report.blocks] == ["blocks.0", "blocks.1"]
    assert [block.layers for block in report.blocks] == [PATHS[:2], PATHS[2:]]
    assert all(block.after < block.before for block in report.blocks)
    assert report.after.relative_l2 < report.before.relative_l2
    assert report.after.relative_l2 == pytest.approx(distance(replaced, model, images), rel=1e-5)
    assert distance(replaced, model, others) < before


def test_a_rate_that_is_too_large_leaves_things_as_they_were():
    """The best that was found is what there was before."""
    model, images = made(Net), data(40)
    replaced, sites = fitted(ToGroupNorm(4), model, images)
    before = parameters_of(replaced, sites)
    options = DistillOptions(steps=8, rate=1e4)
    report = distill(model, replaced, sites, images.split(8), options)
    after = parameters_of(replaced, sites)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.after == report.before
    assert all(block.after == block.before for block in report.blocks)


def test_farther_outputs_are_never_handed_over():
    """Blocks that come nearer may add up to outputs that do not: then all is as it was."""
    model, images = made(Outside), data(40)
    replaced, sites = swapped(model, ToGroupNorm(4), ("first.bn",))
    fit(model, replaced, sites, images.split(8))
    with torch.no_grad():  # the best outputs, of a block that is far off
        replaced.head.weight.copy_(model.head.weight / 2)
        replaced.first.bn.weight.mul_(2)
        replaced.first.bn.bias.mul_(2)
    before = parameters_of(replaced, sites)
    options = DistillOptions(steps=40, rate=0.05, end_to_end=False)
    report = distill(model, replaced, sites, images.split(8), options)
    assert report.blocks[0].after < report.blocks[0].before
    assert report.warnings == ("the outputs came no nearer: the fitted parameters are kept",)
    after = parameters_of(replaced, sites)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_norm_parameters_change():
    """Nothing else of the new network, and nothing at all of the original, the RNG and the data."""
    model, images = made(Net), data(40)
    replaced, sites = fitted(ToEvoNormB0(), model, images)
    replaced.train()
    replaced.head.weight.requires_grad_(False)
    mine = {name: t.clone() for name, t in replaced.state_dict().items()}
    theirs = {name: t.clone() for name, t in model.state_dict().items()}
    inputs, state = images.clone(), torch.get_rng_state()
    distill(model, replaced, sites, images.split(8), FEW)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in theirs.items())
    changed = {n for n, t in mine.items() if not torch.equal(t, replaced.state_dict()[n])}
    assert changed
    assert all(n.rpartition(".")[2] in ("weight", "bias", "v") and "bn" in n for n in changed)
    assert torch.equal(images, inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in replaced.modules())
    assert not any(module.training for module in model.modules())
    assert replaced.blocks[0].conv1.weight.requires_grad
    assert not replaced.head.weight.requires_grad
    assert all(p.grad is None for net in (model, replaced) for p in net.parameters())
    assert all("forward" not in vars(m) for net in (model, replaced) for m in net.modules())


def test_the_seed_decides():
    """The same seed gives the same bits, another one other batches."""
    model, images = made(Net, dtype=torch.float32), data(40, dtype=torch.float32)
    found = []
    for seed in (0, 0, 1):
        replaced, sites = fitted(ToGroupNorm(4), model, images)
        options = DistillOptions(steps=7, seed=seed)
        distill(model, replaced, sites, images.split(8), options)
        found.append(parameters_of(replaced, sites))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_tuned_in_float32(dtype):
    """The result has the dtype that it had, and is finite."""
    model, images = made(Net, dtype=torch.float32).to(dtype), data(40, dtype=torch.float32)
    replaced, sites = fitted(ToEvoNormS0(groups=4), model, images)
    report = distill(model, replaced, sites, images.split(8), FEW)
    assert report.after.relative_l2 < report.before.relative_l2
    assert {t.dtype for t in parameters_of(replaced, sites).values()} == {dtype}
    assert all(bool(t.isfinite().all()) for t in parameters_of(replaced, sites).values())


@pytest.mark.parametrize("when", [("blocks.1", 3), ("the outputs", 3)])
def test_ctrl_c_leaves_everything_as_it_was(when):
    """In a block, and at the end."""
    model, images = made(Net), data(40)
    replaced, sites = fitted(ToGroupNorm(4), model, images)
    before = {name: t.clone() for name, t in replaced.state_dict().items()}

    def stop(progress):
        if (progress.layer, progress.done) == when:
            raise KeyboardInterrupt

    options = DistillOptions(steps=5, progress=stop)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        distill(model, replaced, sites, images.split(8), options)
    assert all(torch.equal(t, replaced.state_dict()[name]) for name, t in before.items())
    assert not any(m.training for m in replaced.modules())


def test_what_goes_to_disk_comes_back_the_same(tmp_path):
    """With no memory for activations."""
    model, images = made(Net, dtype=torch.float32), data(40, dtype=torch.float32)
    found = []
    for cache in (1 << 30, 0):
        replaced, sites = fitted(ToGroupNorm(4), model, images)
        options = DistillOptions(steps=5, cache_bytes=cache, cache_dir=tmp_path)
        distill(model, replaced, sites, images.split(8), options)
        found.append(parameters_of(replaced, sites))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert list(tmp_path.iterdir()) == []


class Outside(nn.Module):
    """The activation of a block's last norm stands behind the block."""

    def __init__(self):
        super().__init__()
        self.first = Half()
        self.act1 = nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.act1(self.first(x)).mean((2, 3)))


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_an_activation_that_was_taken_from_behind_a_block_counts():
    """The block is to give what came out of the activation, not of the old norm."""
    model, images = made(Outside), data(40)
    new = ToEvoNormS0(groups=4).build(model.first.bn, nn.ReLU())
    replaced = replace_modules(copy.deepcopy(model), {"first.bn": new, "act1": nn.Identity()})
    sites = [Site("first.bn", "first.bn", ToEvoNormS0(groups=4), nn.ReLU())]
    error = fit(model, replaced, sites, images.split(8)).layers[0].error
    options = DistillOptions(steps=10, end_to_end=False)
    (block,) = distill(model, replaced, sites, images.split(8), options).blocks
    assert block.path == "first"
    assert block.after <= block.before
    assert block.before == pytest.approx(error, rel=0.2)


class Listing(Residual):
    """Gives as many rows as it finds: nothing to compare row by row."""

    def forward(self, x):
        y = super().forward(x)
        return [y[y[:, 0] > y[:, 1]]]


def test_outputs_that_do_not_compare_are_told():
    """The final outputs are left out, with a warning."""
    model, images = made(Listing), data(40)
    replaced, sites = swapped(model, ToGroupNorm(4))
    fit(model, replaced, sites, [images])
    report = distill(model, replaced, sites, [images], DistillOptions(steps=2))
    assert report.blocks == ()
    assert report.warnings == ("the final outputs are not tuned: they do not compare",)


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 6, 6)]])
def test_no_samples_are_refused(batches):
    """An empty list, and batches of no samples."""
    model = made(Net)
    replaced, sites = swapped(model, ToGroupNorm(4), PATHS)
    with pytest.raises(FitError, match=r"^Cannot distill on no samples"):
        distill(model, replaced, sites, batches, FEW)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(steps):
    """There is nothing to do."""
    model = made(Net)
    replaced, sites = swapped(model, ToGroupNorm(4), PATHS)
    with pytest.raises(FitError, match=r"^Cannot distill: give at least one step"):
        distill(model, replaced, sites, [data()], DistillOptions(steps=steps))


def test_progress_counts_the_steps():
    """For each block, and for the outputs."""
    model, images = made(Net), data(40)
    replaced, sites = fitted(ToGroupNorm(4), model, images)
    events = []
    options = DistillOptions(steps=3, progress=events.append)
    distill(model, replaced, sites, images.split(8), options)
    names = ["blocks.0"] * 3 + ["blocks.1"] * 3 + ["the outputs"] * 3
    assert [(e.stage, e.layer, e.done, e.total) for e in events] == [
        ("distill", name, step % 3 + 1, 3) for step, name in enumerate(names)
    ]


def test_values_of_any_size_are_found():
    """Each moves in units of its own size: one of 1e4 beside one of 1."""
    layer = nn.GroupNorm(1, 2)
    parameters = {(layer, "weight"): torch.tensor([1.0, 1e4])}
    wanted = torch.tensor([1.2, 0.9e4])

    def loss(number):
        return ((layer.weight - wanted) / wanted).square().sum()

    how = Schedule(200, 0.02, 0, lambda step: None)
    found = tuned(parameters, loss, [0], [0], how)
    torch.testing.assert_close(found.values[layer, "weight"], wanted, rtol=1e-2, atol=0)
    assert found.after < 1e-3 * found.before
    assert isinstance(layer.weight, nn.Parameter)


def test_the_report_can_be_read_and_written():
    """As a table, in one line, and as JSON data."""
    model, images = made(Net), data(40)
    replaced, sites = fitted(ToGroupNorm(4), model, images)
    report = distill(model, replaced, sites, images.split(8), DistillOptions(steps=2))
    assert "blocks.1" in str(report)
    assert report.summary().startswith("distilled 2 blocks: outputs ")
    assert report.to_dict()["blocks"][0]["layers"] == list(PATHS[:2])
