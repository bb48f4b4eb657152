"""The group of commands, and the one place where whatever goes wrong becomes an exit code."""

from __future__ import annotations

import shlex
import traceback
from typing import Any

import click

import bntools
from bntools.errors import BNToolsError, UntrustedError

from .console import Console
from .diff import diff
from .export import export
from .fold import fold
from .freeze import freeze, unfreeze, unsync
from .inspect import inspect
from .recalibrate import recalibrate
from .replace import replace_norms
from .ship import ship
from .to_batchnorm import to_batchnorm
from .unfold import unfold
from .verify import verify

__all__ = ["program"]

_TYPED = "bntools.typed"
_CANNOT, _BUG, _INTERRUPTED = 3, 70, 130

_HELP = """Surgery on PyTorch networks with BatchNorm, with proof that the result is right.

\b
Examples:
  bntools inspect model.pt
  bntools fold weights.pth --arch torchvision:resnet50 -o small.pt
  bntools export model.pt
  bntools verify model.pt model.onnx
  bntools recalibrate model.pt --data images/ --eval-data val/
  bntools replace model.pt --with groupnorm --fit images/

MODEL is a file: .pt with a whole model or (with --arch) a state dict, .safetensors, .pt2 of
torch.export, TorchScript or .onnx; told by its content. Files are not trusted: nothing in them is
run. It may also be an architecture's name, such as timm:resnet18.

The answer is on stdout, all else on stderr. Exit codes: 0 done, 1 a check failed, 2 wrong
options, 3 not possible (the message says why), 70 a bug, 130 interrupted.
"""


class Program(click.Group):
    """A group that turns exceptions into one line on stderr and an exit code."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        """Remember what was typed, for errors that say what to type instead."""
        typed = list(args)
        ctx = super().make_context(info_name, args, parent, **extra)
        ctx.meta[_TYPED] = [info_name or "bntools", *typed]
        return ctx

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        console = ctx.obj = Console()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            console.error("interrupted")
            raise click.exceptions.Exit(_INTERRUPTED) from None
        except Exception as error:
            if console.verbose:
                console.error("".join(traceback.format_exception(error)).rstrip())
            console.error(f"Error: {_told(error)}")
            if isinstance(error, UntrustedError):
                console.error(f"To allow it: {_completed(ctx.meta[_TYPED], error.options)}")
            raise click.exceptions.Exit(_CANNOT if _is_foreseen(error) else _BUG) from error


def _completed(typed: list[str], options: tuple[str, ...]) -> str:
    """The command line with further options, as a shell takes it."""
    end = typed.index("--") if "--" in typed else len(typed)
    return shlex.join([*typed[:end], *options, *typed[end:]])


def _is_foreseen(error: Exception) -> bool:
    return isinstance(error, BNToolsError) or _is_memory(error)


def _is_memory(error: Exception) -> bool:
    name = type(error).__name__
    return name in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)


def _told(error: Exception) -> str:
    if isinstance(error, BNToolsError):
        return str(error)
    says = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    if _is_memory(error):
        return (
            f"Cannot go on: there is not enough memory ({says}). Use a smaller --input-shape, or"
            " another --device."
        )
    return (
        f"this is a bug in bntools {bntools.__version__} ({says}). Please report it to its"
        " maintainers, with what the same command prints with -v."
    )


program = Program(
    "bntools",
    help=_HELP,
    commands=[
        inspect,
        fold,
        unfold,
        recalibrate,
        diff,
        export,
        verify,
        freeze,
        unfreeze,
        unsync,
        to_batchnorm,
        replace_norms,
        ship,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
program = click.version_option(bntools.__version__, message="%(prog)s %(version)s")(program)
