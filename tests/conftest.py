"""What every test starts from: the same seed, few threads, and nothing left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
    assert torch.is_grad_enabled(), "a test left gradients disabled"
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype"


def pytest_configure() -> None:
    """What a shell starts in the background ignores Ctrl-C, and hands that on to its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
