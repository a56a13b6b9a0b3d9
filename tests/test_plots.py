"""The structure of pictures: labels, lines, legends, and colours that stay."""

import math
import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ngeval import InputError
from ngeval.analysis.stages import checkpoint_labels
from ngeval.cli import tables
from ngeval.plots import (
    PAGE,
    Chosen,
    damping_figure,
    figure_of,
    norms_figure,
    plot_damping,
    plot_imbalance,
    plot_norms,
    plot_relative,
    plot_stages,
    stages_figure,
    style,
)

METHODS = ("sgd", "ef", "sf", "ief", "diag", "ng")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def gammas(methods=METHODS, dampings=(1e-6, 1e-3, 1.0), checkpoints=3, batches=3, epochs=True):
    """A table such as ``ngeval gamma`` writes; γ/γ_SGD is known in closed form."""
    rows = []
    for stage in range(checkpoints):
        for batch in range(batches):
            for index, method in enumerate(methods):
                for damping in dampings:
                    ratio = ratio_of(index, stage, damping) * 2.0 ** (batch - (batches - 1) / 2)
                    ratio = 1.0 if method == "sgd" else ratio
                    rows.append(
                        {
                            "task": "t",
                            "checkpoint": f"c{stage}.pt",
                            "stage": stage,
                            "epoch": 5.0 * stage if epochs else np.nan,
                            "batch": batch,
                            "method": method,
                            "damping": damping,
                            "damping_scale": "absolute",
                            "gamma": 0.3 * ratio,
                            "gamma_over_sgd": ratio,
                            "gamma_over_ng": 4 * ratio,
                            "gamma_min": 0.075,
                            "gamma_floor": 0.06,
                            "status": "ok",
                        }
                    )
    return pd.DataFrame(rows)


def ratio_of(index, stage, damping):
    return (1 + index) * 3.0**stage * (1 + damping)


def samples(checkpoints=3, batches=2):
    generator = np.random.default_rng(0)
    rows = [
        {"checkpoint": f"c{stage}.pt", "epoch": stage, "batch": batch, "gradient_norm": norm}
        for stage in range(checkpoints)
        for batch in range(batches)
        for norm in generator.lognormal(size=16)
    ]
    return pd.DataFrame(rows)


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def below(figure):
    """The entries of the figure's legend."""
    return [text.get_text() for item in figure.legends for text in item.get_texts()]


_UNNAMED = {f"_child{index}" for index in range(20)}


def labels(axes):
    return {str(item.get_label()) for item in axes.get_lines()} - _UNNAMED


def line(axes, label):
    return next(item for item in axes.get_lines() if item.get_label() == label)


def colours(axes, names):
    return {name: to_hex(line(axes, name).get_color()) for name in names}


class TestStages:
    def test_labels_and_legend(self):
        axes = plot_stages(gammas())
        assert axes.get_xlabel() == "training epoch"
        assert "gamma" in axes.get_ylabel() or "γ" in axes.get_ylabel()
        assert "SGD" in axes.get_ylabel()
        assert axes.get_yscale() == "log"
        assert sorted(legend(axes)) == sorted(METHODS)
        assert "λ" in axes.get_title()
        assert "absolute" in axes.get_title()

    def test_a_line_and_a_band_for_every_method_but_sgd(self):
        axes = plot_stages(gammas())
        assert len(axes.get_lines()) == len(METHODS)  # sgd is the line at 1
        assert len(axes.collections) == len(METHODS) - 1
        assert set(np.ravel(line(axes, "sgd").get_ydata())) == {1}

    def test_lines_are_geometric_means_at_the_epochs(self):
        axes = plot_stages(gammas(), damping=1.0)
        for index, method in enumerate(METHODS):
            if method == "sgd":
                continue
            drawn = line(axes, method)
            np.testing.assert_allclose(drawn.get_xdata(), [0, 5, 10])
            expected = [ratio_of(index, stage, 1.0) for stage in range(3)]
            np.testing.assert_allclose(drawn.get_ydata(), expected)

    def test_bands_enclose_their_lines(self):
        axes = plot_stages(gammas(("ef",)), damping=1.0)
        corners = axes.collections[0].get_paths()[0].vertices
        for x, y in zip(*line(axes, "ef").get_data(), strict=True):
            at_x = corners[corners[:, 0] == x, 1]
            assert at_x.min() < y < at_x.max()

    def test_smallest_positive_damping_is_the_default(self):
        table = gammas(dampings=(1.0, 0.0, 1e-3))
        default, chosen = plot_stages(table), plot_stages(table, 1e-3)
        assert default.get_title() == chosen.get_title()
        np.testing.assert_allclose(
            line(default, "ef").get_ydata(), [ratio_of(1, stage, 1e-3) for stage in range(3)]
        )

    def test_without_epochs_the_order_counts(self):
        axes = plot_stages(gammas(epochs=False))
        assert axes.get_xlabel() == "checkpoint (in order)"
        np.testing.assert_allclose(line(axes, "ef").get_xdata(), [0, 1, 2])

    def test_rows_that_failed_are_left_out(self):
        table = gammas(("sgd", "ef", "ng"))
        failed = (table["method"] == "ng") & (table["epoch"] == 5)
        columns = ["gamma", "gamma_over_sgd", "gamma_over_ng"]
        table.loc[failed, columns] = np.nan
        table.loc[failed, "status"] = "failed"
        axes = plot_stages(table, damping=1.0)
        np.testing.assert_allclose(line(axes, "ng").get_xdata(), [0, 10])
        np.testing.assert_allclose(line(axes, "ef").get_xdata(), [0, 5, 10])

    def test_one_batch_has_no_interval(self):
        axes = plot_stages(gammas(batches=1))
        assert np.isfinite(line(axes, "ef").get_ydata()).all()
        axes.figure.canvas.draw()

    def test_panels_for_dampings(self):
        figure = stages_figure(gammas(), [1e-6, 1.0])
        titles = [axes.get_title() for axes in figure.axes]
        assert len(titles) == len(set(titles)) == 2

    def test_unknown_damping_tells_the_nearest(self):
        with pytest.raises(InputError, match=r"no rows near damping 50; the nearest is 1"):
            plot_stages(gammas(), damping=50.0)


class TestDamping:
    def test_labels_and_legend(self):
        axes = plot_damping(gammas())
        assert "damping λ" in axes.get_xlabel()
        assert "absolute" in axes.get_xlabel()
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert sorted(legend(axes)) == sorted([*METHODS, "floor"])

    def test_lines_over_positive_dampings(self):
        table = gammas(dampings=(0.0, 1e-6, 1e-3, 1.0))
        axes = plot_damping(table, "c1.pt")
        np.testing.assert_allclose(line(axes, "ief").get_xdata(), [1e-6, 1e-3, 1])
        expected = [ratio_of(3, 1, damping) for damping in (1e-6, 1e-3, 1.0)]
        np.testing.assert_allclose(line(axes, "ief").get_ydata(), expected)

    def test_floor_is_in_units_of_sgd(self):
        axes = plot_damping(gammas())
        np.testing.assert_allclose(np.unique(line(axes, "floor").get_ydata()), [0.06 / 0.3])
        assert line(axes, "floor").get_linestyle() == "--"

    def test_first_checkpoint_is_the_default(self):
        first, default = plot_damping(gammas(), "c0.pt"), plot_damping(gammas())
        np.testing.assert_array_equal(
            line(first, "ef").get_ydata(), line(default, "ef").get_ydata()
        )

    def test_table_of_evaluate_without_checkpoints(self):
        columns = ["checkpoint", "epoch", "stage", "task", "batch"]
        table = gammas(checkpoints=1, batches=1).drop(columns=columns)
        assert sorted(legend(plot_damping(table))) == sorted([*METHODS, "floor"])
        assert len(damping_figure(table).axes) == 1

    @pytest.mark.parametrize(
        ("count", "titles"),
        [
            (1, ["epoch 0"]),
            (4, ["epoch 0", "epoch 5", "epoch 10", "epoch 15"]),
            (10, ["epoch 0", "epoch 15", "epoch 30", "epoch 45"]),
        ],
    )
    def test_a_panel_for_each_checkpoint_up_to_four(self, count, titles):
        figure = damping_figure(gammas(("sgd", "ef"), checkpoints=count, batches=1))
        assert [axes.get_title() for axes in figure.axes] == titles
        assert figure.axes[0].get_ylabel()
        assert [axes.get_ylabel() for axes in figure.axes[1:]] == [""] * (len(titles) - 1)
        assert len({axes.get_ylim() for axes in figure.axes}) == 1

    def test_chosen_checkpoints_in_their_order(self):
        figure = damping_figure(gammas(("sgd", "ef")), ["c2.pt", "c0.pt"])
        assert [axes.get_title() for axes in figure.axes] == ["epoch 10", "epoch 0"]

    def test_unknown_checkpoint(self):
        with pytest.raises(InputError, match=r"'c9\.pt'"):
            plot_damping(gammas(), "c9.pt")


class TestImbalance:
    def test_two_panels_with_the_same_stages(self):
        figure = norms_figure(samples())
        upper, lower = figure.axes
        assert (upper.get_xlabel(), lower.get_xlabel()) == ("", "training epoch")
        assert upper.get_xlim() == lower.get_xlim()
        assert "gradient" in upper.get_ylabel()
        assert "imbalance" in lower.get_ylabel()
        assert (upper.get_yscale(), lower.get_yscale()) == ("log", "log")
        assert below(figure) == ["all samples", "median", "max/min"]

    def test_a_density_for_each_stage(self):
        table = samples()
        axes = plot_norms(table)
        assert len(axes.collections) == 3
        for body, (_, rows) in zip(axes.collections, table.groupby("epoch"), strict=True):
            norms = body.get_paths()[0].vertices[:, 1]
            ends = rows["gradient_norm"].min(), rows["gradient_norm"].max()
            np.testing.assert_allclose((norms.min(), norms.max()), ends)
        median = line(axes, "median")
        np.testing.assert_allclose(median.get_xdata(), [0, 1, 2])
        expected = table.groupby("epoch")["gradient_norm"].median()
        np.testing.assert_allclose(median.get_ydata(), expected)

    def test_many_stages_are_bands_of_quantiles(self):
        figure = norms_figure(samples(checkpoints=16, batches=1))
        assert len(figure.axes[0].collections) == 2
        expected = {"5–95 %", "25–75 %", "min, max", "median", "max/min"}
        assert set(below(figure)) == expected

    def test_imbalance_is_the_geometric_mean_over_batches(self):
        table = samples()
        ratios = [
            np.exp(
                np.mean(
                    [
                        np.log(part.max() / part.min())
                        for _, part in rows.groupby("batch")["gradient_norm"]
                    ]
                )
            )
            for _, rows in table.groupby("epoch")
        ]
        drawn = line(plot_imbalance(table), "max/min")
        np.testing.assert_allclose(drawn.get_ydata(), ratios)

    def test_a_norm_of_zero_is_told(self):
        table = samples()
        table.loc[0, "gradient_norm"] = 0.0
        figure = norms_figure(table)
        figure.canvas.draw()
        assert figure.axes[0].get_title() == "1 of 96 norms are 0"
        with pytest.raises(InputError, match="every batch"):
            plot_imbalance(table[table["batch"] == 0].head(16))
        with pytest.raises(InputError, match="above 0"):
            plot_norms(table.assign(gradient_norm=0.0))

    def test_norms_that_are_all_alike(self):
        figure = norms_figure(samples().assign(gradient_norm=2.0))
        figure.canvas.draw()
        assert set(line(figure.axes[1], "max/min").get_ydata()) == {1.0}


class TestNatural:
    """Exact NG is drawn from its bounds where it was not among the methods."""

    def bounded(self, methods):
        table = gammas(methods)
        exact = 0.1 * (1 + table["damping"]) * 1.5 ** table["batch"]
        return table.assign(gamma_ng_lower=exact / 1.01, gamma_ng_upper=exact * 1.01)

    def test_line_over_sgd_of_the_same_batch(self):
        axes = plot_damping(self.bounded(("sgd", "ef")))
        expected = [0.1 * 1.5 / 0.3 * (1 + damping) for damping in (1e-6, 1e-3, 1.0)]
        np.testing.assert_allclose(line(axes, "ng").get_ydata(), expected)

    def test_the_method_itself_has_precedence(self):
        axes = plot_damping(self.bounded(METHODS))
        expected = [ratio_of(5, 0, damping) for damping in (1e-6, 1e-3, 1.0)]
        np.testing.assert_allclose(line(axes, "ng").get_ydata(), expected)

    def test_without_bounds_there_is_none(self):
        axes = plot_damping(self.bounded(("sgd", "ef")).assign(gamma_ng_upper=math.nan))
        assert "ng" not in legend(axes)


class TestRelative:
    def test_ratio_within_batches(self):
        axes = plot_relative(gammas(), "sf", "ief", 1.0)
        drawn = line(axes, "sf/ief")
        np.testing.assert_allclose(drawn.get_xdata(), [0, 5, 10])
        np.testing.assert_allclose(drawn.get_ydata(), [3 / 4] * 3)
        assert axes.get_yscale() == "log"
        assert "sf" in axes.get_ylabel()
        assert "ief" in axes.get_ylabel()
        # What the batches have in common has cancelled.
        corners = axes.collections[0].get_paths()[0].vertices
        np.testing.assert_allclose(corners[:, 1], 3 / 4)

    def test_only_batches_that_have_both(self):
        table = gammas(("sgd", "sf", "ief"))
        lost = (table["method"] == "ief") & (table["checkpoint"] == "c1.pt")
        table.loc[lost, "status"] = "failed"
        np.testing.assert_allclose(line(plot_relative(table), "sf/ief").get_xdata(), [0, 10])

    def test_methods_that_are_not_there(self):
        with pytest.raises(InputError, match="no rows for method 'sg'; did you mean 'sgd'"):
            plot_relative(gammas(), "sg")


def tasks(*names):
    """γ tables and samples of several tasks, told apart by their column."""
    tables = [(gammas().assign(task=name), samples().assign(task=name)) for name in names]
    return tuple(pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True))


class TestStagesFigure:
    def test_columns_are_tasks_and_lines_what_explains(self):
        figure = stages_figure(tasks("a", "b", "c")[0])
        grid = np.array(figure.axes).reshape(2, 3)
        titles = [axes.get_title().splitlines()[0] for axes in grid[0]]
        assert titles == ["a", "b", "c"]
        assert all({"sf/ief", "ef/ief"} <= labels(axes) for axes in grid[1])
        assert len({axes.get_ylim() for axes in grid[0]}) == 1

    def test_with_samples_there_is_their_imbalance(self):
        tables, norms = tasks("a", "b")
        figure = stages_figure(tables, samples=norms)
        grid = np.array(figure.axes).reshape(3, 2)
        assert "imbalance" in grid[2, 0].get_ylabel()
        assert [axes.get_xlabel() for axes in grid[:, 0]] == ["", "", "training epoch"]
        for axes in grid[2]:
            assert labels(axes) == {"max/min"}
            assert axes.get_xlim() == grid[0, 0].get_xlim()
        assert set(METHODS) | {"sf/ief", "ef/ief", "max/min"} == set(below(figure))

    def test_one_task_alone_is_one_panel(self):
        assert len(stages_figure(gammas()).axes) == 1
        assert len(stages_figure(gammas(), relative=[("ef", "sf")]).axes) == 2
        assert len(stages_figure(gammas(), samples=samples(), relative=()).axes) == 2

    def test_tables_by_title_take_the_samples_of_their_checkpoints(self):
        first, second = gammas(), gammas().replace({"checkpoint": {"c0.pt": "d0.pt"}})
        second = second[second["checkpoint"] == "d0.pt"]
        norms = samples().replace({"checkpoint": {"c2.pt": "d0.pt"}}).assign(task="t")
        figure = stages_figure({"one": first, "two": second}, samples=norms)
        grid = np.array(figure.axes).reshape(3, 2)
        np.testing.assert_allclose(line(grid[2, 0], "max/min").get_xdata(), [0, 1])
        np.testing.assert_allclose(line(grid[2, 1], "max/min").get_xdata(), [2])

    def test_samples_of_nothing_that_is_drawn(self):
        with pytest.raises(InputError, match="other tasks or checkpoints"):
            stages_figure(gammas(), samples=samples().assign(task="another"))
        with pytest.raises(InputError, match="no tables"):
            stages_figure({})

    @pytest.mark.parametrize(("width", "inches"), [(None, 3.4), (PAGE, 7.0)])
    def test_width(self, width, inches):
        assert stages_figure(gammas(), width=width).get_figwidth() == inches


class TestStyle:
    def test_colours_stay_between_pictures(self):
        every = colours(plot_stages(gammas()), METHODS[1:])
        assert len(set(every.values())) == len(METHODS) - 1
        damping = colours(plot_damping(gammas()), METHODS[1:])
        assert damping == every
        fewer = colours(plot_stages(gammas(("sgd", "ng", "ief"))), ("ng", "ief"))
        assert fewer == {name: every[name] for name in ("ng", "ief")}
        assert colours(plot_damping(gammas(("ng",))), ("ng",)) == {"ng": every["ng"]}

    def test_variants_of_a_family_share_its_colour_with_another_dash(self):
        axes = plot_stages(gammas(("sgd", "sf", "sf:4", "sf:16")))
        assert len(set(colours(axes, ("sf", "sf:4", "sf:16")).values())) == 1
        dashes = [line(axes, name).get_linestyle() for name in ("sf", "sf:4", "sf:16")]
        assert len(set(dashes)) == 3

    def test_a_users_methods_get_colours_of_their_own(self):
        axes = plot_stages(gammas(("sgd", "ef", "mine", "yours")))
        assert len(set(colours(axes, ("ef", "mine", "yours")).values())) == 3

    @pytest.mark.parametrize(
        ("draw", "table"),
        [
            (plot_stages, gammas()),
            (plot_relative, gammas()),
            (plot_damping, gammas()),
            (plot_norms, samples()),
            (plot_imbalance, samples()),
        ],
        ids=["stages", "relative", "damping", "norms", "imbalance"],
    )
    def test_draws_on_the_axes_given(self, draw, table):
        figure, (left, right) = plt.subplots(1, 2)
        assert draw(table, ax=right) is right
        assert right.get_xlabel()
        assert not left.get_xlabel()
        assert plt.get_fignums() == [figure.number]

    def test_global_settings_and_table_are_left_alone(self):
        table, settings = gammas(), dict(mpl.rcParams)
        before = table.copy()
        stages_figure(table)
        damping_figure(table)
        norms_figure(samples())
        pd.testing.assert_frame_equal(table, before)
        assert dict(mpl.rcParams) == settings

    def test_every_letter_has_a_glyph(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for index, figure in enumerate(
                (stages_figure(gammas()), damping_figure(gammas()), norms_figure(samples()))
            ):
                figure.savefig(tmp_path / f"{index}.png")


@pytest.mark.parametrize(
    "draw", [plot_stages, plot_relative, plot_damping, plot_norms, plot_imbalance]
)
def test_another_table_is_refused_by_column(draw):
    with pytest.raises(InputError, match="no column"):
        draw(pd.DataFrame({"a": [1.0]}))


def test_checkpoints_of_several_runs_keep_their_names():
    rows = [
        {"checkpoint": f"{run}/{epoch}", "epoch": float(epoch), "step": 10.0 * epoch}
        for run in "ab"
        for epoch in (1, 2)
    ]
    table = pd.DataFrame(rows)
    assert style.stage_label(table) == "checkpoint (in order)"
    assert style.with_stage(table)["x"].tolist() == [0, 1, 2, 3]
    assert list(checkpoint_labels(table).values()) == ["a/1", "a/2", "b/1", "b/2"]
    first = table[:2]
    assert style.stage_label(first) == "training epoch"
    assert list(checkpoint_labels(first).values()) == ["epoch 1", "epoch 2"]
    steps = first.assign(epoch=math.nan)
    assert style.stage_label(steps) == "training step"
    assert style.with_stage(steps)["x"].tolist() == [10.0, 20.0]
    assert list(checkpoint_labels(steps).values()) == ["step 10", "step 20"]


def test_steps_of_a_million_are_told_in_full():
    steps = [999_999.0, 1_234_567.0, 1_234_568.0]
    rows = [{"checkpoint": f"{step}.pt", "epoch": math.nan, "step": step} for step in steps]
    table = pd.DataFrame(rows)
    expected = [f"step {step:.0f}" for step in steps]
    assert list(tables.checkpoint_labels(table).values()) == expected
    assert list(checkpoint_labels(table).values()) == expected


def test_a_label_that_comes_twice_is_shown_once():
    figure, (left, right) = plt.subplots(1, 2)
    left.plot([1, 2], color="black", label="sgd")
    right.plot([1, 2], color="#000000", label="sgd")
    right.plot([2, 1], color="red", label="sgd")  # another method, of whose name the end is shown
    style.legend_below(left, right)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sgd", "sgd"]


class TestSeveralTasks:
    """Rows of another task are no more batches of this one."""

    @pytest.mark.parametrize("kind", ["damping", "ranking", "kfac"])
    def test_are_refused_where_one_is_drawn(self, kind):
        tables = {"a": gammas(), "b": gammas().assign(task="other")}
        with pytest.raises(InputError, match=r"tasks t, other .*--task"):
            figure_of(tables, kind)
        with pytest.raises(InputError, match="tasks t, other"):
            figure_of({"both": pd.concat(tables.values())}, kind)

    def test_one_is_chosen(self):
        tables = {"a": gammas(), "b": gammas().assign(task="other", gamma_over_sgd=7.0)}
        figure = figure_of(tables, "damping", Chosen(task="t"))
        alone = figure_of({"a": gammas()}, "damping")
        drawn, expected = (
            [list(item.get_ydata()) for item in built.axes[0].get_lines()]
            for built in (figure, alone)
        )
        assert drawn == expected
        with pytest.raises(InputError, match="no rows for task 'mine'"):
            figure_of(tables, "damping", Chosen(task="mine"))

    def test_two_runs_with_the_same_rows_are_refused(self):
        with pytest.raises(InputError, match="a and b have rows of the same"):
            figure_of({"a": gammas(), "b": gammas()}, "damping")
        norms = samples().assign(sample=list(range(16)) * 6)
        with pytest.raises(InputError, match="a and b have rows of the same"):
            figure_of({"a": norms, "b": norms}, "imbalance")

    def test_parts_of_a_run_are_put_together(self):
        whole = gammas()
        parts = {str(name): part for name, part in whole.groupby("checkpoint")}
        titles = [axes.get_title() for axes in figure_of(parts, "damping").axes]
        assert titles == [axes.get_title() for axes in figure_of({"w": whole}, "damping").axes]
