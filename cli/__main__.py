"""The program `bntools`, and `python -m bntools_cli`."""

from __future__ import annotations

from .main import program

__all__ = ["main"]


def main() -> None:
    """Run the command line with the arguments of this process."""
    program(prog_name="bntools")


if __name__ == "__main__":
    main()
