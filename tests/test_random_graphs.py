"""Random networks from the whole vocabulary of rules: whatever folds must fold right, at any size.

`random_graphs.py` has the vocabulary, and makes recorded runs of thousands. BNTOOLS_EXAMPLES sets
the number of networks that hypothesis draws here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from brute_force import is_needless
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_graphs import KINDS, Draw, check, write
from randomise import randomise
from torch import nn
from zoo import Net

from bntools.dataflow import operations

EXAMPLES = int(os.environ.get("BNTOOLS_EXAMPLES", "300"))
_INSTRUCTIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 999)),
    min_size=2,
    max_size=9,
)


@pytest.mark.timeout(3600)
def test_whatever_folds_in_a_random_network_folds_right():
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES == 300,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(
        st.integers(0, 3), _INSTRUCTIONS, st.lists(st.integers(0, 20), max_size=1), st.booleans()
    )
    def network_folds_right(rank, instructions, returned, pad_forward):
        program = write(rank, instructions, returned)
        assume(check(program, counts, pad_forward=pad_forward) is not None)

    network_folds_right()
    assert counts["checked"] > EXAMPLES // 2
    assert counts["folded"] > counts["norms"] // 5, counts
    assert counts["folded forward"] > counts["norms"] // 50, counts


def test_planted_wrong_gain_is_found_by_the_recorded_run(monkeypatch):
    """An activation that is said to let every shift pass fails within a few networks."""
    told = operations.passing_call

    def planted(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        found = told(name, args, kwargs)
        return replace(found, gain=1.0) if found is not None and "relu" in name else found

    monkeypatch.setattr(operations, "passing_call", planted)
    assert any(Draw.of(seed).failure() for seed in range(120))


def brute(forward: Callable[..., Any]) -> str:
    """What brute force says of the norm of a small model of vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(forward, a=nn.Linear(3, 2), b=nn.Linear(2, 2), bn=nn.BatchNorm1d(2))
        model.c, model.p = nn.Linear(3, 2), nn.ParameterList([torch.ones(2)])
    model = model.double().eval()
    randomise(model)
    random = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, 3, generator=random, dtype=torch.float64) for n in (40, 7)]
    return is_needless(model, "bn", rows[0], rows[1:])


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (lambda m, x: m.bn(m.a(x)).tanh(), "back"),
        (lambda m, x: m.b(m.bn(m.a(x).tanh())).tanh(), "forward"),
        (lambda m, x: m.b(m.bn(m.a(x)).tanh()), "back"),
        (lambda m, x: m.bn(m.a(x).relu()) - m.p[0], "both ways"),
        (lambda m, x: m.bn(y := m.a(x)).tanh() + m.b(y).tanh(), "undone"),
        (lambda m, x: (m.bn(m.a(x) + (y := m.c(x))).tanh(), y), "weights"),
        (lambda m, x: m.bn(m.a(x).relu() + m.b(m.a(x)).tanh()), "needed"),
        (lambda m, x: m.bn(m.a(x)).mul(0) + m.b(m.a(x)), "idle"),
    ],
)
def test_brute_force_tells_what_a_norm_can_do_without(forward, told):
    assert brute(forward) == told
