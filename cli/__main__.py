"""The program `bntools`, and `python -m bntools_cli`."""

from __future__ import annotations

import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line with the arguments of this process."""
    _end_in_order()
    try:
        from .main import program
    except KeyboardInterrupt:  # Ctrl-C before the commands are there to handle it
        sys.exit(130)
    program(prog_name="bntools")


def _end_in_order() -> None:
    """Let a request to end the process (SIGTERM, a closed terminal) undo what is unfinished."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has not all of them
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


if __name__ == "__main__":
    main()
