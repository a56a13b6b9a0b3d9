"""The report: its numbers are the table's, its sentences say no more, its page runs nothing."""

import base64
import gzip
import hashlib
import html.parser
import io
import re
import subprocess
import sys
from importlib import resources
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from pandas.testing import assert_frame_equal
from typer.testing import CliRunner

import ngeval
import ngeval.report.charts
import ngeval.report.page
from ngeval import InputError, OutputError
from ngeval.analysis.intervals import geometric_means
from ngeval.analysis.stages import checkpoint_labels
from ngeval.analysis.tables import kind_of
from ngeval.cli.app import app
from ngeval.plots.gamma import FLOOR
from ngeval.plots.style import styles_of
from ngeval.report import make_page, read_sources, write_report
from ngeval.report.charts import gamma_charts, layer_charts, sample_charts
from ngeval.report.facts import facts, run_facts, troubles
from ngeval.report.findings import findings
from ngeval.report.page import gamma_table
from ngeval.report.sources import Source, Topic, topics
from ngeval.report.summaries import grades
from ngeval.report.svg import INKS
from ngeval.report.wording import with_interval
from ngeval.results.manifest import manifest, write_manifest
from tests.pages import blocks, run_here, shell_lines
from tests.report_cases import (
    DAMPINGS,
    HOSTILE,
    few_pictures,
    gammas,
    hostile,
    layers,
    no_pictures,
    one_picture,
    samples,
    unfolded,
)
from tests.test_performance import tuned


def source(tmp_path, table, name="gamma.csv"):
    """A table as a file, read back."""
    path = tmp_path / name
    table.to_csv(path, index=False)
    return read_sources([path])[0]


def topic(**tables):
    return Topic("t", tables)


def said(**tables):
    return "\n".join(findings(topic(**tables)))


def lines_of(figure):
    """The lines of a figure by their labels."""
    return {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()} | {
        str(line.get_label()): line for axes in figure.axes[:1] for line in axes.get_lines()
    }


def contrast(first, second):
    """Of two colours, 1 to 21: (L₁ + 0.05)/(L₂ + 0.05) with luminances L (WCAG 2)."""
    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


class Reader(html.parser.HTMLParser):
    """What a page is made of."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, page):
        super().__init__()
        self.open, self.scripts, self.texts, self.tags, self.links = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
        self.links += [v for k, v in attributes if k in ("src", "href", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)


class TestIntervals:
    @pytest.mark.parametrize("batches", [2, 5, 40])
    def test_they_are_those_of_summarize(self, batches):
        table = gammas(batches=batches, noise=0.5)
        result = geometric_means(table, ["checkpoint", "method", "damping"], "gamma_over_sgd")
        both = ngeval.summarize(table).merge(result, on=["checkpoint", "method", "damping"])
        assert len(both) == len(result) == 36
        for name, local in (("", "mean"), ("_low", "low"), ("_high", "high")):
            np.testing.assert_allclose(
                both[f"gamma_over_sgd_geomean{name}"], both[local], rtol=1e-12
            )

    def test_groups_of_several_sizes(self):
        table = gammas(noise=0.3)
        table = table[(table["batch"] < 4) | (table["method"] == "ef")]
        result = geometric_means(table, ["method"], "gamma_over_sgd").set_index("method")
        expected = ngeval.summarize(table, ["method"]).set_index("method")
        for name in ("mean", "low", "high"):
            theirs = "gamma_over_sgd_geomean" + ("" if name == "mean" else f"_{name}")
            np.testing.assert_allclose(result[name], expected[theirs], rtol=1e-12)

    def test_what_has_no_logarithm_is_left_out(self):
        table = pd.DataFrame({"k": list("aaab"), "x": [2.0, np.inf, 0.0, np.nan]})
        result = geometric_means(table, ["k"], "x")
        assert result["k"].tolist() == ["a"]
        assert result["mean"].tolist() == [2.0]
        assert result[["low", "high"]].isna().all(axis=None)
        assert geometric_means(table[3:], ["k"], "x").empty


class TestSources:
    def test_kinds_are_told_by_columns(self):
        assert kind_of(gammas(), "f") == "gammas"
        assert kind_of(samples(), "f") == "samples"
        assert kind_of(layers(), "f") == "layers"

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (
                pd.DataFrame({"a": [1], "b": [2]}),
                r"x\.csv has the columns a, b and is not a result table of ngeval",
            ),
            (gammas().assign(study="s"), r"x\.csv holds the rows of a study"),
        ],
    )
    def test_others_are_refused_by_name(self, tmp_path, table, message):
        with pytest.raises(
            InputError, match=f"{message}.*come from ngeval.evaluate and ngeval gamma"
        ):
            source(tmp_path, table, "x.csv")

    def test_tuned_trainings_are_refused_with_the_command_that_reads_them(self, tmp_path):
        message = r"t\.csv holds the rows of tuned trainings.*`python -m studies trained FILE`"
        with pytest.raises(InputError, match=message):
            source(tmp_path, tuned(), "t.csv")

    def test_a_file_twice_is_refused(self, tmp_path):
        path = source(tmp_path, gammas()).path
        with pytest.raises(InputError, match="given twice"):
            read_sources([path, tmp_path / "." / path.name])

    def test_text_among_numbers_is_named(self, tmp_path):
        table = gammas().astype({"gamma_over_sgd": object})
        table.loc[4, "gamma_over_sgd"] = "much"
        with pytest.raises(InputError, match=r"gamma\.csv: column gamma_over_sgd has 'much'"):
            topics([source(tmp_path, table)])

    def test_tasks_of_several_files(self, tmp_path):
        both = pd.concat([gammas(task="a"), gammas(task="b")])
        files = [source(tmp_path, both, "g.csv"), source(tmp_path, samples("b"), "i.csv")]
        result = topics(files)
        assert [(entry.name, list(entry.tables)) for entry in result] == [
            ("a", ["gammas"]),
            ("b", ["gammas", "samples"]),
        ]

    def test_parts_of_a_run_are_one(self, tmp_path):
        table = gammas()
        late, early = table[table["epoch"] == 10], table[table["epoch"] < 10]
        files = [source(tmp_path, late, "2.csv"), source(tmp_path, early, "1.csv")]
        (result,) = topics(files)
        assert len(result.tables["gammas"]) == len(table)
        assert grades(result.tables["gammas"]).checkpoints == list(
            dict.fromkeys(table["checkpoint"])
        )

    @pytest.mark.parametrize("change", [{"num_samples": 64}, {"damping_scale": "mean"}])
    def test_other_runs_stay_apart(self, tmp_path, change):
        table = gammas()
        late = table[table["epoch"] == 10].assign(**change)
        for first in (table, table[table["epoch"] < 10]):
            files = [source(tmp_path, first, "a.csv"), source(tmp_path, late, "b.csv")]
            assert [entry.name for entry in topics(files)] == ["t (a)", "t (b)"]

    @pytest.mark.parametrize("swapped", [False, True])
    def test_files_that_agree_where_they_overlap_are_one_run(self, tmp_path, swapped):
        """As of a tutorial: all checkpoints at one λ, and two of them at all λ."""
        table = gammas()
        stages = table[table["damping"] == DAMPINGS[0]]
        sweep = table[table["epoch"] != 5].assign(gamma=lambda t: t["gamma"] * (1 + 3e-7))
        parts = {"stages.csv": stages, "sweep.csv": sweep, "norms.csv": samples()}
        files = [source(tmp_path, rows, name) for name, rows in parts.items()]
        (result,) = topics(files[::-1] if swapped else files)
        assert result.name == "t"
        assert list(result.tables) == ["gammas", "samples"]
        keys = ["checkpoint", "batch", "method", "damping"]
        kept = result.tables["gammas"]
        assert not kept.duplicated(keys).any()
        once = pd.concat([stages, sweep]).drop_duplicates(keys)
        assert len(kept) == len(once) == 72 + 2 * 48
        text = "\n".join(findings(result))
        assert text.count("iEF is ") == 1
        assert "From epoch 0 to epoch 10" in text
        assert "Surely below SGD" in text
        assert "largest per-sample gradient norm" in text

    @pytest.mark.parametrize("times", [1 + 3e-6, np.nan])
    @pytest.mark.parametrize("column", ["gamma", "gamma_over_sgd"])
    def test_one_row_that_does_not_agree_keeps_files_apart(self, tmp_path, column, times):
        first, second = gammas(), gammas(dampings=DAMPINGS[:1])
        second.loc[7, column] *= times
        files = [source(tmp_path, first, "a.csv"), source(tmp_path, second, "b.csv")]
        assert [entry.name for entry in topics(files)] == ["t (a)", "t (b)"]

    @pytest.mark.parametrize("swapped", [False, True])
    def test_of_two_rows_that_agree_the_one_with_the_natural_gradient_stays(
        self, tmp_path, swapped
    ):
        plain = gammas().assign(gamma_over_ng=np.nan, gamma_min=np.nan)
        late = gammas()[lambda t: t["epoch"] == 10]
        files = [source(tmp_path, plain, "a.csv"), source(tmp_path, late, "b.csv")]
        (result,) = topics(files[::-1] if swapped else files)
        rows = result.tables["gammas"]
        assert len(rows) == len(plain)
        output = rows["gamma_over_ng"].notna()
        assert output.tolist() == (rows["epoch"] == 10).tolist()

    def test_a_table_of_evaluate_alone(self, tmp_path):
        table = gammas(epochs=(0,)).drop(columns=["task", "checkpoint", "epoch", "step", "stage"])
        (result,) = topics([source(tmp_path, table, "mine.csv")])
        assert result.name == "mine"
        assert "iEF" in findings(result)[0]


class TestFindings:
    def test_the_headline_has_the_numbers(self):
        table = gammas()
        first = said(gammas=table).splitlines()[0]
        summary = ngeval.summarize(table, ("method", "damping", "epoch")).set_index(
            ["method", "damping", "epoch"]
        )
        ief, ef = summary.loc["ief", 1e-6, 10], summary.loc["ef", 1e-6, 10]
        assert first.startswith("At λ = 1e-6 and epoch 10, iEF is ")
        for start, row in (("iEF is {} × SGD {}", ief), ("EF {} × {}", ef)):
            output = [row[f"gamma_over_sgd_geomean{end}"] for end in ("", "_low", "_high")]
            assert start.format(*with_interval(*output).split(" ", 1)) in first
        assert "geometric mean over 6 batches, 95 % bootstrap interval" in first

    def test_verdicts(self):
        text = said(gammas=gammas())
        assert "At λ = 1e-6 and epoch 10, nearer to the natural gradient than SGD: iEF;" in text
        assert "farther from it than SGD: EF;" in text
        assert "not distinguishable from SGD with these batches: diag." in text

    @pytest.mark.parametrize("seed", range(8))
    def test_nothing_is_nearer_or_farther_unless_its_interval_says_so(self, seed):
        table = gammas()
        random = np.random.default_rng(seed)
        other = table["method"] != "sgd"
        table.loc[other, "gamma_over_sgd"] = np.exp(random.normal(0, 0.3, other.sum()))
        summary = ngeval.summarize(table, ("method", "damping", "epoch"))
        last = summary[(summary["damping"] == 1e-6) & (summary["epoch"] == 10)]
        last = last.set_index("method").drop("sgd")
        sentence = said(gammas=table).splitlines()[1]
        names = {"ief": "iEF", "ef": "EF", "diag": "diag"}
        parts = {"nearer": "", "farther": "", "not distinguishable": ""}
        for part in sentence.rstrip(".").split("; "):
            parts[next(word for word in parts if word in part)] = part.rpartition(": ")[2]
        for method, name in names.items():
            low = last["gamma_over_sgd_geomean_low"][method]
            high = last["gamma_over_sgd_geomean_high"][method]
            where = (
                "nearer"
                if high < 1 - 1e-4
                else "farther"
                if low > 1 + 1e-4
                else "not distinguishable"
            )
            result = [key for key, output in parts.items() if name in re.split(", | and ", output)]
            assert result == [where]

    @pytest.mark.parametrize(("batches", "warns"), [(4, True), (5, False)])
    def test_few_batches(self, batches, warns):
        text = said(gammas=gammas(batches=batches))
        assert (f"Caution: intervals over {batches} batches are too narrow" in text) == warns

    def test_one_batch_has_no_interval_and_no_verdict(self):
        text = said(gammas=gammas(batches=1))
        assert "There is one batch, so no interval" in text
        assert "nearer" not in text
        assert "[" not in text
        assert "1 batch;" in text

    def test_nearest_and_an_end_of_the_range(self):
        text = said(gammas=gammas())
        assert "Nearest to the least γ possible at epoch 10: iEF (λ = 1e-6) with " in text
        assert " × γ_min. The next is SGD, whose γ is 2 [1.84, 2.17] × iEF's, batch by" in text
        assert "left out" not in text
        natural = gammas({"sgd": 1.0, "ief": 0.5, "ef": 10.0, "ng": 0.25})
        assert "possible at epoch 10, exact NG left out: iEF (λ = 1e-6) with " in said(
            gammas=natural
        )
        ends = "EF (the largest, 1); iEF (the smallest, 1e-6)"
        assert f"At epoch 10 the best λ lies at an end of the range for {ends}" in text
        zero = gammas(dampings=(0.0, 1e-3, 1.0, 10.0))
        assert "the smallest" not in said(gammas=zero)

    def test_two_that_are_equal_cannot_be_told_apart(self):
        table = gammas({"sgd": 1.0, "ief": 0.5, "twin": 0.5})
        text = said(gammas=table)
        assert "It is not distinguishable from twin (λ = 1e-6), whose γ is " in text
        assert "× iEF's, batch by batch (each method at the λ that is best" in text

    def test_change_over_training(self):
        text = said(gammas=gammas(noise=0.0))
        assert "From epoch 0 to epoch 10, γ over SGD's goes at λ = 1e-6: " in text
        assert "EF from 1.23 to 10 (× 8.11" in text
        assert "diag from 1 to 1 (no significant change)" in text

    def test_over_which_damping(self):
        table = gammas(noise=0.0)
        assert "iEF at all; EF at none" in said(gammas=table)
        rising = table["method"] == "ief"
        table.loc[rising & (table["damping"] > 1e-3), "gamma_over_sgd"] = 2.0
        assert "iEF at 2 from 1e-6 to 0.001" in said(gammas=table)

    def test_means_below_sgd_whose_intervals_are_not(self):
        """The table shows means below 1: a sentence that counts intervals says so."""
        table = gammas({"sgd": 1.0, "ief": 0.5, "ef": 0.999, "diag": 1.5}, noise=0.4)
        text = said(gammas=table)
        start = "Surely below SGD (95 % interval below 1) at epoch 10, of the 3 λ from 1e-6 to 1: "
        assert start in text
        means = ngeval.summarize(table, ("method", "damping", "epoch"))
        below = means[(means["epoch"] == 10) & (means["gamma_over_sgd_geomean"] < 1 - 1e-4)]
        count = int((below["method"] == "ef").sum())
        assert count > 0
        assert (means[means["method"] == "ef"]["gamma_over_sgd_geomean_high"] > 1).all()
        assert f"EF at none, by the mean at {count}" in text
        twins = said(gammas=gammas({"sgd": 1.0, "a": 0.999, "b": 1.0, "c": 0.999}, noise=0.4))
        assert f"a and c at none, by the mean at {count}" in twins

    def test_methods_that_damping_does_not_enter_have_no_best(self):
        table = gammas()
        same = table["method"] == "diag"
        table.loc[same, "gamma_over_sgd"] = 3.0
        lines = [line for line in said(gammas=table).splitlines() if "end of the range" in line]
        assert len(lines) == 1
        assert "diag" not in lines[0]

    def test_imbalance_and_what_goes_with_it(self):
        text = said(gammas=gammas(), samples=samples())
        assert "is 2.05 [" in text
        assert "× the smallest at epoch 0 and 205 [" in text
        assert "(geometric means over 6 batches)" in text
        assert "Spearman" not in text  # of three checkpoints
        epochs = tuple(range(6))
        many = [samples().query("epoch == 0").assign(epoch=float(e)) for e in epochs]
        norms = pd.concat(
            [
                part.assign(
                    checkpoint=f"runs/epoch-{e:03d}.pt",
                    gradient_norm=part["gradient_norm"] ** (e + 1),
                )
                for e, part in enumerate(many)
            ]
        )
        text = said(gammas=gammas(epochs=epochs, noise=0.0), samples=norms)
        assert "EF's γ over SGD's grows with the imbalance: Spearman's ρ is 1.00" in text
        flat = norms.assign(gradient_norm=norms["gradient_norm"] ** (1 / (norms["epoch"] + 1) ** 2))
        text = said(gammas=gammas(epochs=epochs, noise=0.0), samples=flat)
        assert "does not simply go with the imbalance: Spearman's ρ is -1.00" in text

    def test_samples_without_a_gradient(self):
        table = samples()
        table.loc[table["sample"] == 0, "gradient_norm"] = 0.0
        assert "the imbalance of norms is infinite" in said(samples=table)
        table = samples()
        table.loc[0, "gradient_norm"] = 0.0
        assert "1 batches hold" not in said(samples=table)
        assert "One batch holds a sample without a gradient" in said(samples=table)

    def test_floor(self):
        text = said(gammas=gammas())
        assert "below γ_min, 0.25 × SGD at epoch 10, 1.25 × the closed-form floor." in text
        local = gammas().assign(gamma_floor=lambda t: t["gamma_min"])
        assert "closed-form floor to within 0.5 %" in said(gammas=local)
        none = gammas().assign(gamma_min=np.nan, gamma_over_ng=np.nan)
        assert "below the floor, 0.2 × SGD" in said(gammas=none)

    def test_nothing_could_be_computed(self):
        table = gammas().assign(status="failed", reason="no memory")
        assert said(gammas=table) == "No row could be computed."
        assert said(layers=layers().assign(status="failed")) == "No layer could be graded."

    def test_layers(self):
        text = said(layers=layers())
        assert text == (
            "Updates lose most at epoch 10, λ = 0.001: EF in layer out (70 % of its KL for 30 % of "
            "the loss it buys)."
        )

    def test_about_ten_sentences(self):
        many = {name: 0.5 + 0.1 * i for i, name in enumerate("abcdefghijklmnopqrst")}
        result = findings(topic(gammas=gammas({"sgd": 1.0, **many}), samples=samples()))
        assert 6 <= len(result) <= 12
        assert "14 more in the table" in result[0]


class TestCharts:
    @pytest.fixture(scope="class")
    @staticmethod
    def charts():
        table = gammas()
        labels = checkpoint_labels(table)
        return [
            *gamma_charts(grades(table), labels),
            *sample_charts(samples(), labels),
            *layer_charts(layers(), labels),
        ]

    def test_all_are_there(self, charts):
        assert [chart.title for chart in charts] == [
            "γ over training",
            "γ over damping",
            "Ranking",
            "Per-sample gradient norms, and their imbalance",
            "Layers",
        ]
        assert [len(chart.options) for chart in charts] == [4, 3, 3, 1, 6]
        assert [chart.options[chart.start][0] for chart in charts] == [
            "1e-6",
            "epoch 10",
            "epoch 10",
            "",
            "sgd, λ = 0.001, epoch 10",
        ]

    def test_values_are_those_of_summarize(self, charts):
        summary = ngeval.summarize(gammas(), ("epoch", "method", "damping"))
        for label, draw in charts[0].options[1:]:
            picture = draw()
            rows = summary[np.isclose(summary["damping"], float(label))]
            lines = lines_of(picture.figure)
            assert set(lines) == {"ief", "ef", "diag", "sgd", "floor"}
            for method in ("ief", "ef", "diag"):
                part = rows[rows["method"] == method].sort_values("epoch")
                x, y = lines[method].get_data()
                assert list(x) == part["epoch"].tolist()
                columns = [f"gamma_over_sgd_geomean{end}" for end in ("", "_low", "_high")]
                np.testing.assert_allclose(y, part[columns[0]], rtol=1e-12)
                points = [point for point in picture.points if point.lines[0] == method]
                np.testing.assert_allclose([point.y for point in points], y, rtol=1e-12)
                assert [point.lines[1:] for point in points] == [
                    (
                        f"epoch {row['epoch']:g}, λ = {label}",
                        f"γ/γ_SGD = {with_interval(*(row[name] for name in columns))}",
                        "batches: 6",
                    )
                    for row in part.to_dict("records")
                ]

    def test_natural_gradient_and_floor_over_damping(self, charts):
        picture = charts[1].options[0][1]()
        lines = lines_of(picture.figure)
        assert set(lines["floor"].get_ydata()) == {0.2}
        expected = [0.25 * (1 + d) for d in DAMPINGS]
        np.testing.assert_allclose(lines["ng"].get_ydata(), expected, rtol=1e-12)
        (axes,) = picture.figure.axes
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert ("floor", "epoch 0", "γ/γ_SGD = 0.2") in [point.lines for point in picture.points]

    def test_ranking_is_at_the_best_damping(self, charts):
        label, draw = charts[2].options[-1]
        assert label == "epoch 10"
        picture = draw()
        (axes,) = picture.figure.axes
        names = [text.get_text() for text in axes.get_yticklabels()]
        assert (names[0], names[-1]) == ("ief", "ef")
        assert axes.yaxis_inverted()
        best = grades(gammas()).best.query("checkpoint == 'runs/epoch-010.pt'")
        expected = best.set_index("method")["best"]
        drawn = [float(line.get_xdata()[0]) for line in axes.get_lines() if len(line.get_xdata())]
        for value, name, point in zip(drawn[::3], names, picture.points, strict=True):
            assert name == point.lines[0]
            assert value == point.x == expected[name]

    def test_norms_and_layers_have_their_numbers(self, charts):
        norms = charts[3].options[0][1]()
        table = samples()
        last = table[table["epoch"] == 10]["gradient_norm"]
        shown = [point for point in norms.points if point.lines[1] == "epoch 10"]
        values = {point.lines[0]: point.y for point in shown}
        for name, level in (("smallest", 0), ("median", 0.5), ("95 %", 0.95), ("largest", 1)):
            assert values[name] == last.quantile(level)
        upper, lower = norms.figure.axes
        assert values["median"] == lines_of(norms.figure)["median"].get_ydata()[-1]
        assert [point.axes for point in shown] == [upper] * 7 + [lower]
        assert shown[-1].lines[2].startswith("max/min = 205 [")
        layer = charts[4].options[-1]
        assert layer[0] == "ef, λ = 0.001, epoch 10"
        assert [(p.lines[0][:2], *p.lines[1:]) for p in layer[1]().points] == [
            ("lo", "0.1", "70.0%"),
            ("lo", "out", "30.0%"),
            ("KL", "0.1", "30.0%"),
            ("KL", "out", "70.0%"),
        ]

    def test_a_picture_is_svg_that_follows_the_page(self, charts):
        label, text, is_first = next(charts[1].drawn("chart-1"))
        assert (label, is_first) == ("epoch 0", False)
        assert text == next(charts[1].drawn("chart-1"))[1]
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img"
        assert "γ over damping" in root.get("aria-label")
        assert "width" not in root.attrib
        titles = [element.text.split("\n") for element in root.iter("title")]
        assert len(titles) == len(charts[1].options[0][1]().points)
        assert ["ief", "epoch 0, λ = 1e-6"] in [title[:2] for title in titles]
        texts = {element.text for element in root.iter("text")}
        assert {"ief", "ef", "diag", "ng", "sgd", "floor", "damping λ (absolute)"} <= texts
        styles = " ".join(element.get("style", "") for element in root.iter())
        assert not set(INKS) & set(re.findall("#[0-9a-f]{6}", styles))
        assert "currentColor" in styles
        assert "font-family" not in styles
        assert not list(root.iter("style"))

    def test_ids_differ_from_picture_to_picture(self, charts):
        texts = [text for _, text, _ in charts[1].drawn("chart-1")]
        others = [text for _, text, _ in charts[1].drawn("c-2")]
        ids = [set(re.findall(r' id="([^"]+)"', text)) for text in texts + others]
        assert all(ids)
        assert len(set.union(*ids)) == sum(map(len, ids))
        for text in texts:
            used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
            assert used == set(re.findall(r' id="([^"]+)"', text))

    def test_of_many_options_some_are_drawn_and_the_first_shown_among_them(self, monkeypatch):
        monkeypatch.setattr(ngeval.report.charts, "svg_text", lambda figure, *_: "<svg></svg>")
        table = gammas(dampings=tuple(np.geomspace(1e-8, 1, 40)), epochs=(0, 5), batches=2)
        chart = next(gamma_charts(grades(table), checkpoint_labels(table)))
        drawn = list(chart.drawn("chart-1"))
        assert len(chart.options) == 41
        assert len(drawn) == 17
        assert [label for label, _, is_first in drawn if is_first] == ["1e-8"]
        assert [drawn[0][0], drawn[-1][0]] == ["the best of each method", "1"]
        epochs = [float(epoch) for epoch in range(8)]
        many = pd.concat([layers().assign(checkpoint=f"{e}.pt", epoch=e) for e in epochs])
        many = pd.concat([many.assign(damping=value) for value in (1e-3, 1.0)])
        many = many.drop_duplicates(["checkpoint", "batch", "method", "damping", "layer"])
        (chart,) = layer_charts(many, checkpoint_labels(many))
        assert len(chart.options) == 16  # of 32: those at the smallest λ
        assert chart.options[chart.start][0] == "sgd, λ = 0.001, epoch 7"

    def test_lines_can_be_seen_on_both_pages(self):
        every = [*ngeval.METHODS, "adamw", "muon:20", "mine", "theirs"]
        looks = styles_of(pd.DataFrame({"method": every}))
        colours = {colour for colour, _, _ in looks.values()} | {FLOOR["color"], "#444444"}
        sheet = (resources.files("ngeval.report") / "report.css").read_text(encoding="utf-8")
        pages = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in sheet.split("@media")]
        for page in pages[:2]:
            inks = {"currentColor": page["ink"], "var(--soft)": page["soft"]}
            for colour in colours:
                shown = inks.get(INKS.get(colour), colour)
                # Graphics need 3 (WCAG 2); orange and sky are what colour-blind readers can tell.
                least = 2.2 if page is pages[0] else 3.0
                assert contrast(page["page"], shown) >= least, (page["page"], colour)

    def test_narrow_intervals_are_told_from_one(self):
        assert with_interval(1.0052, 1.0021, 1.0093) == "1.005 [1.002, 1.009]"
        assert with_interval(0.5, 0.5, 0.5) == "0.5 [0.5, 0.5]"
        assert with_interval(0.5, np.nan, np.nan) == "0.5"

    def test_many_methods_have_no_bands(self):
        table = gammas({"sgd": 1.0, **{f"m{i}": 0.5 for i in range(12)}})
        chart = next(gamma_charts(grades(table), checkpoint_labels(table)))
        assert not chart.options[0][1]().figure.axes[0].collections
        few = next(gamma_charts(grades(gammas()), checkpoint_labels(gammas())))
        assert len(few.options[0][1]().figure.axes[0].collections) == 3

    def test_names_are_shown_as_they_are(self):
        names = {"sgd": 1.0, "<b>a&b</b>": 0.5, "$x$ %{y}": 0.6, "_m\n" + "x" * 100: 0.7}
        table = gammas(names, epochs=(0, 5), batches=2)
        charts = gamma_charts(grades(table), checkpoint_labels(table))
        shown = ["<b>a&b</b>", "$x$ %{y}", "…" + "x" * 31]
        for chart in charts:
            for _, text, _ in chart.drawn("chart-1"):
                root = ElementTree.fromstring(text)
                assert set(shown) <= {element.text.strip() for element in root.iter("text")} | {
                    "…" + "x" * 31
                }
                titles = {element.text.split("\n")[0] for element in root.iter("title")}
                assert set(shown) <= titles
                assert "&lt;b&gt;a&amp;b&lt;/b&gt;" in text


class TestTable:
    def test_first_shown_are_the_last_checkpoint_and_the_smallest_damping(self):
        table = gammas()
        result = gamma_table(grades(table), checkpoint_labels(table))
        assert len(result.rows) == 36
        shown = [[cell.text for cell in row.cells] for row in result.rows if not row.hidden]
        assert [row[0] for row in shown] == ["sgd", "ief", "ef", "diag"]
        assert {(row[5], row[6]) for row in shown} == {("1e-6", "epoch 10")}

    def test_a_long_one_is_thinned_and_says_so(self, monkeypatch):
        monkeypatch.setattr(ngeval.report.page, "MAX_ROWS", 40)
        table = gammas(dampings=tuple(np.geomspace(1e-6, 1, 20)))
        result = gamma_table(grades(table), checkpoint_labels(table))
        assert len(result.rows) <= 40 + 12
        assert "of 20 λ" in result.note
        marked = [row for row in result.rows if "best" in row.filters["damping"]]
        assert len(marked) == 12
        assert any(not row.hidden for row in result.rows)


class TestPage:
    @pytest.fixture(scope="class")
    @staticmethod
    def page(tmp_path_factory):
        folder = tmp_path_factory.mktemp("page")
        table = pd.concat([gammas(task="a"), gammas(task="b")])
        table.loc[(table["method"] == "ef") & (table["damping"] == 1.0), "status"] = "failed"
        table.loc[table["status"] == "failed", "reason"] = "no <b>memory</b>"
        table.loc[(table["method"] == "ief") & (table["damping"] == 1.0), "note"] = "a remark"
        table.to_parquet(folder / "g.parquet", index=False)
        write_manifest(folder / "g.parquet", manifest({"seed": 3}, command=["ngeval", "gamma"]))
        samples("b").to_csv(folder / "i.csv", index=False)
        with few_pictures():
            return make_page(read_sources([folder / "g.parquet", folder / "i.csv"]))

    def test_it_is_well_formed_and_has_no_address(self, page):
        result = Reader(unfolded(page))
        assert result.open == []
        assert all(link.startswith(("#", "data:,")) for link in result.links)
        assert not [a for _, a in result.tags for name in a if name.startswith("on")]

    def test_its_policy_allows_its_scripts_alone(self, page):
        result = Reader(page)
        policy = next(a["content"] for t, a in result.tags if t == "meta" and "http-equiv" in a)
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        allowed = set(re.findall("'sha256-([^']+)'", policy))
        run = [text for attributes, text in result.scripts if "type" not in attributes]
        hashes = {base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in run}
        assert hashes == allowed
        assert len(run) == 1
        assert "unsafe-eval" not in policy
        assert "connect-src" not in policy  # falls back to 'none'

    def test_sections(self, page):
        text = " ".join(" ".join(Reader(page).texts).split())
        for part in (
            "What was measured, and how",
            "6 for each checkpoint, N = 32 samples each",
            "categorical (softmax cross-entropy, in nats)",
            "λ is added to the sum-reduced curvature",
            "3 (batch b draws its labels with seed 3 + b)",
            "ngeval gamma",
            f"ngeval {ngeval.__version__}",
            "i.csv has no manifest beside it",
            "At λ = 1e-6 and epoch 10, iEF is",
            "18 rows failed of a: no <b>memory</b>",
            "Remarks on rows that could be computed",
            "18 rows of a: a remark",
            "432 rows, all columns, from g.parquet",
        ):
            assert part in text, part

    def test_every_heading_of_a_column_is_a_button(self, page):
        tags = Reader(page).tags
        heads = [i for i, (tag, a) in enumerate(tags) if tag == "th"]
        heads = [i for i in heads if "aria-sort" in tags[i][1]]
        assert len(heads) == 16
        assert all(tags[i + 1][0] == "button" and tags[i][1]["aria-sort"] == "none" for i in heads)

    def test_the_data_come_out_as_they_went_in(self, page, tmp_path):
        texts = [t for a, t in Reader(page).scripts if a.get("type") == "text/plain"]
        first = pd.read_csv(io.BytesIO(gzip.decompress(base64.b64decode(texts[0]))))
        table = pd.concat([gammas(task="a"), gammas(task="b")]).reset_index(drop=True)
        columns = ["task", "checkpoint", "batch", "method", "damping", "gamma", "gamma_over_sgd"]
        assert_frame_equal(first[columns], table[columns], check_dtype=False)
        second = pd.read_csv(io.BytesIO(gzip.decompress(base64.b64decode(texts[1]))))
        assert_frame_equal(second, samples("b"), check_dtype=False)

    def test_of_many_rows_the_means_are_in_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ngeval.report.page, "MAX_CELLS", 1000)
        sources = [source(tmp_path, gammas()), source(tmp_path, samples(), "i.csv")]
        with no_pictures():
            page = make_page(sources)
        (text,) = [t for a, t in Reader(page).scripts if a.get("type") == "text/plain"]
        means = pd.read_csv(io.BytesIO(gzip.decompress(base64.b64decode(text))))
        assert len(means) == 36
        assert {"task", "checkpoint", "method", "damping", "ratio", "low", "high"} <= set(means)
        shown = " ".join(Reader(page).texts)
        assert "means over batches; the 216 rows themselves are too many" in shown
        assert "the 288 rows themselves are too many for a page, from i.csv" in shown

    def test_hostile_names_are_text(self, tmp_path):
        path = tmp_path / "h.parquet"
        hostile().to_parquet(path, index=False)
        write_manifest(
            path, manifest({"x": HOSTILE["reason"]}, command=["ngeval", HOSTILE["task"]])
        )
        with few_pictures():
            page = make_page(read_sources([path]), title=HOSTILE["task"])
        result = Reader(unfolded(page))
        assert result.open == []
        assert {tag for tag, _ in result.tags}.isdisjoint({"img", "b", "a" * 2})
        assert not [a for _, a in result.tags for name in a if name.startswith("on")]
        assert all(link.startswith(("#", "data:,")) for link in result.links)
        texts = " ".join(result.texts)
        for name in HOSTILE.values():
            assert name.rpartition("/")[2] in texts  # of a checkpoint its file's name
        assert "{{ 7 * 7 }}" in texts

    def test_pages_without_gammas(self, tmp_path):
        for name, table in (("l.csv", layers()), ("i.csv", samples())):
            assert Reader(make_page([source(tmp_path, table, name)])).open == []
        failed = gammas().assign(status="failed", reason="r", gamma_over_sgd=np.nan)
        text = " ".join(Reader(make_page([source(tmp_path, failed)])).texts)
        assert "No row could be computed." in text
        assert "216 rows failed" in text

    def test_no_files(self):
        with pytest.raises(InputError, match="at least one result file"):
            make_page([])


class TestFacts:
    def test_what_is_not_in_the_table_is_said_to_be_missing(self):
        bare = gammas().drop(columns=["likelihood", "dtype", "engine", "seed", "num_parameters"])
        output = dict(facts(topic(gammas=bare)))
        for name in ("likelihood", "parameters", "model's dtype", "Jacobian engine", "seed"):
            assert output[name] == "not recorded"

    def test_what_the_table_has_not_is_taken_from_the_manifest(self, tmp_path):
        """Rows of ngeval imbalance have neither likelihood nor dtype, engine or seed."""
        recorded = {"likelihood": "Categorical(ignore_index=-100)", "dtype": "float64"}
        beside = manifest({"seed": 7, "engine": "auto"}, facts=recorded)
        norms = Source(tmp_path / "i.csv", "samples", samples(), beside)
        result = dict(facts(Topic("t", {"samples": norms.table}, [norms])))
        expected = "Categorical(ignore_index=-100) (softmax cross-entropy, in nats)"
        assert result["likelihood"] == expected
        settings = ("model's dtype", "Jacobian engine", "seed", "parameters")
        assert [result[name] for name in settings] == ["float64", "auto", "7", "not recorded"]
        graded = Source(tmp_path / "g.csv", "gammas", gammas())
        both = Topic("t", {"gammas": graded.table, "samples": norms.table}, [graded, norms])
        assert dict(facts(both))["model's dtype"] == "float32"  # what the rows say goes first
        beside = manifest({"batch_size": 160, "dtype": None}, facts={"dtype": "the model's"})
        parts = Source(tmp_path / "l.csv", "layers", layers(), beside)
        result = dict(facts(Topic("t", {"layers": parts.table}, [parts])))
        assert result["batches"] == "3 for each checkpoint, N = 160 samples each"
        assert result["model's dtype"] == "unchanged (--dtype was not given)"

    def test_another_metric_is_told(self):
        output = dict(facts(topic(gammas=gammas().assign(metric_samples=320))))
        assert output["graded by"] == "the Fisher and gradient of 320 samples"

    def test_manifest_in_any_state(self, tmp_path):
        whole = Source(tmp_path / "r.csv", "gammas", gammas(), manifest({"seed": 1}))
        output = dict(run_facts(whole))
        assert output["seed"] == "1"
        assert "torch" in output["versions"]
        odd = Source(tmp_path / "r.csv", "gammas", gammas(), {"versions": 3, "machine": None})
        assert dict(run_facts(odd))["command"] == "not recorded"

    def test_troubles_are_grouped_by_reason(self):
        table = gammas()
        table.loc[table["method"] == "ef", ["status", "reason"]] = ["failed", "singular"]
        table.loc[table["method"] == "diag", "note"] = "noted"
        failed, noted = troubles(topic(gammas=table))
        assert (failed.reason, failed.count, failed.status) == ("singular", 54, "failed")
        assert dict(failed.where)["methods"] == "ef"
        assert dict(failed.where)["checkpoints"] == "epoch 0, epoch 5, epoch 10"
        assert (noted.reason, noted.status) == ("noted", "ok")


class TestCommand:
    def run(self, *args, code=0):
        result = CliRunner().invoke(app, ["report", *map(str, args)])
        assert result.exit_code == code, result.output
        return result

    def test_writes_a_page(self, tmp_path):
        path = source(tmp_path, gammas()).path
        output = tmp_path / "new" / "r.html"
        with one_picture():
            result = self.run(path, "-o", output, "--title", "a title")
        assert "<title>a title</title>" in output.read_text()
        assert "written:" in result.stdout
        assert list(output.parent.iterdir()) == [output]
        assert "--force" in self.run(path, "-o", output, code=2).stderr
        with no_pictures():
            assert self.run(path, "-o", output, "--force", "--quiet").stdout == ""

    def test_output_is_checked_before_anything_is_read(self, tmp_path):
        for name, message in (("r.pdf", ".html, .htm"), ("", "is a folder")):
            with pytest.raises(OutputError, match=re.escape(message) if name else "html|folder"):
                write_report([tmp_path / "none.csv"], tmp_path / name)

    def test_what_is_wrong_is_named(self, tmp_path):
        assert (
            "none.csv does not exist"
            in self.run(tmp_path / "none.csv", "-o", tmp_path / "r.html", code=2).stderr
        )
        (tmp_path / "x.csv").write_text("a,b\n1,2\n")
        result = self.run(tmp_path / "x.csv", "-o", tmp_path / "r.html", code=2)
        assert "x.csv has the columns a, b and is not a result table of ngeval" in result.stderr
        assert not (tmp_path / "r.html").exists()

    def test_help_has_examples(self):
        assert "ngeval report sweep.parquet --output report.html" in self.run("--help").stdout

    def test_a_page_is_not_paid_for_by_other_commands(self):
        code = (
            "import sys, ngeval.cli;"
            "print({'matplotlib', 'jinja2.environment', 'ngeval.report.page'} & set(sys.modules))"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert result.stdout == "set()\n"


@pytest.mark.second_stage
class TestItsPage:
    def test_examples_as_written(self, tmp_path, monkeypatch):
        """Those of docs/report.md, on files of those names."""
        files = {"results.parquet": gammas(), "imbalance.parquet": samples()}
        for task in ("lora", "prompt"):
            files[f"{task}/gamma.parquet"] = gammas(task=task)
        files["lora/imbalance.parquet"] = samples("lora")
        (tmp_path / "lora").mkdir()
        (tmp_path / "prompt").mkdir()
        for name, table in files.items():
            table.to_parquet(tmp_path / name, index=False)
        monkeypatch.chdir(tmp_path)
        for language, text in blocks("report.md"):
            if language == "python":
                exec(compile(text, "report.md", "exec"), {})
                assert "a linear model" in (tmp_path / "report.html").read_text()
                (tmp_path / "report.html").unlink()
            for command in shell_lines(text) if language == "bash" else []:
                run_here(command)
                page = (tmp_path / "report.html").read_text()
                (tmp_path / "report.html").unlink()
        assert "<h1>LoRA and prompts</h1>" in page
        assert page.count("<h3>prompt</h3>") == 4
