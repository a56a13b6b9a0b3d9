"""The pages of docs/ can be pasted: their code runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ngeval.cli.app import app
from ngeval.grading.layer_table import COLUMNS as LAYER_COLUMNS
from ngeval.methods import get_method
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.optim import EF, NG, SF, iEF
from tests.pages import DOCS, blocks, in_folder, shell_lines

pytestmark = pytest.mark.second_stage


class TestYourOwnModel:
    def test_ten_lines(self):
        first = blocks("your-own-model.md")[0][1]
        assert len([line for line in first.splitlines() if line.strip()]) <= 10

    def test_every_block_as_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        names: dict[str, object] = {}
        files = {}
        for language, text in blocks("your-own-model.md"):
            if language == "python" and text.startswith("# "):
                files[text.split()[1]] = text
            elif language == "python":
                exec(compile(text, "your-own-model.md", "exec"), names)
        assert "gamma_over_sgd" in capsys.readouterr().out
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        self.save_lightning(tmp_path / "checkpoints")
        for language, text in blocks("your-own-model.md"):
            for command in shell_lines(text) if language == "bash" else []:
                in_folder(tmp_path, [*command, "--quiet"])
        table = pd.read_csv(tmp_path / "gamma.csv")
        assert table["epoch"].unique().tolist() == [1.0, 2.0]
        assert (table["status"] == "ok").all()

    def save_lightning(self, folder: Path) -> None:
        """Lightning's layout: weights beside the state of loops, optimizers and callbacks."""
        folder.mkdir()
        for epoch in (1, 2):
            torch.manual_seed(epoch)
            net = torch.nn.Sequential(
                torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
            )
            state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
            content = {
                "epoch": epoch,
                "global_step": 10 * epoch,
                "pytorch-lightning_version": "2.5.0",
                "state_dict": state,
                "loops": {"fit_loop": {"state_dict": {}}},
                "callbacks": {},
                "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
                "lr_schedulers": [],
                "hyper_parameters": {"lr": 0.1, "name": "x"},
            }
            torch.save(content, folder / f"epoch={epoch}-step={10 * epoch}.ckpt")


@pytest.mark.parametrize("page", ["losses.md", "released-code.md"])
def test_every_block_of_a_page_as_written(page: str):
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)


class TestHuggingFace:
    def test_the_run_that_needs_no_download(self, tmp_path: Path):
        page = blocks("hugging-face.md")
        script = next(text for _, text in page if text.startswith("# make_vit.py"))
        (tmp_path / "make_vit.py").write_text(script)
        commands = next(text for _, text in page if "make_vit.py\nngeval" in text)
        for command in shell_lines(commands):
            in_folder(tmp_path, command)
        table = pd.read_csv(tmp_path / "vit.csv")
        assert table["checkpoint"].unique().tolist() == [
            f"vit-lora/checkpoint-{step}" for step in (0, 40, 80, 120)
        ]
        assert (table["status"] == "ok").all()
        assert (tmp_path / "vit.png").stat().st_size > 1000

    def test_the_options_of_the_page_exist(self):
        text = (DOCS / "hugging-face.md").read_text()
        help_text = CliRunner().invoke(app, ["gamma", "--help"], env={"COLUMNS": "200"}).output
        for option in set(re.findall(r"--[a-z][a-z-]+", text)) - {"--kind"}:
            assert option in help_text, option


class TestLayers:
    def test_every_block_as_written_with_fewer_batches(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        names: dict[str, object] = {}
        for language, text in blocks("layers.md"):
            if language == "python":
                exec(compile(text, "layers.md", "exec"), names)
        shown = capsys.readouterr().out
        assert "excess" in shown
        assert "bias" in shown
        fewer = ["--batch-size", "8", "--num-batches", "1", "--dampings", "1e-4,1"]
        for language, text in blocks("layers.md"):
            for command in shell_lines(text) if language == "bash" else []:
                kind = command[2]
                options = {"compare": fewer, "layers": fewer[2:4]}.get(kind, [])
                in_folder(tmp_path, [*command, *options])
        table = pd.read_csv(tmp_path / "layers.csv")
        assert table["epoch"].unique().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert (table["status"] == "ok").all()
        assert (tmp_path / "layers.png").stat().st_size > 1000
        ranked = pd.read_csv(tmp_path / "compared" / "ranking.csv")
        assert ranked["method"].nunique() == 19
        assert (ranked["status"] == "ok").all()

    def test_the_columns_of_the_page_exist(self):
        text = (DOCS / "layers.md").read_text()
        table = text[text.index("| column |") : text.index("- **`excess`")]
        for row in table.splitlines()[2:]:
            for name in re.findall(r"`(\w+)`", row.split("|")[1]) if row.strip() else []:
                assert name in LAYER_COLUMNS, name

    def test_the_options_of_the_page_exist(self):
        text = (DOCS / "layers.md").read_text()
        runner = CliRunner()
        help_text = "".join(
            runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
            for command in ("layers", "compare", "plot", "train")
        )
        for option in set(re.findall(r"--[a-z][a-z-]+", text)):
            assert option in help_text, option


class TestOptimizers:
    def test_python_as_written(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tmp_path)
        names: dict[str, object] = {}
        for language, text in blocks("optimizers.md"):
            if language == "python":
                exec(compile(text, "optimizers.md", "exec"), names)
        printed = capsys.readouterr().out
        assert "adamw" in printed
        assert "signdescent" in printed
        assert "True" in printed
        assert "mine.optimizer.pt does not fit rmsprop" in printed

    def test_commands_as_written(self, tmp_path: Path):
        [text] = [text for language, text in blocks("optimizers.md") if language == "bash"]
        for command in shell_lines(text):
            in_folder(tmp_path, [*command, "--quiet"])
        table = pd.concat(
            [pd.read_csv(tmp_path / f"{name}.csv") for name in ("optimizers", "diagonals")]
        )
        assert (table["status"] == "ok").all()
        assert table["method"].nunique() == 8

    def test_names_and_options_of_the_page_exist(self):
        text = (DOCS / "optimizers.md").read_text()
        for name in OPTIMIZERS:
            assert f"`{name}`" in text, name
        help_text = CliRunner().invoke(app, ["gamma", "--help"], env={"COLUMNS": "200"}).output
        for option in ("--optimizer-state", "--reduction", "--no-weight-decay", "--allow-pickle"):
            assert option in text
            assert option in help_text, option


class TestTraining:
    def test_python_as_written(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tmp_path)
        names: dict[str, object] = {}
        python = [text for language, text in blocks("training.md") if language == "python"]
        for text in python:
            exec(compile(text, "training.md", "exec"), names)
        shown = re.search(r"mean loss of the last batch: (\d\.\d\d) nats", capsys.readouterr().out)
        assert shown is not None
        assert float(shown[1]) < 1.5
        assert (tmp_path / "state.pt").exists()

    def test_defaults_of_the_page_are_those_of_the_classes(self):
        text = (DOCS / "training.md").read_text()
        for cls in (EF, iEF, SF, NG):
            row = next(line for line in text.splitlines() if line.startswith(f"| `{cls.__name__}`"))
            default = cls([torch.zeros(1, requires_grad=True)], 0.1).defaults["damping"]
            assert float(row.split("|")[4]) == default


class TestKronecker:
    def test_every_block_as_written(self, capsys: pytest.CaptureFixture[str]):
        names: dict[str, object] = {}
        for language, text in blocks("kronecker.md"):
            if language == "python":
                exec(compile(text, "kronecker.md", "exec"), names)
        assert "block-ng" in capsys.readouterr().out
        table = names["table"]
        assert isinstance(table, pd.DataFrame)
        assert (table["status"] == "ok").all()
        # each step of the ladder loses something, at the smallest λ
        least = table[table["damping"] == 1e-6].set_index("method")["gamma_over_ng"]
        assert least["ng"] <= least["block-ng"] <= least["kfac"]

    def test_every_word_of_the_page_is_a_parameter_of_kfac(self):
        text = (DOCS / "kronecker.md").read_text()
        for word in ("expand", "reduce", "exact", "factored", "pi", "diagonal", "gradient", "zero"):
            assert f"| `{word}`" in text
            assert get_method(f"kfac:{word}").name == f"kfac:{word}"
