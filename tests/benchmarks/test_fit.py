"""A fit as a number of plain forward passes over the data, and its time beside that of one pass.

    OMP_NUM_THREADS=2 pytest tests/benchmarks/test_fit.py -s

The goal is a quarter of the number of norm layers, in passes. SIZE is the side of the images: at
224 px the ratios are alike, and everything takes twelve times as long.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest
import torch
from measures import built

import bntools
from bntools.fitting import FitOptions, fit
from bntools.modules import duplicate, named_modules
from bntools.report import FitReport
from bntools.targets import Shape, Site, Target

SIZE = int(os.environ.get("SIZE", "64"))
IMAGES, BATCH = 256, 32
TARGETS = {
    "groupnorm, 32 groups": bntools.ToGroupNorm(),
    "groupnorm, auto": bntools.ToGroupNorm("auto"),
    "evonorm-s0, 32 groups": bntools.ToEvoNormS0(),
}


def prepared(name: str, target: Target):
    """A model, the same with new norms, and the sites."""
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    model = built(name)
    result = bntools.replace(model, target, images[:2]).model
    sites = []
    for path, norm in named_modules(model):
        if not isinstance(norm, torch.nn.BatchNorm2d):
            continue
        shape = Shape(norm.num_features, 4, 2)
        taken = (
            torch.nn.ReLU() if getattr(result.get_submodule(path), "nonlinearity", False) else None
        )
        found = target.resolved(shape).target
        sites.append(Site(path, path, found, taken, target.candidates(shape)))
    return model, result, in_order(model, sites, images[:2]), images


def in_order(model, sites, images):
    """Sites in execution order."""
    seen = []
    hooks = [
        model.get_submodule(site.path).register_forward_hook(lambda *_, s=site: seen.append(s))
        for site in sites
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def passes_of(model, replaced, run) -> tuple[float, FitReport]:
    """How often each image goes through each of both networks, counted at their first layers."""
    rows: Counter[int] = Counter()
    hooks = [
        next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(
            lambda module, args, y: rows.update({id(module): len(y)})
        )
        for net in (model, replaced)
    ]
    report = run()
    for hook in hooks:
        hook.remove()
    return sum(rows.values()) / IMAGES, report


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_fit(target):
    model, replaced, sites, images = prepared("resnet50", target)
    batches = images.split(BATCH)

    def plain():
        with torch.no_grad():
            for batch in batches:
                model(batch)

    plain()
    start = time.process_time()
    plain()
    once = time.process_time() - start
    start = time.process_time()
    passes, report = passes_of(
        model, replaced, lambda: fit(model, replaced, sites, batches, FitOptions())
    )
    seconds = time.process_time() - start
    print(
        f"\nresnet50, {target}, {IMAGES} images of {SIZE} px: {passes:.2f} forward passes for"
        f" {len(report.layers)} norm layers (a pass per layer and network: {2 * len(sites)}),"
        f" {seconds:.1f} CPU s = {seconds / once:.1f} plain passes ({once:.1f} s each);"
        f" activations in memory at most {report.cache_peak / 2**20:.0f} MB"
    )


def test_fit_with_files():
    """The same with a tenth of the memory."""
    model, replaced, sites, images = prepared("resnet50", bntools.ToGroupNorm("auto"))
    batches = images.split(BATCH)
    for cache in (4 << 30, 20 << 20):
        net = duplicate(replaced)
        start = time.process_time()
        report = fit(model, net, sites, batches, FitOptions(cache_bytes=cache))
        print(
            f"\ncache of {cache >> 20} MB: {time.process_time() - start:.1f} CPU s, peak"
            f" {report.cache_peak / 2**20:.0f} MB, {report.spilled / 2**20:.0f} MB written"
        )
