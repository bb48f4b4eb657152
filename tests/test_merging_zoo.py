"""Published nets with branches: as many convolutions as their own reparameterisation, same numbers.

    pytest tests/test_merging_zoo.py -m zoo

prints the table of the README.
"""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from randomise import difference, outputs, randomise
from torch import nn

import bntools
from bntools.recipe import Recipe, apply_edits

timm = pytest.importorskip("timm")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._BatchNorm,)
NETS = {
    "repvgg_a0": 64, "repvgg_b0": 64, "repvgg_b1g4": 64,
    "mobileone_s0": 64, "mobileone_s1": 64, "mobileone_s2": 64, "mobileone_s4": 64,
    "fastvit_t8": 64, "fastvit_s12": 64, "fastvit_sa12": 64,
    "repvit_m0_9": 64, "repvit_m1": 64,
    "repghostnet_050": 64, "repghostnet_100": 64,
    "efficientvit_m0": 224, "levit_128s": 224, "levit_conv_128s": 224, "tiny_vit_5m_224": 224,
}  # fmt: skip


def called(model: nn.Module, x: torch.Tensor, kinds: tuple[type, ...] = CONVOLUTIONS) -> int:
    """How many convolutions, or layers of other kinds, one forward calls."""
    count = []
    handles = [
        module.register_forward_hook(lambda *_: count.append(1))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    outputs(model, x)
    for handle in handles:
        handle.remove()
    return len(count)


def own_way(model: nn.Module) -> nn.Module:
    """The model as its authors make it ready: `reparameterize` of its modules, `fuse` of RepViT."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the layers that it makes have the default dtype
    try:
        return timm.utils.model.reparameterize_model(copy.deepcopy(model).double())
    finally:
        torch.set_default_dtype(default)


def check(name: str) -> str:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    randomise(model)
    x = torch.randn(1, 3, NETS[name], NETS[name])
    result = bntools.fold(model, x, merge_branches=True)
    theirs, wide = own_way(model), x.double()
    mine = called(result.model, x), called(theirs, wide)
    assert mine[0] <= mine[1]
    assert called(result.model, x, (nn.Linear,)) <= called(theirs, wide, (nn.Linear,))
    assert called(result.model, x, NORMS) <= called(theirs, wide, NORMS)
    assert result.report.check
    # both are compared with the original in float64: ours by the check, on inputs of its own
    error = difference(outputs(theirs, wide), outputs(copy.deepcopy(model).double(), wide))
    error += max(each.error for each in result.report.check.float64.outputs)
    assert error < 1e-9
    before, after = result.report.merging.before, result.report.merging.after
    return (
        f"| {name} | {before.convolutions} | {mine[0]} | {mine[1]} |"
        f" {100 * (after.parameters / before.parameters - 1):+.1f} % |"
        f" {100 * (after.flops / before.flops - 1):+.1f} % | {error:.0e} |"
    )


@pytest.mark.parametrize("name", ["repvgg_a0"])
def test_a_net_of_branches_becomes_plain(name):
    check(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", NETS)
def test_nets_of_branches_become_plain(name, capsys):
    row = check(name)
    with capsys.disabled():
        sys.stdout.write(f"\n{row}\n")


def test_a_merged_net_replays_on_a_fresh_one():
    """The recipe goes through JSON; the weights fit strictly."""
    torch.manual_seed(0)
    model = timm.create_model("mobileone_s0", pretrained=False).eval()
    randomise(model)
    x = torch.randn(1, 3, 64, 64)
    result = bntools.fold(model, x, merge_branches=True)
    recipe = Recipe.from_dict(json.loads(json.dumps(result.recipe.to_dict())))
    fresh = apply_edits(timm.create_model("mobileone_s0", pretrained=False).eval(), recipe)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert difference(outputs(fresh, x), outputs(result.model, x)) == 0
