"""What pictures look like in print: nothing overprinted, cut off, hidden, or too small to read."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from ngeval import InputError, plots
from ngeval.cli.app import app
from ngeval.methods import all_methods
from ngeval.plots import (
    COLUMN,
    PAGE,
    STYLE,
    damping_figure,
    figure_of,
    kfac_figure,
    kind_of,
    layers_figure,
    norms_figure,
    plot_damping,
    plot_stages,
    ranking_figure,
    stages_figure,
)
from ngeval.plots.style import styles_of
from ngeval.plots.ticks import log_scale
from studies import get_study
from tests.looks import bare_axes, drawn_texts, faults, overlaps, small_texts
from tests.test_performance import tuned
from tests.test_plot_layers import gammas as kfac_gammas
from tests.test_plot_layers import layers
from tests.test_plots import gammas, samples, tasks

DATA = Path(__file__).parents[1] / "figures" / "data"


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def far(table):
    """γ of twelve decades."""
    return table.assign(gamma_over_sgd=table["gamma_over_sgd"] ** 8)


FIGURES = {
    "stages": lambda: stages_figure(gammas()),
    "stages-far": lambda: stages_figure(far(gammas())),
    "stages-quick": lambda: stages_figure(gammas(checkpoints=1, batches=1)),
    "stages-tasks": lambda: stages_figure(*(tasks("digits-mlp", "coloured-digits-mlp", "t5"))[:1]),
    "stages-samples": lambda: stages_figure(gammas(), samples=samples()),
    "stages-page": lambda: stages_figure(gammas(), [1e-6, 1e-3, 1.0], width=PAGE),
    "damping": lambda: damping_figure(gammas(dampings=tuple(np.logspace(-8, 4, 13)))),
    "damping-column": lambda: damping_figure(gammas(), width=COLUMN),
    "damping-one": lambda: plot_damping(gammas()).figure,
    "norms": lambda: norms_figure(samples()),
    "norms-many": lambda: norms_figure(samples(checkpoints=20)),
    "norms-one": lambda: norms_figure(samples(checkpoints=1)),
    "kfac": lambda: kfac_figure(kfac_gammas()),
    "kfac-column": lambda: kfac_figure(kfac_gammas(), width=COLUMN),
    "ranking": lambda: ranking_figure(kfac_gammas()),
    "layers": lambda: layers_figure(layers(12, ("sgd", "ef", "ief", "ng"))),
    "layers-column": lambda: layers_figure(layers(24, ("sgd",))),
}


def assert_fit_for_print(figure):
    assert faults(figure) == []
    assert figure.get_figwidth() in (COLUMN, PAGE)


@pytest.mark.parametrize("name", FIGURES)
def test_pictures_are_fit_for_print(name):
    assert_fit_for_print(FIGURES[name]())


@pytest.mark.second_stage
@pytest.mark.parametrize(
    "name",
    ["why-ef-fails", "convergence", "fadam", "diagonal", "preconditioners", "optimization"],
)
def test_the_studies_pictures_are_fit_for_print(name):
    study = get_study(name)
    assert_fit_for_print(study.figure(pd.read_parquet(DATA / f"{name}.parquet")))


class TestLooks:
    """The checks find what they are there for."""

    def test_texts_over_each_other_and_over_the_edge(self):
        figure, axes = plt.subplots()
        axes.text(0.5, 0.5, "one")
        axes.text(0.51, 0.5, "other")
        figure.text(0.98, 0.5, "a long text at the edge")
        result = overlaps(figure)
        assert "'one' overlaps 'other'" in result
        assert "'a long text at the edge' is cut off" in result
        assert len(result) == 2

    def test_a_legend_over_lines_points_and_bars(self):
        for draw in ("plot", "scatter", "bar"):
            figure, axes = plt.subplots()
            getattr(axes, draw)([0, 1, 2], [1, 1, 1], label="x")
            axes.set_ylim(0, 2)
            axes.legend(loc="center")
            assert overlaps(figure) == ["panel 0: the legend lies over data"], draw
            axes.set_ylim(0, 30)
            assert overlaps(figure) == [], draw

    def test_ticks_outside_the_limits_do_not_count(self):
        figure, axes = plt.subplots()
        axes.plot([0, 1])
        axes.set_xticks([0, 1, 1.5, 1.501], ["a", "b", "cccc", "dddd"])
        axes.set_xlim(0, 1)
        assert overlaps(figure) == []
        assert {"a", "b"} <= {text.get_text() for text in drawn_texts(figure)}
        axes.set_xlim(0, 1.6)
        assert overlaps(figure) == ["'cccc' overlaps 'dddd'"]

    def test_an_axis_with_one_number(self):
        figure, axes = plt.subplots()
        axes.semilogy([2, 30])
        axes.set_yticks([10], ["10"], minor=False)
        axes.yaxis.set_minor_formatter("")
        assert bare_axes(figure) == ["panel 0: the y axis has ['10']"]
        log_scale(axes, "y")
        assert bare_axes(figure) == []

    def test_small_texts(self):
        figure, axes = plt.subplots()
        axes.text(0, 0, "small", fontsize=5)
        assert small_texts(figure) == ["'small' has 5 pt"]


class TestTicks:
    @pytest.mark.parametrize("name", ["x", "y"])
    @pytest.mark.parametrize(
        ("low", "high"),
        [
            *[(1.0, 1.01), (0.95, 1.3), (0.2, 3.0), (3.0, 30.0), (1e-8, 1e4), (1e-30, 1e30)],
            *[(2, 9), (0.25, 0.25), (0.25, 0.25 + 1e-16)],
        ],
    )
    def test_at_least_two_numbers_and_none_over_another(self, name, low, high):
        with mpl.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(1.7, 1.5), layout="constrained")
            axes.plot(*[[low, high]] * 2)
            log_scale(axes, name)
            assert faults(figure) == []

    def test_limits_that_change_later_change_the_numbers(self):
        with mpl.rc_context(STYLE):
            figure, axes = plt.subplots(layout="constrained")
        axes.plot([1, 2], [1, 2])
        log_scale(axes, "y")
        axes.set_ylim(1e-6, 1e6)
        figure.canvas.draw()
        numbers = [text.get_text() for text in axes.get_yticklabels()]
        assert "10⁰" in numbers
        assert "10⁻⁶" in numbers


class TestColours:
    def test_every_method_of_ngeval_has_its_own_look(self):
        names = list(all_methods())
        styles = styles_of(pd.DataFrame({"method": names}))
        assert len(set(styles.values())) == len(names)
        for name in names:
            assert styles_of(pd.DataFrame({"method": [name]}))[name] == styles[name]

    def test_a_users_methods_keep_theirs(self):
        alone = styles_of(pd.DataFrame({"method": ["mine"]}))["mine"]
        among = styles_of(pd.DataFrame({"method": ["sgd", "adamw", "mine", "ef"]}))["mine"]
        assert alone == among


class TestStyleSheet:
    def test_users_can_have_it_by_name(self):
        with plt.style.context("ngeval.plots.ngeval"):
            assert {name: mpl.rcParams[name] for name in STYLE} == STYLE
            assert plt.figure().get_figwidth() == COLUMN

    def test_files_hold_text_as_text(self, tmp_path):
        with mpl.rc_context(STYLE):
            plot_stages(gammas()).figure.savefig(tmp_path / "x.svg")
        assert ">training epoch</text>" in (tmp_path / "x.svg").read_text()

    def test_a_picture_of_its_own_is_in_the_style(self):
        axes = plot_stages(gammas())
        assert axes.xaxis.label.get_fontsize() == STYLE["axes.labelsize"]
        _, argument = plt.subplots()
        plot_stages(gammas(), ax=argument)
        assert argument.xaxis.label.get_fontsize() == mpl.rcParams["font.size"]


class TestKinds:
    @pytest.mark.parametrize(
        ("tables", "kind"),
        [
            ({"a": gammas()}, "stages"),
            ({"a": gammas(checkpoints=1)}, "damping"),
            ({"a": gammas(dampings=tuple(np.logspace(-6, 0, 9)))}, "damping"),
            ({"a": gammas(), "b": samples()}, "stages"),
            ({"a": gammas(), "b": gammas()}, "stages"),
            ({"a": samples()}, "imbalance"),
            ({"a": layers()}, "layers"),
        ],
    )
    def test_what_fits_by_the_columns(self, tables, kind):
        assert kind_of(tables) == kind
        assert figure_of(tables).axes

    def test_tables_that_do_not_go_together(self):
        with pytest.raises(InputError, match="gammas and layers cannot be in one picture"):
            kind_of({"a": gammas(), "b": layers()})
        with pytest.raises(InputError, match="a has the columns a and is not a result table"):
            kind_of({"a": pd.DataFrame({"a": [1]})})
        with pytest.raises(InputError, match="rows of a study; `python -m studies diagonal --from"):
            kind_of({"a": pd.DataFrame({"study": ["diagonal"]})})

    @pytest.mark.parametrize("kind", [None, *plots.FIGURES])
    @pytest.mark.parametrize("methods", [None, ["sgd"]])
    def test_tuned_trainings_are_refused_with_the_command_that_draws_them(self, kind, methods):
        message = "a holds the rows of tuned trainings.*`python -m studies trained FILE`"
        with pytest.raises(InputError, match=message):
            figure_of({"a": tuned()}, kind, plots.Chosen(methods=methods))

    @pytest.mark.parametrize("draw", [plots.plot_stages, plots.layers_figure, plots.plot_norms])
    def test_so_they_are_by_a_single_picture(self, draw):
        with pytest.raises(InputError, match="the table holds the rows of tuned trainings"):
            draw(tuned())

    def test_a_kind_that_the_table_has_not(self):
        with pytest.raises(InputError, match="a holds a table of gammas, which cannot be in"):
            figure_of({"a": gammas(), "b": samples()}, "imbalance")
        with pytest.raises(InputError, match="no column gamma_over_sgd"):
            figure_of({"a": layers().drop(columns="gamma_over_sgd")}, "damping")
        with pytest.raises(InputError, match="no column method"):
            figure_of({"a": samples()}, "stages")
        with pytest.raises(InputError, match="unknown picture 'stage'; did you mean 'stages'"):
            figure_of({"a": gammas()}, "stage")

    def test_files_of_one_task_have_their_names_in_the_titles(self):
        figure = figure_of({"lora": gammas(), "prompt": gammas(), "norms": samples()})
        titles = [axes.get_title().splitlines()[0] for axes in figure.axes[:2]]
        assert titles == ["t (lora)", "t (prompt)"]


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path):
        tables = {"lora": gammas(), "prompt": gammas(), "norms": samples().assign(task="t")}
        for name, table in tables.items():
            table.to_parquet(tmp_path / f"{name}.parquet")
        return [tmp_path / f"{name}.parquet" for name in tables]

    def test_several_files_and_what_fits_them(self, files, tmp_path):
        assert "kind: stages" in run("plot", *files, "--output", tmp_path / "a.svg")
        text = (tmp_path / "a.svg").read_text()
        for word in ("t (lora)", "t (prompt)", "sf/ief", "ef/ief", "max/min"):
            assert f">{word}</text>" in text
        plain = tmp_path / "b.svg"
        assert not run("plot", *files[1:], "--relative", "none", "--quiet", "--output", plain)
        assert "sf/ief" not in plain.read_text()
        chosen = tmp_path / "c.svg"
        run("plot", files[0], "--kind", "stages", "--relative", "ef/sf, sf/ng", "-o", chosen)
        assert ">ef/sf</text>" in chosen.read_text()
        assert ">sf/ng</text>" in chosen.read_text()

    @pytest.mark.parametrize(("name", "points"), [("column", 244.8), ("page", 504.0)])
    def test_width(self, files, tmp_path, name, points):
        run("plot", files[0], "--width", name, "--output", tmp_path / "a.svg")
        assert f'width="{points:g}pt"' in (tmp_path / "a.svg").read_text()

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--width", "pages"], "unknown width 'pages'; did you mean 'page'"),
            (["--kind", "stage"], "unknown picture 'stage'; did you mean 'stages'"),
            (["--relative", "sf"], "--relative 'sf' is not a list of pairs"),
            (["--relative", "sf/ie"], "no rows for method 'ie'"),
            (["--kind", "layers"], "no column layer"),
        ],
    )
    def test_bad_options(self, files, tmp_path, options, told):
        output = tmp_path / "a.svg"
        assert told in run("plot", files[0], *options, "--output", output, code=2)
        assert not output.exists()

    def test_the_same_file_twice(self, files, tmp_path):
        shown = run("plot", files[0], files[0], "--output", tmp_path / "a.svg", code=2)
        assert "twice" in shown

    def test_files_of_one_name_in_two_folders(self, files, tmp_path):
        (tmp_path / "other").mkdir()
        other = files[0].rename(tmp_path / "other" / files[1].name)
        run("plot", other, files[1], "--output", tmp_path / "a.svg")
        assert "other/prompt.parquet)" in (tmp_path / "a.svg").read_text()


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output
