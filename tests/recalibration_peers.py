"""What update_bn, fvcore's PreciseBN and bntools give on the same traps, beside the truth.

`python tests/recalibration_peers.py` prints the table of the README.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import bntools


def one_norm(channels=1, dtype=torch.float32):
    return nn.Sequential(nn.BatchNorm1d(channels).to(dtype)).eval()


def with_update_bn(model, batches):
    model = copy.deepcopy(model)
    update_bn(batches, model)
    return model


def with_fvcore(model, batches):
    """Fvcore 0.1.5's update_bn_stats, from its formula, with only the norms in training mode.

    `mean += (m - mean) * n / N` and `square += (m^2 + v * (n - 1) / n - square) * n / N` over
    batches of n elements, N so far, in the dtype of the buffers; `variance = square - mean^2`.
    """
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    sizes = {}
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
        norm.register_forward_pre_hook(
            lambda module, args: sizes.update({module: args[0].numel() // args[0].shape[1]})
        )
    means = [torch.zeros_like(norm.running_mean) for norm in norms]
    squares = [torch.zeros_like(norm.running_var) for norm in norms]
    totals = [0] * len(norms)
    with torch.no_grad():
        for batch in batches:
            model(batch)
            for i, norm in enumerate(norms):
                n = sizes[norm]
                totals[i] += n
                square = norm.running_mean.square() + norm.running_var * ((n - 1) / n)
                means[i] += (norm.running_mean - means[i]) * (n / totals[i])
                squares[i] += (square - squares[i]) * (n / totals[i])
        for norm, mean, square in zip(norms, means, squares, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(square - mean.square())
            norm.momentum, norm.training = 0.1, False
    return model


def with_bntools(model, batches):
    return bntools.recalibrate(model, batches, method="pooled").model


TOOLS = {"update_bn": with_update_bn, "fvcore": with_fvcore, "bntools": with_bntools}


class Dropped(nn.Module):
    """Dropout before a norm."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.drop(x))


def small_last_batch(tool):
    """The mean, where 32 rows near 0 are followed by one at 20.6."""
    x = torch.cat([torch.randn(32, 1, 8) * 0.1, torch.full((1, 1, 8), 20.6)])
    return float(tool(one_norm(), x.split(32))[0].running_mean) if tool else float(x.mean())


def sorted_by_class(tool):
    """The variance, where each batch is one class and the classes are 4 deviations apart."""
    batches = [torch.randn(64, 1, 16) + 4 * index for index in (0, 1)]
    if not tool:
        return float(torch.cat(batches).double().var(correction=0))
    return float(tool(one_norm(), batches)[0].running_var)


def large_mean(tool):
    """The smallest variance of 64 channels at mean 100 with deviation 0.01, in units of 1e-4."""
    x = torch.randn(512, 64) * 0.01 + 100
    if not tool:
        return float(x.double().var(0, correction=0).min() * 1e4)
    return float(tool(one_norm(64), x.split(64))[0].running_var.min() * 1e4)


def dropout_before(tool):
    """The variance behind a dropout of 0.5, of inputs at mean 2 with deviation 1."""
    x = torch.randn(512, 3) + 2
    if not tool:
        return float(x.double().var(0, correction=0)[0])
    return float(tool(Dropped().eval(), x.split(64)).norm.running_var[0])


def half_precision(tool):
    """The variance in float16, in 64 batches at mean 30 with deviation 2."""
    x = (torch.randn(4096, 1) * 2 + 30).half()
    if not tool:
        return float(x.double().var(correction=0))
    return float(tool(one_norm(1, torch.float16), x.split(64))[0].running_var)


def nan_pixel(tool):
    """How many of 2 channels are NaN, where one value of one batch is."""
    x = torch.randn(40, 2, 3)
    x[13, 1, 2] = float("nan")
    if not tool:
        return 0.0
    if tool is with_bntools:
        options = bntools.RecalibrationOptions(skip_nonfinite=True)
        model = bntools.recalibrate(one_norm(2), x.split(8), options=options).model
    else:
        model = tool(one_norm(2), x.split(8))
    return float(model[0].running_mean.isnan().sum())


TRAPS = (
    small_last_batch, sorted_by_class, large_mean, dropout_before, half_precision, nan_pixel,
)  # fmt: skip


def figures(trap):
    """Truth and what each tool gives, on the same numbers."""
    found = {}
    for name, tool in {"truth": None, **TOOLS}.items():
        torch.manual_seed(0)
        found[name] = trap(tool)
    return found


def main():
    print(f"| trap | {' | '.join(['truth', *TOOLS])} |")
    print("|---|---|---|---|---|")
    for trap in TRAPS:
        cells = [f"{v:.3g}" if math.isfinite(v) else str(v) for v in figures(trap).values()]
        print(f"| {trap.__doc__.strip().rstrip('.')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
