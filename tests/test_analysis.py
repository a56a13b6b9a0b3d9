"""What the analysis room promises all its readers: checked columns, labels, and no torch."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from ngeval import InputError
from ngeval.analysis.best_damping import best_rows, smallest_positive, without_damping
from ngeval.analysis.intervals import geometric_means, group_means
from ngeval.analysis.norms import imbalance_means, imbalances
from ngeval.analysis.stages import checkpoint_labels, stage_column
from ngeval.analysis.tables import ANY, LABEL, NUMBER, checked, name_in
from studies.training_results import FINITE, TEXT, WHOLE, one_of
from tests.report_cases import gammas


def test_pictures_and_reports_do_without_torch():
    code = (
        "import sys, ngeval.plots, ngeval.report; print({'torch', 'scipy.stats'} & {*sys.modules})"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.strip() == "set()"


class TestColumns:
    @pytest.mark.parametrize(
        ("column", "values", "expected"),
        [
            (NUMBER, ["1.5", None, "inf"], [1.5, np.nan, np.inf]),
            (FINITE, [2, None, 1e300], [2.0, np.nan, 1e300]),
            (WHOLE, [3.0, "4", -1], [3, 4, -1]),
            (TEXT, ["a", 1, 0.5], ["a", "1", "0.5"]),
            (one_of("ok", "failed"), ["ok", "failed", "ok"], ["ok", "failed", "ok"]),
            (ANY, ["a", None, [1, 2]], ["a", "", "[1, 2]"]),
            (LABEL, [0, 1, 2], [0, 1, 2]),
            (LABEL, [0, "b", {"c": 1}], ["0", "b", "{'c': 1}"]),
        ],
    )
    def test_one_type_each(self, column, values, expected):
        table = pd.DataFrame({"x": pd.Series(values, dtype=object), "y": [values] * 3})
        result = checked(table, {"x": column, "absent": WHOLE})
        np.testing.assert_array_equal(result["x"].to_numpy(), expected)
        assert result["y"].tolist() == [values] * 3

    @pytest.mark.parametrize(
        ("column", "value", "expected"),
        [
            (NUMBER, "much", "numbers"),
            (NUMBER, "x", r"numbers \(is it a header row among the rows\?\)"),
            (FINITE, np.inf, "finite numbers, or nothing"),
            (WHOLE, None, "whole numbers"),
            (WHOLE, 1e300, "whole numbers"),
            (TEXT, None, "text"),
            (TEXT, [1], "text"),
            (one_of("ok", "failed"), "lost", "ok or failed"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_row_in_the_file(self, column, value, expected):
        good = "ok" if column.expected in ("text", "ok or failed") else 1
        table = pd.DataFrame({"x": pd.Series([good, good, value, good], dtype=object)})
        message = rf"f\.csv: column x has .* in row 3; it should hold {expected}$"
        for rows in (table, table[1:]):
            with pytest.raises(InputError, match=message):
                checked(rows, {"x": column}, "f.csv")

    def test_names(self):
        table = pd.DataFrame({"method": ["b", "a", "b"]})
        assert [name_in(table, "method", default=place) for place in (0, -1)] == ["b", "a"]
        assert name_in(table, "method", "a") == "a"
        with pytest.raises(InputError, match="no rows for method 'c'; known: a, b"):
            name_in(table, "method", "c")


class TestStages:
    def test_epochs_that_are_not_all_known_or_not_all_different_are_no_labels(self):
        table = pd.DataFrame({"checkpoint": ["r/a", "r/b"], "epoch": [1.0, np.nan]})
        assert stage_column(table) is None
        assert checkpoint_labels(table) == {"r/a": "a", "r/b": "b"}
        table = table.assign(epoch=1.0, step=[5, 6])
        assert stage_column(table) == "step"
        assert checkpoint_labels(table[:1], table) == {"r/a": "step 5", "r/b": "step 6"}


class TestMeans:
    def test_groups_without_values_and_with_one(self):
        groups = [np.array([]), np.array([2.0]), np.array([1.0, 3.0])]
        mean, low, high = group_means(groups)
        np.testing.assert_array_equal(mean, [np.nan, 2.0, 2.0])
        np.testing.assert_array_equal(low, [np.nan, np.nan, 1.0])
        np.testing.assert_array_equal(high, [np.nan, np.nan, 3.0])
        assert np.isnan(group_means(groups, resamples=0)[1:]).all()

    def test_blocks_of_groups_do_not_change_the_numbers(self, monkeypatch):
        table = gammas(noise=0.5)
        keys = ["checkpoint", "method", "damping"]
        whole = geometric_means(table, keys, "gamma_over_sgd")
        monkeypatch.setattr("ngeval.analysis.intervals.MAX_VALUES", 1000)
        pd.testing.assert_frame_equal(geometric_means(table, keys, "gamma_over_sgd"), whole)

    def test_imbalances_without_a_norm_are_not_counted(self):
        norms = [1.0, 4.0, 0.0, 2.0, 0.0, 0.0, np.nan, 1.0]
        table = pd.DataFrame({"checkpoint": "c", "batch": [0, 0, 1, 1, 2, 2, 3, 3]})
        table["gradient_norm"] = norms
        result = imbalances(table)
        np.testing.assert_array_equal(result["imbalance"], [4.0, np.inf, np.nan, np.nan])
        assert result["count"].tolist() == [2, 2, 2, 1]
        assert imbalance_means(table)[["count", "mean"]].to_numpy().tolist() == [[1, 4.0]]


class TestBestDamping:
    def test_the_least_of_those_with_all_batches(self):
        summary = pd.DataFrame(
            {"method": list("aab"), "v": [0.1, 0.5, 3.0], "batches": [1, 2, 2]}, index=[5, 6, 7]
        )
        assert best_rows(summary, ["method"], value="v").index.tolist() == [6, 7]

    def test_methods_without_damping(self):
        assert without_damping(gammas(noise=0.1)) == {"diag", "sgd"}  # 1 at every λ
        assert without_damping(gammas(dampings=(1.0,))) == set()

    def test_smallest_positive(self):
        assert [smallest_positive(values) for values in ([1.0, 0.0, 0.1], [0.0])] == [0.1, 0.0]


def test_a_table_without_a_checkpoint_in_a_row_is_refused():
    table = pd.DataFrame({"checkpoint": ["a.pt", None]})
    with pytest.raises(InputError, match="column checkpoint has empty cells"):
        name_in(table, "checkpoint")
