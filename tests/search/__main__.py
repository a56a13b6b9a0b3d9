"""``python -m tests.search --problems 20000 --seed 0``: how many rows are wrong, and which.

Exit code 1 where a row with status ``ok`` is wrong. ``--only K`` shows one problem's verdicts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
import torch
from rich.progress import track

from ngeval.errors import NgevalError
from tests.search.judge import Verdict, judge
from tests.search.problems import draw

KINDS = ("right", "uncertain", "missing", "unstable", "wrong")


def search(seed: int) -> tuple[int, str, list[Verdict], str]:
    """The verdicts on one problem, or why there are none."""
    torch.set_num_threads(1)
    drawn = draw(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return seed, drawn.name, list(judge(drawn)), ""
    except NgevalError as error:  # a budget below one row, and the like: refused, not wrong
        return seed, drawn.name, [], f"{type(error).__name__}: {error}"


def main() -> int:
    """Draw, judge, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", type=int, help="show every verdict on this problem")
    parser.add_argument("--output", type=Path, help="the table and every wrong row, as JSON")
    options = parser.parse_args()
    if options.only is not None:
        return _show(options.only)
    started, refused, wrong = time.time(), Counter[str](), []
    table: Counter[tuple[str, str]] = Counter()
    claims: list[tuple[float, float, int, Verdict]] = []
    seeds = range(options.seed, options.seed + options.problems)
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(search, seed) for seed in seeds]
        for future in track(as_completed(futures), "searching", total=len(futures)):
            seed, name, verdicts, reason = future.result()
            refused[reason.partition(":")[0]] += bool(reason)
            table.update((v.what, v.kind) for v in verdicts)
            stable = [v for v in verdicts if v.what == "gamma" and v.kind != "unstable"]
            claims += [(v.error, v.claimed, seed, v) for v in stable if v.claimed == v.claimed]
            wrong += [
                {"seed": seed, "problem": name, **vars(v)} for v in verdicts if v.kind == "wrong"
            ]
    summary = pd.Series(table).unstack(fill_value=0).reindex(columns=list(KINDS), fill_value=0)
    print(summary.to_string())
    for row in sorted(wrong, key=lambda r: -r["error"])[:30]:
        print("WRONG", json.dumps(row, ensure_ascii=False))
    covered = [error <= 3 * claimed + 1e-9 for error, claimed, _, _ in claims]
    for error, claimed, seed, row in sorted(claims, key=lambda r: -r[0] / (r[1] + 1e-9))[:12]:
        print("CLAIM", f"{error:.1e} of {claimed:.1e}", seed, row.method, row.damping, row.text)
    figures = {
        "command": f"python -m tests.search --problems {options.problems} --seed {options.seed}",
        "problems": options.problems,
        "refused": {k: n for k, n in refused.items() if k},
        "wrong": len(wrong),
        "problems_with_a_wrong_row": len({row["seed"] for row in wrong}),
        "gammas_with_an_error": len(covered),
        "within_3_errors": sum(covered) / len(covered) if covered else None,
        "minutes": round((time.time() - started) / 60, 1),
    }
    print(json.dumps(figures, indent=2))
    if options.output:
        content = figures | {"table": summary.to_dict("index"), "rows": wrong}
        options.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return int(bool(wrong))


def _show(seed: int) -> int:
    drawn = draw(seed)
    print(drawn.name, drawn.options, drawn.methods, drawn.dampings, drawn.scale)
    _, _, verdicts, reason = search(seed)
    print(reason or pd.DataFrame(map(vars, verdicts)).to_string())
    return int(any(v.kind == "wrong" for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
