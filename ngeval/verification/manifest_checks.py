"""Whether a manifest, which anybody may have written, describes a run that can be repeated.

Pydantic has checked the kinds of its values by then; here are the bounds that hold between them,
which are checked before anything is computed from them. A manifest that is refused is an
`OutputError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from ngeval.errors import OutputError
from ngeval.results.manifest import RunManifest, first_problem, malformed
from ngeval.runs.options import MAX_SEED, RunOptions, parse_bytes
from ngeval.runs.tables import KINDS, Work
from ngeval.tasks.base import MAX_SAMPLES
from ngeval.verification.compare import is_number

MAX_UNITS = 10_000_000
"""Checkpoints × batches of a run that is verified."""

T = TypeVar("T")


def read_options(options: Mapping[str, Any], place: Path) -> RunOptions:
    """The options of a run among those of its command; missing ones have the default."""
    return _validated(RunOptions, options, place)


def read_work(options: Mapping[str, Any], place: Path) -> Work:
    """What was computed of each unit."""
    values = dict(options)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise malformed(place, f"unknown kind of work {repr(kind)[:40]}")
    return _validated(KINDS[kind], values, place)


def _validated(group: type[T], values: Mapping[str, Any], place: Path) -> T:
    try:
        return TypeAdapter(group).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise malformed(place, first_problem(error)) from error


def check_sizes(run: RunOptions, work: Work, manifest: RunManifest, place: Path) -> None:
    """Refuse samples, batches, units, a seed or memory beyond bounds, or in contradiction."""
    metric_batches = work.options.get("metric_batches")
    for name, count in (("num_batches", run.num_batches), ("metric_batches", metric_batches)):
        if isinstance(count, int) and run.batch_size * count > MAX_SAMPLES:
            size = f"{name} × batch_size is {run.batch_size * count:.1e} samples"
            raise malformed(place, f"{size}; at most {MAX_SAMPLES:.0e} are verified")
    batches, checkpoints = len(manifest.identity.batches), len(manifest.identity.checkpoints)
    if batches != run.num_batches:
        raise malformed(
            place, f"it records {batches} batches, and num_batches is {run.num_batches}"
        )
    if checkpoints * batches > MAX_UNITS:
        raise malformed(place, f"it records more than {MAX_UNITS} units")
    if not 0 <= run.seed <= MAX_SEED:
        raise malformed(place, f"seed is {run.seed}")
    parse_bytes(run.memory)


def check_end(manifest: RunManifest, place: Path) -> None:
    """Refuse failed units that are not in the run, or in a complete one."""
    identity, failed = manifest.identity, manifest.failed_units
    for stage, batch in failed:
        if stage >= len(identity.checkpoints) or batch >= len(identity.batches):
            raise malformed(place, f"a failed unit is [{stage}, {batch}], which is not in the run")
    if manifest.finished and manifest.complete == bool(failed):
        raise malformed(place, f"complete is {manifest.complete}, with {len(failed)} failed units")


def check_table(table: pd.DataFrame, manifest: RunManifest, path: Path) -> None:
    """Refuse a table of other units than the manifest records."""
    if not table.columns.is_unique:
        raise OutputError(f"{path} has a column twice")
    identity = manifest.identity
    for name, end in {"stage": len(identity.checkpoints), "batch": len(identity.batches)}.items():
        values = table[name] if name in table else pd.Series([math.nan])
        whole = is_number(values) and bool((values % 1 == 0).all())
        if not whole or not bool(values.between(0, end - 1).all()):
            raise OutputError(
                f"{path} and its manifest belong to different runs: its column {name!r} is not "
                f"always one of the {end} of the run"
            )
