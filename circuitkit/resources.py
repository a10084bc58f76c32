"""Where the data that ships with circuitkit lies: inside the wheel, or beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

from circuitkit.errors import FormatError


def resource(*parts: str) -> Path:
    """Path of a shipped file or folder under ``data/``.

    Raises:
        FormatError: if it is not there.
    """
    here = Path(__file__).parent
    for root in (here / "data", here.parent / "data"):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise FormatError(
        f"the data file {'/'.join(parts)} is missing from this installation; reinstall circuitkit-discovery"
    )
