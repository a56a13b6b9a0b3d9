"""The structure of pictures: labels, lines, legends, and colours that stay."""

import math
import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ngeval import InputError, console
from ngeval.plots import (
    damping_figure,
    imbalance_figure,
    plot_damping,
    plot_imbalance,
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
    def test_labels_and_legend(self):
        figure = imbalance_figure(samples())
        left, right = figure.axes
        assert left.get_xlabel() == "training epoch"
        assert "gradient norm" in left.get_ylabel()
        assert "imbalance" in right.get_ylabel()
        assert (left.get_yscale(), right.get_yscale()) == ("log", "log")
        entries = [text.get_text() for item in figure.legends for text in item.get_texts()]
        assert {"median", "5–95 %", "25–75 %", "max/min"} <= set(entries)
        assert len(entries) == len(set(entries)) == 5

    def test_lines_are_quantiles_of_the_norms(self):
        table = samples()
        left, right = plot_imbalance(table).figure.axes
        median = line(left, "median")
        np.testing.assert_allclose(median.get_xdata(), [0, 1, 2])
        np.testing.assert_allclose(
            median.get_ydata(), table.groupby("epoch")["gradient_norm"].median()
        )
        assert len(left.get_lines()) == 3  # median, min, max
        assert len(left.collections) == 2  # two bands
        ratios = [
            np.median(
                [part.max() / part.min() for _, part in rows.groupby("batch")["gradient_norm"]]
            )
            for _, rows in table.groupby("epoch")
        ]
        np.testing.assert_allclose(line(right, "max/min").get_ydata(), ratios)

    def test_a_norm_of_zero_does_not_stop_it(self):
        table = samples()
        table.loc[0, "gradient_norm"] = 0.0
        imbalance_figure(table).canvas.draw()


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
        [(plot_stages, gammas()), (plot_damping, gammas()), (plot_imbalance, samples())],
        ids=["stages", "damping", "imbalance"],
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
        imbalance_figure(samples())
        pd.testing.assert_frame_equal(table, before)
        assert dict(mpl.rcParams) == settings

    def test_every_letter_has_a_glyph(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for index, figure in enumerate(
                (stages_figure(gammas()), damping_figure(gammas()), imbalance_figure(samples()))
            ):
                figure.savefig(tmp_path / f"{index}.png")


@pytest.mark.parametrize("draw", [plot_stages, plot_damping, plot_imbalance])
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
    assert list(console.checkpoint_labels(table).values()) == ["a/1", "a/2", "b/1", "b/2"]
    first = table[:2]
    assert style.stage_label(first) == "training epoch"
    assert list(console.checkpoint_labels(first).values()) == ["epoch 1", "epoch 2"]
    steps = first.assign(epoch=math.nan)
    assert style.stage_label(steps) == "training step"
    assert style.with_stage(steps)["x"].tolist() == [10.0, 20.0]
    assert list(console.checkpoint_labels(steps).values()) == ["step 10", "step 20"]
