"""Make the pictures and the table of the README: ``python figures/make.py`` (90 s, 2 cores)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from ngeval.demo import Demo
from ngeval.summary import summarize


def stages_text(results: Path) -> str:
    """The README's table: γ/γ_SGD at the smallest λ for epochs 0, 6 and 12."""
    table = pd.read_parquet(results)
    rows = table[(table["damping"] == table["damping"].min()) & table["epoch"].isin([0, 6, 12])]
    summary = summarize(rows, ("epoch", "method"))
    shown = summary.pivot(index="epoch", columns="method", values="gamma_over_sgd_geomean")
    return shown.assign(floor=summary.groupby("epoch")["floor_over_sgd"].median()).to_string()


def main() -> None:
    """Run the demo in a temporary folder and keep its three figures."""
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(Path(folder) / "demo")
        demo.run(lambda report: print(f"epoch {report.epoch}"), lambda step, total: None)
        for kind, path in demo.figures.items():
            shutil.copy(path, Path(__file__).parent / f"{kind}.png")
        print(stages_text(demo.output / "results.parquet"))


if __name__ == "__main__":
    main()
