"""``python -m tests.faults --kills 50 --seed 0``: all scenarios; see ``README.md``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run scenarios; exit code 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="at random moments, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="comma list of scenarios; --list shows them")
    parser.add_argument("--list", action="store_true", help="the scenarios, and no more")
    parser.add_argument("--big", action="store_true", help="20 checkpoints x 20 batches, ten kills")
    parser.add_argument("--output", type=Path, help="figures as JSON, added to what is there")
    options = parser.parse_args()
    # A shell starts what is in the background with SIGINT ignored, which its children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options.output = options.output and options.output.absolute()
    work = Path(tempfile.mkdtemp(prefix="ngeval-faults-"))
    try:
        code = _copy_of_code(work)
        os.chdir(code)  # where Python looks first, also in processes that are started from here
        return _run(options, work, code)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(work, ignore_errors=True)


def _copy_of_code(work: Path) -> Path:
    """What is tested stays as it is, whoever edits the files meanwhile."""
    code = work / "code"
    for name in ("ngeval", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, code / name, ignore=ignored)
    return code


def _run(told: argparse.Namespace, work: Path, code: Path) -> int:
    from tests.faults.processes import Place  # noqa: PLC0415  # after the path is set
    from tests.faults.scenarios import BIG, RANDOM, SCENARIOS  # noqa: PLC0415

    if told.list:
        print("\n".join([*SCENARIOS, *BIG]))
        return 0
    known = BIG if told.big else SCENARIOS
    names = [name for name in told.only.split(",") if name] or list(known)
    if unknown := set(names) - set(SCENARIOS) - set(BIG):
        sys.exit(f"no scenario {', '.join(sorted(unknown))}; --list shows them")
    lost = 0
    for name in names:
        print(f"{name} …", flush=True)
        share = -(-told.kills // len(RANDOM)) if name in RANDOM else told.kills
        scenario = {**SCENARIOS, **BIG}[name]
        outcome = scenario(Place.new(work, name, code), share, Random(f"{told.seed} {name}"))
        summary = outcome.summary()
        print(
            f"{name}: {outcome.faults} faults, {outcome.starts} starts, {outcome.seconds:.0f} s, "
            f"lost: {len(outcome.lost)} {outcome.told or ''}",
            flush=True,
        )
        lost += len(outcome.lost)
        if told.output is not None:
            command = (
                f"python -m tests.faults{' --big' if name in BIG else f' --kills {told.kills}'}"
            )
            summary["command"] = f"{command} --seed {told.seed} --only {name}"
            _record(told.output, summary)
    return 1 if lost else 0


def _record(path: Path, summary: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    import torch  # noqa: PLC0415

    built = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    known["machine"] = built
    known.setdefault("scenarios", {})[summary.pop("name")] = summary
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
