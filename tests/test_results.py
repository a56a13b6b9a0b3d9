"""Result files: the same table in every format, and never a broken file."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from ngeval import OutputError
from ngeval.results.table_files import check_output, read_results, write_results

KINDS = ("csv", "parquet", "jsonl")
NUMBERS = [1 / 3, 1e-12, 2.5e-300, 1.7e300, -4.0, 123456789.123456789, 0.1 + 0.2]


def table(values=NUMBERS):
    return pd.DataFrame(
        {
            "task": "digits-cnn",
            "checkpoint": [f"run/epoch-{i}.pt" for i in range(len(values))],
            "method": 'odd, "name"\nλ',
            "batch": range(len(values)),
            "gamma": values,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
class TestFormats:
    def test_what_is_written_is_read_back(self, tmp_path, kind):
        write_results(table(), tmp_path / f"r.{kind}")
        result = read_results(tmp_path / f"r.{kind}")
        assert_frame_equal(result, table(), check_dtype=False, rtol=4e-16, atol=0)
        assert result["batch"].dtype == np.int64

    def test_a_missing_value_comes_back_missing(self, tmp_path, kind):
        write_results(table([1.0, np.nan, 3.0]), tmp_path / f"r.{kind}")
        assert read_results(tmp_path / f"r.{kind}")["gamma"].isna().tolist() == [False, True, False]

    def test_a_table_replaces_an_earlier_one(self, tmp_path, kind):
        for values in ([1.0, 2.0], [1.0, 2.0, 3.0]):
            write_results(table(values), tmp_path / f"r.{kind}")
            assert read_results(tmp_path / f"r.{kind}")["gamma"].tolist() == values
            assert [path.name for path in tmp_path.iterdir()] == [f"r.{kind}"]

    def test_a_failing_write_keeps_the_old_file(self, tmp_path, kind, monkeypatch):
        path = tmp_path / f"r.{kind}"
        path.write_text("old")

        def disk_full(self, *args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ngeval.results.table_files._WRITERS", {f".{kind}": disk_full})
        with pytest.raises(OutputError, match="No space left on device"):
            write_results(table(), path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_failing_replace_keeps_the_old_file(self, tmp_path, kind, monkeypatch):
        path = tmp_path / f"r.{kind}"
        path.write_text("old")
        real = os.replace

        def refused(source, target, **kwargs):
            if str(target) == str(path):
                raise PermissionError(13, "Permission denied")
            return real(source, target, **kwargs)

        monkeypatch.setattr("os.replace", refused)
        with pytest.raises(OutputError, match="Permission denied"):
            write_results(table(), path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_others_may_read_it(self, tmp_path, kind):
        write_results(table(), tmp_path / f"r.{kind}")
        assert (tmp_path / f"r.{kind}").stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("kind", ["csv", "parquet"])  # JSON has no infinity
def test_infinity_comes_back(tmp_path, kind):
    # γ_min is ∞ where the gradient is zero.
    write_results(table([1.0, np.inf, -np.inf]), tmp_path / f"r.{kind}")
    assert read_results(tmp_path / f"r.{kind}")["gamma"].tolist() == [1.0, np.inf, -np.inf]


def test_every_line_of_jsonl_is_strict_json(tmp_path):
    write_results(table([1.0, np.nan, 1e-12]), tmp_path / "r.jsonl")
    lines = (tmp_path / "r.jsonl").read_text().splitlines()

    def refuse(name):
        raise ValueError(name)

    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["gamma"] for row in rows] == [1.0, None, 1e-12]
    assert rows[0]["method"] == 'odd, "name"\nλ'


class TestCheckOutput:
    def test_makes_the_folder(self, tmp_path):
        check_output(tmp_path / "a" / "b" / "r.csv", (".csv",), force=False)
        assert (tmp_path / "a" / "b").is_dir()
        assert list((tmp_path / "a" / "b").iterdir()) == []

    def test_an_existing_file_needs_force(self, tmp_path):
        (tmp_path / "r.csv").write_text("old")
        with pytest.raises(OutputError, match=r"r\.csv exists; pass --force"):
            check_output(tmp_path / "r.csv", (".csv",), force=False)
        check_output(tmp_path / "r.csv", (".csv",), force=True)
        assert (tmp_path / "r.csv").read_text() == "old"

    def test_unknown_extension_lists_the_known(self, tmp_path):
        with pytest.raises(OutputError, match=r"'\.xls'; use one of \.csv, \.parquet"):
            check_output(tmp_path / "r.xls", (".csv", ".parquet"), force=False)


def test_upper_case_extension_is_told_or_read(tmp_path):
    table().to_csv(tmp_path / "r.CSV", index=False)
    with pytest.raises(OutputError, match=r"\.csv, \.parquet, \.jsonl"):
        read_results(tmp_path / "r.CSV")
