"""What the values of options may be: numbers in a range, and files."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["Number", "Whole", "file_option", "input_file", "named"]


class Whole(click.IntRange):
    """A whole number in a range; click itself tells people of "a valid integer range"."""

    name = "whole number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        number: int = super().convert(value, param, ctx)
        if number > sys.maxsize:
            self.fail(f"{number} is too large.", param, ctx)
        return number


class Number(click.FloatRange):
    """A number in a range."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def file_option(_: click.Context, option: click.Parameter, value: str | None) -> Path | None:
    """Turn the value of an option into the path of what is written."""
    if value == "-":
        raise click.BadParameter("it is a file; --json prints the report on stdout.", param=option)
    return _path(value, option)


def input_file(_: click.Context, option: click.Parameter, value: str | None) -> Path | None:
    """Turn the value of an option into the path of what is read."""
    if value == "-":
        raise click.BadParameter("it is a file; nothing is read from stdin.", param=option)
    return _path(value, option)


def _path(value: str | None, option: click.Parameter) -> Path | None:
    if value == "":
        raise click.BadParameter("it is empty. Give the name of a file.", param=option)
    return None if value is None else Path(value)


def named(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Something by its name: a model, a source of data."""
    if value == "":
        raise click.BadParameter("it is empty. Give a name.", param=option)
    return value
