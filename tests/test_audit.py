"""The audit of pinned versions: what fails CI, what does not, and that both are reported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def audit():
    loader = importlib.machinery.SourceFileLoader("ci_audit", str(ROOT / ".ci" / "audit"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ci_audit", loader))
    loader.exec_module(module)
    return module


FLAW = {"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2.0"]}
GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "1.0", "vulns": [FLAW]}
UNKNOWN = {"name": "other", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "without", "code", "words"),
    [
        ([GOOD, GOOD], [], 0, "audited: 2 of 2"),
        ([GOOD, BAD], [], 1, "bad 1.0: PYSEC-1 (CVE-2026-1), fixed in 2.0"),
        ([GOOD, BAD], ["CVE-2026-1"], 0, "audited: 2 of 2"),
        ([BAD, *[UNKNOWN] * 20], [], 1, "PYSEC-1"),
        ([GOOD, *[UNKNOWN] * 20], [], 0, "not audited: the service knows 1 of 21"),
    ],
)
def test_verdict(audit, packages, without, code, words):
    result, lines = audit.verdict({"dependencies": packages}, without)
    assert result == code
    assert words in "\n".join(lines)


def test_every_ignored_advisory_has_a_date_and_a_reason(audit):
    assert audit.ignored("# why\n\nCVE-1  2026-11-23  never called\n") == ["CVE-1"]
    with pytest.raises(SystemExit, match="needs an advisory, a date and a reason"):
        audit.ignored("CVE-1\n")
    assert audit.ignored((ROOT / ".ci" / "audit-ignore").read_text()) == []


def test_a_service_that_does_not_answer_is_reported(audit, monkeypatch, capsys):
    answers = {"stdout": "", "stderr": "ConnectionError: no network"}
    done = type("Done", (), answers)
    monkeypatch.setattr(audit.subprocess, "run", lambda *args, **options: done)
    assert audit.main() == 0
    assert "cannot be reached, so nothing is audited: ConnectionError" in capsys.readouterr().err


def test_ci_runs_it():
    assert "\npython .ci/audit" in (ROOT / ".ci" / "run").read_text()
