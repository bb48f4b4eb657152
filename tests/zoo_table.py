"""Run bntools over the zoo and write the table: `python tests/zoo_table.py --out FILE`.

Beside each model stands what `torch.fx.experimental.optimization.fuse` folds of it, and how many
layers an independent count (the oracle) finds foldable, where it has that model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import gc
import io
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from randomise import cast, difference, named_modules, norms, outputs, randomise, settle
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo_models import MODELS, Model

import bntools
from bntools.planning import NormFold
from bntools.report import Plan
from bntools.surgery.folding import fold_copy, fold_in_place

__all__ = ["LIMIT", "ORACLE", "TABLE", "Row", "crowd", "measure", "oracle_counts", "read", "write"]

TABLE = Path(__file__).with_name("zoo_table.csv")
ORACLE = Path(__file__).parents[2] / "shared" / "tools" / "zoo_counts.csv"
LIMIT = 1e-10
_GIANT = 300e6  # parameters: two copies in float64 do not fit into a small machine


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Of the `folded` norm layers `forward` go into what comes after them, and `through` are those
    with something on the way. Beyond these `padded` fold with `pad_forward` and `merged` vanish
    with `merge_branches`. `affines` are what is no norm layer and yet an affine per channel.
    `oracle` is empty where the oracle has not counted the model, and so are the columns that were
    not measured yet.
    """

    model: str
    norms: int
    folded: int
    forward: int | None
    through: int | None
    padded: int | None
    merged: int | None
    affines: int | None
    affines_folded: int | None
    kept: str
    oracle: str
    fx_folded: str
    error: float
    seconds: float
    note: str = ""

    def problems(self) -> list[str]:
        """What is wrong with this row, one sentence each."""
        found = [self.note] if self.note else []
        if not self.error <= LIMIT:
            found.append(f"the fold is off by {self.error:.2g}")
        if self.oracle and self.folded < int(self.oracle):
            found.append(f"{self.folded} layers fold, but the oracle folds {self.oracle}")
        if self.fx_folded.isdigit() and self.folded < int(self.fx_folded):
            found.append(f"{self.folded} layers fold, but torch.fx fuse folds {self.fx_folded}")
        return found

    def __str__(self) -> str:
        said = "; ".join(self.problems()) or "ok"
        return (
            f"{self.model}: folded {self.folded} of {self.norms}, {self.forward} forward,"
            f" +{self.padded} padded, +{self.merged} merged (oracle {self.oracle or '-'},"
            f" fx {self.fx_folded}), error {self.error:.1e}, {self.seconds:.1f} s, kept"
            f" {self.kept or 'none'}: {said}"
        )


class _FloatIsDouble(TorchFunctionMode):
    """Makes `tensor.float()` give float64, for models that say so."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*args, **(kwargs or {}))


def measure(entry: Model) -> Row:
    """Plan and fold one model in float64 and compare it with itself on inputs not recorded."""
    with _FloatIsDouble() if entry.says_float else contextlib.nullcontext():
        return _measured(entry)


def crowd(entry: Model) -> Any:
    """Inputs to take statistics of: those of seed 2, and images of other seeds.

    On the last, tiny maps of a network two images give statistics that magnify every rounding.
    """
    first = entry.example(2)
    if not isinstance(first, Tensor) or first.dim() != 4:
        return first
    more = 6 if first.shape[-1] <= 128 else 2
    return torch.cat([first, *(entry.example(3 + seed) for seed in range(more))])


def _measured(entry: Model) -> Row:
    torch.manual_seed(0)
    model = entry.build().eval()
    fx_folded = _fx_folded(model)
    recorded, compared = (cast(entry.example(seed), torch.float64) for seed in (1, 2))
    model.double()
    randomise(model)
    settle(model, cast(crowd(entry), torch.float64))
    start = time.perf_counter()
    plan = bntools.plan_fold(model, recorded)
    seconds = time.perf_counter() - start
    note = _miscounted(model, plan)
    count = len(norms(model))
    truth = _observed(model, entry, compared)
    start = time.perf_counter()
    kept = [d for d in plan.kept if d.reason is not None and not d.affine]
    reasons = Counter(d.reason.value for d in kept)
    folds = plan.compiled.folds
    norm_folds = [fold for fold in folds if not fold.layer.chain]
    more = _Beyond.of(model, recorded, len(norm_folds)) if kept else _Beyond()
    affines = sum(d.affine for d in plan.decisions)
    del plan  # it holds the tensors that a fold in place replaces
    folded = _folded(model, folds)
    seconds += time.perf_counter() - start
    del model
    error = float(f"{difference(_observed(folded, entry, compared), truth):.1e}")
    if len(norms(folded)) != count - len(norm_folds):
        note = f"{len(norms(folded))} norm layers are left; {note}"
    return Row(
        entry.name,
        count,
        len(norm_folds),
        sum(fold.forward for fold in norm_folds),
        sum(bool(fold.via) for fold in norm_folds),
        more.padded,
        more.merged,
        affines,
        len(folds) - len(norm_folds),
        " ".join(f"{reason}:{n}" for reason, n in sorted(reasons.items())),
        oracle_counts().get(entry.name, ""),
        fx_folded,
        max(error, more.difference(entry, compared, truth)),
        round(seconds, 2),
        note,
    )


@dataclass(frozen=True)
class _Beyond:
    """What folds where padded convolutions may pad with other values and branches may merge."""

    padded: int = 0
    merged: int = 0
    model: nn.Module | None = None

    @classmethod
    def of(cls, model: nn.Module, recorded: Any, folded: int) -> _Beyond:
        """With both options; what `folded` counts goes without them."""
        plan = bntools.plan_fold(model, recorded, pad_forward=True)
        padded = sum(not d.affine for d in plan.folds) - folded
        if sum(p.numel() for p in model.parameters()) >= _GIANT:
            return cls(padded)
        result = bntools.fold(model, recorded, plan=plan, merge_branches=True)
        left = len(norms(result.model))
        return cls(padded, len(norms(model)) - left - folded - padded, result.model)

    def difference(self, entry: Model, inputs: Any, truth: list[Tensor]) -> float:
        """How far its outputs are from the truth."""
        if self.model is None:
            return 0.0
        return float(f"{difference(_observed(self.model, entry, inputs), truth):.1e}")


def write(rows: dict[str, Row], path: Path) -> None:
    """Write the table, in the order of the zoo."""
    ordered = [rows[name] for name in MODELS if name in rows]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in ordered)


def oracle_counts() -> dict[str, str]:
    """How many layers fold backward by the oracle's count: from its table, or our copy of that."""
    if not ORACLE.exists():
        return {row.model: row.oracle for row in read(TABLE).values() if row.oracle}
    zoos = {"tv": "torchvision", "timm": "timm"}
    with ORACLE.open(newline="") as file:
        lines = csv.DictReader(file)
        return {f"{zoos[line['zoo']]}:{line['name']}": line["o_backward"] for line in lines}


def _folded(model: nn.Module, folds: Sequence[NormFold]) -> nn.Module:
    if sum(p.numel() for p in model.parameters()) < _GIANT:
        return fold_copy(model, folds).model
    for fold in folds:
        model = fold_in_place(model, [fold])
    return model


def _miscounted(model: nn.Module, plan: Plan) -> str:
    planned = Counter(d.path for d in plan.decisions if not d.affine)
    twice = [path for path, n in planned.items() if n > 1]
    missing = sorted(norms(model).keys() ^ planned.keys())
    said = [f"planned twice: {twice}"] if twice else []
    return "; ".join(said + ([f"not one decision each: {missing}"] if missing else []))


def _observed(model: nn.Module, entry: Model, inputs: Any) -> list[Tensor]:
    """The outputs, and those of the watched modules; empty ones say nothing."""
    seen: list[Any] = []
    with contextlib.ExitStack() as hooks:
        for path, module in named_modules(model):
            if path in entry.watch:
                handle = module.register_forward_hook(lambda _, __, out: seen.append(out))
                hooks.callback(handle.remove)
        found = outputs(model, inputs)
    for out in seen:
        found += out.values() if isinstance(out, dict) else [out]
    return [tensor for tensor in found if tensor.numel()]


def _fx_folded(model: nn.Module) -> str:
    """How many norm layers fx fuse removes from a copy without contents; it prints errors."""
    from torch.fx import symbolic_trace
    from torch.fx.experimental.optimization import fuse

    hollow = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for t in (*model.parameters(), *model.buffers())
    }
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        try:
            traced = symbolic_trace(copy.deepcopy(model, hollow))
            before = len(norms(traced))  # tracing drops what does not run
            fused = fuse(traced, inplace=True, no_trace=True)
        except Exception:  # noqa: BLE001 (it raises whatever it likes)
            return "untraceable"
    return str(before - len(norms(fused)))


def _failed(entry: Model, error: Exception) -> Row:
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    nothing = (0,) * 8
    return Row(
        entry.name, *nothing, "", oracle_counts().get(entry.name, ""), "", math.inf, 0.0, why
    )


def read(path: Path) -> dict[str, Row]:
    """Read a table that `write` wrote; one that is not there is empty."""
    if not path.exists():
        return {}
    types: dict[str, Any] = {
        "int": int,
        "int | None": lambda text: int(text) if text else None,
        "float": float,
        "str": str,
    }
    with path.open(newline="") as file:
        found = [
            Row(**{f.name: types[str(f.type)](line.get(f.name, "")) for f in fields(Row)})
            for line in csv.DictReader(file)
        ]
    return {row.model: row for row in found}


def _total(rows: Sequence[Row], column: str) -> str:
    """The sum of a column, over the rows in which it was measured."""
    return f"{sum(getattr(row, column) or 0 for row in rows):,}"


def summary(rows: Sequence[Row]) -> str:
    """The table in short, as in the README: one line per collection."""
    columns = (
        "", "models", "norm layers", "folded", "forward", "through", "+ padded", "+ merged",
        "affines", "oracle, of", "fx fuse", "fx fails", "worst error",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    groups = {
        "torchvision": [
            r for r in rows if r.model.startswith("torchvision") and "+" not in r.model
        ],
        "torchvision, FrozenBatchNorm2d": [r for r in rows if "+frozen" in r.model],
        "timm": [r for r in rows if r.model.startswith("timm")],
    }
    for name, group in groups.items():
        total = functools.partial(_total, group)
        counted = [row for row in group if row.oracle]
        oracle = f"{sum(int(r.oracle) for r in counted):,}" if counted else "-"
        norms_counted = sum(row.norms for row in counted)
        traced = [int(row.fx_folded) for row in group if row.fx_folded.isdigit()]
        lines.append(
            f"| {name} | {len(group)} | {sum(r.norms for r in group):,} |"
            f" **{sum(r.folded for r in group):,}** | {total('forward')} | {total('through')} |"
            f" {total('padded')} | {total('merged')} |"
            f" {total('affines_folded')} of {total('affines')} |"
            f" {oracle}, {norms_counted:,} |"
            f" {sum(traced):,} | {len(group) - len(traced)} |"
            f" {max((r.error for r in group), default=0.0):.1e} |"
        )
    kept: Counter[str] = Counter()
    for row in rows:
        for item in row.kept.split():
            reason, _, count = item.rpartition(":")
            kept[reason] += int(count)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in kept.most_common())
    return "\n".join([*lines, "", f"Kept: {reasons}."])


def main() -> int:
    """Measure what is asked for; exit with 1 where a row has a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (CSV)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="models, as in 'timm:*'")
    parser.add_argument("--resume", action="store_true", help="keep the sound rows of the table")
    parser.add_argument("--summary", action="store_true", help="only print the table in short")
    options = parser.parse_args()
    if options.summary:
        print(summary(list(read(options.out).values())))
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = read(options.out) if options.resume else {}
    for entry in MODELS.values():
        known = rows.get(entry.name)
        done = known is not None and known.forward is not None and not known.problems()
        if done or not fnmatchcase(entry.name, options.only):
            continue
        try:
            rows[entry.name] = measure(entry)
        except Exception as error:  # noqa: BLE001 (a crash is a result)
            rows[entry.name] = _failed(entry, error)
        gc.collect()
        write(rows, options.out)
        sys.stderr.write(f"{rows[entry.name]}\n")
        sys.stderr.flush()
    print(summary(list(rows.values())))
    return int(any(row.problems() for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
