"""Pictures of odd tables: names that are no plain words, numbers that are none, many methods."""

from __future__ import annotations

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from ngeval import InputError
from ngeval.analysis.ranking import ranking
from ngeval.cli.app import app
from ngeval.plots import (
    Chosen,
    damping_figure,
    figure_of,
    kfac_figure,
    layers_figure,
    norms_figure,
    plot_damping,
    plot_imbalance,
    plot_layers,
    plot_norms,
    plot_ranking,
    plot_relative,
    plot_stages,
    ranking_figure,
    save_figure,
    stages_figure,
)
from studies.toy.least_squares import LeastSquares
from studies.toy.picture import plot_toy
from tests.test_plot_layers import layers
from tests.test_plots import below, gammas, samples

NAMES = {
    r"$\frac{$": r"\$\frac{\$",
    "$x_1$": r"\$x_1\$",
    "_under": " _under",
    "": "(no name)",
    "方法": "��",
    "a\x00b\nc": "a�b c",
    "m" * 3000 + ":20": "…" + "m" * 28 + ":20",
}
PICTURES = {"stages": stages_figure, "damping": damping_figure, "ranking": ranking_figure}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def small(methods=("sgd", "ief", "ng"), **options):
    return gammas(methods, (1e-3, 1.0), checkpoints=2, batches=2, **options)


def named(table, name, old="ief"):
    return table.assign(method=table["method"].replace(old, name))


def shown(figure):
    """All texts that a figure draws."""
    return {text.get_text() for text in figure.findobj(mpl.text.Text)}


class TestNames:
    """Warnings are errors here: no name may make matplotlib warn."""

    @pytest.mark.parametrize("kind", PICTURES)
    def test_of_methods(self, kind, tmp_path):
        figure = PICTURES[kind](small(("sgd", *NAMES, "ng")))
        save_figure(figure, tmp_path / "a.svg")
        expected = {text[:1] + text[-23:] if len(text) > 24 else text for text in NAMES.values()}
        if kind == "ranking":
            assert expected <= shown(figure)
            assert figure.axes[0].get_window_extent().width > 0.25 * figure.bbox.width
        else:
            assert set(NAMES.values()) <= set(below(figure))

    def test_of_checkpoints_tasks_and_layers(self, tmp_path):
        tall = small()
        four = list(NAMES)[:4]
        names = dict(zip(tall["checkpoint"].unique(), four, strict=False))
        epochless = tall.assign(epoch=math.nan, checkpoint=tall["checkpoint"].map(names))
        rows = layers(len(NAMES), ("ief",))
        names = dict(zip(rows["layer"].unique(), NAMES, strict=True))
        figures = {
            damping_figure(epochless): four[:2],
            stages_figure({name: tall for name in four if name}): [n for n in four if n],
            layers_figure(rows.assign(layer=rows["layer"].map(names))): NAMES,
        }
        for figure, expected in figures.items():
            save_figure(figure, tmp_path / "a.png")
            texts = shown(figure)
            for name in expected:
                assert any(NAMES[name] in text for text in texts), name

    def test_in_given_axes_without_the_style(self, tmp_path):
        figure, axes = plt.subplots()
        plot_stages(named(small(), "$x_1$"), ax=axes)
        axes.set_title("$\\gamma^2$")  # one's own formulas stay formulas
        figure.savefig(tmp_path / "a.png")
        assert axes.title.get_parse_math()

    def test_long_names_with_the_same_end_are_two(self):
        table = small(("sgd", "ief", "ef"))
        table = named(named(table, "a" + "m" * 90), "b" + "m" * 90, old="ef")
        assert sum("mmm" in entry for entry in below(stages_figure(table))) == 2


def spoilt(value, method="ief", columns=("gamma_over_sgd", "gamma_over_ng")):
    table = small()
    table.loc[table["method"] == method, list(columns)] = value
    return table


class TestValues:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
    @pytest.mark.parametrize("kind", PICTURES)
    def test_a_method_without_a_grade_is_left_out(self, value, kind, tmp_path):
        figure = PICTURES[kind](spoilt(value))
        save_figure(figure, tmp_path / "a.png")
        assert "ief" not in below(figure)
        with pytest.raises(InputError, match="finite positive γ"):
            PICTURES[kind](small().assign(gamma_over_sgd=value))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
    def test_in_the_ranking_and_over_damping(self, value):
        result = ranking(spoilt(value)).set_index("method")
        assert set(result.loc["ief", "status"]) == {"failed"}
        assert result["rank"].notna().sum() == 4
        table = small()
        table.loc[table["damping"] == 1.0, "damping"] = value
        axes = plot_damping(table)
        assert all(np.isfinite(line.get_xdata()).all() for line in axes.get_lines())
        with pytest.raises(InputError, match="finite positive γ"):
            kfac_figure(table.assign(damping=value))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
    def test_norms_that_are_none(self, value, tmp_path):
        table = samples()
        table.loc[0, "gradient_norm"] = value
        axes = plot_norms(table)
        assert axes.get_title() == "1 of 96 norms are not finite"
        save_figure(axes.figure, tmp_path / "a.png")
        (line,) = plot_imbalance(table).get_lines()
        whole = table.iloc[16:32]["gradient_norm"]  # the other batch of the first checkpoint
        assert line.get_ydata()[0] == pytest.approx(whole.max() / whole.min())
        for draw in (plot_norms, plot_imbalance):
            with pytest.raises(InputError, match="gradient norm"):
                draw(table.assign(gradient_norm=value))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_layers(self, value, tmp_path):
        table = layers(3, ("ief",))
        save_figure(layers_figure(table.assign(excess=value)), tmp_path / "a.png")
        with pytest.raises(InputError, match="shares that are not finite"):
            layers_figure(table.assign(curvature_share=value))

    @pytest.mark.parametrize("column", ["gamma_over_sgd", "damping", "epoch"])
    def test_texts_among_numbers_are_named(self, column):
        table = small()
        header = pd.DataFrame([{name: name for name in table} | {"status": "ok"}])
        message = f"column {column} has '{column}' in row 1; it should hold numbers .*a header row"
        mixed = table.astype({column: object})
        mixed.loc[0, column] = header.loc[0, column]
        with pytest.raises(InputError, match=message):
            plot_stages(mixed)
        with pytest.raises(InputError, match="gradient_norm has 'abc'"):
            norms_figure(samples().assign(gradient_norm="abc"))

    def test_a_second_header_is_left_out(self):
        """As of files joined by ``cat``: every column is text, the header's status is none."""
        table = small()
        header = pd.DataFrame([{name: name for name in table}])
        joined = pd.concat([table.astype(str), header, table.astype(str)], ignore_index=True)
        left, right = plot_stages(joined), plot_stages(table)
        for one, other in zip(left.get_lines(), right.get_lines(), strict=True):
            np.testing.assert_allclose(one.get_xdata(), other.get_xdata())
            np.testing.assert_allclose(one.get_ydata(), other.get_ydata())


class TestManyMethods:
    def many(self, count):
        return small(("sgd", *(f"method-{index}" for index in range(count))))

    @pytest.mark.parametrize("draw", [stages_figure, damping_figure])
    def test_the_figure_grows_and_the_panels_stay(self, draw):
        heights = []
        for count in (3, 60):
            figure = draw(self.many(count), width=3.4)
            figure.draw_without_rendering()
            axes = figure.axes[0]
            heights.append(axes.get_window_extent().height / figure.dpi)
            assert figure.get_figwidth() == 3.4
            (legend,) = figure.legends
            assert legend.get_window_extent().y1 < axes.get_window_extent().y0
        assert heights[1] > 0.75 * heights[0]

    def test_so_does_that_of_a_single_panel(self):
        axes = plot_stages(self.many(60))
        axes.figure.draw_without_rendering()
        assert axes.get_window_extent().height / axes.figure.dpi > 1.2

    def test_methods_are_chosen(self):
        table = self.many(30)
        figure = figure_of({"a": table}, "stages", Chosen(methods=["method-3", "method-7"]))
        assert below(figure) == ["method-3", "method-7", "sgd"]
        figure = figure_of({"a": table}, "kfac", Chosen(methods=["method-3"]))
        assert below(figure) == ["method-3", "sgd"]
        with pytest.raises(InputError, match="no rows for method 'method-x'; did you mean"):
            figure_of({"a": table}, "ranking", Chosen(methods=["method-x"]))
        with pytest.raises(InputError, match="leave --methods out"):
            figure_of({"a": samples()}, "imbalance", Chosen(methods=["ief"]))

    def test_the_command_says_that_they_are_too_many(self, tmp_path):
        path = tmp_path / "a.csv"
        self.many(30).to_csv(path, index=False)
        args = ["plot", str(path), "--kind", "stages", "--force", "-o", str(tmp_path / "a.svg")]
        output = CliRunner().invoke(app, args)
        assert output.exit_code == 0
        assert "31 lines are too many to distinguish" in output.output
        output = CliRunner().invoke(app, [*args, "--methods", "method-1, method-4"])
        assert output.exit_code == 0
        assert "distinguish" not in output.output
        written = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert "method-4" in written
        assert "method-5" not in written


DRAWN = {
    "stages": lambda ax: plot_stages(small(), ax=ax),
    "damping": lambda ax: plot_damping(small(), ax=ax),
    "relative": lambda ax: plot_relative(small(), "ief", "ng", ax=ax),
    "ranking": lambda ax: plot_ranking(small(), ax=ax),
    "norms": lambda ax: plot_norms(samples(), ax=ax),
    "imbalance": lambda ax: plot_imbalance(samples(), ax=ax),
    "layers": lambda ax: plot_layers(layers(3, ("ief",)), ax=ax),
    "toy": lambda ax: plot_toy(LeastSquares(), "ief", arrows=2, ax=ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_given_axes_are_drawn_on_and_nothing_else_is_made(name, tmp_path):
    figure, (left, right) = plt.subplots(1, 2)
    size = tuple(figure.get_size_inches())
    assert DRAWN[name](right) is right
    assert right.has_data()
    assert not left.has_data()
    assert figure.axes == [left, right]
    assert figure.legends == []
    assert tuple(figure.get_size_inches()) == size
    assert plt.get_fignums() == [figure.number]
    save_figure(figure, tmp_path / "a.png")


@pytest.mark.parametrize("width", [3.4, 7.0])
@pytest.mark.parametrize("draw", [stages_figure, damping_figure, kfac_figure, ranking_figure])
def test_the_order_of_rows_is_no_matter(draw, width, tmp_path):
    table = small().sample(frac=1, random_state=0)
    one = table[(table["checkpoint"] == "c0.pt") & (table["batch"] == 0)]
    for rows, suffix in ((table, "pdf"), (one, "png")):
        figure = draw(rows, width=width)
        save_figure(figure, tmp_path / f"a.{suffix}")
        assert figure.get_figwidth() == width


def test_the_other_figures_have_both_widths():
    for width in (3.4, 7.0):
        for figure in (
            layers_figure(layers(3, ("ief", "sgd")), width=width),
            norms_figure(samples(1, 1), width=width),
        ):
            assert figure.get_figwidth() == width
