"""Two parameters, two data: against closed forms in numpy, and the structure of the pictures."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.quiver import Quiver
from typer.testing import CliRunner

import ngeval
from ngeval.errors import InputError
from ngeval.plots.style import in_style
from studies.__main__ import app
from studies.toy.least_squares import DEFAULT_METHODS, LeastSquares, trajectories
from studies.toy.picture import Window, plot_paths, plot_toy, toy_figure
from studies.why_ef_fails import RATES
from tests.looks import bare_axes, overlaps, small_texts
from tests.problems import prepared

pytestmark = pytest.mark.second_stage

TOYS = {
    "paper": LeastSquares(),
    "skewed": LeastSquares(inputs=((1.0, -2.0), (0.3, 3.0)), targets=(-0.5, 4.0)),
}
DAMPINGS = (0.0, 0.01, 2.0)


def closed_form(method: str, toy: LeastSquares, theta: np.ndarray, damping: float) -> np.ndarray:
    """d(λ) by numpy, at one θ."""
    inputs, targets = np.array(toy.inputs), np.array(toy.targets)
    residual = inputs @ theta - targets
    rows = inputs * residual[:, None]
    gradient = rows.sum(0)
    gram = rows @ rows.T + damping * np.eye(2)
    return {
        "sgd": lambda: gradient,
        "ng": lambda: np.linalg.solve(inputs.T @ inputs + damping * np.eye(2), gradient),
        "ief": lambda: rows.T @ np.linalg.solve(gram, residual**2),
        "ef": lambda: rows.T @ np.linalg.solve(gram, np.ones(2)),
    }[method]()


def points(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(1.0, 2.0, (count, 2))


@pytest.fixture(scope="module")
def paths() -> pd.DataFrame:
    return pd.concat(list(trajectories(LeastSquares(), RATES, steps=8)), ignore_index=True)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
class TestLeastSquares:
    def test_minimum_loss_and_lines(self, toy):
        np.testing.assert_allclose(
            toy.minimum, np.linalg.lstsq(np.array(toy.inputs), toy.targets, rcond=None)[0]
        )
        assert toy.loss(toy.minimum) < 1e-25
        for theta in points(5):
            expected = sum(
                0.5 * (x[0] * theta[0] + x[1] * theta[1] - y) ** 2
                for x, y in zip(toy.inputs, toy.targets, strict=True)
            )
            assert toy.loss(theta) == pytest.approx(expected, rel=1e-12)
        assert toy.loss(points(6).reshape(2, 3, 2)).shape == (2, 3)
        for sample in range(2):
            along = toy.minimum + 7.0 * toy.optima[sample]
            assert toy.residuals(along)[sample] == pytest.approx(0, abs=1e-12)
            assert abs(toy.residuals(along)[1 - sample]) > 1e-3

    @pytest.mark.parametrize("damping", DAMPINGS)
    @pytest.mark.parametrize("method", DEFAULT_METHODS)
    def test_updates_are_those_of_the_formulas(self, toy, method, damping):
        places = points(12)
        expected = [closed_form(method, toy, theta, damping) for theta in places]
        result = toy.updates(method, places, damping)
        np.testing.assert_allclose(result, expected, rtol=1e-7, atol=1e-9)

    def test_updates_of_any_method_are_those_of_a_problem(self, toy):
        """With its own seed for each point, where labels are drawn."""
        model = torch.nn.Linear(2, 1, bias=False).double().eval()
        inputs = torch.from_numpy(np.array(toy.inputs))
        targets = torch.from_numpy(np.array(toy.targets)[:, None])
        for method in ("sf:3", "kfac", "diag-ef:0.5", "adamw:0"):
            result = toy.updates(method, points(3), 0.1, seed=5)
            for number, theta in enumerate(points(3)):
                with torch.no_grad():
                    model.weight.copy_(torch.tensor(theta))
                problem = ngeval.Problem(model, inputs, targets, "gaussian:1")
                state = prepared(method, problem, 5 + number)
                np.testing.assert_allclose(result[number], state.direction(0.1).numpy(), rtol=1e-9)

    def test_several_methods_at_once_have_the_numbers_of_each(self, toy):
        methods = ("sgd", "sf", "ef", "ng")
        together = toy.all_updates(methods, points(4), 0.1, seed=2)
        for method, result in zip(methods, together, strict=True):
            np.testing.assert_array_equal(result, toy.updates(method, points(4), 0.1, seed=2))

    def test_ief_is_the_natural_gradient_at_no_damping_only(self, toy):
        places = points(8)
        natural = toy.updates("ng", places)
        np.testing.assert_allclose(natural, places - toy.minimum, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(toy.updates("ief", places), natural, rtol=1e-6, atol=1e-9)
        damped = toy.updates("ief", places, 0.5) - toy.updates("ng", places, 0.5)
        assert np.abs(damped).max() > 0.01

    def test_ef_is_thrown_off_near_a_line(self, toy):
        """As 1/r_n, whichever sample is nearly fitted; the natural gradient is not."""
        for sample in range(2):
            nearer = [
                toy.minimum + toy.optima[sample] + gap * np.array(toy.inputs[sample])
                for gap in (1e-4, 1e-6)
            ]
            lengths = np.linalg.norm(toy.updates("ef", nearer), axis=1)
            assert lengths[1] / lengths[0] == pytest.approx(100, rel=0.05)
            lengths = np.linalg.norm(toy.updates("ng", nearer), axis=1)
            assert lengths[1] / lengths[0] == pytest.approx(1, rel=0.05)

    def test_at_the_minimum_nothing_moves_but_ef(self, toy):
        for method in ("sgd", "ng", "ief"):
            assert np.abs(toy.updates(method, [toy.minimum])).max() < 1e-6

    def test_default_rates_bring_sgd_down(self, toy):
        rates = {name: toy.rate(name) for name in ("sgd", "ng")}
        for path in trajectories(toy, rates, steps=20):
            assert (path["loss"].diff().dropna() < 0).all()
        largest = 2 * toy.rate("sgd")
        with pytest.raises(InputError, match=r"path of sgd with learning rate .* diverges"):
            list(trajectories(toy, {"sgd": 3 * largest}, steps=200))


class TestTrajectories:
    """Against closed forms in the residuals: θ = θ* + X⁻¹r."""

    @pytest.mark.parametrize("method", RATES)
    def test_follows_its_recursion(self, paths, method):
        toy, rate = LeastSquares(), RATES[method]
        inputs = np.array(toy.inputs)
        for number, path in paths[paths["method"] == method].groupby("start"):
            theta = path[["theta_1", "theta_2"]].to_numpy()
            assert tuple(theta[0]) == toy.starts[number]
            residuals = (theta - toy.minimum) @ inputs.T
            for before, after in itertools.pairwise(residuals):
                expected = {
                    "ief": before * (1 - rate),
                    "ng": before * (1 - rate),
                    "ef": before - rate / before,
                    "sgd": before - rate * inputs @ inputs.T @ before,
                }[method]
                np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(path["loss"], 0.5 * (residuals**2).sum(1), rtol=1e-9)

    def test_cosine_with_the_natural_gradient(self, paths):
        toy = LeastSquares()
        for row in paths[paths["step"] < 3].itertuples():
            theta = np.array([row.theta_1, row.theta_2])
            first = closed_form(row.method, toy, theta, 0.0)
            second = closed_form("ng", toy, theta, 0.0)
            expected = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert row.cosine_ng == pytest.approx(expected, rel=1e-7)

    def test_damping_and_seeds_count(self):
        toy, start = LeastSquares(), [(3.0, 0.0)]
        (path,) = trajectories(toy, {"ef": 0.1}, start, steps=1, damping=0.5)
        step = closed_form("ef", toy, np.array(start[0]), 0.5)
        np.testing.assert_allclose(
            path[["theta_1", "theta_2"]].to_numpy()[1], np.array(start[0]) - 0.1 * step, rtol=1e-7
        )
        drawn = [
            next(trajectories(toy, {"sf": 0.1}, start, steps=3, damping=0.1, seed=seed))
            for seed in (0, 0, 1)
        ]
        pd.testing.assert_frame_equal(drawn[0], drawn[1])
        assert not drawn[0].equals(drawn[2])

    def test_from_the_minimum_nothing_moves(self):
        """Also where rounding leaves EF a residual to be thrown off by."""
        for toy in (LeastSquares(), LeastSquares(((0.7, 0.1), (0.3, 0.9)), (0.1, 0.3))):
            start = toy.minimum.tolist()
            paths = pd.concat(trajectories(toy, starts=[start], steps=5), ignore_index=True)
            assert set(paths["method"]) == set(DEFAULT_METHODS)
            np.testing.assert_array_equal(paths["theta_1"], start[0])
            np.testing.assert_array_equal(paths["theta_2"], start[1])
            assert (paths["learning_rate"] > 0).all()
            figure = toy_figure(toy, paths, arrows=3)
            figure.draw_without_rendering()
            assert figure.axes[0].get_xlim() == pytest.approx((start[0] - 1, start[0] + 1))

    @pytest.mark.parametrize(
        ("inputs", "targets"),
        [
            (((1e4, 0), (0, 1)), (1, 1)),
            (((1e-4, 0), (0, 1)), (1, 1)),
            (((1, 0), (1, 1e-5)), (2, 1)),
            (((1e-4, 0), (0, 1e-4)), (1, -3)),
            (((1e4, 0), (0, 1e4)), (1e6, 1e6)),
        ],
    )
    def test_default_rates_draw_what_is_let_in(self, inputs, targets):
        toy = LeastSquares(inputs, targets)
        starts = toy.starts[:2]
        rates = {name: toy.rate(name, starts) for name in DEFAULT_METHODS}
        for path in trajectories(toy, rates, starts, steps=20):
            assert np.isfinite(path["loss"]).all()
        away = np.array(starts) - toy.minimum
        np.testing.assert_allclose(toy.updates("ief", starts), away, rtol=1e-6, atol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("inputs", "targets", "message"),
        [
            (((1, 2), (2, 4)), (1, 1), "parallel, so that no single θ fits best"),
            (((0, 0), (2, 4)), (1, 1), "parallel"),
            (((1, 2), (2, float("nan"))), (1, 1), "inputs must be finite"),
            (((1, 2), (2, 1)), (1, float("inf")), "targets must be finite"),
            (((1, 2, 3), (2, 1, 3)), (1, 1), "two samples of two numbers"),
            (((1, 2), (2,)), (1, 1), "two samples of two numbers"),
            (((1, 2), (2, 1)), (1, 1, 1), "one number for each of two samples"),
            (((1, 2), (2, "x")), (1, 1), "two samples of two numbers"),
            (((1e150, 0), (0, 1)), (1, 1), r"lengths 1e\+150 and 1; give samples of lengths from"),
            (((1e200, 0), (0, 1e200)), (1, 1), r"lengths 1e\+200 and 1e\+200"),
            (((1e-200, 0), (0, 1e-200)), (1, 1), "lengths 1e-200 and 1e-200"),
            (((1e3, 0), (0, 1e-3)), (1, 1), r"1e\+06 times as long"),
            (((1, 2), (2, 1)), (1e300, 1), r"targets must be of size 1e\+06 at most"),
            (((1e-3, 0), (0, 1e-3)), (1e5, 1), "the minimum must be of size"),
        ],
    )
    def test_of_data(self, inputs, targets, message):
        with pytest.raises(InputError, match=message):
            LeastSquares(inputs, targets)

    @pytest.mark.parametrize(
        ("rates", "options", "message"),
        [
            ({"ief": -1.0}, {}, "learning rate of ief must be positive"),
            ({"ife": 0.1}, {}, "did you mean 'ief'"),
            ({"ief": 0.1}, {"steps": 0}, "0 steps"),
            ({"ief": 0.1}, {"starts": []}, "two numbers for each start"),
            ({"ief": 0.1}, {"starts": [(1.0, 2.0, 3.0)]}, "two numbers for each start"),
            ({"ief": 0.1}, {"starts": [(1.0, float("nan"))]}, "starts must be finite"),
            ({"muon": 0.1}, {}, "muon:0"),
            ({"ief": 0.1}, {"starts": [(1e300, 1e300)]}, "starts, as seen from the minimum, must"),
            ({"ief": 0.1}, {"damping": float("inf")}, "damping inf is not allowed"),
        ],
    )
    def test_of_paths(self, rates, options, message):
        with pytest.raises(InputError, match=message):
            list(trajectories(LeastSquares(), rates, **options))

    def test_of_pictures(self, paths):
        with pytest.raises(InputError, match="no rows of 'kfac'"):
            plot_toy(LeastSquares(), "kfac", paths=paths)
        with pytest.raises(InputError, match="no column theta_1"):
            plot_paths(LeastSquares(), paths.drop(columns="theta_1"))


class TestPictures:
    def test_figure_has_a_panel_for_each_method_a_zoom_and_the_losses(self, paths):
        figure = toy_figure(LeastSquares(), paths, arrows=6)
        panels = [ax for ax in figure.axes if ax.get_visible()]
        titles = [ax.get_title() for ax in panels]
        assert titles[:3] == ["sgd, η = 0.1", "ng = ief, η = 0.1", "ief = ng, η = 0.1"]
        assert titles[3].startswith("ef, η = 0.02")
        assert titles[4:] == ["ef, 8 times enlarged", "loss, geometric mean over starts"]
        for ax in panels[:5]:
            assert (ax.get_xlabel(), ax.get_ylabel()) == ("θ₁", "θ₂")
            assert any(isinstance(part, Quiver) for part in ax.collections)
        assert figure.get_size_inches()[0] == 7.0
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert shown[:3] == ["datum 1 is fitted", "datum 2 is fitted", "minimum"]
        assert shown[3:] == ["sgd", "ng", "ief", "ef"]
        assert [*overlaps(figure), *bare_axes(figure), *small_texts(figure)] == []

    def test_zoom_is_outlined_in_the_panel_of_ef(self, paths):
        panels = toy_figure(LeastSquares(), paths, arrows=4).axes
        boxes = {
            ax.get_title(): (box.get_xy(), box.get_width())
            for ax in panels
            for box in ax.patches
            if isinstance(box, Rectangle)
        }
        ((title, (corner, width)),) = boxes.items()
        assert title.startswith("ef, η")
        low, high = panels[4].get_xlim()
        assert corner == pytest.approx((low, panels[4].get_ylim()[0]))
        assert width == pytest.approx(high - low)

    def test_methods_that_differ_are_not_said_to_be_the_same(self):
        toy = LeastSquares()
        rates = {"ng": 0.1, "ief": 0.1}
        paths = pd.concat(trajectories(toy, rates, steps=3, damping=0.3), ignore_index=True)
        figure = toy_figure(toy, paths, damping=0.3, arrows=4)
        assert [ax.get_title() for ax in figure.axes[:2]] == ["ng, η = 0.1", "ief, η = 0.1"]

    def test_arrows_point_along_the_step(self, paths):
        toy = LeastSquares()
        ax = plot_toy(toy, "ef", paths=paths, arrows=5, damping=0.1)
        (arrows,) = (part for part in ax.collections if isinstance(part, Quiver))
        assert len(arrows.U) >= 20
        for x, y, u, v in zip(arrows.X, arrows.Y, arrows.U, arrows.V, strict=True):
            step = -closed_form("ef", toy, np.array([x, y]), 0.1)
            cosine = (u * step[0] + v * step[1]) / np.hypot(u, v) / np.linalg.norm(step)
            assert cosine == pytest.approx(1, abs=1e-6)
        sizes = [np.linalg.norm(closed_form("ef", toy, p, 0.1)) for p in arrows.get_offsets()]
        assert np.array_equal(np.argsort(sizes), np.argsort(np.hypot(arrows.U, arrows.V)))

    def test_lines_paths_and_minimum_are_drawn_where_they_are(self, paths):
        toy = LeastSquares()
        _, ax = plt.subplots()
        assert plot_toy(toy, "sgd", paths=paths, arrows=3, ax=ax) is ax
        local = paths[(paths["method"] == "sgd") & (paths["start"] == 1)]
        drawn = [line.get_xydata() for line in ax.get_lines()]
        expected = local[["theta_1", "theta_2"]].to_numpy()
        assert any(line.shape == expected.shape and np.allclose(line, expected) for line in drawn)
        (star,) = (line for line in ax.get_lines() if line.get_label() == "minimum")
        np.testing.assert_allclose(star.get_xydata()[0], toy.minimum)
        lines = [line for line in ax.get_lines() if "is fitted" in str(line.get_label())]
        assert len(lines) == 2
        for sample, line in enumerate(lines):
            assert toy.residuals(line.get_xy1())[sample] == pytest.approx(0, abs=1e-12)
            assert toy.residuals(line.get_xy2())[sample] == pytest.approx(0, abs=1e-12)
        assert len({line.get_linestyle() for line in lines}) == 2

    def test_grid_points_on_a_line_are_left_out(self):
        """There EF has a pole; the middle of an odd grid is the minimum."""
        toy = LeastSquares(((1.0, 0.0), (0.0, 1.0)), (0.0, 0.0))
        window = Window((0.0, 0.0), 1.0)
        ax = plot_toy(toy, "ef", window=window, arrows=5)
        (arrows,) = (part for part in ax.collections if isinstance(part, Quiver))
        assert len(arrows.U) == 25 - 9
        assert np.isfinite(arrows.U).all()

    def test_interactive_mode_stays_as_a_backend_has_set_it(self):
        """A notebook's backend is loaded with the first figure, which may be one of ngeval's."""
        before = mpl.is_interactive()
        try:
            for expected in (True, False):
                with in_style():
                    mpl.interactive(expected)
                assert mpl.is_interactive() is expected
        finally:
            mpl.interactive(before)

    def test_all_methods_on_one_landscape(self, paths):
        ax = plot_paths(LeastSquares(), paths)
        colours = {str(line.get_label()): to_hex(line.get_color()) for line in ax.get_lines()}
        assert set(RATES) <= set(colours)
        assert len({colours[name] for name in RATES}) == len(RATES)


class TestCommand:
    def test_writes_picture_and_paths(self, tmp_path):
        picture, table = tmp_path / "toy.svg", tmp_path / "paths.csv"
        args = ["toy", "-o", picture, "--table", table, "--steps", 4, "--arrows", 4]
        args += ["--inputs", "1,0; 0.5,-2", "--targets", "1, 3", "--methods", "ief,ef,sf:2"]
        args += ["--start", "-1,1.8", "--start", "2,2", "--learning-rate", "ef=0.05,sf:2=0.3"]
        result = CliRunner().invoke(app, [*map(str, args), "--damping", "0.01", "--seed", "3"])
        assert result.exit_code == 0, result.output
        assert "loss after 4 steps" in result.output
        assert "ef, η = 0.05" in picture.read_text(encoding="utf-8")
        actual = pd.read_csv(table)
        toy = LeastSquares(((1.0, 0.0), (0.5, -2.0)), (1.0, 3.0))
        rates = {"ief": 0.1, "ef": 0.05, "sf:2": 0.3}
        starts = [(-1.0, 1.8), (2.0, 2.0)]
        expected = trajectories(toy, rates, starts, steps=4, damping=0.01, seed=3)
        pd.testing.assert_frame_equal(actual, pd.concat(expected, ignore_index=True))

    def test_help_has_examples(self):
        result = CliRunner().invoke(app, ["toy", "--help"])
        assert "python -m studies toy --output toy.pdf" in result.output
        assert "--learning-rate" in result.output

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--inputs", "1,2; 2,4"), "are parallel"),
            (("--inputs", "1,2"), "write two samples of two numbers"),
            (("--targets", "1"), "--targets '1': write two numbers"),
            (("--targets", "1,nan"), "targets must be finite"),
            (("--start", "1;2"), "--start '1;2': write two numbers"),
            (("--start", "inf,0"), "starts must be finite"),
            (("--methods", "iff"), "did you mean 'ief'"),
            (("--methods", "ief,ief"), "named twice"),
            (("--learning-rate", "fast"), "--learning-rate 'fast': write one number"),
            (("--learning-rate", "kfac=1"), "--learning-rate names kfac"),
            (("--learning-rate", "-1"), "must be positive"),
            (("--start", "1e300,1e300"), "starts, as seen from the minimum, must be of size 1e+06"),
            (("--damping", "inf"), "damping inf is not allowed"),
            (("--inputs", "1e150,0;0,1"), "give samples of lengths from"),
            (("--learning-rate", "sgd=100", "--steps", "50"), "diverges"),
            (("--table", "paths.txt"), "the extension '.txt'"),
        ],
    )
    def test_bad_input_is_one_message(self, args, message, tmp_path):
        picture = tmp_path / "toy.png"
        result = CliRunner().invoke(app, ["toy", "-o", str(picture), *args])
        assert result.exit_code == 2
        assert message in " ".join((result.output + result.stderr).split())
        assert not picture.exists()

    def test_picture_that_exists_is_kept(self, tmp_path):
        picture = tmp_path / "toy.png"
        picture.write_text("mine")
        result = CliRunner().invoke(app, ["toy", "-o", str(picture)])
        assert result.exit_code == 2
        assert "--force" in result.stderr
        assert picture.read_text() == "mine"
