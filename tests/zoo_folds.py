"""Zoo models whose norm layers must fold: refusing more than needed is a fault too."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import CASES, IMAGE, Case, Net, case, either, fold, rand

from bntools.report import Reason

WIDE = rand(2, 4, 8, 8)


def _pair(host: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(host(), norm())


_LINE, _VOLUME, _ROW = rand(2, 3, 12), rand(2, 3, 4, 5, 5), rand(5, 6)
_BN1, _BN2, _BN3 = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], Any]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), lambda: _BN1(6), _LINE),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), lambda: _BN2(6), IMAGE),
    "conv3d": (lambda: nn.Conv3d(3, 6, 3), lambda: _BN3(6), _VOLUME),
    "conv2d_without_bias": (lambda: nn.Conv2d(3, 6, 3, bias=False), lambda: _BN2(6), IMAGE),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: _BN2(6), WIDE),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: _BN2(4), WIDE),
    "conv2d_depthwise_multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: _BN2(8), WIDE),
    "conv2d_strided": (lambda: nn.Conv2d(3, 6, 3, 2, 2, 2), lambda: _BN2(6), IMAGE),
    "conv2d_same": (lambda: nn.Conv2d(3, 6, 3, padding="same"), lambda: _BN2(6), IMAGE),
    "conv2d_reflect": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        lambda: _BN2(6),
        IMAGE,
    ),
    "conv2d_circular_without_bias": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", bias=False),
        lambda: _BN2(6),
        IMAGE,
    ),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 6, 3), lambda: _BN1(6), _LINE),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 6, 3, 2, 1, 1), lambda: _BN2(6), IMAGE),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(3, 6, 2), lambda: _BN3(6), _VOLUME),
    "conv_transpose_square": (lambda: nn.ConvTranspose2d(4, 4, 3), lambda: _BN2(4), WIDE),
    "conv_transpose_grouped_square": (
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=2),
        lambda: _BN2(4),
        WIDE,
    ),
    "conv_transpose_grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        lambda: _BN2(6),
        WIDE,
    ),
    "conv_transpose_grouped_narrow": (
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False),
        lambda: _BN1(4),
        rand(2, 6, 9),
    ),
    "conv_transpose_depthwise": (
        lambda: nn.ConvTranspose3d(3, 3, 2, groups=3),
        lambda: _BN3(3),
        _VOLUME,
    ),
    "linear": (lambda: nn.Linear(6, 4), lambda: _BN1(4), _ROW),
    "linear_without_bias": (lambda: nn.Linear(6, 4, bias=False), lambda: _BN1(4), _ROW),
    "no_affine": (lambda: nn.Conv2d(3, 6, 3), lambda: _BN2(6, affine=False), IMAGE),
    "large_eps": (lambda: nn.Conv2d(3, 6, 3), lambda: _BN2(6, eps=0.5), IMAGE),
    "zero_momentum": (lambda: nn.Conv2d(3, 6, 3), lambda: _BN2(6, momentum=0.0), IMAGE),
    "sync_batch_norm": (lambda: nn.Conv2d(3, 6, 3), lambda: nn.SyncBatchNorm(6), IMAGE),
}
for _name, (_host, _norm, _inputs) in _PAIRS.items():
    CASES[_name] = Case(_name, partial(_pair, _host, _norm), {"1": fold("0")}, _inputs)
for _name, _dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
    CASES[_name] = Case(
        _name,
        lambda dtype=_dtype: _pair(lambda: nn.Conv2d(3, 6, 3), lambda: _BN2(6)).to(dtype),
        {"1": fold("0")},
        IMAGE,
        dtype=_dtype,
    )
    CASES[f"{_name}_linear_without_bias"] = Case(
        f"{_name}_linear_without_bias",
        lambda dtype=_dtype: _pair(lambda: nn.Linear(6, 8, bias=False), lambda: _BN1(8)).to(dtype),
        {"1": fold("0")},
        _ROW,
        dtype=_dtype,
    )


# Kinds of norm layers


@case({"1": fold("0")})
def lazy_norm_after_a_forward():
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d())
    model.eval()(IMAGE())
    return model


@case({"1": fold("0")}, needs="torchvision")
def frozen_batch_norm():
    from torchvision.ops import FrozenBatchNorm2d

    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), FrozenBatchNorm2d(6), nn.ReLU())


@case({"1": fold("0")}, needs="timm")
def batch_norm_with_activation():
    from timm.layers import BatchNormAct2d

    return nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6, act_layer=nn.SiLU), nn.Tanh())


class PlainSubclass(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        assert input.ndim == 4
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.1, self.eps)


@case({"1": fold("0")})
def subclass_that_does_no_more_than_a_norm():
    return nn.Sequential(nn.Conv2d(3, 6, 3), PlainSubclass(6))


@case({"bn": fold("conv")})
def only_batch_norms_count():
    """An InstanceNorm with statistics reaches the kernels as a batch norm over N * C channels."""
    other = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    return Net(
        lambda m, x: m.group(m.second(m.instance(m.first(x)))) + m.bn(m.conv(x)),
        first=nn.Conv2d(3, 6, 3),
        instance=other,
        second=nn.Conv2d(6, 6, 1),
        group=nn.GroupNorm(2, 6),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


# Ways of calling


@case({"bn": fold("conv")})
def functional_convolution_with_bias():
    return Net(
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")})
def host_forward_called_directly():
    return Net(
        lambda m, x: m.bn(m.conv.forward(x)),
        conv=nn.Conv2d(3, 6, 3, bias=False),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": either("conv", reasons=(Reason.OUTSIDE_FORWARD,))})
def norm_forward_called_directly():
    return Net(lambda m, x: m.bn.forward(m.conv(x)), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


class SamePadding(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        padded = F.pad(input, (0, 1, 0, 1))
        return F.conv2d(padded, self.weight, self.bias, self.stride)


@case({"bn": fold("conv"), "bn2": fold("conv2")})
def convolution_that_pads_itself():
    return Net(
        lambda m, x: m.bn2(m.conv2(m.bn(m.conv(x)).relu())),
        conv=SamePadding(3, 6, 3, 2, bias=False),
        bn=nn.BatchNorm2d(6),
        conv2=SamePadding(6, 4, 2),
        bn2=nn.BatchNorm2d(4),
    )


class OwnConvolution(nn.Module):
    """A convolution that is no subclass of torch's, with a bias that it passes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.offset)


@case({"1": fold("0")})
def host_of_an_unknown_class():
    return nn.Sequential(OwnConvolution(), nn.BatchNorm2d(6))


class Rooted(nn.Module):
    """The model itself owns the weight of its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(4))
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.linear(x, self.weight, self.bias))


@case({"bn": fold("")}, _ROW)
def host_is_the_model_itself():
    return Rooted()


@case({"bn": fold("conv")})
def forward_writes_to_its_input():
    return Net(
        lambda m, x: m.bn(m.conv(x.mul_(2).add_(1))),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": either("conv")}, rand(2, 2, 3, 8, 8))
def vectorised_map():
    return Net(
        lambda m, x: torch.vmap(lambda image: m.bn(m.conv(image)))(x),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv"), "bn2": fold("fc")})
def inference_mode_inside():
    """Composite operations arrive whole there."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = m.bn(m.conv(x)).relu().flatten(2)
            return m.bn2(m.fc(y).transpose(1, 2)).clone()

    return Net(
        forward,
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
        fc=nn.Linear(36, 5),
        bn2=nn.BatchNorm1d(5),
    )


@case({"bn": fold("conv")})
def gradients_enabled_inside():
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return m.bn(m.conv(x))

    return Net(forward, conv=nn.Conv2d(3, 6, 3, bias=False), bn=nn.BatchNorm2d(6))


@case({"block.1": fold("block.0")})
def checkpointed_block():
    from torch.utils.checkpoint import checkpoint

    return Net(
        lambda m, x: checkpoint(m.block, x, use_reentrant=False),
        block=nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    )


@case({"bn": fold("conv")}, lambda: {"image": IMAGE(), "scale": 2.0})
def keyword_arguments():
    return Net(
        lambda m, image, scale: {"out": [m.bn(m.conv(image)) * scale]},
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")}, lambda: ([rand(3, 9, 8)(), rand(3, 7, 8)()],))
def list_of_images():
    return Net(
        lambda m, images: [m.bn(m.conv(x[None])) for x in images],
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")}, rand(3, 8, 8))
def unbatched_convolution():
    return Net(lambda m, x: m.bn(m.conv(x)[None]), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"bn": either("fc")}, _ROW)
def matrix_product_with_bias():
    return Net(
        lambda m, x: m.bn(torch.addmm(m.fc.bias, x, m.fc.weight.t())),
        fc=nn.Linear(6, 4),
        bn=nn.BatchNorm1d(4),
    )


# Data movement between host and norm


@case({"3": fold("0")})
def dropout_and_identity_between():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout2d(0.4), nn.Identity(), nn.BatchNorm2d(6))


@case({"bn": fold("fc")}, rand(2, 7, 6))
def linear_then_transpose():
    return Net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(6, 5), bn=nn.BatchNorm1d(5))


@case({"bn": fold("fc")}, rand(2, 7, 6))
def linear_then_flattened_batch():
    """LeViT: (N, L, C) becomes (N * L, C) for the norm, and goes back."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        return m.bn(y.flatten(0, 1)).reshape_as(y)

    return Net(forward, fc=nn.Linear(6, 6, bias=False), bn=nn.BatchNorm1d(6))


@case({"bn": fold("conv")}, rand(2, 3, 4, 4))
def flattened_pixel():
    return Net(
        lambda m, x: m.bn(torch.flatten(m.conv(x), 1)),
        conv=nn.Conv2d(3, 6, 4),
        bn=nn.BatchNorm1d(6),
    )


@case({"bn": fold("conv")})
def permuted_there_and_back():
    return Net(
        lambda m, x: m.bn(m.conv(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn_a": fold("conv"), "bn_b": fold("conv")})
def norms_on_halves():
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.conv(x).chunk(2, dim=1)
        return m.bn_a(a) * m.bn_b(b)

    return Net(forward, conv=nn.Conv2d(3, 8, 3), bn_a=nn.BatchNorm2d(4), bn_b=nn.BatchNorm2d(4))


@case({"bn": either("conv", reasons=(Reason.USED_ELSEWHERE,))})
def norm_on_one_half():
    """The other half could be left alone; a planner that does not look so closely may refuse."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.conv(x).split(4, dim=1)
        return m.bn(a) * b

    return Net(forward, conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(4))


@case({"bn": fold("a", "b")})
def norm_on_a_concatenation():
    return Net(
        lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], dim=1)),
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(3, 5, 3, bias=False),
        bn=nn.BatchNorm2d(9),
    )


@case({"bn": fold("a", "b")})
def norm_on_a_concatenation_of_pixels():
    return Net(
        lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], dim=3)),
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
    )


@case({"bn": fold("conv")})
def channel_shuffle():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        n, c, h, w = y.shape
        return m.bn(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"2": fold("0")})
def pixel_shuffle():
    """Norm channel c gets the host's channels 4c to 4c + 3."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2))


@case({"bn": fold("conv")})
def groups_as_batch():
    """Each norm channel is given to two channels of the host."""
    return Net(
        lambda m, x: m.bn(m.conv(x).reshape(4, 4, 6, 6)),
        conv=nn.Conv2d(3, 8, 3),
        bn=nn.BatchNorm2d(4),
    )


@case({"bn": fold("conv")})
def flipped_channels():
    return Net(lambda m, x: m.bn(m.conv(x).flip(1)), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"bn": fold("conv")}, rand(2, 3, 3, 3))
def expanded_pixel():
    return Net(
        lambda m, x: m.bn(m.conv(x).expand(-1, -1, 4, 4)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


# Sharing that does no harm


@case({"first": fold("conv"), "second": fold("conv")})
def norm_on_norm():
    return Net(
        lambda m, x: m.second(m.first(m.conv(x))).relu(),
        conv=nn.Conv2d(3, 6, 3),
        first=nn.BatchNorm2d(6),
        second=nn.BatchNorm2d(6),
    )


@case({"bn": fold("a", "b")})
def norm_called_after_two_hosts():
    return Net(
        lambda m, x: m.bn(m.a(x)) * m.bn(m.b(x)),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(3, 6, 3, bias=False),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")}, lambda: (rand(2, 3, 8, 8)(), rand(2, 3, 4, 4)()))
def pyramid_levels():
    return Net(
        lambda m, *levels: [m.bn(m.conv(x)).relu_() for x in levels],
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")})
def applied_repeatedly():
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.bn(m.conv(x)).tanh()
        return x

    return Net(forward, conv=nn.Conv2d(3, 3, 3, padding=1), bn=nn.BatchNorm2d(3))


@case({"bn": fold("conv")})
def norm_called_twice_on_one_output():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y).sigmoid() * m.bn(y)

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"a": fold("conv")})
def norm_under_two_names():
    norm = nn.BatchNorm2d(6)
    return Net(lambda m, x: m.b(m.conv(x)), conv=nn.Conv2d(3, 6, 3), a=norm, b=norm)


@case({"bn": fold("a")})
def host_under_two_names():
    conv = nn.Conv2d(3, 6, 3)
    return Net(lambda m, x: m.bn(m.b(x)), a=conv, b=conv, bn=nn.BatchNorm2d(6))


@case({"a.1": fold("a.0")})
def block_under_two_names():
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    return Net(lambda m, x: m.b(m.a(x)), a=block, b=block)


@case({"bn1": fold("conv1"), "bn2": fold("conv2")})
def one_relu_for_all():
    return Net(
        lambda m, x: m.relu(m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))),
        conv1=nn.Conv2d(3, 6, 3),
        bn1=nn.BatchNorm2d(6),
        relu=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(6, 6, 3),
        bn2=nn.BatchNorm2d(6),
    )


@case({"bn_a": either("a"), "bn_b": either("b")})
def norms_that_share_their_affine():
    first, second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    second.weight, second.bias = first.weight, first.bias
    return Net(
        lambda m, x: m.bn_a(m.a(x)) * m.bn_b(m.b(x)),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(3, 6, 3),
        bn_a=first,
        bn_b=second,
    )


@case(
    {
        "1": either("0", reasons=(Reason.TIED_WEIGHT,)),
        "3": either("2", reasons=(Reason.TIED_WEIGHT,)),
    }
)
def weights_that_share_storage():
    """Two parameters of one storage: right when new tensors replace both."""
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
    )
    model[2].weight.data = model[0].weight.data
    return model


# What comes after the norm, or beside it


@case({"bn": fold("conv")})
def in_place_activation_after():
    return Net(
        lambda m, x: F.relu_(m.bn(m.conv(x))).add_(1),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")})
def output_overwritten():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        y[:] = 0
        return y + x.mean()

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"bn": fold("a")})
def output_unused():
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn(m.a(x))
        return m.b(x)

    return Net(forward, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"bn": fold("conv")})
def pre_norm_shape_is_used():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + torch.arange(y.shape[3]).to(x) + y.numel()

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"bn": either("conv", reasons=(Reason.USED_ELSEWHERE,))})
def pre_norm_zeros_like():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + torch.zeros_like(y)

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"bn": fold("conv")})
def batch_mates_matter():
    """The result of an image depends on the others of its batch."""
    return Net(
        lambda m, x: (y := m.bn(m.conv(x - x.mean(0, keepdim=True)))) - y.mean(),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")})
def draws_random_numbers():
    return Net(
        lambda m, x: m.bn(m.conv(x)) + 0 * torch.randn_like(x).mean(),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"block.1": fold("block.0")}, finish=lambda m: m.block.register_forward_hook(lambda *_: None))
def hook_that_sees_the_normed_output():
    return Net(lambda m, x: m.block(x), block=nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))


@case(
    {"1": either("0", reasons=(Reason.HOOKS,))},
    finish=lambda m: m[0].register_forward_pre_hook(lambda *_: None),
)
def hook_that_sees_the_input():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"bn": either("fc")}, rand(2, 7, 6))
def view_of_the_output_of_a_norm_on_a_transposed():
    """A norm's output is contiguous; what takes its place has to allow that view as well."""
    return Net(
        lambda m, x: m.bn(m.fc(x).transpose(1, 2)).view(2, -1),
        fc=nn.Linear(6, 5),
        bn=nn.BatchNorm1d(5),
    )


@case({"bn": either("conv")})
def output_seen_by_another_thread():
    """Modes of the dispatcher are per thread: what the other one does is not recorded."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, seen = m.conv(x), []
        thread = threading.Thread(target=lambda: seen.append(y.detach().mean()))
        thread.start()
        thread.join()
        return m.bn(y) + seen[0]

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


# Awkward numbers


def _set(**values: float | list[float]) -> Callable[[Any], None]:
    """Set statistics or affine parameters of the norm at the end of a Sequential."""

    def finish(model: Any) -> None:
        for name, value in values.items():
            with torch.no_grad():
                tensor = getattr(model[-1], name)
                tensor.copy_(torch.tensor(value, dtype=torch.float64).expand_as(tensor))

    return finish


@case({"1": fold("0")}, finish=_set(running_var=[0.0, 5e-45, 1e5, 1.0, 0.5, 2.0]))
def variances_of_the_wild():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"1": fold("0")}, finish=_set(running_var=[1e-7, 3e-6, 9e-6, 1.0, 0.5, 2.0]))
def half_of_the_variances_under_eps():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"1": fold("0")}, _ROW, finish=_set(weight=1e7))
def outputs_of_ten_million():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))


@case({"1": fold("0")}, finish=_set(weight=[0.0, 0.0, 1.0, -1.0, 1.0, 1.0]))
def dead_channels():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"1": fold("0")}, finish=_set(num_batches_tracked=0))
def never_counted_batches():
    """Converted files have real statistics and a count of 0."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case(
    {"1": fold("0")}, rand(2, 8, 64, 64), finish=_set(weight=1e-4, bias=1e-4), dtype=torch.float16
)
def half_precision_subnormals():
    """In float16 subnormal weights are ordinary ones: flushing them to zero would be an error."""
    return nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).half()


@case({"bn": fold("conv")}, dtype=torch.float16)
def half_convolution_and_float_norm():
    return Net(
        lambda m, x: m.head(m.bn(m.conv(x).to(m.head.weight.dtype))),
        conv=nn.Conv2d(3, 6, 3).half(),
        bn=nn.BatchNorm2d(6),
        head=nn.Conv2d(6, 2, 1),
    )


@case({"bn": fold("conv")}, dtype=torch.bfloat16, float64=False)
def bfloat16_convolution_and_float_norm():
    return Net(
        lambda m, x: m.bn(m.conv(x).float()),
        conv=nn.Conv2d(3, 6, 3).bfloat16(),
        bn=nn.BatchNorm2d(6),
    )


@case(
    {"bn": either("conv", reasons=(Reason.COMPUTED_WEIGHT, Reason.NOT_AFTER_LINEAR))}, float64=False
)
def autocast_inside():
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.bn(m.conv(x)).float()

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@case({"1": fold("0")})
def channels_last():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    return model.to(memory_format=torch.channels_last)


# Awkward classes


@case(
    {"blocks.0.1": fold("blocks.0.0"), "blocks.1.1": fold("blocks.1.0"), "heads.left": fold("neck")}
)
def nested_containers():
    blocks = [nn.Sequential(nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for c in (3, 4)]

    def forward(m: Any, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = block(x)
        return m.heads["left"](m.neck(x))

    return Net(
        forward,
        blocks=nn.ModuleList(blocks),
        neck=nn.Conv2d(4, 4, 3),
        heads=nn.ModuleDict({"left": nn.BatchNorm2d(4)}),
    )


@case({"bn1": fold("conv2"), "bn2": fold("conv1")})
def registered_in_another_order():
    return Net(
        lambda m, x: m.bn2(m.conv1(m.bn1(m.conv2(x)).relu())),
        conv1=nn.Conv2d(6, 6, 3),
        bn1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(3, 6, 3),
        bn2=nn.BatchNorm2d(6),
    )


@case({"bn": fold("conv")})
def class_that_shadows_modules():
    return Net(
        lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), modules=[]
    )


@case({"bn": fold("conv")})
def cannot_be_deep_copied():
    return Net(
        lambda m, x: m.bn(m.conv(x)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
        lock=threading.Lock(),
        stream=(i for i in range(3)),
    )


class Unhelpful(nn.Sequential):
    """Falsy, and its `train` returns nothing, so that `model.eval()` is None."""

    def __len__(self) -> int:
        return 0

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


@case({"1": fold("0")})
def falsy_model_whose_eval_returns_none():
    return Unhelpful(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"bn": either("conv")})
def closure_over_the_model():
    """Copies call the modules of the original: fold into these, and the copy is not folded."""
    model = Net(lambda m, x: m.call(x), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))
    model.call = lambda x: model.bn(model.conv(x))
    return model


@case({"bn": either("conv")})
def norm_in_a_plain_list_as_well():
    """What is replaced by its path is still called through the list."""
    norm = nn.BatchNorm2d(6)
    return Net(lambda m, x: m.all[0](m.conv(x)), conv=nn.Conv2d(3, 6, 3), bn=norm, all=[norm])


@case({"bn": either("conv")})
def forward_reads_attributes_of_the_norm():
    return Net(
        lambda m, x: m.bn(m.conv(x)) * m.bn.num_features + m.bn.eps,
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": either("conv")})
def written_through_numpy():
    """Neither the dispatcher nor the version counter sees that write."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.numpy()[:] *= 2
        return m.bn(y)

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))


@dataclass
class Detection:
    boxes: Tensor
    scores: tuple[Tensor, int]


@case({"bn": fold("conv")})
def dataclass_output():
    return Net(
        lambda m, x: Detection(y := m.bn(m.conv(x)), (y.amax((2, 3)), 3)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"block.1": fold("block.0")})
def scripted_function_beside():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gelu = torch.jit.script(nn.GELU())
    block = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    return Net(lambda m, x: m.gelu(m.block(x)), block=block, gelu=gelu)


# Affines that are no norm layer


class _Gain(nn.Module):
    """A learned affine, in place or not."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.shift = torch.randn(1, 6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace:
            return x.mul_(self.scale).add_(self.shift)
        return torch.addcmul(self.shift, x, self.scale)


@case({"1": fold("0"), "2": fold("0"), "3": fold("0")})
def affines_by_hand_around_a_norm():
    return nn.Sequential(nn.Conv2d(3, 6, 3), _Gain(), nn.BatchNorm2d(6), _Gain(inplace=True))


@case({"(sub, div, mul)": fold("conv")})
def batch_norm_in_a_forward():
    """Its constants are a plain tensor, a buffer and a parameter of the module that convolves."""
    model = Net(
        lambda m, x: F.silu((m.conv(x) - m.mean) / torch.sqrt(m.var + 1e-3) * m.gamma),
        conv=nn.Conv2d(3, 6, 3),
    )
    model.mean = torch.randn(6, 1, 1)
    model.register_buffer("var", torch.rand(6, 1, 1) + 0.5)
    model.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
    return model


@case({"0": fold("1")})
def input_normalisation():
    normalise = Net(lambda m, x: (x - torch.tensor(m.mean).view(3, 1, 1)) / 0.25)
    normalise.mean = [0.485, 0.456, 0.406]
    return nn.Sequential(normalise, nn.Conv2d(3, 6, 3))


@case({"s": fold("a", "b")})
def gain_called_twice_after_its_own_hosts():
    parts = {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(3, 6, 3), "s": _Gain()}
    return Net(lambda m, x: m.s(m.a(x)) - F.relu(m.s(m.b(x))), **parts)
