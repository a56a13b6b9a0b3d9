"""The layer view against explicit matrices: masks, shares and sums."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import ngeval
from ngeval.curvature.updates import DirectionUpdates
from ngeval.grading.layer_table import COLUMNS, parts_of
from ngeval.model.parameter_groups import make_groups
from tests import problems, reference

METHODS = ("sgd", "ef", "ief", "ng", "diag", "diag-ef:0.5")
DAMPINGS = (1e-3, 1.0)


def layers_of(model: nn.Module) -> dict[str, list[slice]]:
    """Where each module's trainable parameters are in a flat vector, by a loop over them."""
    places: dict[str, list[slice]] = {}
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = ".".join(name.split(".")[:-1]) or "(model)"
            places.setdefault(layer, []).append(slice(start, start + parameter.numel()))
            start += parameter.numel()
    return places


def masked(direction: Tensor, places: list[slice]) -> Tensor:
    """The direction with all other entries set to 0."""
    part = torch.zeros_like(direction)
    for place in places:
        part[place] = direction[place]
    return part


def close(actual: float, expected: float, tolerance: float) -> None:
    assert actual == pytest.approx(expected, rel=tolerance, abs=1e-300)


@pytest.mark.parametrize("name", problems.EXACT_NAMES)
def test_every_number_is_that_of_explicit_matrices(name):
    case, dense = problems.case(name), problems.reference_of(name)
    fisher, gradient = reference.fisher(dense), reference.gradient(dense)
    table = ngeval.layer_table(problems.problem_of(name), METHODS, DAMPINGS)
    places = layers_of(case.model)
    assert len(table) == len(METHODS) * len(DAMPINGS) * len(places)
    assert (table["status"] == "ok").all()
    for (method, damping), rows in table.groupby(["method", "damping"], sort=False):
        direction = reference.update(dense, method, damping)
        assert rows["layer"].tolist() == list(places)
        size = float(direction @ fisher @ direction)
        for _, row in rows.iterrows():
            part = masked(direction, places[row["layer"]])
            plain = masked(gradient, places[row["layer"]])
            close(row["gamma"], reference.gamma(dense, part), 1e-6)
            ratio = reference.gamma(dense, part) / reference.gamma(dense, plain)
            close(row["gamma_over_sgd"], ratio, 1e-6)
            local = torch.cat([torch.arange(p.start, p.stop) for p in places[row["layer"]]])
            inverse = torch.linalg.pinv(fisher[local][:, local], rtol=1e-12, hermitian=True)
            least = float(gradient[local] @ inverse @ gradient[local]) ** -0.5
            close(row["gamma_over_best"], row["gamma"] / least, 1e-5)
            assert row["gamma_over_best"] >= 1 - 1e-6
            close(row["decrease"], float(part @ gradient), 1e-6)
            close(row["own_curvature"], float(part @ fisher @ part), 1e-6)
            assert abs(row["curvature"] - float(part @ fisher @ direction)) < 1e-6 * size
            close(row["update_norm"], float(part.norm()), 1e-6)
            close(row["gamma_total"], reference.gamma(dense, direction), 1e-6)
            assert row["num_parameters"] == int(sum(p.stop - p.start for p in places[row["layer"]]))


@pytest.mark.parametrize("name", ["categorical-mlp-float64", "gaussian-conv-float32"])
def test_contributions_add_up_to_the_whole_update(name):
    problem = problems.problem_of(name)
    table = ngeval.layer_table(problem, METHODS, DAMPINGS)
    whole = ngeval.evaluate(problem, METHODS, DAMPINGS).set_index(["method", "damping"])
    tolerance = 1e-9 if name.endswith("64") else 1e-3
    for key, rows in table.groupby(["method", "damping"]):
        assert rows["decrease_share"].sum() == pytest.approx(1, abs=1e-12)
        assert rows["curvature_share"].sum() == pytest.approx(1, abs=1e-12)
        assert rows["excess"].sum() == pytest.approx(0, abs=1e-12)
        for column in ("decrease", "curvature"):
            close(rows[column].sum(), whole.loc[key, column], tolerance)
        for total in rows["gamma_total"]:
            close(total, whole.loc[key, "gamma"], tolerance)
        squares = float((rows["update_norm"] ** 2).sum())
        close(math.sqrt(squares), whole.loc[key, "update_norm"], tolerance)


def test_one_group_is_the_whole_update():
    problem = problems.problem_of("bernoulli-mlp-float64")
    table = ngeval.layer_table(problem, METHODS, DAMPINGS, groups=lambda _: "all")
    whole = ngeval.evaluate(problem, METHODS, DAMPINGS)
    for column in ("gamma", "decrease", "curvature", "update_norm", "gamma_over_sgd"):
        np.testing.assert_allclose(table[column], whole[column], rtol=1e-8)
    assert (table["num_parameters"] == problem.num_parameters).all()
    np.testing.assert_allclose(table["own_curvature"], table["curvature"], rtol=1e-12)
    np.testing.assert_allclose(table["gamma_total"], table["gamma"], rtol=1e-12)


@pytest.mark.parametrize("name", ["gaussian-mlp-float64", "categorical-sequence-float64"])
def test_natural_gradient_spends_where_it_buys(name):
    # F F⁺g = g: every layer's share of dᵀFd is its share of dᵀg.
    table = ngeval.layer_table(problems.problem_of(name), ["ng", "sgd"], [0.0])
    natural, plain = (table[table["method"] == method] for method in ("ng", "sgd"))
    np.testing.assert_allclose(natural["excess"], 0, atol=1e-7)
    assert plain["excess"].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gaussian-mlp-float64", "categorical-conv-float64"])
def test_exact_blocks_are_best_in_each_layer(name):
    # γ of the best direction in a layer alone: (g_lᵀF_ll⁺g_l)^(−1/2).
    case, dense = problems.case(name), problems.reference_of(name)
    methods = ["block-ng", "ng", "sgd", "ief", "diag"]
    table = ngeval.layer_table(problems.problem_of(name), methods, [0.0])
    rows, gradient = reference.fisher_rows(dense), reference.gradient(dense)
    for layer, places in layers_of(case.model).items():
        columns = torch.cat([torch.arange(place.start, place.stop) for place in places])
        part = gradient[columns]
        best = float(part @ reference.solve_curvature(rows[:, columns], part, 0.0)) ** -0.5
        result = table[table["layer"] == layer].set_index("method")["gamma"]
        close(result["block-ng"], best, 1e-6)
        assert (result >= best * (1 - 1e-7)).all()


def test_excess_is_the_slope_of_gamma_in_a_layers_learning_rate():
    dense = problems.reference_of("categorical-mlp-float64")
    case = problems.case("categorical-mlp-float64")
    table = ngeval.layer_table(problems.problem_of("categorical-mlp-float64"), ["ief"], [1e-2])
    direction, step = reference.update(dense, "ief", 1e-2), 1e-5
    for _, row in table.iterrows():
        part = masked(direction, layers_of(case.model)[row["layer"]])
        up, down = (reference.gamma(dense, direction + s * part) for s in (step, -step))
        assert row["excess"] == pytest.approx(math.log(up / down) / (2 * step), abs=1e-8)


def test_many_parts_in_little_memory():
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)), nn.Linear(40, 3)).double().eval()
    x, y = torch.randn(5, 40, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    # 6,683 parameters: 53 kB for each direction; three at a time, out of eleven.
    small = ngeval.Problem(model, x, y, "categorical", memory=170_000)
    plenty = ngeval.Problem(model, x, y, "categorical")
    assert small.rows.memory // (8 * small.num_parameters) == 3
    groups = make_groups({n: p.numel() for n, p in model.named_parameters()}, "parameter")
    assert len(groups) == 10
    direction = plenty.gradient() * torch.linspace(1, 2, plenty.num_parameters)
    result, expected = (parts_of(ngeval.Metric(p), direction, groups) for p in (small, plenty))
    for column in ("decrease", "curvature", "own_curvature", "norms", "gammas", "gamma_total"):
        np.testing.assert_allclose(getattr(result, column), getattr(expected, column), rtol=1e-10)


def test_another_batch_grades():
    case = problems.case("categorical-mlp-float64")
    problem = case.problem()
    other = problems.make("categorical-mlp-float64", seed=0, num_samples=11)
    metric = ngeval.Metric(problem, [(other.inputs, other.targets)])
    dense = reference.build(case.model, other.inputs, other.targets, case.family)
    table = ngeval.layer_table(problem, ["ief"], [1e-2], metric=metric)
    direction = reference.update(case.reference(), "ief", 1e-2)
    for _, row in table.iterrows():
        part = masked(direction, layers_of(case.model)[row["layer"]])
        close(row["gamma"], reference.gamma(dense, part), 1e-7)
    assert set(table["metric_samples"]) == {11}
    assert set(table["num_samples"]) == {7}


def test_huge_and_tiny_updates_are_graded_alike():
    problem = problems.problem_of("categorical-mlp-float32")
    groups = make_groups({n: p.numel() for n, p in problem.function.parameters.items()}, "layer")
    direction = problem.gradient().double()
    metric = ngeval.Metric(problem)
    expected = parts_of(metric, direction, groups)
    for factor in (1e-120, 1e120):
        result = parts_of(metric, direction * factor, groups)
        np.testing.assert_allclose(result.gammas, expected.gammas, rtol=1e-6)
        np.testing.assert_allclose(result.curvature, expected.curvature * factor**2, rtol=1e-6)


SIZES = {"encoder.0.a.weight": 6, "encoder.0.a.bias": 2, "encoder.1.weight": 4, "scale": 1}


class TestGroups:
    @pytest.mark.parametrize(
        ("groups", "expected"),
        [
            ("layer", {"encoder.0.a": 8, "encoder.1": 4, "(model)": 1}),
            ("parameter", SIZES),
            (1, {"encoder": 12, "scale": 1}),
            (2, {"encoder.0": 8, "encoder.1": 4, "scale": 1}),
            (9, SIZES),
            ({"s": ["scale"], "w": ["encoder.0.a.weight", "encoder.1.weight"]}, None),
            (lambda name: name[-1], {"t": 10, "s": 2, "e": 1}),
        ],
    )
    def test_ways_to_group(self, groups, expected):
        result = make_groups(SIZES, groups)
        expected = expected or {"w": 10, "(rest)": 2, "s": 1}
        assert {group.name: group.num_parameters for group in result} == expected
        assert [group.name for group in result] == list(expected)
        covered = sorted((p.start, p.stop) for group in result for p in group.places)
        assert covered == [(0, 6), (6, 8), (8, 12), (12, 13)]

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ({"a": ["scal"]}, "no trainable parameter 'scal'; did you mean 'scale'"),
            ({"a": ["scale"], "b": "scale"}, "'scale' is in two groups, 'a' and 'b'"),
            ({"a": ["scale", "scale"]}, "in two groups"),
            ({"a": []}, "group 'a' has no parameter"),
            ("layers", "groups must be 'layer', 'parameter'"),
            (0, "groups must be"),
            (True, "groups must be"),
            (None, "groups must be"),
            (lambda _: None, "groups gave None for parameter"),
        ],
    )
    def test_bad_groups(self, groups, message):
        with pytest.raises(ngeval.InputError, match=message.replace("(", r"\(")):
            make_groups(SIZES, groups)


class Broken:
    name = "broken"

    def prepare(self, problem, kernel, seed=0):
        raise RuntimeError("out of ideas")


class Half:
    """An update that leaves the first layer alone."""

    name = "half"
    notes = ("half of it",)
    coverage = 40.0

    def prepare(self, problem, kernel, seed=0):
        self.problem = problem
        return self

    largest_curvature = float("nan")

    def direction(self, damping):
        gradient = self.problem.gradient().clone()
        gradient[:25] = 0
        return gradient

    def updates(self, dampings):
        return DirectionUpdates(1, lambda _: self.direction(0.0))


def test_a_failing_method_is_rows_with_a_reason():
    problem = problems.problem_of("categorical-mlp-float64")
    table = ngeval.layer_table(problem, ["sgd", Broken(), "ng"], DAMPINGS)
    failed = table[table["method"] == "broken"]
    assert len(failed) == 2 * len(DAMPINGS)
    assert set(failed["status"]) == {"failed"}
    assert set(failed["reason"]) == {"RuntimeError: out of ideas"}
    assert failed["gamma"].isna().all()
    assert (table.loc[table["method"] != "broken", "status"] == "ok").all()


def test_a_layer_that_is_left_alone_is_undefined_and_the_rest_is_not():
    table = ngeval.layer_table(problems.problem_of("categorical-mlp-float64"), [Half()], [1.0])
    first, second = (row for _, row in table.iterrows())
    assert (first["status"], first["reason"]) == ("undefined", "the update is 0 in this layer")
    assert (first["decrease_share"], first["curvature_share"]) == (0, 0)
    assert (second["status"], second["note"]) == ("ok", "half of it")
    assert second["coverage"] == 40.0
    assert second["decrease_share"] == 1
    assert second["gamma"] == pytest.approx(second["gamma_total"])


def test_relative_dampings():
    problem = problems.problem_of("categorical-mlp-float64")
    table = ngeval.layer_table(problem, ["sgd", "ief"], [0.5], damping_scale="relative")
    expected = ngeval.evaluate(problem, ["sgd", "ief"], [0.5], damping_scale="relative")
    result = table.drop_duplicates("method")
    np.testing.assert_allclose(result["damping_absolute"], expected["damping_absolute"])
    np.testing.assert_allclose(result["gamma_total"], expected["gamma"], rtol=1e-9)


def test_columns_steps_and_seed():
    steps: list[str] = []
    problem = problems.problem_of("categorical-mlp-float64")
    tables = [
        ngeval.layer_table(problem, ["sf", "sgd"], [1.0], seed=seed, on_step=steps.append)
        for seed in (3, 3, 4)
    ]
    assert list(tables[0].columns) == COLUMNS
    assert steps == ["sf", "sgd"] * 3
    pd.testing.assert_frame_equal(tables[0], tables[1])
    sampled = [table.loc[table["method"] == "sf", "gamma"].tolist() for table in tables]
    assert sampled[0] != sampled[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping_scale": "relativ"}, "did you mean 'relative'"),
        ({"dampings": [-1.0]}, "damping"),
        ({"methods": ["iff"]}, "did you mean 'ief'"),
        ({"groups": "block"}, "groups must be"),
    ],
)
def test_bad_arguments(options, message):
    problem = problems.problem_of("categorical-mlp-float64")
    with pytest.raises(ngeval.InputError, match=message):
        ngeval.layer_table(**{"problem": problem, "methods": ["sgd"], **options})


def test_metric_of_another_problem():
    first, second = (problems.problem_of(f"categorical-{m}-float64") for m in ("mlp", "conv"))
    with pytest.raises(ngeval.InputError, match="made for a different problem"):
        ngeval.layer_table(first, ["sgd"], metric=ngeval.Metric(second))
    with pytest.raises(ngeval.InputError, match=r"problem must be an ngeval\.Problem, not Linear"):
        ngeval.layer_table(nn.Linear(2, 2), ["sgd"])


def test_the_best_of_a_layer_is_left_out_where_it_is_out_of_reach(monkeypatch):
    problem = problems.make("categorical-mlp-float64").problem()
    table = ngeval.layer_table(problem, ["sgd"], [1.0], natural=False)
    assert table["gamma_over_best"].isna().all()
    assert (table["reason"] == "").all()
    monkeypatch.setattr("ngeval.curvature.row_space.EXPLICIT_ENTRIES", 0)
    monkeypatch.setattr("ngeval.curvature.fisher_blocks.DENSE_SIZE", 5)
    table = ngeval.layer_table(problem, ["sgd"], [1.0])
    assert table["gamma_over_best"].isna().all()
    assert table["note"].str.contains("no least γ of layers: .*use fewer samples").all()
    assert (table["status"] == "ok").all()


def test_the_natural_gradient_of_each_layer_is_its_best():
    problem = problems.make("categorical-conv-float64").problem()
    table = ngeval.layer_table(problem, ["block-ng"], [0.0])
    assert table["gamma_over_best"].to_numpy() == pytest.approx(1, abs=1e-6)
