"""CIFAR-10 and CIFAR-100 from their original files, pickled or binary.

Krizhevsky 2009, "Learning multiple layers of features from tiny images";
https://www.cs.toronto.edu/~kriz/cifar.html describes the layouts.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ngeval.errors import TaskError, foreign_errors

FILES = {
    ("cifar10", "train"): [f"data_batch_{i}" for i in range(1, 6)],
    ("cifar10", "test"): ["test_batch"],
    ("cifar100", "train"): ["train"],
    ("cifar100", "test"): ["test"],
}
FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
PIXELS = 3 * 32 * 32
LABEL_KEYS = {"cifar10": b"labels", "cifar100": b"fine_labels"}


@dataclass(frozen=True)
class Images:
    """Images with labels, as rows: ``pixels (n, 32, 32, 3)`` of bytes, ``labels (n,)``."""

    pixels: np.ndarray
    labels: np.ndarray
    column_names: Sequence[str] = ("image", "label")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self.pixels[index]), "label": int(self.labels[index])}


def read_cifar(name: str, folder: Path, split: str) -> Images | None:
    """Read the original files in a folder, or in that of their archive; None if there are none."""
    for place in (folder, *(folder / inside for inside in FOLDERS[name])):
        for ending in ("", ".bin"):
            if not any((place / (FILES[name, s][0] + ending)).is_file() for s in ("train", "test")):
                continue
            if (name, split) not in FILES:
                raise TaskError(f"{name} has the splits train and test, not {split!r}")
            paths = [place / (file + ending) for file in FILES[name, split]]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise TaskError(f"{place} lacks {', '.join(missing)} of {name}'s {split} split")
            read = _binary if ending else _pickled
            parts = [read(name, path) for path in paths]
            flat = np.concatenate([pixels for pixels, _ in parts])
            images = flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            return Images(images, np.concatenate([labels for _, labels in parts]))
    return None


def _binary(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label (two for CIFAR-100: coarse, fine) and 3072 pixels."""
    front = 1 if name == "cifar10" else 2
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (front + PIXELS):
        raise TaskError(f"{path} does not hold records of {front + PIXELS} bytes; truncated?")
    records = content.reshape(-1, front + PIXELS)
    return records[:, front:], records[:, front - 1].astype(np.int64)


def _pickled(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    with foreign_errors(TaskError, f"{path} is not a file of {name}"):
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(content[b"data"])
        labels = np.asarray(content[LABEL_KEYS[name]], np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise TaskError(
            f"{path} holds pixels of shape {pixels.shape} ({pixels.dtype}) for {len(labels)} "
            f"labels; {name} has ({len(labels)}, {PIXELS}) bytes"
        )
    return pixels, labels


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that allows no functions and classes but those of numpy arrays."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._ALLOWED:
            raise TaskError(
                f"a CIFAR file asks to run {module_name}.{global_name} on loading, which was "
                "refused; it is not the original file"
            )
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)
