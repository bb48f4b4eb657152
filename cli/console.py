"""The streams: the answer goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import click

from bntools.errors import BNToolsError

__all__ = ["Console"]

_COLOURS = {
    r"(?<=  )kept, [\w-]+": "yellow",
    r"^error(?=  )": "bold red",
    r"^warning(?=  )": "yellow",
    r"^-+$": "dim",
    r"\bDIFFERS\b": "bold red",
}


@dataclass
class Console:
    """What a command says, and how much of it."""

    quiet: bool = False
    verbose: bool = False

    def note(self, message: str) -> None:
        """What is good to know; nothing with --quiet."""
        if not self.quiet:
            self.error(message)

    def detail(self, message: str) -> None:
        """What only --verbose wants to know."""
        if self.verbose:
            self.error(message)

    def warn(self, message: str) -> None:
        """What the user should know in any case."""
        self.error(f"warning: {message}")

    def warn_of_trust(self, source: str) -> None:
        """What --trust means for a file."""
        if os.path.exists(source):
            self.warn(
                f"--trust: {source} may run code of its own as it is read, with all that you may"
                " do on this computer"
            )

    def error(self, message: str) -> None:
        """A line on stderr, in which names from a file cannot steer the terminal."""
        with suppress(OSError):  # nobody is left to tell
            click.echo(_harmless(message), err=True)

    def table(self, text: str) -> None:
        """The answer for people; with --quiet only its last line, the summary."""
        summary = text.rpartition("\n")[2]
        _write(summary if self.quiet else text)

    def document(self, data: dict[str, Any]) -> None:
        """The answer for programs: one JSON document, in which NaN and infinity are null."""
        _write(json.dumps(data, indent=2, allow_nan=False))

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """While something takes long: a spinner on a terminal, and stdout kept clean.

        What model code prints goes to stderr; its warnings are shown with --verbose.
        """
        with self.hushed(), self._spinner(what):
            yield

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """The same without a spinner, for what shows its own progress."""
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("default" if self.verbose else "ignore")
            yield

    def _spinner(self, what: str) -> Any:
        if self.quiet or sys.stderr is None or not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console as RichConsole
        from rich.markup import escape

        return RichConsole(stderr=True).status(escape(_harmless(what)), spinner="line")


def _write(text: str) -> None:
    """Write to stdout; that the reader has gone (`| head`) is no error."""
    try:
        if sys.stdout is not None and sys.stdout.isatty() and _colourful():
            text = _coloured(text)
        click.echo(text)
        if sys.stdout is not None:
            sys.stdout.flush()
    except UnicodeEncodeError:
        click.echo(text.encode("ascii", "backslashreplace"))
    except BrokenPipeError:
        _abandon_stdout()
    except OSError as error:
        _abandon_stdout()
        reason = (error.strerror or str(error)).lower()
        raise BNToolsError(f"Cannot write the answer to stdout: {reason}.") from error


def _abandon_stdout() -> None:
    """Python flushes stdout once more at its end; let that go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _colourful() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _coloured(text: str) -> str:
    from rich.console import Console as RichConsole
    from rich.text import Text

    body, _, summary = text.rpartition("\n")
    styled = Text(f"{body}\n" if body else "")
    for pattern, style in _COLOURS.items():
        styled.highlight_regex(f"(?m){pattern}", style)
    styled.append(summary, "bold")
    console = RichConsole(color_system="standard", force_terminal=True, highlight=False)
    with console.capture() as captured:
        console.print(styled, end="", soft_wrap=True)
    return captured.get()


def _harmless(text: str) -> str:
    kept = (
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(kept)
