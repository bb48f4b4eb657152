"""Draw the two pictures of the README: `python samples/pictures.py [--out DIR]`.

`drift.png`: how the statistics of the digits network move when the images come in with another
normalisation than in training. `errors.png`: the error by depth, against float64, of the folded
network and of a copy with a wrong eps in one layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import bntools

HERE = Path(__file__).parent


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "pictures", help="a folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model = bntools.load(HERE / "digits_cnn.pt")

    other = bntools.Preprocessing(grayscale=True, mean=(0.5,), std=(0.25,))
    data = bntools.read_data(str(HERE / "digits"), preprocessing=other)
    result = bntools.recalibrate(model, data, evaluate=bntools.Accuracy(data))
    bntools.write_plot(result.report, out / "drift.png", force=True)
    print(result.report.summary())

    wrong = bntools.load(HERE / "digits_cnn.pt")
    wrong.get_submodule("4.bn1").eps = 1e-2
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    candidates = {"folded": bntools.fold(model).model, "eps 1e-2 in one layer": wrong}
    reports = {name: bntools.compare_layers(model, c, images) for name, c in candidates.items()}
    bntools.write_plot(reports, out / "errors.png", force=True)
    for name, report in reports.items():
        print(f"{name}: {report.summary()}")


if __name__ == "__main__":
    main()
