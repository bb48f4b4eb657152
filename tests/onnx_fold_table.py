"""Fold torchvision's zoo as ONNX files: `python tests/onnx_fold_table.py --resume`.

Each model is exported without any folding and without torch's optimiser, and folded as an ONNX
file. Beside what bntools leaves stands what others leave of the same file: ONNX Runtime's own
offline optimisation, and, with `--peers FOLDER` (made by `pip install --target FOLDER --no-deps
onnxoptimizer onnxsim`), these two. Each model runs in a process of its own, and the table grows row
by row, so that a run that was stopped goes on. `--raw` takes the files as the exporter writes them,
with the computed biases that no other tool folds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from randomise import randomise, settle
from zoo_models import MODELS
from zoo_table import crowd

import bntools
from bntools.errors import ExportError
from bntools.examples import given
from bntools.report import Report
from bntools.runtimes import cleaning, exporting
from bntools.runtimes.sessions import open_session
from bntools.runtimes.widening import DoubleModel

__all__ = ["NAMES", "TABLE", "Row", "measure", "read", "summary"]

TABLE = Path(__file__).with_name("onnx_fold_table.csv")
LIMIT, FACTOR = 1e-5, 4
_BACKBONE = "the backbone alone"
_MINUTES = 30
# The quick ones first: a run may be stopped.
_QUICK = (
    "resnet18", "shufflenet_v2_x0_5", "mobilenet_v2", "mnasnet0_5", "mobilenet_v3", "googlenet",
    "regnet_x_400mf", "densenet121", "inception", "resnet34", "resnet50", "r3d_18",
    "efficientnet_b0", "vgg11", "lraspp", "shufflenet", "mnasnet", "regnet_y_400mf", "00mf",
)  # fmt: skip
_LAST = ("rcnn", "retinanet", "fcos", "raft", "maxvit", "v2_l", "128gf", "32gf", "16gf", "_b7")


def _cost(name: str) -> tuple[int, int, str]:
    late = next((len(_LAST) - i for i, part in enumerate(_LAST) if part in name), 0)
    quick = next((i for i, part in enumerate(_QUICK) if part in name), len(_QUICK))
    return late, quick, name


NAMES = sorted((name for name in MODELS if name.startswith("torchvision:")), key=_cost)


@dataclass(frozen=True)
class Row:
    """One model.

    `norms` are its BatchNormalization nodes, `kept` the reasons of those that the plan keeps,
    `left` those in the folded file; `chains` is how many chains of constant arithmetic fold, too.
    `error` is that of the folded file in ONNX Runtime without optimisations, `own` that of the
    original there, both against the original in float64; `exact` that of the fold made in float64.
    """

    model: str
    norms: int
    kept: str
    left: int
    chains: int
    error: float
    own: float
    exact: float
    ort_left: str
    optimizer_left: str
    simplifier_left: str
    seconds: float
    note: str = ""

    @property
    def exported(self) -> bool:
        """Whether torch's exporter can write the model, or at least its backbone."""
        return not self.note.startswith("ExportError")

    @property
    def is_backbone(self) -> bool:
        """Whether it was the backbone alone: the exporter cannot write detectors as a whole."""
        return self.note.startswith(_BACKBONE)

    def problems(self) -> list[str]:
        """What is wrong with this row, one sentence each."""
        if not self.exported:
            return []
        found = [self.note] if self.note and not self.is_backbone else []
        if self.left != _kept(self):
            found.append(f"{self.left} norms are left, and the plan keeps {_kept(self)}")
        if not self.error <= max(LIMIT, FACTOR * self.own):
            found.append(f"the fold is off by {self.error:.2g}")
        return found

    def __str__(self) -> str:
        fine = "ok" if not self.is_backbone else "ok, the backbone alone"
        said = "; ".join(self.problems()) or (fine if self.exported else "not exported")
        return (
            f"{self.model}: {self.norms} norms, {self.left} left (ORT {self.ort_left},"
            f" onnxoptimizer {self.optimizer_left}, onnxsim {self.simplifier_left}),"
            f" kept {self.kept or 'none'}, {self.chains} chains, error {self.error:.1e}"
            f" ({self.own:.1e}, {self.exact:.1e}),"
            f" {self.seconds:.0f} s: {said}"
        )


def measure(name: str, peers: Path | None, *, raw: bool = False) -> Row:
    """Export one model, fold its file, and see what others fold."""
    torch.manual_seed(0)
    model, note = _exported(name, raw=raw)
    start = time.perf_counter()
    result = bntools.fold_onnx(model)
    seconds = round(time.perf_counter() - start, 1)
    report: Report = result.report
    kept = [each for each in report.kept if each.kind == "BatchNormalization"]
    reasons = Counter(each.reason.value for each in kept if each.reason is not None)
    error, own = _errors(model, result.model)
    exact = report.check.float64 if report.check is not None else None
    return Row(
        name,
        _norms(model),
        " ".join(f"{reason}:{n}" for reason, n in sorted(reasons.items())),
        _norms(result.model),
        sum(each.kind != "BatchNormalization" for each in report.folds),
        error,
        own,
        float(f"{exact.worst.error:.1e}") if exact is not None and exact.worst else float("nan"),
        _tried(lambda: _by_runtime(model)),
        _tried(lambda: _by_optimizer(model)) if peers is not None else "",
        _tried(lambda: _by_simplifier(model)) if peers is not None else "",
        seconds,
        note,
    )


def _exported(name: str, *, raw: bool) -> tuple[onnx.ModelProto, str]:
    """The model as ONNX; where torch cannot export it, its backbone, and a note that says so."""
    entry = MODELS[name]
    model = entry.build().eval()
    example = entry.example(2)
    randomise(model)
    settle(model, crowd(entry))
    if raw:
        exporting.clean = cleaning._drop_notes
    note = ""
    try:
        made = exporting.export(model, given(example), dynamic=False)
    except ExportError as error:
        backbone, image = getattr(model, "backbone", None), _image(example)
        if not isinstance(backbone, torch.nn.Module) or image is None:
            raise
        made = exporting.export(backbone, given(image), dynamic=False)
        note = f"{_BACKBONE} (of the whole, ExportError: {' '.join(str(error).split())[:120]})"
    return ir.to_proto(made.graph), note


def _image(example: Any) -> torch.Tensor | None:
    """A batch of the first image in the arguments of a detector."""
    while isinstance(example, (list, tuple)) and example:
        example = example[0]
    if not isinstance(example, torch.Tensor) or example.dim() < 3:
        return None
    return torch.rand(2, *example.shape[-3:], generator=torch.Generator().manual_seed(3))


def _norms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


def _errors(model: onnx.ModelProto, folded: onnx.ModelProto) -> tuple[float, float]:
    """The largest errors in ONNX Runtime of the folded model and of its original."""
    session = open_session(model.SerializeToString(), optimise=False)
    generator = torch.Generator().manual_seed(7)
    shapes = {port.name: [size or 2 for size in port.shape] for port in session.inputs}
    feeds = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    plain = session.run(feeds)
    given = open_session(folded.SerializeToString(), optimise=False).run(feeds)
    try:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        truth = DoubleModel(copy).run(feeds)
    except Exception:  # noqa: BLE001 - operations that onnx's evaluator has not
        truth = plain
    rows = []
    for found in (given, plain):
        gaps = [_gap(found[n], t) for n, t in truth.items() if t.is_floating_point() and t.numel()]
        rows.append(float(f"{max(gaps, default=float('nan')):.1e}"))
    return rows[0], rows[1]


def _gap(found: torch.Tensor, truth: torch.Tensor) -> float:
    if found.shape != truth.shape:
        return float("inf")
    scale = truth.double().norm()
    return float((found.double() - truth.double()).norm() / scale) if scale else 0.0


def _tried(attempt: Callable[[], onnx.ModelProto]) -> str:
    """How many norms a peer leaves, or why it fails."""
    try:
        made = attempt()
        onnx.checker.check_model(made, full_check=False)
        return str(_norms(made))
    except Exception as error:  # noqa: BLE001 - whatever fails is a result
        return f"fails ({type(error).__name__})"


def _by_runtime(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return onnx.load(options.optimized_model_filepath)


def _by_optimizer(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxoptimizer

    made: onnx.ModelProto = onnxoptimizer.optimize(model)
    return made


def _by_simplifier(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    made, sound = onnxsim.simplify(model)
    if not sound:
        raise ValueError("onnxsim says that its result differs")
    return made


def read(path: Path) -> dict[str, Row]:
    """Read a table; one that is not there is empty."""
    if not path.exists():
        return {}
    types: dict[str, Any] = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        rows = [
            Row(**{f.name: types[str(f.type)](line[f.name]) for f in fields(Row)})
            for line in csv.DictReader(file)
        ]
    return {row.model: row for row in rows}


def write(rows: dict[str, Row], path: Path) -> None:
    """Write the table in the order of the zoo."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(rows[name]) for name in MODELS if name in rows)


def summary(rows: Iterable[Row]) -> str:
    """The table in short, as in the README."""
    rows = list(rows)
    known = [row for row in rows if row.exported]
    left = {
        "ORT": [row.ort_left for row in known],
        "onnxoptimizer": [row.optimizer_left for row in known],
        "onnxsim": [row.simplifier_left for row in known],
    }
    cells = []
    for counts in left.values():
        numbers = [int(each) for each in counts if each.isdigit()]
        fails = sum(each.startswith("fails") for each in counts)
        cells.append(f"{sum(numbers):,}" + (f", fails on {fails}" if fails else ""))
    parts = sum(row.is_backbone for row in known)
    worst = max((row.exact for row in known if row.exact == row.exact), default=0.0)
    head = "models | norms | bntools leaves | the plan keeps | ORT leaves | onnxoptimizer | onnxsim"
    ours = (
        len(known),
        sum(r.norms for r in known),
        sum(r.left for r in known),
        sum(map(_kept, known)),
    )
    row = " | ".join([*(f"{count:,}" for count in ours), *cells, f"{worst:.1e}"])
    told = f"Of {parts} detectors the backbone alone, which is what torch can export.\n"
    none = [row.model for row in rows if not row.exported]
    told = told * bool(parts) + f"Not exported by torch: {', '.join(none)}.\n" * bool(none)
    return f"{told}| {head} | worst error in float64 |\n|{'---|' * 8}\n| {row} |"


def _kept(row: Row) -> int:
    """How many norms the plan keeps."""
    return sum(int(item.rpartition(":")[2]) for item in row.kept.split())


def _failed(name: str, why: str) -> Row:
    return Row(name, 0, "", 0, 0, 0.0, 0.0, 0.0, "", "", "", 0.0, why)


def _child(name: str, peers: str, *, raw: bool) -> None:
    """Measure one model in this process; the row is a line of JSON on stdout."""
    warnings.simplefilter("ignore")
    folder = Path(peers) if peers else None
    if folder is not None:
        sys.path.append(str(folder))
    try:
        row = measure(name, folder, raw=raw)
    except Exception as error:  # noqa: BLE001 - a crash is a result
        row = _failed(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    print(json.dumps(asdict(row)), flush=True)


def _measured(name: str, options: argparse.Namespace) -> Row:
    peers = str(options.peers or "")
    command = [sys.executable, __file__, "--child", name, peers]
    command += ["--raw"] if options.raw else []
    try:
        # The path is this file's own, and the names are those of the table above.
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * _MINUTES, check=False
        )
    except subprocess.TimeoutExpired:
        return _failed(name, f"it takes more than {_MINUTES} minutes")
    line = next((each for each in run.stdout.splitlines() if each.startswith('{"model"')), None)
    if line is None:
        why = f"the process ended with {run.returncode}: {run.stderr.strip()[-200:]}"
        return _failed(name, why)
    return Row(**json.loads(line))


def main() -> int:
    """Measure what is asked for; exit with 1 where a row has a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (CSV)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="models, as in '*resnet*'")
    parser.add_argument("--peers", type=Path, help="the folder of onnxoptimizer and onnxsim")
    parser.add_argument("--raw", action="store_true", help="files as the exporter writes them")
    parser.add_argument("--resume", action="store_true", help="keep the sound rows of the table")
    parser.add_argument("--summary", action="store_true", help="only print the table in short")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child, raw=options.raw)
        return 0
    rows = read(options.out) if options.resume or options.summary else {}
    for name in [] if options.summary else NAMES:
        done = name in rows and not rows[name].problems()
        if done or not fnmatchcase(name, f"*{options.only}*"):
            continue
        rows[name] = _measured(name, options)
        sys.stderr.write(f"{rows[name]}\n")
        write(rows, options.out)
    print(summary(rows.values()))
    return int(any(row.problems() for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
