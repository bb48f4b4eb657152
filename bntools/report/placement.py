"""Where a model ran: never on another device than the report says."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """The runtime, provider and device on which a model ran, and where its nodes went.

    `nodes` counts the nodes of an ONNX model per provider; `host` of them are shape arithmetic,
    which a GPU session computes on the CPU by design. `reason` says why this provider was picked
    where that was left to bntools. `tf32` is None where the device has no such mode.
    """

    runtime: str
    provider: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    host: int = 0
    tf32: bool | None = None
    reason: str = ""

    def __str__(self) -> str:
        parts = [f"{self.runtime} on {self.device}"]
        if self.nodes:
            counts = ", ".join(f"{count} on {name}" for name, count in self.nodes.items())
            parts.append(f"nodes: {counts}")
        if self.host:
            parts.append(f"{self.host} of them shape arithmetic on the host")
        if self.tf32 is not None:
            parts.append(f"TF32 {'allowed' if self.tf32 else 'off'}")
        parts += [f"{name} {version}" for name, version in self.versions.items()]
        return "; ".join([*parts, *([self.reason] if self.reason else [])])
