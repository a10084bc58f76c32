"""Warnings that point at the user's own line, from whatever depth of the package they come."""

from __future__ import annotations

import sys
import warnings


def caution(message: str) -> None:
    """Emit a UserWarning at the first frame outside circuitkit.

    >>> with warnings.catch_warnings(record=True) as seen:
    ...     warnings.simplefilter("always")
    ...     caution("few examples")
    >>> str(seen[0].message)
    'few examples'
    """
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("circuitkit."):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, UserWarning, stacklevel=depth)
