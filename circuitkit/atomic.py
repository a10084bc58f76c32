"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from circuitkit.errors import FormatError


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Replace a file by ``content`` in one step; missing parent folders are made. Returns the path.

    The bytes go to a temporary file in the same folder, reach the disk, and are then renamed over the target, so a
    reader, a crash or a full disk sees the old file or the new one. Text is written as UTF-8.

    Raises:
        FormatError: if the file cannot be written; the old file is unchanged and nothing is left beside it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(Path(folder) / "new" / "note.txt", "done").read_text()
    'done'
    """
    data = content.encode() if isinstance(content, str) else content
    # A rename would replace a symbolic link; writing to what it points at keeps the link.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_through(temporary, data)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise FormatError(
            f"could not write {path}: {error.strerror or error}; nothing was changed. "
            "Free some space or give a file in a folder that you can write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return Path(path)


def _write_through(path: Path, data: bytes) -> None:
    # os.open, not tempfile: the file gets the permissions that the user's umask asks for.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Some file systems cannot sync a folder; the rename is atomic there all the same.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
