"""Rows of a data set: from the hub, or from a folder in any of the layouts that users have."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from ngeval.errors import NgevalError, TaskError
from ngeval.tasks.hf.cifar import LABEL_KEYS, read_cifar
from ngeval.tasks.hf.glue import FOLDERS, GLUE
from ngeval.tasks.hf.hub import hub_is_reachable, loading
from ngeval.utils.optional import optional_module

HUB_NAMES = {
    "glue": "nyu-mll/glue",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
"""Short names of data sets on the hub."""

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")


class Rows(Protocol):
    """What a task needs of a table; ``datasets.Dataset`` has it."""

    @property
    def column_names(self) -> Sequence[str]:
        """The columns."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row, by column."""


def load_rows(name: str, subset: str | None, split: str, data_dir: Path | None) -> Rows:
    """The rows of one split.

    Args:
        name: ``glue``, ``cifar10``, ``cifar100``, a data set on the hub, or a folder.
        subset: its part, as ``sst2`` of ``glue``.
        split: ``train``, ``validation``, ….
        data_dir: where the files are, if not on the hub: a folder of ``save_to_disk``; or files
            named for the split (``train.csv``, ``train-00000-of-00001.parquet``; ``.jsonl``,
            ``.tsv``, ``.arrow``), there, in ``data/`` or in a folder named for the subset; or the
            original files of GLUE or CIFAR.

    Raises:
        TaskError: nothing there, no such split, unreadable, or empty.
        DependencyError: datasets is not installed.
    """
    folder = data_dir if data_dir is not None else Path(name)
    try:
        there = folder.is_dir()
    except OSError as error:  # a name that the file system does not take
        raise TaskError(
            f"data {str(folder)[:80]!r} cannot be looked up: {error.strerror}"
        ) from error
    if data_dir is not None or there:
        if not there:
            raise TaskError(f"data folder {folder} does not exist")
        rows = _local(name, subset, split, folder)
    else:
        rows = _from_hub(name, subset, split)
    if len(rows) == 0:
        raise TaskError(f"split {split!r} of {name!r} has no rows")
    return rows


def _from_hub(name: str, subset: str | None, split: str) -> Rows:
    datasets = optional_module("datasets")
    hub_name = HUB_NAMES.get(name, name)
    if not hub_is_reachable():
        # What is in the cache needs no network; the library would try for half a minute.
        datasets.config.HF_HUB_OFFLINE = True
    with loading(name, "data set"):
        try:
            rows: Rows = datasets.load_dataset(hub_name, subset, split=split)
        except (ConnectionError, FileNotFoundError) as error:
            raise TaskError(
                f"data set {name!r} is no folder here and not in the local cache, and cannot be "
                f"had from the hub ({str(error).splitlines()[0][:200]}); give a folder that holds "
                "it with --data-dir (data_dir=)"
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
    found = sorted({p.name for place in places for p in place.iterdir()})[:12]
    raise TaskError(
        f"no split {split!r} of {name if subset is None else f'{name}/{subset}'} in {folder}: "
        "expected what datasets' save_to_disk writes, or files such as "
        f"{split}.csv, {split}.jsonl or {split}-00000-of-00001.parquet; it holds "
        f"{', '.join(found) or 'nothing'}"
    )


def _saved_to_disk(place: Path, split: str) -> Rows | None:
    """What ``save_to_disk`` wrote for one split, or for a dictionary of them."""
    together = (place / "dataset_dict.json").is_file()
    single = next((p for p in (place / split, place) if (p / "state.json").is_file()), None)
    if not together and single is None:
        return None
    datasets = optional_module("datasets")
    try:
        if not together:
            rows: Rows = datasets.load_from_disk(str(single))
            return rows
        splits = datasets.load_from_disk(str(place))
    except Exception as error:  # whatever a broken folder makes the library raise
        raise TaskError(f"{place} cannot be read by datasets.load_from_disk: {error}") from error
    if split not in splits:
        raise TaskError(f"{place} has the splits {', '.join(splits)}, not {split!r}")
    chosen: Rows = splits[split]
    return chosen


def _split_files(place: Path, split: str) -> list[Path]:
    """The files of a split, all of one kind."""
    if not place.is_dir():
        return []
    names = (split, split.replace("validation", "dev"))
    for suffix in SUFFIXES:
        found = sorted(
            path
            for path in place.iterdir()
            if path.suffix == suffix
            and (path.stem in names or any(path.stem.startswith(f"{name}-0") for name in names))
        )
        if found:
            return found
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
        try:
            frames.append(_read_original(file, glue) if glue else _read_table(file))
        except NgevalError:
            raise
        except Exception as error:  # whatever a broken file makes pandas raise
            raise TaskError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    whole = pd.concat(frames, ignore_index=True)
    made: Rows = datasets.Dataset.from_pandas(whole, preserve_index=False)
    return made


def _read_table(file: Path) -> pd.DataFrame:
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    if file.suffix in (".json", ".jsonl"):
        return pd.read_json(file, lines=file.suffix == ".jsonl")
    # "None", "NA" and the like are words of a text.
    separator = "\t" if file.suffix == ".tsv" else ","
    return pd.read_csv(file, sep=separator, keep_default_na=False)


def _read_original(file: Path, subset: str) -> pd.DataFrame:
    """A ``.tsv`` as GLUE gives it away, with the columns and class numbers of the hub's."""
    form = GLUE[subset]
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}
    frame = pd.read_csv(file, header=None if subset == "cola" else "infer", **options)
    frame.columns = frame.columns.map(str)
    frame = frame.rename(columns={there: here for here, there in form.header.items()})
    wanted = [*form.columns, form.label]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise TaskError(
            f"{file} has no {', '.join(missing)} of {subset}; its columns are "
            f"{', '.join(frame.columns[:12])} (a test split has no labels)"
        )
    labels = frame[form.label]
    if form.words and not pd.api.types.is_numeric_dtype(labels):
        numbers = labels.map({word: i for i, word in enumerate(form.words)})
        frame = frame.assign(**{form.label: numbers})[numbers.notna()]  # MNLI's "-": no agreement
        frame = frame.astype({form.label: int})
    chosen: pd.DataFrame = frame[wanted]
    return chosen
