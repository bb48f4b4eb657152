"""A deployment pipeline in Python: `python samples/deploy.py [MODEL] [--data SOURCE] [--out DIR]`.

Load, inspect, recalibrate, fold, export, verify, and a report; every step may end the run with an
exit code of its own, and what it leaves is complete or not there. `bntools.ship` does the same in
one call; here the steps are apart, for pipelines that do something in between.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bntools

HERE = Path(__file__).parent
OK, UNHEALTHY, WORSE, UNPROVEN, DIFFERENT, CANNOT = 0, 11, 12, 13, 14, 3


def deploy(source: str, data: str, out: Path) -> int:
    """Take a model to `out`; returns the exit code."""
    model = bntools.load(source).eval()

    health = bntools.inspect(model)
    if health.errors:
        print(health)
        return UNHEALTHY

    batches = bntools.read_data(data, preprocessing=bntools.Preprocessing(grayscale=True))
    score = bntools.Accuracy(batches)
    options = bntools.RecalibrationOptions(gate=False)
    recalibrated = bntools.recalibrate(model, batches, prior=1000, evaluate=score, options=options)
    before, after = recalibrated.report.score_before, recalibrated.report.score_after
    print(f"accuracy {before:.4f} -> {after:.4f}")
    if before is None or after is None or after < before - 0.01:
        return WORSE

    folded = bntools.fold(recalibrated.model)
    print(folded.report.summary())
    if not folded.report.check:
        return UNPROVEN

    out.mkdir(parents=True, exist_ok=True)
    bntools.save(folded, out / "model.pt", force=True)
    exported = bntools.export_onnx(
        folded.model, None, out / "model.onnx", provider="cpu", fold=False, force=True
    )
    judged = bntools.verify(recalibrated.model, out / "model.onnx", provider="cpu", per_layer=True)
    print(judged)
    if not (exported.report and judged):
        return DIFFERENT
    bntools.write_report(out / "verification.json", judged, force=True)
    return OK


def main() -> int:
    """Run with the sample network by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "digits_cnn.pt"))
    parser.add_argument("--data", default=str(HERE / "digits"), help="as for bntools recalibrate")
    parser.add_argument("--out", type=Path, default=Path("deployed"), help="a folder")
    options = parser.parse_args()
    try:
        return deploy(options.model, options.data, options.out)
    except bntools.BNToolsError as error:
        print(f"Error: {error}", file=sys.stderr)
        return CANNOT


if __name__ == "__main__":
    raise SystemExit(main())
