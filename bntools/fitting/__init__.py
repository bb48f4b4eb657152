"""Fitting new norm layers to what the old ones gave, in closed form."""

from __future__ import annotations

from bntools.fitting.fit import FitOptions, fit

__all__ = ["FitOptions", "fit"]
