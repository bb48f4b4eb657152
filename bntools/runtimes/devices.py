"""Where PyTorch models run: moved there on request, or an error that says why not."""

from __future__ import annotations

import platform

import torch

from bntools.errors import InputError, RuntimeUnavailableError
from bntools.report import Placement

__all__ = ["PROVIDERS", "torch_device", "torch_placement"]

PROVIDERS = ("cpu", "cuda", "auto")


def check_provider(provider: str) -> str:
    """The provider, if there is such a one."""
    if provider not in PROVIDERS:
        raise InputError(f"Cannot use the provider {provider!r}: there are {', '.join(PROVIDERS)}.")
    return provider


def torch_device(provider: str) -> tuple[torch.device, str]:
    """The device of a provider, and for "auto" the reason of the choice.

    Raises `RuntimeUnavailableError` where CUDA is asked for and cannot be had.
    """
    if check_provider(provider) == "cpu":
        return torch.device("cpu"), ""
    why_not = _why_no_cuda()
    if not why_not:
        return torch.device("cuda"), "" if provider == "cuda" else "picked because CUDA works"
    if provider == "auto":
        return torch.device("cpu"), f"picked because {why_not}"
    raise RuntimeUnavailableError(
        f"Cannot run PyTorch on CUDA: {why_not}. Use --provider cpu, or install what is missing."
    )


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device or driver"
    try:
        torch.ones(1, device="cuda").add(1).cpu()
    except RuntimeError as error:
        return f"the CUDA device does not work ({' '.join(str(error).split())[:200]})"
    return ""


def torch_placement(
    device: torch.device, *, allow_tf32: bool = False, reason: str = ""
) -> Placement:
    """What a report says about a model of PyTorch on a device."""
    versions = {"torch": str(torch.__version__)}
    on_gpu = device.type == "cuda"
    if on_gpu:
        versions["CUDA"] = str(torch.version.cuda)
        versions["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return Placement(
        "PyTorch",
        device.type,
        device_name(device),
        versions,
        tf32=allow_tf32 if on_gpu else None,
        reason=reason,
    )


def device_name(device: torch.device) -> str:
    """The device in words, such as "NVIDIA H200" or "the CPU (x86_64)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({platform.machine()})" if device.type == "cpu" else str(device)
