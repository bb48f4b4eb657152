"""TF32: what a GPU may round float32 products to, switched for one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["TF32_EPS", "tf32"]

TF32_EPS = 2.0**-10
"""One rounding of TF32: ten bits of mantissa, as many as float16 has."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:  # noqa: FBT001 - the one thing that it says
    """Let CUDA convolutions, recurrent layers and matrix products use TF32, or not, inside.

    By default torch allows it for convolutions only. The settings are restored at the end; see
    https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html
    """
    backends: Any = torch.backends
    settings = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value
