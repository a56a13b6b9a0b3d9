"""Install, tutorial, pictures, clusters, errors: what these pages say is true, in smaller sizes."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from typer.testing import CliRunner

import ngeval
import ngeval.plots
from ngeval.checkpoints import Checkpoint, find_checkpoints
from ngeval.cli.app import app
from ngeval.methods import METHODS
from ngeval.plots import FIGURES
from ngeval.runs.run import Run
from ngeval.runs.tables import GammaTable
from ngeval.tasks import get_task
from ngeval.training import Training
from tests.pages import DOCS, blocks, in_folder, run_here, run_python, shell_lines

pytestmark = pytest.mark.second_stage


def smaller(text: str) -> str:
    """Two epochs in place of twelve, and fewer trainings."""
    text = text.replace("--epochs 12", "--epochs 2").replace("epoch-012", "epoch-002")
    return text.replace("epochs=5), spaces, seeds=3", "epochs=1, num_batches=4), spaces, seeds=2")


SMALL = ("--batch-size", "8", "--num-batches", "1", "--quiet")
SMALLER = {
    "gamma": SMALL,
    "sweep": SMALL,
    "imbalance": SMALL,
    "layers": SMALL,
    "compare": (*SMALL, "--methods", "sgd,ief,kfac,kfac-ef,kfac-ief", "--dampings", "1e-4,1"),
    "train": ("--num-batches", "4", "--quiet"),
    "plot": ("--quiet",),
    "trained": ("--quiet",),
    "toy": ("--arrows", "5", "--steps", "5", "--quiet"),
}
"""Options with which a page's commands take seconds."""


def run_page(page: str, languages: tuple[str, ...] = ("bash",)) -> None:
    """The commands of a page in this folder, or all of its blocks in their order."""
    names: dict[str, object] = {}
    for language, text in blocks(page):
        if language not in languages:
            continue
        if language == "python":
            exec(compile(smaller(text), page, "exec"), names)
            continue
        for command in shell_lines(smaller(text)):
            in_folder(Path.cwd(), [*command, *SMALLER.get(command[2], ())])


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the tutorial's commands have run."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_page("tutorial.md")
    yield folder
    plt.close("all")


class TestTutorial:
    def test_commands_as_written_in_a_smaller_size(self, tutorial: Path):
        gammas = pd.read_parquet(tutorial / "gamma.parquet")
        assert gammas["epoch"].unique().tolist() == [0.0, 1.0, 2.0]
        assert (gammas["status"] == "ok").all()
        assert pd.read_parquet(tutorial / "sweep.parquet")["damping"].nunique() == 50
        for name in ("stages.png", "damping.png", "imbalance.png", "report.html"):
            assert (tutorial / name).stat().st_size > 1000, name

    def test_python_as_written(
        self,
        tutorial: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tutorial)
        names = run_python("tutorial.md")
        assert "adamw:5" in capsys.readouterr().out
        table = names["table"]
        assert isinstance(table, pd.DataFrame)
        assert (table["status"] == "ok").all()
        assert (tutorial / "one-batch.png").stat().st_size > 1000


class TestPictures:
    def test_every_command_and_block(self, tutorial: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tutorial)
        for file in tutorial.glob("*.png"):
            file.unlink()
        run_page("pictures.md", ("bash", "python"))
        text = (DOCS / "pictures.md").read_text()
        named = set(re.findall(r"[\w-]+\.(?:pdf|png)(?=\n| *\"|$)", text)) - {"one-batch.png"}
        drawn = {path.name for path in (*tutorial.glob("*.pdf"), *tutorial.glob("*.png"))}
        assert len(named) > 12
        assert {name for name in named if not (DOCS.parent / "figures" / name).exists()} <= drawn

    def test_every_kind_of_picture_is_on_the_page(self):
        text = (DOCS / "pictures.md").read_text()
        for kind in FIGURES:
            assert f"--kind {kind} " in text, kind
        for name in ngeval.plots.__all__:
            if name.startswith("plot_") or name.endswith("_figure"):
                assert name in text, name


class TestInstall:
    def test_the_extras_are_those_of_pyproject(self):
        project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
        rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "install.md").read_text(), re.MULTILINE)
        assert sorted(rows) == sorted(project["optional-dependencies"])


class TestCluster:
    def test_the_script_and_the_joined_table(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tmp_path)
        run_here(
            ["-m", "ngeval", "train", "--task", "digits-mlp", "--output", "runs/mlp"],
            *("--epochs", "1", "--num-batches", "2", "--quiet"),
        )
        shell = [text for language, text in blocks("cluster.md") if language == "bash"]
        script = next(text for text in shell if "SLURM_ARRAY_TASK_ID" in text)
        plot = next(text for text in shell if "ngeval plot" in text)
        (tmp_path / "grade.sh").write_text(
            script.replace(
                "ngeval sweep", f"{sys.executable} -m ngeval sweep --batch-size 8 --num-batches 2"
            )
        )
        for number in ("0", "1"):
            job = {"SLURM_ARRAY_TASK_ID": number, "SLURM_CPUS_PER_TASK": "1"}
            subprocess.run(["bash", "grade.sh"], cwd=tmp_path, check=True, env=os.environ | job)
        run_python("cluster.md")
        table = pd.read_parquet("sweep.parquet")
        assert table.groupby("stage")["checkpoint"].unique().explode().tolist() == [
            "runs/mlp/epoch-000.safetensors",
            "runs/mlp/epoch-001.safetensors",
        ]
        assert "gamma_over_sgd_geomean" in capsys.readouterr().out
        run_here(shell_lines(plot)[0])

    def test_commands_of_long_runs_in_a_smaller_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Each in one process: other tests start torchrun."""
        monkeypatch.chdir(tmp_path)
        list(Training(get_task("digits-mlp"), Path("runs/mlp"), epochs=1, num_batches=2).run())
        shell = [text for language, text in blocks("cluster.md") if language == "bash"]
        lines = [line for text in shell for line in text.replace("\\\n", " ").splitlines()]
        long = [
            line
            for line in lines
            if "ngeval" in line and "ARRAY" not in line and "plot" not in line
        ]
        assert sum("torchrun" in line for line in long) == 3
        for line in long:
            words = shlex.split(line)[shlex.split(line).index("ngeval") + 1 :]
            words = [word.replace("100", "1") for word in words if word not in ("--device", "cuda")]
            sizes = ["--batch-size", "8", "--dampings" if words[0] != "gamma" else "--damping", "1"]
            done = CliRunner().invoke(app, [*words, *sizes, "--quiet"])
            assert done.exit_code == 0, (line, done.output)

    def test_joined_rows_are_those_of_one_run(self, tmp_path: Path):
        """The seed fixes the labels that sf samples, too, as the page says."""
        task = get_task("digits-mlp")
        training = Training(task, tmp_path, epochs=1, num_batches=2)
        list(training.run())
        checkpoints = find_checkpoints([str(tmp_path)])
        work = GammaTable.of("sf", dampings=[1e-3])

        def table(checkpoints: list[Checkpoint]) -> pd.DataFrame:
            return work.table(Run(task, checkpoints, batch_size=8, num_batches=2))

        whole = table(checkpoints)
        joined = pd.concat([table([one]) for one in checkpoints], ignore_index=True)
        columns = ["checkpoint", "batch", "gamma"]
        pd.testing.assert_frame_equal(joined[columns], whole[columns])


class TestLargeModels:
    def test_python_as_written(self, capsys: pytest.CaptureFixture[str]):
        table = run_python("large-models.md")["table"]
        assert isinstance(table, pd.DataFrame)
        assert table["metric_samples"].unique().tolist() == [564]
        assert "metric_samples" in capsys.readouterr().out


def messages() -> list[str]:
    """Every text in the source, with … for the parts that are filled in."""
    texts = []
    for path in Path(ngeval.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                texts.append("".join(map(str, parts)))
    return texts


class TestErrors:
    def test_each_quoted_message_is_in_the_source(self):
        quoted = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(), re.MULTILINE)
        assert len(quoted) > 25
        known = messages()
        for message in quoted:
            parts = [part.strip() for part in message.split("…") if part.strip(" ;:,")]
            assert max(map(len, parts)) >= 12, message
            pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
            assert any(pattern.search(text) for text in known), message


class TestMethods:
    def test_the_table_has_every_method_with_its_formula(self):
        text = (DOCS / "methods.md").read_text()
        for name in METHODS:
            assert f"`{name}`" in text or f"`{name}:" in text, name
