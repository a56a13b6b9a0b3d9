"""The study of KFAC's kinds and Adam: its rows, its verdicts on made-up rows, its figure."""

import pandas as pd
import pytest

from studies import get_study
from studies.preconditioners import METHODS, MOMENTS, SMALL, STUDY
from tests.committed_figures import KEPT, make

pytestmark = pytest.mark.second_stage

ADAM = "Adam's step is nearer to the natural gradient than the gradient"


@pytest.fixture(scope="module")
def rows():
    return pd.concat(STUDY.run("quick", 0, lambda *_: None), ignore_index=True)


def made_up(changes: dict[str, float]) -> pd.DataFrame:
    """γ of 1 for every method but those named, at three epochs, with a spread over seeds."""
    parts = [
        {
            **{"part": "gamma", "seed": seed, "epoch": epoch, "checkpoint": f"epoch-{epoch}"},
            **{"batch": 0, "method": method, "damping": damping, "status": "ok"},
            "gamma": changes.get(method, 1.0) * (1 + 0.01 * seed),
        }
        for seed in range(5)
        for epoch in (1, 4, 8)
        for method in METHODS
        for damping in (SMALL, 1.0)
    ]
    table = pd.DataFrame(parts)
    ratios = table["gamma"]
    table = table.assign(gamma_over_sgd=ratios, gamma_over_ng=ratios + 1, gamma_floor=0.5)
    moments = [
        {
            **{"part": "moments", "seed": seed, "epoch": epoch, "method": label, "status": "ok"},
            "correlation": changes.get("correlation", 0.5) + 0.001 * seed,
        }
        for seed in range(5)
        for epoch in (1, 4, 8)
        for label in MOMENTS
    ]
    return pd.concat([table, pd.DataFrame(moments)], ignore_index=True)


def verdicts(table: pd.DataFrame) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in STUDY.findings(table)}


class TestRows:
    def test_every_method_at_every_stage_and_seed(self, rows):
        gammas = rows[rows["part"] == "gamma"]
        assert set(gammas["method"]) == set(METHODS)
        counts = gammas.groupby(["seed", "epoch", "method"]).size()
        assert set(counts) == {3}
        assert len(counts) == 2 * 3 * len(METHODS)
        assert (gammas["status"] == "ok").all()

    def test_correlations_are_of_all_pairs(self, rows):
        moments = rows[rows["part"] == "moments"]
        assert set(moments["method"]) == set(MOMENTS)
        assert moments["correlation"].between(0.3, 1).all()

    def test_figure_and_findings_of_the_rows(self, rows):
        assert len(STUDY.findings(rows)) == 10
        figure = STUDY.figure(rows)
        assert [axes.get_ylabel() for axes in figure.axes] == ["γ/γ_SGD"] * 3
        assert make.structure(figure) == KEPT["preconditioners"]

    def test_it_is_registered(self):
        assert get_study("preconditioners") is STUDY


class TestVerdicts:
    def test_where_ieKFAC_and_adam_lead(self):
        claims = verdicts(made_up({"kfac-ief": 0.5, "ief": 0.6, "adam": 0.5, "correlation": 0.95}))
        assert [v for claim, v in claims.items() if "iEF" in claim] == ["confirmed"] * 6
        assert (
            claims["Adam's step is nearer to the natural gradient than the gradient"] == "confirmed"
        )
        assert claims["Adam's second moment stands for the diagonal of the empirical Fisher"] == (
            "confirmed"
        )

    def test_where_nothing_differs_nothing_is_confirmed(self):
        claims = verdicts(made_up({"ief": 0.5}))
        assert set(claims.values()) == {"not confirmed"}

    def test_where_it_holds_at_one_stage_alone(self):
        table = made_up({})
        late = (table["epoch"] == 8) & (table["method"] == "adam")
        table.loc[late, ["gamma", "gamma_over_sgd"]] *= 0.5
        assert verdicts(table)[ADAM] == "under conditions"
