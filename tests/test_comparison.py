"""Best dampings and rankings, against loops over a table that is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

import ngeval
from ngeval.analysis.best_damping import at_best_damping
from ngeval.analysis.ranking import COLUMNS, ranking
from ngeval.analysis.stages import three_stages
from ngeval.analysis.summary import summarize

DAMPINGS = (1e-4, 1e-2, 1.0)


def gammas(checkpoints: int = 5, batches: int = 3) -> pd.DataFrame:
    """γ/γ_min = 2 + |log₁₀ λ − target| with another target for every method and checkpoint."""
    targets = {"a": (-4, -2, -2, 0, 0), "b": (0, 0, 0, 0, 0), "sgd": None, "late": (-2,) * 5}
    generator = np.random.default_rng(1)
    rows = []
    for stage in range(checkpoints):
        for batch in range(batches):
            size = float(generator.uniform(0.5, 2))
            for method, target in targets.items():
                for damping in DAMPINGS:
                    ratio = 4.0
                    if target is not None:
                        ratio = 2 + abs(math.log10(damping) - target[stage])
                    if method == "late":
                        ratio *= 3 - stage / 2
                    ratio *= 1 + 0.1 * batch * (method != "sgd")
                    rows.append(
                        {
                            "checkpoint": f"c{stage}",
                            "epoch": 2.0 * stage,
                            "batch": batch,
                            "method": method,
                            "damping": damping,
                            "gamma": 0.1 * size * ratio,
                            "gamma_over_sgd": ratio / 4,
                            "gamma_over_ng": ratio,
                            "gamma_floor": 0.1 * size,
                            "status": "ok",
                            "reason": "",
                        }
                    )
    return pd.DataFrame(rows)


def best_by_loop(table: pd.DataFrame, checkpoints: list[str], method: str) -> float:
    """The λ with the least mean log γ/γ_SGD."""
    means = {}
    for damping in DAMPINGS:
        logs = [
            math.log(row["gamma_over_sgd"])
            for _, row in table.iterrows()
            if (row["method"], row["damping"]) == (method, damping)
            and row["checkpoint"] in checkpoints
        ]
        means[damping] = sum(logs) / len(logs)
    return min(means, key=means.__getitem__)


class TestBestDamping:
    def test_for_every_checkpoint(self):
        table = gammas()
        best = at_best_damping(table)
        assert len(best) == 5 * 3 * 4
        for (checkpoint, method), rows in best.groupby(["checkpoint", "method"]):
            expected = best_by_loop(table, [checkpoint], method)
            assert rows["damping"].tolist() == [expected] * 3

    def test_for_the_whole_run(self):
        table = gammas()
        best = at_best_damping(table, whole_run=True)
        for method, rows in best.groupby("method"):
            expected = best_by_loop(table, [f"c{i}" for i in range(5)], method)
            assert set(rows["damping"]) == {expected}
        assert set(best.loc[best["method"] == "a", "damping"]) == {1e-2}

    def test_a_damping_with_failures_is_not_taken(self):
        table = gammas()
        lost = (table["method"] == "b") & (table["damping"] == 1.0) & (table["batch"] == 1)
        table.loc[lost, ["status", "gamma", "gamma_over_sgd"]] = ["failed", math.nan, math.nan]
        best = at_best_damping(table)
        assert set(best.loc[best["method"] == "b", "damping"]) == {1e-2}

    def test_other_columns_are_kept(self):
        table = gammas().assign(mine=range(5 * 3 * 4 * 3))
        best = at_best_damping(table)
        pd.testing.assert_frame_equal(
            best.set_index("mine"), table.set_index("mine").loc[best["mine"]]
        )


class TestRanking:
    def test_three_checkpoints_by_rank(self):
        ranked = ranking(gammas())
        assert list(ranked.columns) == COLUMNS
        assert ranked["checkpoint"].unique().tolist() == ["c0", "c2", "c4"]
        assert ranked["stage_name"].unique().tolist() == ["early", "middle", "late"]
        assert ranked["epoch"].unique().tolist() == [0.0, 4.0, 8.0]
        for _, rows in ranked.groupby("checkpoint"):
            assert rows["gamma_over_ng"].is_monotonic_increasing
        # At the start "late" is the worst of all, in the end it shares the first place.
        assert ranked[ranked["checkpoint"] == "c0"]["method"].tolist() == ["a", "b", "sgd", "late"]
        assert ranked[ranked["checkpoint"] == "c0"]["rank"].tolist() == [1, 1, 3, 4]
        last = ranked[ranked["checkpoint"] == "c4"].set_index("method")
        assert last["rank"].to_dict() == pytest.approx({"a": 1, "b": 1, "late": 1, "sgd": 4})

    def test_numbers_are_those_of_summarize(self):
        table = gammas()
        ranked = ranking(table).set_index(["checkpoint", "method"])
        summary = summarize(table).set_index(["checkpoint", "method", "damping"])
        for (checkpoint, method), row in ranked.iterrows():
            damping = best_by_loop(table, [checkpoint], method)
            expected = summary.loc[(checkpoint, method, damping)]
            for ratio in ("gamma_over_ng", "gamma_over_sgd"):
                assert row[ratio] == pytest.approx(expected[f"{ratio}_geomean"])
                for end in ("_low", "_high"):
                    assert row[ratio + end] == pytest.approx(expected[f"{ratio}_geomean{end}"])
            assert row["batches"] == 3
            run = best_by_loop(table, [f"c{i}" for i in range(5)], method)
            over_run = summary.loc[(checkpoint, method, run), "gamma_over_ng_geomean"]
            assert row["gamma_over_ng_run"] == pytest.approx(over_run)
            if method == "sgd":  # no λ in it
                assert math.isnan(row["damping"])
                assert math.isnan(row["damping_run"])
            else:
                assert (row["damping"], row["damping_run"]) == (damping, run)

    def test_a_method_that_failed_comes_last_with_its_reason(self):
        table = gammas()
        lost = (table["method"] == "a") & (table["checkpoint"] == "c4")
        table.loc[lost, ["status", "reason"]] = ["failed", "no state"]
        table.loc[lost, ["gamma", "gamma_over_sgd", "gamma_over_ng"]] = math.nan
        last = ranking(table).groupby("checkpoint").get_group("c4")
        assert last["method"].tolist()[-1] == "a"
        assert last["status"].tolist() == ["ok", "ok", "ok", "failed"]
        assert last["reason"].tolist() == ["", "", "", "no state"]
        assert math.isnan(last["rank"].iloc[-1])
        assert last["batches"].iloc[-1] == 0

    def test_coverage_where_the_table_tells_it(self):
        table = gammas()
        assert ranking(table)["coverage"].isna().all()
        table["coverage"] = np.where(table["method"] == "b", 80.0, 100.0)
        result = ranking(table).groupby("method")["coverage"].unique()
        assert {name: list(values) for name, values in result.items()} == {
            "a": [100],
            "b": [80],
            "late": [100],
            "sgd": [100],
        }

    def test_a_checkpoint_where_all_failed(self):
        table = gammas()
        lost = table["checkpoint"] == "c4"
        table.loc[lost, ["status", "reason"]] = ["failed", "NaN weights"]
        table.loc[lost, ["gamma", "gamma_over_sgd", "gamma_over_ng"]] = math.nan
        ranked = ranking(table)
        last = ranked[ranked["checkpoint"] == "c4"]
        assert last["rank"].isna().all()
        assert set(last["reason"]) == {"NaN weights"}
        assert ranked[ranked["checkpoint"] == "c0"]["rank"].tolist() == [1, 1, 3, 4]

    def test_without_the_natural_gradient_by_the_ratio_to_sgd(self):
        table = gammas().assign(gamma_over_ng=math.nan)
        ranked = ranking(table, ["c2"])
        assert ranked["gamma_over_sgd"].is_monotonic_increasing
        assert ranked["rank"].iloc[0] == 1
        assert ranked["gamma_over_ng"].isna().all()

    @pytest.mark.parametrize(
        ("count", "chosen", "names"),
        [
            (1, ["c0"], ["early"]),
            (2, ["c0", "c1"], ["early", "late"]),
            (4, ["c0", "c2", "c3"], ["early", "middle", "late"]),
        ],
    )
    def test_few_checkpoints(self, count, chosen, names):
        table = gammas(count)
        assert three_stages(table) == chosen
        assert ranking(table)["stage_name"].unique().tolist() == names

    def test_one_batch_and_one_damping(self):
        table = gammas(batches=1)
        ranked = ranking(table[table["damping"] == 1e-2])
        assert len(ranked) == 3 * 4
        assert ranked["gamma_over_ng_low"].isna().all()
        assert (ranked["damping"] == 1e-2).all()

    def test_unknown_checkpoint(self):
        with pytest.raises(ngeval.InputError, match="no rows for checkpoint 'c9'"):
            ranking(gammas(), ["c9"])
