"""Blocks of parallel linear branches, written as in their papers, and hostile look-alikes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(inputs: int, outputs: int, kernel, **options) -> nn.Sequential:
    """What every such block is made of."""
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class RepConv(nn.Module):
    """YOLOv6/v7: a 3x3 and a 1x1 with norms, and a norm alone where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride=stride, padding=1, groups=groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride=stride, groups=groups)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.act(self.rbr_dense(x) + self.rbr_1x1(x) + id_out)


class ACBlock(nn.Module):
    """ACNet (Ding et al. 2019): a square kernel, a row and a column."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        options = {"stride": stride, "dilation": dilation}
        d = dilation
        self.square = conv_bn(inputs, outputs, 3, padding=d, **options)
        self.hor = conv_bn(inputs, outputs, (1, 3), padding=(0, d), **options)
        self.ver = conv_bn(inputs, outputs, (3, 1), padding=(d, 0), **options)

    def forward(self, x: Tensor) -> Tensor:
        result = self.square(x)
        result += self.hor(x)
        result += self.ver(x)
        return F.relu(result)


class CroppedACBlock(nn.Module):
    """ACNet as published, for a padding of less than half of the kernel: inputs are cropped."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, padding: int = 0) -> None:
        super().__init__()
        self.crop = kernel // 2 - padding
        self.square = conv_bn(inputs, outputs, kernel, padding=padding)
        self.ver = conv_bn(inputs, outputs, (kernel, 1), padding=(padding, 0))
        self.hor = conv_bn(inputs, outputs, (1, kernel), padding=(0, padding))

    def forward(self, x: Tensor) -> Tensor:
        columns = x[:, :, :, self.crop : -self.crop]
        rows = x[:, :, self.crop : -self.crop, :]
        return F.relu(self.square(x) + self.ver(columns) + self.hor(rows))


class DiverseBranch(nn.Module):
    """DBB (Ding et al. 2021) with unpadded second layers: what is exact without new borders."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.origin = conv_bn(inputs, outputs, 3, stride=stride)
        self.average = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.AvgPool2d(3, stride),
            nn.BatchNorm2d(outputs),
        )
        self.sequence = nn.Sequential(
            nn.Conv2d(inputs, inputs, 1, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, stride, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x) + self.average(x)
        out = out + self.sequence(x)
        return F.relu(out)


class PaddedDiverseBranch(nn.Module):
    """DBB with padding: exact where nothing but a plain 1x1 comes before the padded layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.origin = conv_bn(channels, channels, 3, padding=1)
        self.point = conv_bn(channels, channels, 1)
        self.average = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.AvgPool2d(3, 1, 1),
            nn.BatchNorm2d(channels),
        )
        self.sequence = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.origin(x) + self.point(x) + self.average(x) + self.sequence(x))


class FixedPlusLearned(nn.Conv2d):
    """A 1x1 that starts as the identity: its kernel is what it learned plus a fixed one."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        width = channels // groups
        fixed = torch.zeros(channels, width, 1, 1)
        for channel in range(channels):
            fixed[channel, channel % width] = 1
        self.fixed = fixed  # no buffer, as published
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight + self.fixed.to(self.weight.device)
        return F.conv2d(x, kernel, None, 1, 0, self.dilation, self.groups)


class NormAndBorder(nn.Module):
    """A norm, and a border of what the norm gives for zeros, written into slices."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(x)
        if not self.width:
            return out
        norm, width = self.norm, self.width
        deviation = torch.sqrt(norm.running_var + norm.eps)
        values = norm.bias.detach() - norm.running_mean * norm.weight.detach() / deviation
        values = values.view(1, -1, 1, 1)
        out = F.pad(out, [width] * 4)
        out[:, :, :width, :] = values
        out[:, :, -width:, :] = values
        out[:, :, :, :width] = values
        out[:, :, :, -width:] = values
        return out


class PublishedDiverseBranch(nn.Module):
    """DBB as its authors published it (github.com/DingXiaoH/DiverseBranchBlock)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        pad, options = kernel // 2, {"stride": stride, "groups": groups}
        self.origin = conv_bn(inputs, outputs, kernel, padding=pad, **options)
        self.avg = nn.Sequential()
        if groups < outputs:
            self.avg.append(nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False))
            self.avg.append(NormAndBorder(outputs, pad))
            self.avg.append(nn.AvgPool2d(kernel, stride))
            self.point = conv_bn(inputs, outputs, 1, **options)
        else:
            self.avg.append(nn.AvgPool2d(kernel, stride, pad))
        self.avg.append(nn.BatchNorm2d(outputs))
        middle = inputs if groups < outputs else 2 * inputs
        if middle == inputs:
            first: nn.Module = FixedPlusLearned(inputs, groups)
        else:
            first = nn.Conv2d(inputs, middle, 1, groups=groups, bias=False)
        self.sequence = nn.Sequential(
            first,
            NormAndBorder(middle, pad),
            nn.Conv2d(middle, outputs, kernel, bias=False, **options),
            nn.BatchNorm2d(outputs),
        )
        self.nonlinear = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        if hasattr(self, "point"):
            out += self.point(x)
        out += self.avg(x)
        out += self.sequence(x)
        return self.nonlinear(out)


class DilatedBranches(nn.Module):
    """UniRepLKNet (Ding et al. 2024): a large depthwise kernel and small dilated ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = conv_bn(channels, channels, 13, padding=6, groups=channels)
        self.small = nn.ModuleList(
            conv_bn(
                channels, channels, kernel,
                padding=dilation * (kernel - 1) // 2, dilation=dilation, groups=channels,
            )
            for kernel, dilation in ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        for branch in self.small:
            out = out + branch(x)
        return out


class RepMixer(nn.Module):
    """FastViT: `x + scale * (mixer(x) - norm(x))`, depthwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.mixer = RepConv(channels, channels, groups=channels)
        self.mixer.act = nn.Identity()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * (self.mixer(x) - self.norm(x))


class NormAfterSum(nn.Module):
    """A norm that folds only once its branches are one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.a(x) + self.b(x) + x))


class Sum(nn.Module):
    """Any sum of two layers, by a function of the module and its input."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def branches(channels: int = 6, **options) -> dict[str, nn.Module]:
    """A 3x3 and a 1x1 that would merge."""
    return {
        "a": nn.Conv2d(channels, channels, 3, padding=1, **options),
        "b": nn.Conv2d(channels, channels, 1, **options),
    }
