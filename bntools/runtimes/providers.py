"""The providers of ONNX Runtime: opened without a fallback, and read back.

A session that is asked for CUDA and does not get it runs on the CPU and raises nothing.
"""

from __future__ import annotations

import ctypes
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bntools.errors import BNToolsError, LoadError, RuntimeUnavailableError
from bntools.report import Placement
from bntools.runtimes.devices import check_provider, device_name
from bntools.runtimes.hosting import data_nodes

__all__ = ["Opening", "open_on"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_RECORD = "session.record_ep_graph_assignment_info"
_FOLDER = "session.model_external_initializers_file_folder_path"
_FATAL, _WARNING = 4, 2
_INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]'"


@dataclass(frozen=True)
class Opening:
    """What session to open: the file or the bytes of an ONNX model, and how it may run."""

    model: Path | bytes
    allow_tf32: bool = False
    optimise: bool = True
    beside: Path | None = None

    def __str__(self) -> str:
        return str(self.model) if isinstance(self.model, Path) else "the ONNX model"


def open_on(provider: str, opening: Opening) -> tuple[Any, Placement]:
    """A session of ONNX Runtime on a provider, and what it says about itself.

    Raises `LoadError` for a file that is no ONNX model, `RuntimeUnavailableError` for what is
    missing to run it there.
    """
    check_provider(provider)
    ort = _onnxruntime()
    if provider == "cpu":
        return _on_cpu(ort, opening, "")
    try:
        return _on_cuda(ort, opening, "" if provider == "cuda" else "picked because CUDA works")
    except RuntimeUnavailableError as error:
        if provider == "cuda":
            raise
        why = str(error).partition(": ")[2].partition(". ")[0]
        return _on_cpu(ort, opening, f"picked because {why.rstrip('.')}")


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 - an optional package, and slow to import
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({_line(error)})"
        raise RuntimeUnavailableError(
            f"Cannot use ONNX Runtime: it is not installed{why}. pip install onnxruntime, or for"
            f" CUDA {_INSTALL}"
        ) from error
    return onnxruntime


def _on_cpu(ort: Any, opening: Opening, reason: str) -> tuple[Any, Placement]:
    session = _session(ort, opening, [_CPU], {})
    device = device_name(torch.device("cpu"))
    versions = {"onnxruntime": str(ort.__version__)}
    nodes = {_short(name): count for name, count in _counts(session).items()}
    return session, Placement("ONNX Runtime", "cpu", device, versions, nodes, reason=reason)


def _on_cuda(ort: Any, opening: Opening, reason: str) -> tuple[Any, Placement]:
    if _CUDA not in ort.get_available_providers():
        raise RuntimeUnavailableError(
            f"Cannot run {opening} on CUDA: onnxruntime {ort.__version__} is the package for the"
            f" CPU. Put the other in its place: pip uninstall onnxruntime, then {_INSTALL}"
        )
    said = _preload(ort)
    asked = [(_CUDA, {"use_tf32": "1" if opening.allow_tf32 else "0"})]
    try:
        session = _session(ort, opening, asked, {_NO_FALLBACK: "1"})
    except BNToolsError:
        session = _session(ort, opening, asked, {})  # tells which nodes, or why there is no CUDA
    if _CUDA not in session.get_providers():
        raise RuntimeUnavailableError(
            f"Cannot run {opening} on CUDA: {_why_not(ort, said)}. Install what is missing"
            f" (libraries: {_INSTALL}), or use --provider cpu."
        )
    host = _checked_host(session, opening)
    nodes = {_short(name): count for name, count in _counts(session).items()}
    on_gpu = torch.cuda.is_available()
    device = device_name(torch.device("cuda")) if on_gpu else "a CUDA device"
    versions = {"onnxruntime": str(ort.__version__), "CUDA": str(getattr(ort, "cuda_version", ""))}
    return session, Placement(
        "ONNX Runtime", "cuda", device, versions, nodes, host, opening.allow_tf32, reason
    )


def _checked_host(session: Any, opening: Opening) -> int:
    """How many nodes of shape arithmetic stay on the CPU; any other there is an error."""
    on_cpu = [node for name, node in _assigned(session) if name != _CUDA]
    if not on_cpu:
        return 0
    computing = data_nodes(opening.model, [(node.name, node.op_type) for node in on_cpu])
    if computing:
        shown = ", ".join(f"{name or '(unnamed)'} ({kind})" for name, kind in computing[:5])
        more = f" and {len(computing) - 5} more" if len(computing) > 5 else ""
        raise RuntimeUnavailableError(
            f"Cannot run {opening} on CUDA: its provider left nodes with data to the CPU: {shown}"
            f"{more}. Use --provider cpu, or operations that CUDA has."
        )
    return len(on_cpu)


def _session(ort: Any, opening: Opening, providers: list[Any], settings: dict[str, str]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    if not opening.optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in {_RECORD: "1", **settings}.items():
        options.add_session_config_entry(key, value)
    if opening.beside is not None:
        options.add_session_config_entry(_FOLDER, str(opening.beside))
    source = opening.model if isinstance(opening.model, bytes) else str(opening.model)
    try:
        with _silent(ort):
            return ort.InferenceSession(source, options, providers=providers)
    except Exception as error:
        raise _explained(error, opening) from error


@contextmanager
def _silent(ort: Any) -> Iterator[None]:
    """Neither the logger nor the Python wrapper of ONNX Runtime says anything inside."""
    ort.set_default_logger_severity(_FATAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(_WARNING)  # its default; it cannot be asked


def _preload(ort: Any) -> str:
    """Let torch's CUDA libraries serve; what could not be loaded."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(Exception):  # it is a help only: the session decides
        ort.preload_dlls()
    return said.getvalue()


def _why_not(ort: Any, said: str) -> str:
    """Why the CUDA provider did not start: the first library that is missing, if it is that."""
    folder = Path(ort.__file__).parent / "capi"
    for library in sorted(folder.glob("*onnxruntime_providers_cuda.*")):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:  # noqa: PERF203 - there is one such library
            missing = str(error).partition(":")[0]
            if missing.startswith("libcuda.so"):
                return f"there is no NVIDIA driver ({missing} is missing)"
            if "undefined symbol" not in str(error):
                return f"the library {missing} is missing"
    failed = re.search(r"Failed to load ([^:\s]+)", said)
    if failed:
        return f"the library {Path(failed[1]).name} is missing"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return "its CUDA provider did not start"


def _explained(error: Exception, opening: Opening) -> BNToolsError:
    says = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", _line(error))
    if type(error).__name__ == "NotImplemented":
        return RuntimeUnavailableError(
            f"Cannot run {opening}: ONNX Runtime has no such operation for these types ({says})."
            " Use another dtype or opset."
        )
    if type(error).__name__ in ("InvalidProtobuf", "NoModel"):
        return LoadError(
            f"Cannot load {opening}: it is no ONNX model, or damaged. Export or copy it again."
        )
    return LoadError(f"Cannot load {opening}: ONNX Runtime refuses it ({says}).")


def _assigned(session: Any) -> Iterator[tuple[str, Any]]:
    """The provider of each node."""
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            yield part.ep_name, node


def _counts(session: Any) -> Counter[str]:
    return Counter(name for name, _ in _assigned(session))


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
