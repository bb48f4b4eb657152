"""Plant every fault of tests/faults.py, and print how many are caught: the table in the README.

python tests/faults_table.py              # eight layers of each architecture
python tests/faults_table.py --layers 0   # all of them, for an hour
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from faults import ARCHITECTURES, KINDS, Outcome, fold_of

RUNTIMES = ("torch", "onnxruntime")
_HEAD = ["", "planted", "matter", *(f"caught, {r}" for r in RUNTIMES), "elsewhere"]
_HEAD += [*(f"also caught, {r}" for r in RUNTIMES), *(f"named, {r}" for r in RUNTIMES)]


def counts(outcomes: Sequence[Outcome]) -> list[int]:
    """One row: faults that matter and how many of them are caught, and the same for the others."""
    matter = [outcome for outcome in outcomes if outcome.matters]
    others = [outcome for outcome in outcomes if not outcome.matters]
    return [
        len(outcomes),
        len(matter),
        *(sum(outcome.caught[runtime] for outcome in matter) for runtime in RUNTIMES),
        len(others),
        *(sum(outcome.caught[runtime] for outcome in others) for runtime in RUNTIMES),
        *(sum(outcome.is_named(runtime) for outcome in others) for runtime in RUNTIMES),
    ]


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Rows for each architecture, each kind of fault, and all of them, in Markdown."""
    every = [outcome for found in outcomes.values() for outcome in found]
    rows = {name: counts(found) for name, found in outcomes.items()}
    for kind in KINDS:
        rows[kind] = counts([outcome for outcome in every if outcome.fault.kind == kind])
    rows["**all**"] = counts(every)
    lines = [_HEAD, ["---"] * len(_HEAD), *([name, *map(str, row)] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="norm layers to harm; 0: all")
    parser.add_argument("--channels", type=int, default=2, help="channels of each")
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES), metavar="ARCHITECTURE")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.names:
            fold = fold_of(name)
            fold.exported(Path(folder) / "good.onnx")
            faults = fold.faults(asked.layers or None, asked.channels)
            outcomes[name] = [fold.outcome(fault, Path(folder)) for fault in faults]
            print(name, *counts(outcomes[name]), flush=True)  # noqa: T201 - a script
    print(table(outcomes))  # noqa: T201 - a script


if __name__ == "__main__":
    main()
