"""Reports as text: rich tables, as wide as the terminal."""

from __future__ import annotations
from typing import Any
def text(*parts: Any) -> str: return "\n".join(str(p) for p in parts)
def decisions(x): return "\n".join(f"{d.path:30} {d.kind:16} {d.action.value} {','.join(d.hosts)} {d.reason.value if d.reason else ''} {d.detail}" for d in x)
def outputs(x): return "\n".join(map(str,x))
layers = findings = outputs
