"""The table of tuned optimizers: means and intervals by hand, ranks, marks, picture, command."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from rich.console import Console
from typer.testing import CliRunner

from ngeval import InputError
from ngeval.cli import console
from ngeval.cli.app import app as package
from ngeval.plots import COLUMN, PAGE, save_figure
from ngeval.plots.style import styles_of
from ngeval.results.table_files import write_results
from studies.__main__ import app
from studies.statistics import t_interval
from studies.training_picture import performance_figure, plot_performance
from studies.training_results import average_ranks, outcomes, performance
from studies.training_tables import performance_tables
from studies.tuning import COLUMNS
from tests.looks import faults, overlaps

pytestmark = pytest.mark.second_stage

ACCURACIES = {"sgd": [0.90, 0.92, 0.97], "ief": [0.95, 0.96, 0.96], "ef": [0.5, 0.7, 0.6]}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def training(optimizer="sgd", seed=0, phase="final", task="digits", **columns) -> pd.DataFrame:
    """Three epochs, of which the second is the best by validation loss, the last by accuracy."""
    local = {
        "task": task,
        "optimizer": optimizer,
        "phase": phase,
        "trial": 1,
        "learning_rate": 0.1,
        "schedule": "constant",
        "monitor": "validation_loss",
        "seed": seed,
        "epoch": [0, 1, 2],
        "train_loss": [2.3, 0.5, 0.25],
        "train_accuracy": [0.1, 0.9, 0.95],
        "validation_loss": [2.3, 0.6, 0.7],
        "validation_accuracy": [0.1, 0.8, 0.85],
        "test_loss": [2.3, 0.55, 0.65],
        "test_accuracy": [0.1, 0.82, 0.84],
        "status": "ok",
        "reason": "",
    }
    return pd.DataFrame(local | columns, index=[0, 1, 2]).reindex(columns=list(COLUMNS))


def lost(optimizer, seed, phase="final", **columns):
    """A training that diverged in its third epoch."""
    output = {"status": "diverged", "reason": "NaN", "train_loss": [2.3, 9.0, math.nan]}
    return training(optimizer, seed, phase, **(output | columns))


def tuned(accuracies=ACCURACIES, task="digits") -> pd.DataFrame:
    """Several optimizers and seeds, with a search of three learning rates."""
    parts = []
    for name, values in accuracies.items():
        parts += [
            training(name, 0, "search", task, learning_rate=rate, trial=number)
            for number, rate in enumerate((0.01, 0.1, 1.0))
        ]
        parts += [
            training(name, seed, task=task, test_accuracy=[0.1, value, 0.5])
            for seed, value in enumerate(values)
        ]
    return pd.concat(parts)


class TestInterval:
    @pytest.mark.parametrize("count", [2, 3, 5, 12])
    @pytest.mark.parametrize("confidence", [0.95, 0.5])
    def test_against_scipys(self, count, confidence):
        values = np.random.default_rng(count).normal(3, 2, count)
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
        mean, low, high = t_interval(values, confidence)
        assert mean == pytest.approx(values.mean(), rel=1e-12)
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-10)

    def test_by_hand(self):
        # s = 0.1 of three values; t_2(0.975) = 4.302653 (from tables)
        mean, low, high = t_interval([0.5, 0.7, 0.6])
        half = 4.302653 * 0.1 / math.sqrt(3)
        assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half), abs=1e-7)

    def test_of_one_value_there_is_none(self):
        mean, low, high = t_interval([0.5, math.nan])
        assert mean == 0.5
        assert math.isnan(low)
        assert math.isnan(high)
        assert all(map(math.isnan, t_interval([])))


class TestPerformance:
    def test_means_and_intervals(self):
        table = performance(tuned()).set_index("optimizer")
        for name, values in ACCURACIES.items():
            half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
            row = table.loc[name]
            assert row["test_accuracy_mean"] == pytest.approx(np.mean(values))
            assert row["test_accuracy_low"] == pytest.approx(np.mean(values) - half, abs=1e-6)
            assert row["test_accuracy_high"] == pytest.approx(np.mean(values) + half, abs=1e-6)
            assert (row["test_loss_mean"], row["train_loss_mean"]) == (0.55, 0.25)
            assert (row["seeds"], row["diverged"], row["trials"]) == (3, 0, 3)
        assert table["rank"].to_dict() == {"sgd": 2, "ief": 1, "ef": 3}
        assert set(table["metric"]) == {"test_accuracy"}
        assert set(table["data"]) == {"test"}

    def test_at_the_best_epoch_by_what_was_monitored(self):
        by_loss, by_accuracy = (
            outcomes(training(monitor=f"validation_{what}")).iloc[0]
            for what in ("loss", "accuracy")
        )
        assert (by_loss["best_epoch"], by_loss["test_accuracy"]) == (1, 0.82)
        assert (by_accuracy["best_epoch"], by_accuracy["test_accuracy"]) == (2, 0.84)
        assert by_loss["train_loss"] == by_accuracy["train_loss"] == 0.25

    def test_rows_in_any_order(self):
        rows = tuned().sample(frac=1, random_state=0)
        first = performance(tuned()).set_index("optimizer").sort_index()
        pd.testing.assert_frame_equal(performance(rows).set_index("optimizer").sort_index(), first)

    def test_one_seed_has_no_interval(self):
        row = performance(training()).iloc[0]
        assert row["test_accuracy_mean"] == 0.82
        assert math.isnan(row["test_accuracy_low"])
        assert math.isnan(row["train_loss_high"])

    def test_targets_that_are_no_classes_are_ranked_by_loss(self):
        none = {f"{part}_accuracy": math.nan for part in ("train", "validation", "test")}
        rows = [training("sgd", **none), training("ief", test_loss=[2, 0.4, 1], **none)]
        table = performance(pd.concat(rows))
        assert set(table["metric"]) == {"test_loss"}
        assert table["rank"].tolist() == [2, 1]
        assert table["test_accuracy_mean"].isna().all()

    def test_without_test_data_the_validation_counts_and_without_that_the_training(self):
        held = {"test_loss": math.nan, "test_accuracy": math.nan}
        row = performance(training(**held)).iloc[0]
        assert (row["data"], row["test_accuracy_mean"]) == ("validation", 0.8)
        held |= {"validation_loss": math.nan, "validation_accuracy": math.nan}
        row = performance(training(**held, monitor="train_loss")).iloc[0]
        assert (row["data"], row["test_accuracy_mean"], row["test_loss_mean"]) == (
            "train",
            0.95,
            0.25,
        )

    def test_test_data_without_validation_data_counts_at_the_last_epoch(self):
        held = {"validation_loss": math.nan, "validation_accuracy": math.nan}
        row = performance(training(**held, monitor="train_loss", train_loss=[1, 0.1, 0.2])).iloc[0]
        assert (row["data"], row["test_accuracy_mean"]) == ("test", 0.84)

    def test_diverged_trainings_are_counted_and_rank_behind(self):
        rows = [
            lost("sgd", 0, test_accuracy=[0.1, 1.0, 1.0]),
            training("sgd", 1, test_accuracy=[0.1, 0.99, 0.1]),
            training("ief", 0),
            training("ief", 1),
        ]
        table = performance(pd.concat(rows)).set_index("optimizer")
        assert (table.loc["sgd", "seeds"], table.loc["sgd", "diverged"]) == (1, 1)
        assert table.loc["sgd", "test_accuracy_mean"] == 0.99
        assert table["rank"].to_dict() == {"sgd": 2, "ief": 1}

    def test_an_optimizer_of_which_every_trial_diverged(self):
        rows = [lost("sgd", 0, "search", trial=t, learning_rate=10.0**t) for t in range(3)]
        table = performance(pd.concat([*rows, training("ief")])).set_index("optimizer")
        row = table.loc["sgd"]
        assert (row["rank"], row["seeds"], row["trials"], row["trials_diverged"]) == (2, 0, 3, 3)
        assert math.isnan(row["test_accuracy_mean"])
        assert math.isnan(row["learning_rate"])

    @pytest.mark.parametrize(
        ("rates", "dampings", "edge"),
        [
            ((0.01, 0.1, 1.0), (1.0, 1.0, 1.0), ""),
            ((0.1, 0.1, 1.0), (0.1, 1.0, 10.0), "learning_rate"),
            ((0.01, 0.1, 0.05), (0.1, 1.0, 10.0), "learning_rate"),
            ((0.01, 0.1, 1.0), (1.0, 2.0, 2.0), "damping"),
            ((0.1, 0.2, 1.0), (1.0, 2.0, 2.0), "learning_rate, damping"),
        ],
    )
    def test_settings_at_an_end_of_what_was_tried(self, rates, dampings, edge):
        tries = [
            training("ief", 0, "search", trial=i, learning_rate=r, damping=d)
            for i, (r, d) in enumerate(zip(rates, dampings, strict=True))
        ]
        final = training("ief", damping=1.0)
        row = performance(pd.concat([*tries, final])).iloc[0]
        assert (row["learning_rate"], row["damping"], row["edge"]) == (0.1, 1.0, edge)

    def test_equals_share_a_rank(self):
        names = {"sgd": [0.9, 0.8], "ief": [0.8, 0.9], "ef": [0.1, 0.2]}
        assert performance(tuned(names))["rank"].tolist() == [1, 1, 3]

    def test_average_rank_over_tasks(self):
        other = {"sgd": [0.9], "ief": [0.8], "ef": [0.1], "ng": [0.95]}
        ranks = average_ranks(performance(pd.concat([tuned(), tuned(other, "other")])))
        assert ranks.drop("ng").to_dict() == {"sgd": 2.0, "ief": 2.0, "ef": 3.5}
        assert math.isnan(ranks["ng"])

    def test_a_training_twice_is_refused(self):
        with pytest.raises(InputError, match="sgd on digits with seed 0 twice"):
            performance(pd.concat([training(), training()]))

    def test_numbers_that_a_file_kept_as_objects(self):
        rows = tuned()
        as_read = rows.assign(task="1", damping=None, seed=rows["seed"].astype("Int64"))
        expected = performance(rows.assign(task="1"))
        pd.testing.assert_frame_equal(performance(as_read), expected)

    def test_another_table_is_refused(self):
        with pytest.raises(InputError, match=r"no column phase.*training\.parquet"):
            performance(training().drop(columns="phase"))


class TestShown:
    def printed(self, rows) -> str:
        out = console.table_console()
        with out.capture() as captured:
            for table in performance_tables(performance(rows)):
                out.print(table)
        return captured.get()

    def test_tables(self):
        shown = self.printed(pd.concat([tuned(), tuned(ACCURACIES, "other")]))
        half = 100 * 4.302653 * np.std(ACCURACIES["ief"], ddof=1) / math.sqrt(3)
        assert f"95.67 ± {half:.2f}" in shown
        assert "test accuracy, %" in shown
        [line] = [line for line in shown.splitlines() if "average rank" in line]
        assert line.split()[2:] == ["2.00", "1.00", "3.00"]
        assert "0.1" in shown.partition("tuned settings")[2]
        assert "*" not in shown.partition("tuned settings")[2]

    @pytest.mark.parametrize("width", [80, 100])
    def test_in_a_narrow_terminal_nothing_is_cut_off(self, width):
        names = dict.fromkeys(("sgd", "adamw", "adafactor", "ef", "ief"), ACCURACIES["ief"])
        tasks = ("coloured-digits-mlp", "digits")
        table = performance(pd.concat([tuned(names, task) for task in tasks]))
        out = Console(width=width, color_system=None)
        with out.capture() as captured:
            for part in performance_tables(table, width):
                out.print(part)
        shown = captured.get()
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        assert shown.count("95.67 ± ") == 10  # of each optimizer on each task, unbroken
        assert shown.count("0.25 ± 0\n") + shown.count("0.25 ± 0 ") == 10
        assert [shown.count(word) for word in ("average rank", "test accuracy, %")] == [1, 2]

    def test_side_by_side_where_there_is_room(self):
        table = performance(tuned())
        wide, narrow = (list(performance_tables(table, width)) for width in (100, 40))
        assert [len(tables) for tables in (wide, narrow)] == [3, 2]
        assert [column.header for column in wide[0].columns[1:]] == list(ACCURACIES)

    def test_the_best_is_bold(self):
        test, train, _ = performance_tables(performance(tuned()))
        cells = [next(iter(column.cells)) for column in test.columns[1:]]
        assert [cell.startswith("[bold]") for cell in cells] == [False, True, False]
        assert all("[bold]" in next(iter(column.cells)) for column in train.columns[1:])

    def test_marks(self):
        tries = [
            training("ief", 0, "search", trial=i, learning_rate=r) for i, r in ((0, 0.1), (1, 1))
        ]
        gone = [lost("sgd", 0, "search", trial=t, learning_rate=10.0**t) for t in range(3)]
        held = {"test_loss": math.nan, "test_accuracy": math.nan}
        shown = self.printed(pd.concat([*tries, training("ief", **held), *gone, lost("ief", 1)]))
        assert "0.1*" in shown
        assert "at an end of the values tried" in shown
        assert "diverged" in shown
        assert "1 diverged" in shown
        assert "validation accuracy" in shown


def seven_optimizers():
    one = tuned()
    one = one[one["optimizer"] == one["optimizer"].iloc[0]]
    names = ("sgd", "momentum", "adam", "adamw", "adafactor", "fadam", "muon")
    return pd.concat([one.assign(optimizer=name) for name in names], ignore_index=True)


DRAWN = {
    "page": lambda: performance_figure(seven_optimizers()),
    "loss": lambda: plot_performance(seven_optimizers(), what="train_loss").figure,
    "column": lambda: plot_performance(seven_optimizers()).figure,
}


class TestFigure:
    def test_two_panels_for_each_task(self):
        none = {f"{part}_accuracy": math.nan for part in ("train", "validation", "test")}
        numbers = pd.concat([training("sgd", s, task="numbers", **none) for s in (0, 1)])
        figure = performance_figure(pd.concat([tuned(), numbers]))
        labels = [axes.get_xlabel() for axes in figure.axes]
        assert labels[0] == "test accuracy (%)"
        assert labels[2] == "test loss (nats)"
        assert labels[1] == labels[3] == "training loss after the last epoch (nats)"
        assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == ["digits", "numbers"]
        names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert names == list(ACCURACIES)

    def test_means_intervals_and_seeds(self):
        axes = performance_figure(tuned()).axes[0]
        for place, values in enumerate(ACCURACIES.values()):
            half = 100 * 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
            bars = axes.collections[place].get_segments()[0][:, 0]
            assert (bars[1] - bars[0]) / 2 == pytest.approx(half, abs=1e-3)
            points = [line for line in axes.lines if line.get_marker() == "."][place]
            assert points.get_xdata() == pytest.approx(100 * np.array(values))

    def test_nothing_to_draw(self):
        with pytest.raises(InputError, match="no final training"):
            performance_figure(lost("sgd", 0))

    def test_trained_optimizers_are_drawn_in_the_colours_of_graded_ones(self):
        axes = performance_figure(seven_optimizers()).axes[0]
        drawn = {container.lines[0].get_color() for container in axes.containers}
        names = [text.get_text() for text in axes.get_yticklabels()]
        styles = styles_of(pd.DataFrame({"method": names}))
        assert drawn == {colour for colour, _, _ in styles.values()}

    @pytest.mark.parametrize("width", [COLUMN, PAGE])
    def test_both_widths(self, width):
        assert performance_figure(tuned(), width=width).get_figwidth() == width

    @pytest.mark.parametrize("name", DRAWN)
    def test_it_is_fit_for_print(self, name):
        figure = DRAWN[name]()
        assert faults(figure) == []
        assert figure.get_figwidth() in (COLUMN, PAGE)

    def test_given_axes_are_drawn_on_and_nothing_else_is_made(self, tmp_path):
        figure, (left, right) = plt.subplots(1, 2)
        size = tuple(figure.get_size_inches())
        assert plot_performance(tuned(), ax=right) is right
        assert right.has_data()
        assert not left.has_data()
        assert figure.axes == [left, right]
        assert figure.legends == []
        assert tuple(figure.get_size_inches()) == size
        assert plt.get_fignums() == [figure.number]
        save_figure(figure, tmp_path / "a.png")

    def test_an_interval_below_zero_leaves_the_logarithmic_axis_at_its_edge(self):
        rows = tuned()
        ends = rows["phase"] == "final"
        rows.loc[ends, "train_loss"] = np.where(rows.loc[ends, "seed"] % 2 == 0, 1e-3, 1.0)
        axes = plot_performance(rows, what="train_loss")
        assert axes.get_xscale() == "log"
        assert [text for text in axes.texts if text.arrow_patch is not None]
        assert math.isfinite(axes.get_xlim()[0])
        assert overlaps(axes.figure) == []


def run(*args, code=0):
    """The command; returns its result."""
    result = CliRunner().invoke(app, ["trained", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path):
        first, second = tmp_path / "a", tmp_path / "b.csv"
        first.mkdir()
        tuned().to_parquet(first / "training.parquet")
        tuned({"sgd": [0.8, 0.9]}, "other").to_csv(second, index=False)
        return first, second

    def test_table_of_several_files_as_csv(self, files, tmp_path):
        first, second = files
        result = run(first, second, "-o", tmp_path / "t.csv")
        assert "average rank" in result.stdout
        assert "t.csv" in result.stdout
        table = pd.read_csv(tmp_path / "t.csv")
        assert table["task"].tolist() == ["digits"] * 3 + ["other"]
        rows = pd.concat([tuned(), tuned({"sgd": [0.8, 0.9]}, "other")])
        expected = performance(rows)["test_accuracy_mean"]
        assert table["test_accuracy_mean"].tolist() == pytest.approx(expected.tolist())

    def test_folder_has_the_picture_too(self, files, tmp_path):
        run(files[0], files[1], "-q", "-o", tmp_path / "out")
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["performance.csv", "performance.png"]
        result = run(files[0], "-o", tmp_path / "out", code=2)
        assert "--force" in result.stderr

    @pytest.mark.parametrize(
        "words",
        [
            ("plot", "-o", "x.png"),
            ("plot", "--kind", "damping", "-o", "x.png"),
            ("report", "-o", "x.html"),
            ("compare", "-t", "digits-mlp", "-o", "x", "-c"),
        ],
    )
    def test_the_package_names_this_command(self, files, tmp_path, monkeypatch, words):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(package, [*words, str(files[1])])
        assert result.exit_code == 2
        assert "holds the rows of tuned trainings" in result.stderr
        assert "`python -m studies trained FILE`, in a clone" in result.stderr
        assert result.stderr.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.csv"]

    def test_without_output_it_only_prints(self, files, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert "tuned settings" in run(files[0]).stdout
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_same_optimizer_twice(self, files, tmp_path):
        tuned({"ief": [0.9]}).to_parquet(tmp_path / "c.parquet")
        result = run(files[0], tmp_path / "c.parquet", code=2)
        assert "ief on digits is in" in result.stderr

    @pytest.mark.parametrize("kind", [".csv", ".parquet", ".jsonl"])
    @pytest.mark.parametrize(
        ("column", "value", "wanted"),
        [
            ("task", None, "text"),
            ("optimizer", None, "text"),
            ("monitor", "nonsense", "train_loss or validation_loss or validation_accuracy"),
            ("monitor", None, "train_loss or"),
            ("status", "bogus", "ok or diverged or failed"),
            ("phase", "last", "search or final"),
            ("seed", None, "whole numbers"),
            ("seed", 0.5, "whole numbers"),
            ("trial", "first", "whole numbers"),
            ("epoch", "last", "whole numbers"),
            ("test_loss", "abc", "finite numbers"),
            ("damping", "x", "finite numbers"),
            ("train_accuracy", "most", "finite numbers"),
        ],
    )
    def test_rows_that_somebody_edited(self, tmp_path, kind, column, value, wanted):
        rows, file = tuned().reset_index(drop=True), tmp_path / f"edited{kind}"
        # Parquet keeps a column's kind: there it was edited as a whole.
        rows[column] = rows[column].astype(object if kind != ".parquet" else type(value or ""))
        rows.loc[1 if kind != ".parquet" else slice(None), column] = value
        write_results(rows, file)
        result = run(file, code=2)
        assert f"edited{kind}: column {column} has " in result.stderr
        assert f"should hold {wanted}" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_losses_that_are_infinite(self, tmp_path):
        training(train_loss=[1.0, 0.5, math.inf]).to_parquet(tmp_path / "inf.parquet")
        result = run(tmp_path / "inf.parquet", "-o", tmp_path / "o", code=2)
        assert "inf.parquet: column train_loss has inf in row 3" in result.stderr
        assert not list((tmp_path / "o").iterdir())

    def test_no_such_file_or_folder(self, tmp_path):
        assert "typo does not exist" in run("typo", code=2).stderr
        result = run(tmp_path, code=2)
        assert f"{tmp_path} holds no training.parquet" in result.stderr

    @pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
    def test_a_picture_alone(self, files, tmp_path, kind):
        run(files[0], "-q", "-o", tmp_path / f"x.{kind}")
        assert (tmp_path / f"x.{kind}").stat().st_size > 1000
        assert not list(tmp_path.rglob("performance.*"))

    def test_of_nothing_there_is_no_picture(self, tmp_path):
        lost("sgd", 0).to_parquet(tmp_path / "lost.parquet")
        args = (tmp_path / "lost.parquet", "-o")
        assert "nothing to draw" in run(*args, tmp_path / "x.png", code=2).stderr
        run(*args, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["performance.csv"]

    def test_the_rows_are_not_written_over(self, files):
        before = files[1].read_bytes()
        result = run(files[1], "-o", files[1], "--force", code=2)
        assert "holds the rows that are compared" in result.stderr
        assert files[1].read_bytes() == before

    def test_another_table(self, tmp_path):
        pd.DataFrame({"gamma": [1.0]}).to_csv(tmp_path / "g.csv", index=False)
        assert "no column task" in run(tmp_path / "g.csv", code=2).stderr
