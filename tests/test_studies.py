"""The studies: each quick size through the command, and what theory predicts."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import solve_ivp
from typer.testing import CliRunner

from ngeval import InputError, Problem, Task, TaskError
from ngeval.results.manifest import manifest_path
from studies import STUDIES, get_study, images
from studies.__main__ import app
from studies.base import decide
from studies.convergence import PLANS, descend, flow_time, predicted
from studies.convergence_findings import (
    CROSS_ENTROPY,
    FOUR_OUTPUTS,
    ONE_OUTPUT,
    exponential_rate,
    power_exponent,
)
from studies.images import coloured_digits, image_task, vit_lora_task
from studies.texts import text_task
from tests.committed_figures import KEPT, make

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = [
    pytest.mark.second_stage,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

OWN = ("why-ef-fails", "convergence", "diagonal", "optimization")
CLAIMS = {
    "why-ef-fails": ("same amount", "in proportion to", "projection", "imbalance", "near-zero λ"),
    "convergence": ("linearly", "sub-linearly", "by itself", "below EF's and SGD's"),
    "diagonal": ("enough", "width", "depth", "worse than SGD"),
    "optimization": ("EF and SF", "AdamW, Adafactor and SGD", "training loss", "ranks first"),
}


def run(*args: object) -> str:
    """Run the studies; returns what it printed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    plt.close("all")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quick sizes are written, each run once."""
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module", params=OWN)
def quick(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Path]:
    """A study that was run in its quick size, and its folder."""
    run(request.param, "--quick", "--quiet", "--output", folder)
    return request.param, folder


class TestQuick:
    def test_writes_rows_figure_and_findings(self, quick):
        name, folder = quick
        rows = pd.read_parquet(folder / f"{name}.parquet")
        assert len(rows) > 20
        assert set(rows["study"]) == {name}
        assert set(rows["size"]) == {"quick"}
        assert set(rows["study_seed"]) == {0}
        assert (folder / f"{name}.png").stat().st_size > 10_000
        page = (folder / f"{name}.md").read_text()
        assert f"`python -m studies {name} --quick --seed 0`" in page
        assert "too small to judge by" in page
        for claim in CLAIMS[name]:
            assert claim in page

    def test_findings_are_made_of_the_rows_alone(self, quick, tmp_path):
        name, folder = quick
        out = run(name, "--from", folder / f"{name}.parquet", "--output", tmp_path)
        assert (tmp_path / f"{name}.md").read_text() == (folder / f"{name}.md").read_text()
        assert not (tmp_path / f"{name}.parquet").exists()
        for finding in get_study(name).findings(pd.read_parquet(folder / f"{name}.parquet")):
            assert finding.verdict in out
            assert finding.rule
            assert "nan" not in finding.evidence

    def test_the_figure_consists_of_what_the_committed_one_does(self, quick):
        name, folder = quick
        figure = get_study(name).figure(pd.read_parquet(folder / f"{name}.parquet"))
        assert make.structure(figure) == KEPT[name]
        plt.close("all")

    def test_incomplete_rows_are_refused(self, quick):
        name, folder = quick
        rows = pd.read_parquet(folder / f"{name}.parquet").head(3)
        with pytest.raises(InputError):
            get_study(name).findings(rows)


class TestCommand:
    def test_lists_the_studies(self):
        shown = run()
        for name in STUDIES:
            assert name in shown

    def test_a_missing_package_is_reported_before_any_work(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        args = ["optimization", "--quick", "-o", str(tmp_path / "o")]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 2
        assert "'optimization' needs peft" in result.output + result.stderr
        assert not list((tmp_path / "o").glob("*.parquet"))

    @pytest.mark.parametrize(
        "words",
        [
            ("convergence", "--quick"),
            ("toy", "-o", "toy.png"),
            ("trained", "nowhere.csv", "-o", "t.csv"),
        ],
    )
    def test_one_of_torchruns_processes_does_the_work(self, tmp_path, monkeypatch, words):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.chdir(tmp_path)
        assert run(*words) == ""
        assert list(tmp_path.iterdir()) == []

    def test_the_rows_of_finished_parts_are_kept(self, tmp_path, monkeypatch):
        def parts(size, seed, advance):
            yield pd.DataFrame({"loss": [1.0]})
            yield pd.DataFrame({"loss": [2.0]})
            raise KeyboardInterrupt

        monkeypatch.setattr(
            "studies.__main__.get_study", lambda _: replace(STUDIES["convergence"], run=parts)
        )
        assert CliRunner().invoke(app, ["convergence", "-o", str(tmp_path)]).exit_code == 130
        path = tmp_path / "convergence.parquet"
        assert pd.read_parquet(path)["loss"].tolist() == [1.0, 2.0]
        assert json.loads(manifest_path(path).read_text())["options"]["study"] == "convergence"

    def test_help_has_examples(self):
        shown = run("why-ef-fails", "--help")
        assert "Example" in shown
        assert "python -m studies why-ef-fails --quick" in shown

    def test_bad_input_is_one_message(self, tmp_path):
        rows = tmp_path / "rows.parquet"
        pd.DataFrame({"study": ["diagonal"], "size": ["quick"]}).to_parquet(rows)
        other = tmp_path / "other.csv"
        pd.DataFrame({"x": [1]}).to_csv(other, index=False)
        for args, message in (
            (("nonsense",), "unknown study 'nonsense'"),
            (("why-ef-fail",), "did you mean 'why-ef-fails'"),
            (("convergence", "--from", rows), "the file has rows of diagonal"),
            (("convergence", "--from", other), "no column 'study'"),
            (("convergence", "--from", tmp_path / "x.parquet"), "does not exist"),
            (("convergence", "--data-dir", tmp_path), "makes its own data"),
            (("optimization", "--data-dir", tmp_path / "no"), "is not a folder"),
        ):
            result = CliRunner().invoke(app, [*map(str, args), "-o", str(tmp_path / "o")])
            assert result.exit_code == 2
            assert message in result.output + result.stderr

    def test_files_that_exist_are_kept(self, tmp_path):
        for end in ("parquet", "png", "md"):
            target = tmp_path / end / f"diagonal.{end}"
            target.parent.mkdir()
            target.write_text("mine")
            result = CliRunner().invoke(app, ["diagonal", "-o", str(target.parent)])
            assert result.exit_code == 2
            assert "--force" in result.stderr
            assert target.read_text() == "mine"


class TestDecide:
    def test_each_verdict(self):
        assert decide([True, True]) == "confirmed"
        assert decide([False, True]) == "under conditions"
        assert decide([False]) == "not confirmed"
        with pytest.raises(InputError):
            decide([])


class TestPredicted:
    @pytest.mark.parametrize("classes", [2, 10])
    def test_cross_entropy_solves_the_equations(self, classes):
        """The two curves are the solutions of dℓ/dt = −k(1 − e^−ℓ)² with both k."""
        initial = torch.tensor([0.01, 0.7, 2.3, 9.0], dtype=torch.float64)
        bounds = predicted(initial, 5.0, CROSS_ENTROPY, classes)
        for k, bound in zip((2.0, classes / (classes - 1)), bounds, strict=True):
            solved = solve_ivp(
                lambda _, loss, k=k: -k * np.expm1(-loss) ** 2,
                (0, 5.0),
                initial.numpy(),
                rtol=1e-10,
                atol=1e-13,
                method="LSODA",
            )
            np.testing.assert_allclose(bound.numpy(), solved.y[:, -1], rtol=1e-6)

    def test_squares_of_residuals_lie_between_what_the_curves_are_made_of(self):
        probabilities = torch.softmax(torch.randn(500, 4, dtype=torch.float64) * 2, 1)
        p = probabilities[:, 0]
        squares = (probabilities - torch.eye(4, dtype=torch.float64)[0]).square().sum(1)
        assert bool((squares <= 2 * (1 - p) ** 2 + 1e-12).all())
        assert bool((squares >= 4 / 3 * (1 - p) ** 2 - 1e-12).all())

    def test_squared_error_falls_exponentially(self):
        initial = torch.tensor([1.0, 4.0], dtype=torch.float64)
        for bound in predicted(initial, 0.5, ONE_OUTPUT, 1):
            torch.testing.assert_close(bound, initial * math.exp(-1))
        assert flow_time(ONE_OUTPUT, 0.1, 3) == pytest.approx(-3 * math.log(0.9))
        assert flow_time(CROSS_ENTROPY, 0.1, 3) == pytest.approx(0.3)

    def test_small_steps_of_ief_follow(self):
        plan = PLANS["quick"]
        rates = dict.fromkeys(plan.rates, (0.02,))
        plan = type(plan)(**{**vars(plan), "rates": rates})
        for kind in (ONE_OUTPUT, FOUR_OUTPUTS):
            rows = descend(kind, "ief", 0.02, 25, plan, seed=0)
            np.testing.assert_allclose(rows["loss"], rows["low"], rtol=0.05)
        rows = descend(CROSS_ENTROPY, "ief", 0.02, 25, plan, seed=0)
        assert bool(rows["loss"].between(0.995 * rows["low"], 1.005 * rows["high"]).all())
        assert float(rows["falling"].min()) == 1
        assert rows["loss"].iloc[-1] < 0.85 * rows["loss"].iloc[0]

    def test_fits(self):
        time = np.linspace(0, 4, 41)
        rows = pd.DataFrame({"time": time, "loss": 3 * np.exp(-1.7 * time)})
        assert exponential_rate(rows) == pytest.approx(-1.7)
        rows = pd.DataFrame({"time": time[1:], "loss": 0.2 * time[1:] ** -1.2})
        assert power_exponent(rows) == pytest.approx(-1.2)


class TestTasks:
    """Those of the study *optimization*, at the size of its quick run."""

    @pytest.fixture(params=["images", "lora", "prompt", "vit"])
    def make(self, request):
        return {
            "images": image_task,
            "lora": lambda: text_task("lora", 4, (8, 8, 8)),
            "prompt": lambda: text_task("prompt", 4, (8, 8, 8)),
            "vit": lambda: vit_lora_task(4, (40, 30, 30)),
        }[request.param]

    @staticmethod
    def parts(task: Task) -> list[list[tuple[float, ...]]]:
        """Each sample of the three parts as something that can be counted."""
        result = []
        for batches in (task.batches(8, None, 3), task.validation(), task.test()):
            rows = []
            for inputs, _ in batches:
                pixels = inputs["input_ids"] if isinstance(inputs, dict) else inputs
                rows += [tuple(row.flatten().tolist()) for row in pixels]
            result.append(rows)
        return result

    def test_parts_do_not_overlap(self, make):
        train, validation, test = self.parts(make())
        assert len(train) >= len(validation) > 0
        assert not set(train) & set(validation)
        assert not (set(train) | set(validation)) & set(test)

    def test_same_for_the_same_seed(self, make):
        first, again = (list(make().batches(8, 2, 5)) for _ in range(2))
        for (_, targets), (_, more) in zip(first, again, strict=True):
            assert torch.equal(targets, more)
        models = []
        for _ in range(2):
            torch.manual_seed(1)
            models.append(make().model())
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(one, other)

    def test_gradients_of_samples_need_no_loop(self, make):
        task = make()
        inputs, targets = next(task.batches(4, 1, 0))
        problem = Problem(task.model().eval(), inputs, targets, "categorical")
        assert problem.engine == "layers"
        assert not any("loop" in note for note in problem.notes)
        assert problem.num_parameters < 300_000

    def test_prompt_is_all_that_is_tuned(self):
        model = text_task("prompt", 4, (8, 8, 8)).model()
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            "prompt.weight"
        ]


class TestImages:
    def test_coloured_digits_have_the_shape_of_cifar(self):
        digits = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
        built = coloured_digits(digits, seed=4)
        assert built.shape == (3, 32, 32, 3)
        assert built.dtype == np.uint8
        np.testing.assert_array_equal(built, coloured_digits(digits, seed=4))
        assert (built != coloured_digits(digits, seed=5)).mean() > 0.9

    def test_reads_the_files_of_cifar10(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images, "CIFAR_SIZES", (6, 2, 3))
        generator = np.random.default_rng(0)
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            labels = generator.integers(10, size=(4, 1), dtype=np.uint8)
            pixels = generator.integers(256, size=(4, 3072), dtype=np.uint8)
            np.concatenate([labels, pixels], 1).tofile(tmp_path / f"{name}.bin")
        task = image_task(tmp_path)
        assert task.name == "cifar10-mlp"
        sizes = [
            sum(len(targets) for _, targets in batches)
            for batches in (task.batches(3, None, 0), task.validation(), task.test())
        ]
        assert sizes == [6, 2, 3]
        with pytest.raises(TaskError, match="no files of CIFAR-10"):
            image_task(tmp_path / "elsewhere")
