"""Result files and manifests, through reading, summaries, the report and the pictures.

The first byte says which format the others are in (see `FORMATS`) and what is done with the table
(see `USES`).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from ngeval.analysis.summary import summarize
from ngeval.plots import Chosen, figure_of, kind_of
from ngeval.report import make_page, read_sources
from ngeval.report.facts import facts, run_facts, troubles
from ngeval.report.sources import topics
from ngeval.results.manifest import read_manifest
from ngeval.results.table_files import read_results
from tests.fuzz.targets.base import (
    HOSTILE_NAMES,
    Target,
    as_json,
    damaged,
    emptied,
    json_values,
    names,
    remembered,
)

mpl.use("Agg")

FORMATS = ("g.csv", "g.parquet", "g.jsonl", "g.csv.manifest.json")
MANIFEST = FORMATS.index("g.csv.manifest.json")


def attempt(data: bytes, folder: Path) -> None:
    """Write the file and use it."""
    emptied(folder)
    use, kind = divmod(data[0] % (len(FORMATS) * len(USES)) if data else 0, len(FORMATS))
    if kind == MANIFEST:
        (folder / "g.csv").write_bytes(_csv(_gammas()))
    (folder / FORMATS[kind]).write_bytes(data[1:])
    if kind == MANIFEST:
        read_manifest(folder / "g.csv")
    USES[use](folder / ("g.csv" if kind == MANIFEST else FORMATS[kind]))


def _report_facts(path: Path) -> None:
    sources = read_sources([path])
    for source in sources:
        run_facts(source)
    for topic in topics(sources):
        facts(topic)
        troubles(topic)


def _page(path: Path) -> None:
    make_page(read_sources([path]))


def _picture(path: Path) -> None:
    tables = {"g": read_results(path)}
    try:
        figure_of(tables, kind_of(tables), Chosen()).canvas.draw()
    finally:
        plt.close("all")


USES: tuple[Callable[[Path], object], ...] = (
    *(read_results,) * 18,
    *(lambda path: summarize(read_results(path)),) * 3,
    *(_report_facts,) * 3,
    _page,
    _picture,
)
"""What is done with a table; the first ones oftener, since they take less time."""


def _gammas() -> pd.DataFrame:
    """A small table such as ``ngeval gamma`` writes."""
    return pd.DataFrame(
        [
            {
                "task": "t",
                "checkpoint": f"epoch-{epoch}.pt",
                "stage": epoch,
                "epoch": float(epoch),
                "step": 10.0 * epoch,
                "batch": batch,
                "method": method,
                "damping": damping,
                "damping_scale": "absolute",
                "gamma": 0.2 * value,
                "gamma_over_sgd": value,
                "gamma_over_ng": 2 * value,
                "gamma_floor": 0.05,
                "status": "ok",
                "reason": "",
                "num_samples": 8,
                "seed": 3 + batch,
            }
            for epoch in (0, 1)
            for batch in (0, 1)
            for method, value in (("sgd", 1.0), ("ief", 0.5 + batch / 8))
            for damping in (1e-3, 1.0)
        ]
    )


def _samples() -> pd.DataFrame:
    rows = [
        {"task": "t", "checkpoint": "a", "batch": 0, "sample": i, "gradient_norm": 0.5 + i}
        for i in range(4)
    ]
    return pd.DataFrame(rows)


def _layers() -> pd.DataFrame:
    shares = {"decrease_share": 0.5, "curvature_share": 0.5, "excess": 0.0, "gamma_total": 0.1}
    ratios = {"gamma": 0.1, "gamma_over_sgd": 1.0, "gamma_over_best": 2.0, "status": "ok"}
    where = {"task": "t", "checkpoint": "a", "batch": 0, "damping": 0.1, "num_parameters": 5}
    rows = [
        where | {"method": method, "layer": layer} | shares | ratios
        for method in ("sgd", "ef")
        for layer in ("0.1", "0.10")
    ]
    return pd.DataFrame(rows)


def _trainings() -> pd.DataFrame:
    numbers = {f"{part}_{what}": 0.5 for part in ("validation", "test") for what in ("loss",)}
    numbers |= {f"{part}_accuracy": 0.5 for part in ("validation", "test")}
    output = {"monitor": "validation_loss", "train_loss": 0.5, "damping": math.nan, "status": "ok"}
    rows = [
        {"task": "t", "optimizer": "sgd", "phase": phase, "trial": 0, "learning_rate": 0.1}
        | {"seed": seed, "epoch": epoch}
        | numbers
        | output
        for phase, seed in (("search", 0), ("final", 0), ("final", 1))
        for epoch in (0, 1)
    ]
    return pd.DataFrame(rows)


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode("utf-8", "surrogatepass")


def _parquet(table: pd.DataFrame) -> bytes:
    built = io.BytesIO()
    try:
        table.to_parquet(built, index=False)
    except Exception:  # values that Arrow has no type for
        return b"PAR1"
    return built.getvalue()


def _jsonl(table: pd.DataFrame) -> bytes:
    return b"\n".join(as_json(record) for record in table.to_dict("records"))


WRITERS = (_csv, _parquet, _jsonl)
TABLES = (_gammas, _samples, _layers, _trainings)


def _of(use: int, kind: int, content: bytes) -> bytes:
    return bytes([use * len(FORMATS) + kind]) + content


@remembered
def seeds() -> list[bytes]:
    """A valid file of every kind and format, for some uses."""
    built = [
        _of(use, kind, write(table()))
        for use in (0, 18, 21)
        for kind, write in enumerate(WRITERS)
        for table in TABLES[: 4 if use else 2]
    ]
    return [*built, *(_of(21, MANIFEST, as_json(output)) for output in (_manifest(), []))]


def _manifest() -> dict[str, Any]:
    return {
        "format": 1,
        "created": "2026-11-23T04:00:00+00:00",
        "command": "ngeval gamma --task t",
        "options": {"seed": 0, "damping": "0.1"},
        "run": {"task": "t", "checkpoints": ["a.pt"], "batch_size": 8},
        "versions": {"ngeval": "0.1.0"},
        "machine": {"cpu": "x", "cores": 2, "memory": 2**34, "gpus": []},
    }


@st.composite
def _table(draw: st.DrawFn) -> bytes:
    """A table with columns left out, doubled or of other values, in any format."""
    table = draw(st.sampled_from(TABLES))().astype(object)
    odd = st.one_of(
        names(),
        st.floats(),
        st.integers(),
        st.none(),
        st.booleans(),
        st.sampled_from([[], {}, [1, "a"], 2**80, "1e999", "0.10", "ok", "failed", -0.0, 1e-320]),
    )
    for _ in range(draw(st.integers(0, 3))):
        column = draw(st.sampled_from(list(table.columns)))
        change = draw(st.sampled_from(["value", "value", "value", "column", "drop", "rename"]))
        row, value = draw(st.integers(0, len(table) - 1)), draw(odd)
        name = draw(names() | st.sampled_from(["method", "gamma", "task", "batch"]))
        with contextlib.suppress(Exception):  # what pandas does not take is not written either
            table = _changed(table, change, column, row, value, name)
    table = table.iloc[: draw(st.integers(0, len(table)))]
    kind, typed = draw(st.integers(0, 2)), draw(st.booleans())
    content = b""
    with contextlib.suppress(Exception):
        content = WRITERS[kind](table.convert_dtypes() if typed and kind != 2 else table)
    return _of(draw(st.integers(0, len(USES) - 1)), kind, content)


def _changed(
    table: pd.DataFrame, change: str, column: str, row: int, value: Any, name: str
) -> pd.DataFrame:
    match change:
        case "value":
            table = table.copy()
            table.at[row, column] = value
            return table
        case "column":
            return table.assign(**{column: [value for _ in range(len(table))]})
        case "drop" if len(table.columns) > 1:
            return table.drop(columns=column)
        case _:
            return table if name in table else table.rename(columns={column: name})


@st.composite
def _arrow(draw: st.DrawFn) -> bytes:
    """A parquet file with types and metadata that pandas does not write."""
    arrays: Sequence[Any] = [
        pa.array([1, 2], pa.int8()),
        pa.array([[1], None], pa.list_(pa.int64())),
        pa.array([{"a": 1}, None]),
        pa.array([b"\xff", b""]),
        pa.array([None, None]),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([2**62, -1], pa.timestamp("ns")),
        pa.array([2**52, -1], pa.timestamp("s")),
        pa.array([1, None], pa.duration("s")),
        pa.array([1.0, math.nan], pa.float32()),
        pa.array([True, None]),
        pa.array([1, 2], pa.decimal128(30, 4)),
    ]
    columns = draw(
        st.dictionaries(
            st.sampled_from([*_gammas().columns]) | names().filter(str.isprintable),
            st.sampled_from(range(len(arrays))),
            min_size=1,
            max_size=4,
        )
    )
    table = pa.table({name: arrays[index] for name, index in columns.items()})
    words = ["index_columns", "columns", "column_indexes", "name", "pandas_type", "numpy_type"]
    output = draw(st.none() | json_values([*words, "object", "range", "kind", "datetimetz", "a"]))
    if output is not None:
        text = as_json(output).decode("utf-8", "replace")
        table = table.replace_schema_metadata({"pandas": text})
    built = io.BytesIO()
    pq.write_table(table, built, coerce_timestamps=None, version="2.6")
    return _of(draw(st.integers(0, len(USES) - 1)), 1, built.getvalue())


def structured() -> st.SearchStrategy[bytes]:
    """Tables with odd values, odd Arrow types, odd manifests, and damaged files."""
    words = [*_manifest(), "seed", "task", "checkpoints", "cpu", "gpus", "memory"]
    manifests = json_values(words).map(lambda told: _of(21, MANIFEST, as_json(told)))
    parts = st.dictionaries(st.sampled_from(list(_manifest())), json_values(words), max_size=3)
    nearly = parts.map(lambda told: _of(21, MANIFEST, as_json(_manifest() | told)))
    whole = damaged(st.sampled_from(seeds()))
    return st.one_of(_table(), _table(), _arrow(), manifests, nearly, whole, whole, whole)


TARGET = Target(
    "results",
    0.20,
    attempt,
    seeds,
    structured,
    words=(
        *_gammas().columns,
        *("PAR1", "NaN", "inf", "1e999", '"', ",,", "\r\n", "ok", "failed", "null", "[[[["),
        *(name for name in HOSTILE_NAMES if name.isprintable() and len(name) < 40),
    ),
)
