"""Replace the norms of torchvision's classifiers by every target: `python tests/replace_table.py`.

Each model runs in a process of its own, and the table grows row by row, so that a run that was
stopped goes on (`--resume`). For every target the new model has to run, to take one training step
with finite gradients, to come out of its file as it was, and to be the same in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from randomise import outputs, settle
from torch import Tensor, nn
from zoo_models import MODELS, TORCHVISION

import bntools
from bntools.artifacts import staged
from bntools.examples import given
from bntools.runtimes import exporting
from bntools.runtimes.sessions import open_session

__all__ = ["CLASSIFIERS", "TABLE", "TARGETS", "Row", "measure", "read", "summary"]

TABLE = Path(__file__).with_name("replace_table.csv")
TARGETS: dict[str, Any] = {
    "groupnorm": bntools.ToGroupNorm(),
    "layernorm": bntools.ToLayerNorm(),
    "layernorm-channels": bntools.ToLayerNorm(over="channels"),
    "instancenorm": bntools.ToInstanceNorm(),
    "evonorm-s0": bntools.ToEvoNormS0(),
    "evonorm-b0": bntools.ToEvoNormB0(),
}
LIMIT, FACTOR = 1e-4, 10  # untrained, a network with other norms may amplify every rounding
_OTHERS = (
    "deeplabv3", "fasterrcnn", "fcn", "fcos", "keypointrcnn", "lraspp", "maskrcnn", "raft",
    "retinanet", "ssdlite",
)  # fmt: skip
_MINUTES = 40
# Its second head needs this size in training mode.
_SIZES = {"torchvision:inception_v3": 299}
# The quick ones first: a run may be stopped.
_QUICK = (
    "resnet18", "vgg11", "mobilenet_v2", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_x_400mf",
    "mobilenet_v3", "googlenet", "resnet34", "resnet50", "r3d_18", "efficientnet_b0", "inception",
    "mnasnet", "shufflenet", "vgg", "regnet_y_400mf", "00mf", "mc3", "r2plus1d", "resnext50",
)  # fmt: skip
_LAST = ("maxvit", "s3d", "efficientnet_b7", "v2_l", "128gf", "32gf", "16gf", "_b6", "v2_m")


def _cost(name: str) -> tuple[int, int, str]:
    """Where a model comes in the table's making."""
    late = next((len(_LAST) - i for i, part in enumerate(_LAST) if part in name), 0)
    quick = next((i for i, part in enumerate(_QUICK) if part in name), len(_QUICK))
    return late, quick, name


CLASSIFIERS = sorted(
    (f"torchvision:{name}" for name in TORCHVISION if not name.startswith(_OTHERS)), key=_cost
)


@dataclass(frozen=True)
class Row:
    """One model with one target.

    `error` is that of ONNX Runtime, `own` that of the new model in float32, both against the new
    model in float64.
    """

    model: str
    target: str
    norms: int
    replaced: int
    activations: int
    kept: str
    runs: bool
    trains: bool
    reloads: bool
    exports: bool
    error: float
    own: float
    seconds: float
    note: str = ""

    @property
    def sound(self) -> bool:
        """Whether everything was as it has to be."""
        return self.runs and self.trains and self.reloads and self.exports and not self.note

    def __str__(self) -> str:
        said = "ok" if self.sound else f"FAILED {self.note}"
        return (
            f"{self.model} {self.target}: {self.replaced} of {self.norms}, {self.activations}"
            f" activations, kept {self.kept or 'none'}, {self.error:.1e} ({self.own:.1e}),"
            f" {self.seconds:.0f} s: {said}"
        )


def measure(name: str, target: str, *, export: bool = True) -> Row:
    """Replace the norms of one model, and try the result in every way (an export takes seconds)."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model, example = _prepared(name)
    result = bntools.replace(model, TARGETS[target], example)
    report = result.report
    notes: list[str] = []
    runs = _tried(notes, "runs", lambda: _runs(result.model, example))
    reloads = _tried(notes, "reloads", lambda: _reloads(result, example))
    errors = None
    if export:
        errors = _tried(notes, "exports", lambda: _export_errors(result.model, example))
    error, own = errors or (float("inf"), float("inf"))
    exports = errors is not None and error <= max(LIMIT, FACTOR * own)
    if errors is not None and not exports:
        notes.append(f"ONNX Runtime differs by {error:.1e}")
    trains = _tried(notes, "trains", lambda: _trains(result.model, example))  # last: it changes it
    reasons = Counter(row.reason.value for row in report.kept)
    return Row(
        name,
        target,
        len(report.layers),
        len(report.replaced),
        sum(bool(row.activation) for row in report.replaced),
        " ".join(f"{reason}:{n}" for reason, n in sorted(reasons.items())),
        bool(runs),
        bool(trains),
        bool(reloads),
        exports,
        float(f"{error:.1e}"),
        float(f"{own:.1e}"),
        round(time.perf_counter() - start, 1),
        "; ".join(notes),
    )


def _prepared(name: str) -> tuple[nn.Module, Tensor]:
    entry = MODELS[name]
    model = entry.build().eval()
    example = entry.example(1)
    size = _SIZES.get(name)
    if size is not None:
        example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    settle(model, example)
    return model, example


def _tried(notes: list[str], what: str, attempt: Any) -> Any:
    try:
        return attempt()
    except Exception as error:  # noqa: BLE001 - whatever fails is a result
        notes.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None


def _runs(model: nn.Module, example: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outputs(model, example))


def _reloads(result: Any, example: Tensor) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        bntools.save(result, path)
        again = bntools.load(path)
    mine, theirs = outputs(result.model, example), outputs(again, example)
    return all(map(torch.equal, mine, theirs))


def _export_errors(model: nn.Module, example: Tensor) -> tuple[float, float]:
    """The errors of ONNX Runtime and of torch, both in float32, against float64."""
    made = exporting.export(model, given(example), dynamic=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        staged(made.graph, Path(folder) / "m.onnx") as file,
    ):
        session = open_session(file.source, provider="cpu")
        found = next(iter(session.run(made.feeds(given(example))).values()))
    native = outputs(model, example)[0]
    truth = outputs(copy.deepcopy(model).double(), example.double())[0]
    error, own = ((each - truth).norm() / truth.norm() for each in (found, native))
    return float(error), float(own)


def _trains(model: nn.Module, example: Tensor) -> bool:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    out = model(example)
    logits = [out] if isinstance(out, Tensor) else [part for part in out if part is not None]
    labels = torch.arange(len(example))
    loss = sum(nn.functional.cross_entropy(part, labels) for part in logits)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = bool(gradients) and all(bool(g.isfinite().all()) for g in gradients)
    optimizer.step()
    return finite and all(bool(p.isfinite().all()) for p in model.parameters())


def read(path: Path) -> dict[tuple[str, str], Row]:
    """Read a table; one that is not there is empty."""
    if not path.exists():
        return {}
    types: dict[str, Any] = {
        "int": int, "float": float, "bool": lambda text: text == "True", "str": str,
    }  # fmt: skip
    with path.open(newline="") as file:
        rows = [
            Row(**{f.name: types[str(f.type)](line[f.name]) for f in fields(Row)})
            for line in csv.DictReader(file)
        ]
    return {(row.model, row.target): row for row in rows}


def write(rows: dict[tuple[str, str], Row], path: Path) -> None:
    """Write the table in the order of the zoo."""
    order = {name: place for place, name in enumerate(MODELS)}
    targets = list(TARGETS)
    ordered = sorted(rows.values(), key=lambda r: (order[r.model], targets.index(r.target)))
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in ordered)


def summary(rows: Iterable[Row]) -> str:
    """The table in short, as in the README: one line per target."""
    lines = [
        "| target | models | norm layers | replaced | activations | run | train | export | kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = list(rows)
    for target in TARGETS:
        group = [row for row in known if row.target == target]
        kept: Counter[str] = Counter()
        for item in (item for row in group for item in row.kept.split()):
            reason, _, count = item.rpartition(":")
            kept[reason] += int(count)
        reasons = ", ".join(f"{count} {reason}" for reason, count in kept.most_common())
        lines.append(
            f"| {target} | {len(group)} | {sum(r.norms for r in group):,} |"
            f" {sum(r.replaced for r in group):,} | {sum(r.activations for r in group):,} |"
            f" {sum(r.runs for r in group)} | {sum(r.trains for r in group)} |"
            f" {sum(r.exports for r in group)} | {reasons or 'none'} |"
        )
    return "\n".join(lines)


def _child(name: str, targets: list[str]) -> None:
    """Measure one model in this process; every row is a line of JSON on stdout."""
    warnings.simplefilter("ignore")
    for target in targets:
        try:
            row = measure(name, target)
        except Exception as error:  # noqa: BLE001 - a crash is a result
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            row = Row(name, target, 0, 0, 0, "", False, False, False, False, 0.0, 0.0, 0.0, why)
        print(json.dumps(asdict(row)), flush=True)


def _measured(name: str, targets: list[str]) -> list[Row]:
    command = [sys.executable, __file__, "--child", name, *targets]
    # The path is this file's own, and the names are those of the tables above.
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=60 * _MINUTES, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    rows = [Row(**json.loads(line)) for line in lines]
    missing = [target for target in targets if target not in {row.target for row in rows}]
    why = f"the process ended with {run.returncode}: {run.stderr.strip()[-200:]}"
    return rows + [
        Row(name, target, 0, 0, 0, "", False, False, False, False, 0.0, 0.0, 0.0, why)
        for target in missing
    ]


def main() -> int:
    """Measure what is asked for; exit with 1 where a row is not sound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (CSV)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="models, as in '*resnet*'")
    parser.add_argument("--resume", action="store_true", help="keep the sound rows of the table")
    parser.add_argument("--summary", action="store_true", help="only print the table in short")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child[0], options.child[1:])
        return 0
    rows = read(options.out) if options.resume or options.summary else {}
    for name in [] if options.summary else CLASSIFIERS:
        left = [t for t in TARGETS if (name, t) not in rows or not rows[name, t].sound]
        if not left or not fnmatchcase(name, f"*{options.only}*"):
            continue
        for row in _measured(name, left):
            rows[row.model, row.target] = row
            sys.stderr.write(f"{row}\n")
        write(rows, options.out)
    print(summary(rows.values()))
    return int(any(not row.sound for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
