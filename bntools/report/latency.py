"""What a change of a model did to its speed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Latency"]

_NOISE = 0.03


@dataclass(frozen=True)
class Latency:
    """Medians of eager forwards in milliseconds, without and with a change.

    `ratio` is how many times as fast the change made the model; within 3 % it counts as no change.
    """

    before_ms: float
    after_ms: float
    ratio: float
    runs: int
    threads: int
    device: str = "cpu"
    inputs: str = ""

    @property
    def faster(self) -> bool:
        """Whether the change made the model faster, by more than 3 %."""
        return self.ratio > 1 + _NOISE

    def summary(self) -> str:
        """One line: how much faster or slower, and what was measured."""
        if self.faster:
            told = f"{self.ratio:.2f} times as fast"
        elif self.ratio < 1 - _NOISE:
            told = f"{self.ratio:.2f} times as fast, which is slower"
        else:
            told = "as fast as without"
        spent = f"{self.before_ms:.2f} -> {self.after_ms:.2f} ms"
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        how = f"median of {self.runs} runs on {self.inputs}, {self.device}, {threads}"
        return f"{told} ({spent}; {how})"
