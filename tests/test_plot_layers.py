"""Pictures of layers and of comparisons: bars, panels, labels."""

from __future__ import annotations

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from ngeval import InputError
from ngeval.analysis.layer_summary import leading_layers, summarize_layers, with_rest
from ngeval.analysis.ranking import ranking
from ngeval.cli.tables import layer_tables, ranking_tables
from ngeval.plots import (
    kfac_figure,
    layers_figure,
    plot_layers,
    plot_ranking,
    ranking_figure,
)
from ngeval.results.table_files import read_results, write_results

KFAC = ("ief", "kfac", "kfac-ef", "kfac-ief")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def layers(count=5, methods=("sgd", "ief"), checkpoints=2, batches=3):
    """A table such as ``ngeval layers`` writes; shares add up to 1."""
    generator = np.random.default_rng(0)
    rows = []
    for stage in range(checkpoints):
        for batch in range(batches):
            for method in methods:
                shares = generator.normal(1, 1, (2, count))
                bought, spent = shares / shares.sum(1, keepdims=True)
                rows += [
                    {
                        "checkpoint": f"c{stage}.pt",
                        "epoch": 5.0 * stage,
                        "batch": batch,
                        "method": method,
                        "damping": 1e-3,
                        "layer": f"block.{index}",
                        "num_parameters": 10 + index,
                        "gamma": 0.5 + index,
                        "gamma_over_sgd": 0.25 * 2.0**batch,
                        "decrease_share": bought[index],
                        "curvature_share": spent[index],
                        "excess": spent[index] - bought[index],
                        "gamma_total": 0.2,
                        "status": "ok",
                    }
                    for index in range(count)
                ]
    return pd.DataFrame(rows)


def gammas(methods=("sgd", *KFAC), checkpoints=3, dampings=(1e-6, 1e-2)):
    rows = [
        {
            "checkpoint": f"c{stage}.pt",
            "epoch": 5.0 * stage,
            "batch": batch,
            "method": method,
            "damping": damping,
            "damping_scale": "absolute",
            "gamma": 0.3 * ratio,
            "gamma_over_sgd": ratio,
            "gamma_over_ng": 4 * ratio,
            "gamma_floor": 0.06,
            "status": "ok",
            "reason": "",
        }
        for stage in range(checkpoints)
        for batch in range(3)
        for index, method in enumerate(methods)
        for damping in dampings
        for ratio in [1.0 if method == "sgd" else ratio_of(index, stage, damping) * 1.1**batch]
    ]
    return pd.DataFrame(rows)


def ratio_of(index, stage, damping):
    """Odd methods are best at the smaller λ, even ones at the greater."""
    worse = (damping > 1e-4) == (index % 2 == 1)
    return 0.2 * index * 1.5**stage * (3.0 if worse else 1.0)


def widths(axes):
    return [[bar.get_width() for bar in container] for container in axes.containers]


def names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


class TestLayers:
    def test_bars_are_means_over_batches_at_the_last_checkpoint(self):
        table = layers()
        axes = plot_layers(table, "ief")
        chosen = table[(table["method"] == "ief") & (table["checkpoint"] == "c1.pt")]
        means = chosen.groupby("layer", sort=False)[["decrease_share", "curvature_share"]].mean()
        np.testing.assert_allclose(widths(axes), means.to_numpy().T)
        assert names(axes) == list(means.index)
        assert axes.get_title() == "ief: γ = 0.2"
        assert axes.yaxis_inverted()

    def test_first_method_and_another_checkpoint(self):
        table = layers()
        np.testing.assert_allclose(
            widths(plot_layers(table, checkpoint="c0.pt")),
            widths(plot_layers(table[table["checkpoint"] == "c0.pt"], "sgd")),
        )

    def test_two_colours_with_their_meaning(self):
        axes = plot_layers(layers())
        entries = [text.get_text() for text in axes.get_legend().get_texts()]
        assert ["loss" in entries[0], "KL" in entries[1]] == [True, True]
        colours = [to_hex(container[0].get_facecolor()) for container in axes.containers]
        assert colours == ["#0072b2", "#e69f00"]
        assert "share" in axes.get_xlabel()

    @pytest.mark.parametrize(("count", "shown"), [(1, 1), (24, 24), (25, 24), (60, 24)])
    def test_many_layers_are_cut_and_the_rest_is_one_bar(self, count, shown):
        axes = plot_layers(layers(count))
        assert len(names(axes)) == shown
        for bars in widths(axes):
            assert sum(bars) == pytest.approx(1)
        rest = f"rest ({count - 23})"
        assert (names(axes)[-1] == rest) == (count > 24)
        kept = [name for name in names(axes) if name != rest]
        assert kept == sorted(kept, key=lambda name: int(name.rpartition(".")[2]))

    def test_a_panel_for_each_method_with_the_same_layers(self):
        methods = ("sgd", "ef", "ief", "sf", "ng", "diag")
        figure = layers_figure(layers(40, methods))
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title().partition(":")[0] for axes in panels] == list(methods)
        assert len({tuple(names(axes)) for axes in panels} - {()}) == 1  # said once in a line
        assert {len(bars) for axes in panels for bars in widths(axes)} == {24}
        assert len({axes.get_xlim() for axes in panels}) == 1
        assert len(figure.legends) == 1
        assert figure.get_suptitle() == "epoch 5, λ = 10⁻³"
        figure.canvas.draw()

    def test_layers_that_are_numbers_survive_a_file(self, tmp_path):
        table = layers(2).replace({"layer": {"block.0": "0.1", "block.1": "0.10"}})
        for suffix in (".csv", ".jsonl", ".parquet"):
            write_results(table, tmp_path / f"t{suffix}")
            axes = plot_layers(read_results(tmp_path / f"t{suffix}"))
            assert names(axes) == ["0.1", "0.10"]

    def test_layers_of_pandas_own_reading(self, tmp_path):
        table = layers(2).replace({"layer": {"block.0": "0", "block.1": "2"}})
        table.to_csv(tmp_path / "t.csv")
        assert names(plot_layers(pd.read_csv(tmp_path / "t.csv"))) == ["0", "2"]

    def test_bad_choices(self):
        table = layers()
        with pytest.raises(InputError, match="no rows for method 'iff'; did you mean 'ief'"):
            plot_layers(table, "iff")
        with pytest.raises(InputError, match="no rows for checkpoint 'c7'"):
            layers_figure(table, checkpoint="c7")
        with pytest.raises(InputError, match="no rows near damping 5"):
            layers_figure(table, damping=5.0)
        with pytest.raises(InputError, match="every row"):
            layers_figure(table.assign(status="failed"))
        with pytest.raises(InputError, match="no column"):
            layers_figure(pd.DataFrame({"a": [1.0]}))
        with pytest.raises(InputError, match="no column"):
            summarize_layers(pd.DataFrame({"a": [1.0]}))

    def test_draws_on_the_axes_given(self):
        figure, (left, right) = plt.subplots(1, 2)
        assert plot_layers(layers(), ax=right) is right
        assert not left.get_xlabel()
        assert plt.get_fignums() == [figure.number]


class TestSummary:
    def test_means_and_geometric_means(self):
        summary = summarize_layers(layers(2, ("ief",), 1))
        assert summary["layer"].tolist() == ["block.0", "block.1"]
        np.testing.assert_allclose(summary["gamma_over_sgd"], 0.25 * 2)
        np.testing.assert_allclose(summary["gamma"], [0.5, 1.5])
        assert summary["num_parameters"].tolist() == [10, 11]

    def test_rows_that_failed_do_not_count(self):
        table = layers(2, ("ief",), 1)
        table.loc[table["batch"] == 0, ["status", "decrease_share"]] = ["failed", math.nan]
        expected = summarize_layers(table[table["batch"] > 0])
        pd.testing.assert_frame_equal(summarize_layers(table), expected)

    def test_the_rest_keeps_the_sums(self):
        summary = summarize_layers(layers(9, ("ief",), 1))
        leading = leading_layers(summary, 4)
        assert len(leading) == 3
        size = summary[["decrease_share", "curvature_share"]].abs().max(axis=1)
        assert set(leading) == set(summary["layer"][size.nlargest(3).index])
        shown = with_rest(summary, leading)
        assert shown["layer"].tolist() == [*leading, "rest (6)"]
        for column in ("decrease_share", "curvature_share", "num_parameters"):
            assert shown[column].sum() == pytest.approx(summary[column].sum())
        assert math.isnan(shown["gamma"].iloc[-1])


def shown_text(tables):
    out = Console(width=160, record=True, quiet=True)
    with out.capture() as capture:
        out.quiet = False
        for table in tables:
            out.print(table)
    return capture.get()


class TestPrinted:
    def test_layers_of_up_to_three_checkpoints(self):
        text = shown_text(layer_tables(layers(3, checkpoints=7)))
        for word in ("epoch 0", "epoch 15", "epoch 30", "buys", "spends", "block.2", "γ = 0.2"):
            assert word in text
        assert "epoch 10" not in text
        summary = summarize_layers(layers(3, checkpoints=7)).iloc[0]
        assert f"{summary['decrease_share']:.1%}" in text
        assert f"{summary['excess']:+.1%}" in text

    def test_many_layers_are_cut(self):
        text = shown_text(layer_tables(layers(40, checkpoints=1)))
        assert text.count("rest (25)") == 2

    def test_layers_without_checkpoints(self):
        table = layers(checkpoints=1).drop(columns=["checkpoint", "epoch"])
        assert "λ = 0.001: layers" in shown_text(layer_tables(table))

    def test_ranking_has_the_best_damping_and_the_interval(self):
        table = gammas()
        text = shown_text(ranking_tables(ranking(table), table))
        for word in ("early: epoch 0", "middle: epoch 5", "late: epoch 10", "95 %", "γ/γ_min"):
            assert word in text
        first = ranking(table).iloc[0]
        line = next(line for line in text.splitlines() if f" {first['method']} " in line)
        assert f"{first['gamma_over_ng']:.3g}" in line
        assert f"{first['gamma_over_ng_low']:.3g} – {first['gamma_over_ng_high']:.3g}" in line
        assert f"{first['damping']:.0e}" in line
        assert text.count("sgd") == 3

    def test_ranking_tells_what_is_not_covered(self):
        table = gammas().assign(coverage=100.0)
        assert "covers" not in shown_text(ranking_tables(ranking(table), table))
        table.loc[table["method"] == "kfac", "coverage"] = 87.4
        text = shown_text(ranking_tables(ranking(table), table))
        assert text.count("covers") == text.count("87 %") == 3

    def test_ranking_without_the_natural_gradient(self):
        table = gammas().assign(gamma_over_ng=math.nan)
        text = shown_text(ranking_tables(ranking(table), table))
        assert "γ/γ_SGD at each method's best λ" in text
        assert "γ/γ_min" not in text


class TestKfac:
    def test_best_on_the_left_and_one_damping_on_the_right(self):
        figure = kfac_figure(gammas())
        best, single = figure.axes
        assert best.get_title() == "each at its best λ"
        assert "10⁻⁶" in single.get_title()
        for index, method in enumerate(KFAC, start=1):
            for axes, damping in ((best, (1e-2, 1e-6)[index % 2]), (single, 1e-6)):
                ratios = [ratio_of(index, stage, damping) for stage in (0, 1, 2)]
                (line,) = [
                    line for line in axes.get_lines() if str(line.get_label()).split()[0] == method
                ]
                np.testing.assert_allclose(line.get_ydata(), np.array(ratios) * 1.1)

    def test_legend_has_the_papers_names(self):
        (legend,) = kfac_figure(gammas()).legends
        entries = [text.get_text() for text in legend.get_texts()]
        assert sorted(entries) == [
            "ief",
            "kfac (KFAC)",
            "kfac-ef (eKFAC)",
            "kfac-ief (ieKFAC)",
            "sgd",
        ]

    def test_lines_can_be_told_apart(self):
        lines = [
            line for line in kfac_figure(gammas()).axes[0].get_lines() if len(line.get_xdata()) == 3
        ]
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
        assert len(looks) == len(lines) == 4

    def test_one_damping_is_one_panel(self):
        assert len(kfac_figure(gammas(dampings=(1e-2,))).axes) == 1

    def test_chosen_damping_and_methods(self):
        figure = kfac_figure(gammas(), 1e-2, ["kfac"])
        assert "λ = 0.01" in figure.axes[1].get_title()
        with pytest.raises(InputError, match="none of the methods ief"):
            kfac_figure(gammas(("sgd", "ef")))


class TestRanking:
    def test_points_are_the_ranking(self):
        table = gammas()
        axes = plot_ranking(table)
        ranked = ranking(table)
        last = ranked[ranked["checkpoint"] == "c2.pt"]
        assert names(axes) == last["method"].tolist()
        for container, name in zip(axes.containers, ("c0.pt", "c1.pt", "c2.pt"), strict=True):
            rows = ranked[ranked["checkpoint"] == name].set_index("method").loc[names(axes)]
            np.testing.assert_allclose(container.lines[0].get_xdata(), rows["gamma_over_ng"])
        entries = [text.get_text() for text in axes.get_legend().get_texts()]
        assert entries == ["early: epoch 0", "middle: epoch 5", "late: epoch 10"]
        assert axes.get_xscale() == "log"

    def test_a_method_that_failed_at_a_checkpoint_has_no_point_there(self):
        table = gammas()
        lost = (table["method"] == "kfac") & (table["checkpoint"] == "c0.pt")
        table.loc[lost, "status"] = "failed"
        table.loc[lost, ["gamma", "gamma_over_sgd", "gamma_over_ng"]] = math.nan
        axes = plot_ranking(table)
        place = names(axes).index("kfac")
        drawn = [container.lines[0].get_xdata()[place] for container in axes.containers]
        assert [bool(np.isfinite(x)) for x in drawn] == [False, True, True]

    def test_without_the_natural_gradient_there_is_nothing_to_draw(self):
        with pytest.raises(InputError, match="no γ_min"):
            ranking_figure(gammas().assign(gamma_over_ng=math.nan))


def test_every_letter_has_a_glyph(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = (layers_figure(layers()), kfac_figure(gammas()), ranking_figure(gammas()))
        for index, figure in enumerate(figures):
            figure.savefig(tmp_path / f"{index}.png")
