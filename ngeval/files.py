"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ngeval.errors import OutputError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file beside the output, then put it in its place.

    A reader finds the earlier file or the new one, never a part; where writing fails, the earlier
    one stays.

    Args:
        path: the output.
        write: writes all of it to the path that it is given.

    Raises:
        OutputError: the disk is full or the folder cannot be written (any more).
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
