"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ngeval.errors import OutputError


def replace_file(path: Path, write: Callable[[Path], object], scratch: Path | None = None) -> None:
    """Write a temporary file, then put it in its place.

    A reader finds the earlier file or the new one, never a part; where writing fails, the earlier
    one stays. What has returned from here is on the disk, whatever happens to the machine then.

    Args:
        path: the output.
        write: writes all of it to the path that it is given.
        scratch: a folder of the same file system for the temporary file, which a killed process
            leaves behind; default: the output's own.

    Raises:
        OutputError: the disk is full or the folder cannot be written (any more).
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
    """Have the system write what it keeps of a file, or of a folder's names."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # file systems on the network may not know how to do that for a folder
    finally:
        os.close(handle)
