"""The program `bntools`, and `python -m bntools_cli`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line with the arguments of this process."""
    try:
        from .main import program
    except KeyboardInterrupt:  # Ctrl-C before the commands are there to handle it
        sys.exit(130)
    program(prog_name="bntools")


if __name__ == "__main__":
    main()
