"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ngeval.errors import OutputError


def replace_file(path: Path, write: Callable[[Path], object], scratch: Path | None = None) -> None:
    """Let ``write`` fill a temporary file, and rename it to the output ``path``.

    A reader sees the earlier file or the new one, never a part of it; if writing fails, the earlier
    file stays. When the function returns, the file is on the disk, even if the machine then fails.
    The temporary file, which a killed process leaves behind, is in the folder ``scratch`` of the
    same file system; default: the output's.
    """
    try:
        handle, name = tempfile.mkstemp(dir=scratch or path.parent, prefix=".", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            _to_disk(temporary)
            temporary.replace(path)
            _to_disk(path.parent)  # the name, too
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # network file systems may not support this for folders
    finally:
        os.close(handle)
