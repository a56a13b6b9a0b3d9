"""``python -m tests.faults.page``: the tables of ``docs/robustness.md``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "robustness.md"
RESULTS = ROOT / "tests" / "faults" / "RESULTS.json"
FUZZ = ROOT / "tests" / "fuzz" / "RESULTS.json"
SEARCH = ROOT / "tests" / "search" / "RESULTS.json"


def page() -> str:
    """The page with its tables replaced."""
    text = PAGE.read_text(encoding="utf-8")
    tables = {"faults": fault_table(), "fuzz": fuzz_table(), "search": search_table()}
    for name, table in tables.items():
        marks = f"<!-- {name}: made by python -m tests.faults.page -->", f"<!-- end of {name} -->"
        before, rest = text.split(marks[0])
        text = before + marks[0] + "\n\n" + table + "\n\n" + marks[1] + rest.split(marks[1])[1]
    return text


def fault_table() -> str:
    """What was tried, how often, and what was lost."""
    if not RESULTS.exists():
        return "No figures yet."
    output = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| what was tried | faults | starts | lost | command |", "|---|--:|--:|--:|---|"]
    for one in output["scenarios"].values():
        lost = len(one["lost"]) or "nothing"
        cells = (one["what"], f"{one['faults']:,}", f"{one['starts']:,}", lost)
        lines.append("| " + " | ".join(map(str, cells)) + f" | `{one['command']}` |")
    total = [
        sum(one[name] for one in output["scenarios"].values()) for name in ("faults", "starts")
    ]
    lost = sum(len(one["lost"]) for one in output["scenarios"].values()) or "nothing"
    lines.append(f"| **all** | **{total[0]:,}** | **{total[1]:,}** | **{lost}** | |")
    return "\n".join(lines)


def fuzz_table() -> str:
    """Inputs by target, and what was found."""
    if not FUZZ.exists():
        return "No figures yet."
    output: dict[str, Any] = json.loads(FUZZ.read_text(encoding="utf-8"))
    lines = ["| target | engine | inputs | findings |", "|---|---|--:|--:|"]
    for job in output["jobs"]:
        result = len(job["findings"]) or "none"
        lines.append(f"| {job['target']} | {job['engine']} | {job['inputs']:,} | {result} |")
    result = output["findings"] or "none"
    lines.append(f"| **all** | | **{output['inputs']:,}** | **{result}** |")
    return "\n".join(lines) + f"\n\nCommand: `{re.sub(' +', ' ', output['command'])}`"


def search_table() -> str:
    """What became of the numbers of random problems."""
    if not SEARCH.exists():
        return "No figures yet."
    output: dict[str, Any] = json.loads(SEARCH.read_text(encoding="utf-8"))
    kinds = ("right", "uncertain", "missing", "unstable", "wrong")
    lines = [f"| number | {' | '.join(kinds)} |", "|---|--:|--:|--:|--:|--:|"]
    for number, counts in output["table"].items():
        lines.append(f"| `{number}` | " + " | ".join(f"{counts[kind]:,}" for kind in kinds) + " |")
    return "\n".join(lines) + (
        f"\n\nCommand: `{output['command']}`. Of {output['gammas_with_an_error']:,} values of γ, "
        f"{100 * output['within_3_errors']:.2f} % are within 3 × `gamma_error` + 10⁻⁹ of the right "
        "one."
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
