"""What may stand in a result file that somebody edited, joined or broke: told, or refused."""

import contextlib
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngeval import InputError, OutputError
from ngeval.analysis.stages import checkpoint_labels
from ngeval.errors import NgevalError
from ngeval.report import make_page, read_sources, write_report
from ngeval.report.facts import facts, troubles
from ngeval.report.findings import findings
from ngeval.report.sources import Source, Topic, ends_of, topics
from ngeval.report.summaries import grades
from ngeval.report.wording import interval_text, with_interval
from ngeval.results.manifest import manifest_path
from ngeval.results.table_files import read_results
from tests.report_cases import gammas, layers, no_pictures, one_picture, samples


def read(folder, tables):
    """Tables as files of these names, read back."""
    for name, table in tables.items():
        (folder / name).parent.mkdir(exist_ok=True)
        table.to_csv(folder / name, index=False)
    return read_sources([folder / name for name in tables])


def said(**tables):
    return "\n".join(findings(Topic("t", tables)))


def told_of(sources):
    """The topics' findings, troubles and notes, as text."""
    result = topics(sources)
    parts = [line for topic in result for line in findings(topic)]
    parts += [f"{t.count} {t.status}: {t.reason}" for topic in result for t in troubles(topic)]
    return "\n".join([*parts, *(note for topic in result for note in topic.notes)])


@pytest.fixture(name="one_picture")
def _one_picture():
    with one_picture():
        yield
    plt.close("all")


@pytest.fixture(name="no_pictures")
def _no_pictures():
    with no_pictures():
        yield


class TestFiles:
    def test_files_of_one_name_are_told_apart_by_their_folders(self, tmp_path, one_picture):
        twice = gammas().assign(gamma_over_sgd=lambda t: 2 * t["gamma_over_sgd"])
        sources = read(tmp_path, {"a/gamma.csv": gammas(), "b/gamma.csv": twice})
        assert [topic.name for topic in topics(sources)] == ["t (a/gamma)", "t (b/gamma)"]
        assert dict(facts(topics(sources)[0]))["files"] == "a/gamma.csv"
        page = make_page(sources)
        assert page.count("<h3>t (b/gamma)</h3>") == 4
        assert 'data-name="a-gamma.csv"' in page
        assert 'data-name="b-gamma.csv"' in page

    def test_as_much_of_a_path_as_is_needed(self, tmp_path):
        paths = [tmp_path / name for name in ("a/x/g.csv", "b/x/g.csv", "b/x/i.csv", "c/g.csv")]
        assert list(ends_of(paths).values()) == ["a/x/g.csv", "b/x/g.csv", "i.csv", "c/g.csv"]

    def test_one_stem_with_two_extensions(self, tmp_path):
        sources = read(tmp_path, {"g.csv": gammas()})
        gammas(noise=0.1).to_parquet(tmp_path / "g.parquet")
        sources += read_sources([tmp_path / "g.parquet"])
        assert [topic.name for topic in topics(sources)] == ["t (g.csv)", "t (g.parquet)"]

    def test_a_task_that_is_called_like_a_run(self, tmp_path):
        tables = {"a.csv": gammas(), "b.csv": gammas(noise=0.1)}
        tables["c.csv"] = gammas(task="t (a)")
        assert len({topic.name for topic in topics(read(tmp_path, tables))}) == 3

    def test_a_folder_is_said_to_be_one(self, tmp_path):
        (tmp_path / "d.csv").mkdir()
        with pytest.raises(OutputError, match=r"d\.csv is a folder"):
            read_results(tmp_path / "d.csv")

    @pytest.mark.parametrize(
        "text",
        ["[" * 100_000, '{"a":' * 100_000, "[]", "{", "", b"\xff\xfe{"],
        ids=["deep", "deep object", "list", "cut", "empty", "binary"],
    )
    def test_a_bad_manifest_is_a_warning_that_names_it(self, tmp_path, no_pictures, text):
        read(tmp_path, {"g.csv": gammas()})
        content = text if isinstance(text, bytes) else text.encode()
        manifest_path(tmp_path / "g.csv").write_bytes(content)
        page = make_page(read_sources([tmp_path / "g.csv"]))
        warnings = page[page.index('id="warnings"') :]
        assert re.search(r"<li>[^<]*g\.csv\.manifest\.json[^<]*delete it", warnings)

    @pytest.mark.parametrize(
        "content",
        [
            {"machine": {"gpus": 3, "cores": {}, "cpu": None}},
            {"machine": {"memory": 10**400, "gpus": "one"}},
            {"machine": {"memory": -1}},
            {"command": "\ud800"},
            {"options": {"a": ["x", ["y"] * 50] * 40}, "run": [1]},
        ],
    )
    def test_odd_manifests_do_not_cost_the_page(self, tmp_path, no_pictures, content):
        read(tmp_path, {"g.csv": gammas()})
        manifest_path(tmp_path / "g.csv").write_text(json.dumps(content), encoding="utf-8-sig")
        (source,) = read_sources([tmp_path / "g.csv"])
        assert (source.manifest, source.notes) == (content, ())
        output = write_report([tmp_path / "g.csv"], tmp_path / "r.html")
        assert "Command, versions, machine and options" in output.read_text(encoding="utf-8")

    def test_a_name_that_is_no_text(self, tmp_path, one_picture):
        table = gammas().drop(columns="task")
        page = make_page([Source(tmp_path / "x\udcff.csv", "gammas", table)])
        assert r"x\udcff" in page
        assert page.encode()


class TestRows:
    def test_rows_that_stand_twice_count_once(self, tmp_path):
        both = pd.concat([gammas(), gammas()[:5]])
        (result,) = topics(read(tmp_path, {"g.csv": both}))
        assert len(result.tables["gammas"]) == len(gammas())
        assert result.notes == ["g.csv: 5 rows are there more than once, and counted once."]
        assert findings(result) == findings(topics(read(tmp_path, {"g.csv": gammas()}))[0])

    @pytest.mark.parametrize(
        ("table", "column", "keys"),
        [
            (gammas(), "gamma_over_sgd", "checkpoint, batch, method and damping"),
            (samples(), "gradient_norm", "checkpoint, batch and sample"),
            (layers(), "excess", "checkpoint, batch, method, damping and layer"),
        ],
    )
    def test_rows_that_contradict_each_other_are_refused(self, tmp_path, table, column, keys):
        other = table[-2:].assign(**{column: table[column] * 1.5 + 1})
        message = (
            rf"x\.csv: 2 rows repeat an earlier one with different numbers \(they agree in {keys};"
        )
        with pytest.raises(InputError, match=message):
            topics(read(tmp_path, {"x.csv": pd.concat([table, other])}))

    def test_what_to_do_is_said(self, tmp_path):
        table = gammas().drop(columns="batch")
        with pytest.raises(InputError, match="number these in column batch"):
            topics(read(tmp_path, {"x.csv": table}))

    def test_a_failed_row_and_its_repetition_are_no_contradiction(self, tmp_path):
        lost = gammas()[:1].assign(status="failed", reason="memory")
        assert len(topics(read(tmp_path, {"x.csv": pd.concat([lost, gammas()])}))) == 1

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"damping_scale": "mean"}, ["damping_scale absolute", "damping_scale mean"]),
            ({"num_samples": 99}, ["num_samples 32", "num_samples 99"]),
            ({"metric_samples": 99}, ["metric_samples 32", "metric_samples 99"]),
            ({"dtype": "float64"}, ["dtype float32", "dtype float64"]),
            ({"seed": lambda t: t["seed"] + 50}, ["seed 3", "seed 53"]),
            ({"seed": 7}, None),
        ],
    )
    def test_two_settings_in_a_file_are_two_runs(self, tmp_path, change, names):
        second = gammas().assign(gamma_over_sgd=lambda t: 9 * t["gamma_over_sgd"], **change)
        alone = gammas()
        if names is None:
            alone, names = alone.assign(seed=5), ["seed 5", "seed 7"]
        result = topics(read(tmp_path, {"g.csv": pd.concat([alone, second])}))
        assert [topic.name for topic in result] == [f"t (g; {name})" for name in names]
        for topic, table in zip(result, (alone, second), strict=True):
            assert findings(topic) == findings(Topic("t", {"gammas": table}))
            assert "g.csv holds 2 runs of t" in topic.notes[0]

    def test_batches_of_several_sizes_are_one_run(self, tmp_path):
        table = gammas()
        table.loc[table["batch"] == 5, "num_samples"] = 20
        (result,) = topics(read(tmp_path, {"g.csv": table}))
        assert "N = 32, 20 samples" in dict(facts(result))["batches"]

    @pytest.mark.parametrize(
        ("value", "reason"),
        [(np.nan, "is NaN"), (np.inf, "is infinite"), (-1.0, "is not positive"), (0.0, "positive")],
    )
    def test_ratios_that_cannot_be_used_are_told(self, tmp_path, value, reason):
        table = gammas()
        table.loc[table["method"] == "ef", "gamma_over_sgd"] = value
        (result,) = topics(read(tmp_path, {"g.csv": table}))
        (trouble,) = troubles(result)
        assert (trouble.count, trouble.status) == (54, "left out")
        assert trouble.reason.startswith("γ/γ_SGD")
        assert trouble.reason.endswith(reason)
        assert dict(trouble.where)["methods"] == "ef"
        assert not re.search(r"\bEF\b", "".join(findings(result)))

    def test_bounds_of_two_signs_are_no_value(self):
        table = gammas().assign(gamma_ng_lower=-1.0)
        assert grades(table).natural.empty

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_shares_that_cannot_be_used_are_told(self, tmp_path, value):
        table = layers()
        table.loc[table["layer"] == "0.1", "curvature_share"] = value
        text = told_of(read(tmp_path, {"l.csv": table}))
        assert "18 left out: a share is NaN or infinite" in text
        assert "EF in layer out (70 % of its KL" in text

    @pytest.mark.parametrize(
        ("value", "reason"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "negative")]
    )
    def test_norms_that_are_none_are_told(self, tmp_path, value, reason):
        table = samples()
        table.loc[(table["sample"] == 3) & (table["batch"] == 0), "gradient_norm"] = value
        text = told_of(read(tmp_path, {"i.csv": table}))
        assert f"3 left out: the gradient's norm is {reason}" in text
        assert "3 batches hold a sample with an invalid norm (NaN, infinite or negative)" in text
        assert "means over 5 batches" in text
        assert "without a gradient" not in text
        table.loc[table["sample"] == 3, "gradient_norm"] = value
        assert "No batch has a finite imbalance" in told_of(read(tmp_path, {"i.csv": table}))

    def test_norms_without_a_batch_are_of_one(self, tmp_path):
        table = samples()[lambda t: t["batch"] == 0].assign(batch=np.nan)
        assert "is 2 × the smallest at epoch 0" in told_of(read(tmp_path, {"i.csv": table}))

    @pytest.mark.parametrize(
        ("column", "value"), [("damping", np.nan), ("batch", np.nan), ("epoch", "late")]
    )
    def test_columns_that_must_be_told_are_named(self, tmp_path, column, value):
        table = gammas().astype({column: object})
        table.loc[7, column] = value
        with pytest.raises(InputError, match=rf"g\.csv: column {column} .* in row 8"):
            topics(read(tmp_path, {"g.csv": table}))

    @pytest.mark.parametrize("seed", ["a0", 0.5, [1, 2], {"a": 1}])
    def test_seeds_are_shown_as_they_are(self, tmp_path, seed):
        path = tmp_path / "g.jsonl"
        rows = gammas().assign(seed=[seed] * len(gammas())).to_dict("records")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (result,) = topics(read_sources([path]))
        assert dict(facts(result))["seed"] == str(seed)


class TestVerdicts:
    def test_what_rounds_to_one_is_not_told_from_it(self):
        table = gammas({"sgd": 1.0, "mine": 1.0}, noise=0.0)
        mine = table["method"] == "mine"
        table.loc[mine, "gamma_over_sgd"] = 1 - 1e-9 * (1 + table["batch"])
        text = said(gammas=table)
        assert "nearer to the natural gradient" not in text
        assert "not distinguishable from SGD with these batches: mine" in text

    @pytest.mark.parametrize("end", [1.00011, 1.0004, 1.003, 1.02, 0.99985, 0.9994, 0.996])
    def test_an_end_that_decides_is_not_shown_as_one(self, end):
        shown = interval_text(*sorted([end, 4.14 if end > 1 else 0.2]))
        assert "[1, " not in shown
        assert ", 1]" not in shown
        low, high = (float(part) for part in shown.strip("[]").split(", "))
        assert (low > 1) == (end > 1)
        assert (high < 1) == (end < 1)

    def test_an_end_that_does_not_decide_is_shown_as_one(self):
        assert with_interval(1.87, 1.00004, 4.14) == "1.87 [1, 4.14]"

    def test_methods_of_one_batch_are_told_by_themselves(self):
        table = gammas(batches=3)
        table.loc[(table["method"] == "ef") & (table["batch"] > 0), "status"] = "failed"
        text = said(gammas=table)
        assert "unknown, for one batch has no interval: EF" in text
        assert "Caution: intervals over 3 batches are too narrow" in text
        assert re.search(r"EF from \S+ to \S+ \(without an interval\)", text)

    def test_the_caution_names_the_methods_that_it_is_for(self):
        table = gammas(batches=6)
        table.loc[(table["method"] == "ef") & (table["batch"] > 2), "status"] = "failed"
        assert "Caution: intervals of EF over 3 batches are too narrow" in said(gammas=table)

    def test_dampings_are_counted_of_those_that_a_method_has(self):
        table = gammas(noise=0.0)
        table.loc[(table["method"] == "ief") & (table["damping"] == 1.0), "status"] = "failed"
        assert "iEF at 2 from 1e-6 to 0.001" in said(gammas=table)

    def test_layers_are_told_of_the_last_checkpoint_at_the_smallest_positive_damping(self):
        late, early = (layers()[lambda t, e=e: t["epoch"] == e] for e in (10, 0))
        zero = late.assign(damping=0.0)
        text = said(layers=pd.concat([zero, late, early]))
        assert text.startswith("Updates lose most at epoch 10, λ = 0.001")

    def test_large_steps_are_whole_and_differ(self):
        table = gammas().drop(columns="epoch")
        table["step"] = 1_234_567 + table["step"] / 10
        labels = list(checkpoint_labels(table).values())
        assert labels == ["step 1234567", "step 1234572", "step 1234577"]
        halves = table.assign(step=table["step"] / 1e7)
        assert len(set(checkpoint_labels(halves).values())) == 3


TABLES = {"gammas": gammas(batches=2, epochs=(0, 1)), "samples": samples()[:40]}
TABLES |= {"layers": layers()}

odd_numbers = st.one_of(
    st.sampled_from([0.0, -1.0, 1.0, np.nan, np.inf, -np.inf, 1e308, 5e-324, 1e-6, 1e7]),
    st.floats(width=64),
)
odd_values = st.one_of(
    odd_numbers,
    st.sampled_from([None, "", "a", "nan", "1", True, [1, 2], [], {"a": [1]}, "\x00", "x" * 60]),
    st.integers(-(10**20), 10**20),
)


class TestAnyTable:
    """A table with the right columns gives a page or an error of ngeval, whatever stands in it."""

    @staticmethod
    def page_or_error(kind, table):
        source = Source(Path("x.csv"), kind, table)
        with contextlib.suppress(NgevalError):
            assert make_page([source]).rstrip().endswith("</html>")

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(data=st.data())
    @pytest.mark.parametrize("kind", ["gammas", "samples", "layers"])
    def test_odd_values(self, one_picture, kind, data):
        table = TABLES[kind]
        columns = data.draw(st.lists(st.sampled_from(list(table)), min_size=1, max_size=3))
        table = table.astype(dict.fromkeys(columns, object))
        for column in columns:
            values = odd_numbers if data.draw(st.booleans()) else odd_values
            whole = data.draw(st.booleans())
            rows = range(len(table)) if whole else data.draw(st.sets(st.integers(0, 11)))
            value = data.draw(values)
            for row in rows:
                table[column].array[row] = value
        if data.draw(st.booleans()):
            table = table.infer_objects()
        self.page_or_error(kind, table)
