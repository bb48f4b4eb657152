"""Why a norm layer folds where it does, or stays, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bntools.tables.layout import named, plain, text, wrapped

if TYPE_CHECKING:
    from bntools.report import Explanation, Step, Way

__all__ = ["explanation"]

_MOST = 24


def explanation(of: Explanation) -> str:
    """The decision, then for each direction what is on the way, numbered from the norm on."""
    calls = f"it is called {of.calls} times; this is the first call" if of.calls > 1 else ""
    ways = [_way(way) for way in of.ways] or [_told(of)]
    return text(plain(of.summary()), calls, *ways)


def _told(of: Explanation) -> str:
    """What the decision alone says."""
    decision = of.decision
    lines = [f"backward: {decision.detail}"] if decision.detail else []
    if decision.forward_reason is not None:
        lines.append(f"forward: {decision.forward_reason.value}: {decision.forward_detail}")
    return "\n".join(wrapped(plain(line), "  ") for line in lines)


def _way(way: Way) -> str:
    verdict = "folds" if way.reason is None else f"{way.reason.value}: {plain(way.detail)}"
    lines = [wrapped(f"{way.direction}: {verdict}", "  ")]
    shown = (
        way.steps
        if len(way.steps) <= _MOST
        else (*way.steps[: _MOST // 2], None, *way.steps[-_MOST // 2 :])
    )
    for number, step in enumerate(way.steps, start=1):
        if step in shown:
            lines.append(_step(number, step))
        elif number == _MOST // 2 + 1:
            lines.append(f"  ... {len(way.steps) - len(shown) + 1} more ...")
    return "\n".join(lines)


def _step(number: int, step: Step) -> str:
    where = f" in {named(step.module)}" if step.module else ""
    line = f"  {number}. {plain(step.operation)}{where} {step.role}: {plain(step.says)}"
    return wrapped(line.lstrip(), "     ").replace("     ", "  ", 1)
