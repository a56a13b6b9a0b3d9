"""The rows of a data set, from the hub or from a folder in one of the common layouts."""

from __future__ import annotations

import csv
import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from ngeval.errors import TaskError, foreign_errors
from ngeval.tasks.hf.cifar import LABEL_KEYS, read_cifar
from ngeval.tasks.hf.glue import FOLDERS, GLUE
from ngeval.tasks.hf.hub import hub_is_reachable, loading
from ngeval.utils.optional import optional_module
from ngeval.utils.text import first_line

HUB_NAMES = {"glue": "nyu-mll/glue", "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
"""Short names of data sets on the hub."""

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")


class Rows(Protocol):
    """A table as tasks use it, such as a ``datasets.Dataset``."""

    @property
    def column_names(self) -> Sequence[str]:
        """The names of the columns."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def load_rows(name: str, subset: str | None, split: str, data_dir: Path | None) -> Rows:
    """The rows of one split, of which there must be some.

    They come from the hub, from the folder ``data_dir``, or from the folder that is the name: a
    folder of ``save_to_disk``; or one with files named for the split (``train.csv``,
    ``train-00000-of-00001.parquet``; ``.jsonl``, ``.tsv``, ``.arrow``), in it, in its ``data/`` or
    in a folder named for the subset; or one with the original files of GLUE or CIFAR.
    """
    folder = data_dir if data_dir is not None else Path(name)
    if os.path.isdir(folder):
        rows = _local(name, subset, split, folder)
    elif data_dir is not None:
        raise TaskError(f"data folder {folder} does not exist")
    else:
        rows = _from_hub(name, subset, split)
    if len(rows) == 0:
        raise TaskError(f"split {split!r} of {name!r} has no rows")
    return rows


def _from_hub(name: str, subset: str | None, split: str) -> Rows:
    datasets = optional_module("datasets")
    hub_name = HUB_NAMES.get(name, name)
    if not hub_is_reachable():
        # Without a network, the library would wait half a minute before it reads its cache.
        datasets.config.HF_HUB_OFFLINE = True
    with loading(name, "data set"):
        try:
            rows: Rows = datasets.load_dataset(hub_name, subset, split=split)
        except (ConnectionError, FileNotFoundError) as error:
            raise TaskError(
                f"data set {name!r} is neither a folder nor in the local cache, and cannot be "
                f"loaded from the hub ({first_line(error, 200)}); give a folder that holds it with "
                "--data-dir (data_dir=)"
            ) from error
    return rows


def _local(name: str, subset: str | None, split: str, folder: Path) -> Rows:
    places = [folder]
    if subset is not None:
        original = FOLDERS.get(subset, subset.upper())
        places = [folder / subset, folder / original, folder]
    places = [place for place in places if place.is_dir()]
    for place in places:
        if name in LABEL_KEYS and (images := read_cifar(name, place, split)) is not None:
            return images
        if (saved := _saved_to_disk(place, split)) is not None:
            return saved
    for inside in (inside for place in places for inside in (place, place / "data")):
        files = _split_files(inside, split)
        if files:
            original_glue = name == "glue" and files[0].suffix == ".tsv"
            return _read_files(files, subset if original_glue else None)
    names = sorted({path.name for place in places for path in place.iterdir()})[:12]
    raise TaskError(
        f"no split {split!r} of {name if subset is None else f'{name}/{subset}'} in {folder}: "
        "expected a folder of datasets' save_to_disk, or files such as "
        f"{split}.csv, {split}.jsonl or {split}-00000-of-00001.parquet; it holds "
        f"{', '.join(names) or 'nothing'}"
    )


def _saved_to_disk(place: Path, split: str) -> Rows | None:
    """The rows in a folder of ``save_to_disk``, of one split or of a dictionary of splits."""
    together = (place / "dataset_dict.json").is_file()
    single = next((p for p in (place / split, place) if (p / "state.json").is_file()), None)
    if not together and single is None:
        return None
    datasets = optional_module("datasets")
    with foreign_errors(TaskError, f"{place} cannot be read by datasets.load_from_disk"):
        loaded: Any = datasets.load_from_disk(str(place if together else single))
    if together and split not in loaded:
        raise TaskError(f"{place} has the splits {', '.join(loaded)}, not {split!r}")
    rows: Rows = loaded[split] if together else loaded
    return rows


def _split_files(place: Path, split: str) -> list[Path]:
    """The files of a split, all with the same suffix."""
    if not place.is_dir():
        return []
    names = (split, split.replace("validation", "dev"))
    for suffix in SUFFIXES:
        files = sorted(
            path
            for path in place.iterdir()
            if path.suffix == suffix
            and (path.stem in names or any(path.stem.startswith(f"{name}-0") for name in names))
        )
        if files:
            return files
    return []


def _read_files(files: Sequence[Path], glue: str | None) -> Rows:
    datasets = optional_module("datasets")
    if files[0].suffix == ".arrow":
        with loading(str(files[0]), "data"):
            parts = [datasets.Dataset.from_file(str(file)) for file in files]
            rows: Rows = datasets.concatenate_datasets(parts)
        return rows
    frames = []
    for file in files:
        with foreign_errors(TaskError, f"{file} cannot be read"):
            frames.append(_read_original(file, glue) if glue else _read_table(file))
    table = pd.concat(frames, ignore_index=True)
    converted: Rows = datasets.Dataset.from_pandas(table, preserve_index=False)
    return converted


def _read_table(file: Path) -> pd.DataFrame:
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    if file.suffix in (".json", ".jsonl"):
        return pd.read_json(file, lines=file.suffix == ".jsonl")
    # In a text, "None" and "NA" are words.
    separator = "\t" if file.suffix == ".tsv" else ","
    return pd.read_csv(file, sep=separator, keep_default_na=False)


def _read_original(file: Path, subset: str) -> pd.DataFrame:
    """An original ``.tsv`` of GLUE, with the columns and class numbers of the hub's version."""
    form = GLUE[subset]
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}
    frame = pd.read_csv(file, header=None if subset == "cola" else "infer", **options)
    frame.columns = frame.columns.map(str)
    frame = frame.rename(columns={original: name for name, original in form.header.items()})
    columns = [*form.columns, form.label]
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise TaskError(
            f"{file} has no {', '.join(missing)} of {subset}; its columns are "
            f"{', '.join(frame.columns[:12])} (a test split has no labels)"
        )
    labels = frame[form.label]
    if form.words and not pd.api.types.is_numeric_dtype(labels):
        numbers = labels.map({word: i for i, word in enumerate(form.words)})
        frame = frame.assign(**{form.label: numbers})[numbers.notna()]  # "-" in MNLI: no label
        frame = frame.astype({form.label: int})
    selected: pd.DataFrame = frame[columns]
    return selected
