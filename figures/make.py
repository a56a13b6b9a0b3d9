"""Make the pictures that the README shows: ``python figures/make.py`` (about a minute)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import matplotlib as mpl

from ngeval.demo import Demo


def main() -> None:
    """Run the demo in a temporary folder and keep its three figures."""
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(Path(folder) / "demo")
        demo.run(lambda report: print(f"epoch {report.epoch}"), lambda step, total: None)
        for kind, path in demo.figures.items():
            shutil.copy(path, Path(__file__).parent / f"{kind}.png")


if __name__ == "__main__":
    main()
