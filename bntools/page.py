"""The page of a shipment: one HTML file that needs no other, with its tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from bntools.errors import BNToolsError
from bntools.plots.canvas import rendered
from bntools.plots.drift import draw_drift
from bntools.plots.errors import draw_errors
from bntools.report import Equivalence, ShipReport

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; overflow-wrap: anywhere; } h2 { margin-top: 2rem; font-size: 1.15rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; vertical-align: top;
  border-bottom: 1px solid #8884; overflow-wrap: break-word; }
th { white-space: nowrap; } td:last-child { overflow-wrap: anywhere; min-width: 8rem; }
.wide { overflow-x: auto; }
.verdict { font-weight: 600; } .good { color: #1a7f37; } .bad { color: #cf222e; }
figure { margin: 1rem 0; background: #fff; max-width: 46rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: #444; padding: 0 0.5rem 0.5rem; font-size: 0.85rem; }
code { font-size: 0.85em; } footer { margin-top: 2rem; color: #888; font-size: 0.8rem; }
"""
_MOST_ROWS = 60
Row = Sequence[object]


def page(report: ShipReport) -> str:
    """The page, in UTF-8; what names a file or a model has chosen is escaped.

    Without matplotlib it has no pictures, and says so.
    """
    body = "\n".join(part for part in _parts(report) if part)
    title = escape(f"{report.source}: shipped by bntools")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
        f"\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _parts(report: ShipReport) -> Iterable[str]:
    verdict = "good" if report else "bad"
    yield f"<h1>{escape(report.source)}</h1>"
    yield f'<p class="verdict {verdict}">{escape(report.summary())}</p>'
    yield _section("Steps", _table(("step", "outcome"), _named(report)))
    yield _section("Equivalence", _table(_OUTPUT_HEAD, _outputs(report.checks)))
    yield _notes(f"Not verified on {name}: {why}" for name, why in report.unavailable.items())
    yield _pictures(report)
    yield _section("Doctor", _findings(report))
    yield _section("Norm layers that stay", _kept(report))
    yield _section("Files", _table(("file", "bytes", "SHA-256"), _files(report)))
    yield _notes(report.notes)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"<footer>{escape(versions)}</footer>"


def _named(report: ShipReport) -> list[Row]:
    return [(step.value, said) for step, said in report.steps.items()]


_OUTPUT_HEAD = ("runtime", "output", "error", "original's own", "limit", "verdict")


def _outputs(checks: Iterable[Equivalence]) -> list[Row]:
    return [
        (
            str(check.placement or "PyTorch").partition(";")[0],
            output.name,
            f"{output.error:.2g}",
            f"{output.reference_error:.2g}",
            f"{output.limit:.2g}",
            "equivalent" if output.passed else f"DIFFERS {output.note}",
        )
        for check in checks
        for output in check.outputs
    ]


def _findings(report: ShipReport) -> str:
    rows = [(f.severity.value, f.path, f.code, f.message) for f in report.inspection.findings]
    if not rows:
        return "<p>Nothing to report.</p>"
    return _table(("severity", "layer", "code", "what"), rows)


def _kept(report: ShipReport) -> str:
    kept = report.fold.kept if report.fold is not None else ()
    if not kept:
        return "<p>None: every norm layer is folded.</p>"
    rows = [(d.path, d.kind, d.reason.value if d.reason else "", d.detail) for d in kept]
    return _table(("norm layer", "kind", "reason", "why"), rows)


def _files(report: ShipReport) -> list[Row]:
    return [(file.name, f"{file.size:,}", file.sha256) for file in report.files]


def _pictures(report: ShipReport) -> str:
    try:
        return "\n".join(_drawn(report))
    except BNToolsError as error:  # matplotlib is optional
        return f"<p>No pictures: {escape(str(error))}</p>"


def _drawn(report: ShipReport) -> Iterable[str]:
    if report.recalibration is not None and report.recalibration.layers:
        drift = draw_drift([layer.drift for layer in report.recalibration.layers])
        yield _figure(rendered(drift, ".svg"), "How the statistics moved, layer by layer.")
    depths = {
        check.placement.provider if check.placement else "torch": check.layers
        for check in report.checks
        if check.layers is not None
    }
    if depths:
        yield _figure(rendered(draw_errors(depths), ".svg"), "Error by depth, against float64.")


def _figure(svg: bytes, caption: str) -> str:
    text = svg.decode()
    return (
        f"<figure>{text[text.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def _notes(lines: Iterable[str]) -> str:
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows[:_MOST_ROWS]
    ]
    left = len(rows) - _MOST_ROWS
    more = f"\n<p>... and {left} more: see the certificate.</p>" if left > 0 else ""
    table = f"<table>\n<tr>{top}</tr>\n" + "\n".join(lines) + "\n</table>"
    return f'<div class="wide">\n{table}\n</div>{more}'
