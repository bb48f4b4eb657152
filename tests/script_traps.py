"""What torch's own TorchScript pass makes of the trap models, and what bntools makes of them.

`python tests/script_traps.py` traces every model of `tests/zoo.py` that can be traced, each in a
child process, as the pass may end it. "torch" counts what the pass alone gives, "bntools" what
`bntools.fold` gives: right, wrong, raised, or crashed.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import zoo
import zoo_folds  # noqa: F401 - fills the zoo
import zoo_keeps  # noqa: F401 - fills the zoo
from randomise import difference
from torch import Tensor
from torch.utils._pytree import tree_flatten

import bntools

_WRONG = 1e-2  # half precision rounds to 4e-3
_OUTCOMES = ("right", "wrong", "raised", "not traced")
_CRASHES_TRACING = {"vectorised_map"}


def torchs_pass(model: Any, inputs: Any) -> Any:
    """The pass, without any check."""
    del inputs
    return torch.jit._recursive.wrap_cpp_module(torch._C._jit_pass_fold_convbn(model._c))


def by_bntools(model: Any, inputs: Any) -> Any:
    """The same pass, checked."""
    return bntools.fold(model, inputs).model


def outcome(case: zoo.Case, fold: Callable[[Any, Any], Any]) -> str:
    """What one fold of one model is."""
    inputs = case.example()
    if isinstance(inputs, dict):
        return "not traced"
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    try:
        traced = torch.jit.trace(case.prepare(), copy.deepcopy(args), check_trace=False).eval()
        truth = _tensors(traced, args)
    except Exception:  # noqa: BLE001 - whatever cannot be traced is no trap of the pass
        return "not traced"
    try:
        folded = _tensors(fold(traced, inputs), args)
    except Exception:  # noqa: BLE001 - torch asserts
        return "raised"
    return "right" if difference(folded, truth) < _WRONG else "wrong"


def _tensors(model: Any, args: Any) -> list[Tensor]:
    with torch.no_grad():
        found = tree_flatten(model(*copy.deepcopy(args)))[0]
    return [value for value in found if isinstance(value, Tensor)]


def in_a_child(case: zoo.Case, fold: Callable[[Any, Any], Any]) -> str:
    """The outcome, or that the process ended."""
    child = os.fork()
    if child == 0:
        os._exit(_OUTCOMES.index(outcome(case, fold)))
    status = os.waitpid(child, 0)[1]
    return _OUTCOMES[os.WEXITSTATUS(status)] if os.WIFEXITED(status) else "crashed"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    cases = [c for c in zoo.CASES.values() if c.available and c.name not in _CRASHES_TRACING]
    for title, fold in (("torch", torchs_pass), ("bntools", by_bntools)):
        found = {case.name: in_a_child(case, fold) for case in cases}
        counts = Counter(found.values())
        sys.stdout.write(f"{title}: {dict(counts.most_common())}\n")
        for name, what in found.items():
            if what in ("wrong", "raised", "crashed"):
                sys.stdout.write(f"    {name}: {what}\n")


if __name__ == "__main__":
    main()
