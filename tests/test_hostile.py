"""Inputs that try to break ngeval: escapes, bombs, odd names, and a small part of the fuzzing.

The long run is ``python -m tests.fuzz``; the inputs in which it found something are replayed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import html.parser
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import time
import zipfile

import hypothesis
import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

from ngeval.checkpoints import CheckpointLoader, find_checkpoints, read_optimizer, read_state
from ngeval.checkpoints.finding import read_metadata
from ngeval.cli.app import app
from ngeval.errors import CheckpointError, InputError, NgevalError
from ngeval.report import make_page, read_sources
from ngeval.results.manifest import manifest, write_manifest
from ngeval.tasks import get_task
from ngeval.tasks.hf.hub import hub_is_reachable
from ngeval.utils.text import visible
from tests.fuzz import engines, oracle
from tests.fuzz.__main__ import REGRESSIONS
from tests.fuzz.targets import TARGETS
from tests.fuzz.targets.checkpoints import STATE, zipped
from tests.report_cases import PAYLOADS, few_pictures, gammas, layers, samples, unfolded

EXAMPLES = {"checkpoints": 120, "results": 40, "texts": 80, "commands": 12}
"""Inputs of each target in CI."""


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Judge inputs of a target, in a folder of their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_is_reachable.cache_clear()
    oracle.listen()
    folder = tmp_path / "inputs"
    folder.mkdir()
    yield lambda attempt, data: oracle.judged(attempt, data, folder)
    hub_is_reachable.cache_clear()


class TestOracle:
    """The judge finds what it is there to find."""

    CASES = (
        ("exception", lambda data, folder: {}["none"]),
        ("no message", lambda data, folder: raising(InputError(""))),
        ("event", lambda data, folder: oracle.canary()),
        ("event", lambda data, folder: (folder.parent / "outside").write_bytes(data)),
        ("event", lambda data, folder: (folder.parent / "outside").mkdir()),
        ("event", lambda data, folder: (folder / ".." / "outside").unlink(missing_ok=True)),
        ("event", lambda data, folder: os.rename(folder, f"{folder}-moved")),  # noqa: PTH104
        ("event", lambda data, folder: subprocess.run([sys.executable, "-V"], check=False)),
    )

    @pytest.mark.parametrize(("kind", "attempt"), CASES)
    def test_finds(self, judged, kind, attempt):
        assert judged(attempt, b"x").kind == kind

    def test_finds_what_takes_too_long(self, judged, monkeypatch):
        monkeypatch.setattr(oracle, "PATIENCE", 0.05)
        assert judged(lambda data, folder: time.sleep(5), b"").kind == "slow"

    @pytest.mark.parametrize(
        "attempt",
        [
            lambda data, folder: (folder / "inside").write_bytes(data),
            lambda data, folder: raising(InputError("what to do")),
        ],
    )
    def test_lets_pass(self, judged, attempt):
        assert judged(attempt, b"x") is None


def raising(error):
    raise error


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.bin")), ids=lambda path: path.stem)
def test_regressions(judged, path):
    target = TARGETS[path.name.partition("-")[0]]
    assert judged(target.attempt, path.read_bytes()) is None


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_some_inputs(judged, target):
    result = []

    @hypothesis.settings(
        max_examples=EXAMPLES[target.name],
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.structured())
    def attempt(data):
        result.append((judged(target.attempt, data), data))

    attempt()
    for data in target.seeds() if target.name in ("checkpoints", "texts") else ():
        attempt.hypothesis.inner_test(data)
    assert [(output, data) for output, data in result if output is not None] == []
    assert len(result) > EXAMPLES[target.name] // 2


# Escapes.


def sharded(folder, **places):
    """An index with a good shard beside it."""
    safetensors.torch.save_file({"weight": STATE["weight"]}, folder / "one.safetensors")
    output = {"weight": "one.safetensors"} | places
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": output}))


OUTSIDE = "../outside.safetensors"


@pytest.mark.parametrize(
    "place",
    [OUTSIDE, "sub/../../outside.safetensors", "/etc/passwd", "{outside}", "..", ".", "", "a\0b"],
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "outside.safetensors"
    safetensors.torch.save_file({"bias": STATE["bias"]}, outside)
    sharded(folder, bias=place.format(outside=outside))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_state(folder)


def test_a_shard_is_no_link_out_of_its_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "outside.safetensors"
    safetensors.torch.save_file({"bias": STATE["bias"]}, outside)
    sharded(folder, bias="two.safetensors")
    (folder / "two.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"outside its folder.*two\.safetensors"):
        read_state(folder)


def test_links_as_the_hub_makes_them_are_followed(tmp_path):
    """Index and shards are links into one folder of contents."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sharded(blobs, bias="two.safetensors")
    safetensors.torch.save_file({"bias": STATE["bias"]}, blobs / "two.safetensors")
    for path in list(blobs.iterdir()):
        (snapshot / path.name).symlink_to(path)
    assert set(read_state(snapshot)) == {"weight", "bias"}


def test_members_of_a_zip_are_never_written(tmp_path):
    path = tmp_path / "folder" / "a.pt"
    path.parent.mkdir()
    torch.save(STATE, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped", "x")
        archive.writestr("/tmp/escaped", "x")
    with contextlib.suppress(CheckpointError):
        read_state(path)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["a.pt", "folder"]


# Bombs.


def test_a_zip_that_unpacks_to_more_than_it_is(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}" + b"\x00" * 50_000_000 + b".")
    with pytest.raises(CheckpointError, match=r"bomb\.pt.*more than the file has"):
        read_state(path)


def test_a_header_that_declares_terabytes(tmp_path):
    path = tmp_path / "huge.safetensors"
    output = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    header = json.dumps(output).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(CheckpointError, match=r"huge\.safetensors cannot be read"):
        read_state(path)
    path.write_bytes(struct.pack("<Q", 2**62) + header)
    with pytest.raises(CheckpointError, match=r"huge\.safetensors cannot be read"):
        read_state(path)


NESTED = {
    "key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "memo": b"\x80\x02}(" + b")" + b"\x85q\x00h\x00\x86" * 100_000 + b"K\x01u.",
    "value": b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * 300_000 + b"s.",
}


@pytest.mark.parametrize("container", [zipped, bytes])
@pytest.mark.parametrize("opcodes", NESTED.values(), ids=NESTED)
def test_values_nested_by_the_thousand(tmp_path, opcodes, container):
    """Python's hash of such a tuple overflows the C stack: the process would be gone."""
    path = tmp_path / "nested.pt"
    path.write_bytes(container(opcodes))
    for read in (read_state, read_optimizer):
        with pytest.raises(CheckpointError, match=r"nested\.pt"):
            read(path)


@pytest.mark.parametrize("beside", [False, True])
def test_json_nested_by_the_thousand(tmp_path, beside):
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    name = "a.json" if beside else "model.safetensors.index.json"
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="cannot be read as"):
        read_metadata(tmp_path / "a.safetensors") if beside else read_state(tmp_path)


def test_numbers_that_are_no_epochs(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    for text in ("NaN", "Infinity", "1e999", "1" * 400, '"3"', "true", "[]", "null"):
        (tmp_path / "a.json").write_text(f'{{"epoch": 1, "epoch": {text}, "step": 7}}')
        (checkpoint,) = find_checkpoints([str(tmp_path)])
        assert checkpoint.epoch is None
        assert checkpoint.step == 7


# Names.

ODD = ("\x1b[31mred\x1b[0m", "a\nngeval: written", "[bold]b[red]", "[link=x]y", "\u202egnp", "\r")


def test_what_a_terminal_acts_on_is_spelt_out():
    shown = visible("\x1b]0;title\x07 \u202e \udcff é 한 λ 🙂\n")
    assert shown == r"\x1b]0;title\x07 \u202e \udcff é 한 λ 🙂\n"
    assert len(visible("x" * 10**6)) < 10_000


@pytest.mark.parametrize("name", ODD)
def test_names_in_messages(tmp_path, name):
    place = tmp_path / "runs"
    place.mkdir()
    (place / f"{name}.safetensors").write_bytes(b"nothing of the kind")
    done = CliRunner().invoke(app, ["gamma", "--task", "digits-mlp", "--checkpoint", str(place)])
    assert done.exit_code in (2, 3)
    assert not set(done.stderr) & {"\x1b", "\r", "\u202e"}
    assert not any(line.startswith("ngeval: written") for line in done.stderr.splitlines())


def test_a_name_of_a_million_letters(tmp_path):
    name = "a" * 10**6
    torch.save({name: torch.zeros(1)}, tmp_path / "a.pt")
    (checkpoint,) = find_checkpoints([str(tmp_path)])
    with pytest.raises(CheckpointError) as error:
        CheckpointLoader(nn.Linear(4, 3)).load(checkpoint)
    assert len(str(error.value)) < 5_000
    for text in (name, f"{name}.py:x", f"{name}:x"):
        with pytest.raises(NgevalError):
            get_task(text)
    with pytest.raises(CheckpointError):
        find_checkpoints([name])


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    path = tmp_path / f"{'a' * 252}.pt"
    torch.save(STATE, path)
    (checkpoint,) = find_checkpoints([str(tmp_path)])
    assert checkpoint.optimizer is None
    CheckpointLoader(nn.Linear(4, 3)).load(checkpoint)


# The page.

TEXTS = ("task", "checkpoint", "method", "layer", "optimizer", "reason", "likelihood", "engine")


class Elements(html.parser.HTMLParser):
    """Every element of a page, with its attributes, and the text of its scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self._inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def page_of(folder, payloads):
    """A page on every kind of table, with payloads in place of its texts, in turn."""
    folder.mkdir()
    turn = itertools.cycle(payloads)
    tables = {
        "g": gammas(batches=2, epochs=(0, 5), dampings=(1e-3, 1.0)),
        "i": samples(),
        "l": layers(),
    }
    paths = []
    for name, table in tables.items():
        for column in TEXTS:
            if column in table:
                last = table[column] == table[column].iloc[-1]
                table[column] = table[column].mask(last, next(turn))
        if name == "g":
            table.loc[table.index[:2], "status"] = "failed"
            table.loc[table.index[:2], "reason"] = next(turn)
        payload = next(turn)
        table[payload] = payload
        safe = "".join(sign for sign in payload if sign not in "/\0")[:60]
        paths.append(folder / f"{safe}{name}.parquet")
        table.to_parquet(paths[-1], index=False)
        output = manifest(
            {payload: payload}, command=["ngeval", payload], facts={payload: [payload]}
        )
        machine = {"cpu": next(turn), "gpus": [next(turn)]}
        write_manifest(paths[-1], output | {"machine": machine})
    with few_pictures():
        return unfolded(make_page(read_sources(paths), title="".join(payloads)))


ALLOWED = set(
    re.findall(
        r"\w+",
        "html head meta title link style body a header h1 h2 h3 h4 p nav main section dl dt dd div "
        "details summary ul li span label select option table caption thead tbody tr th td button "
        "figure figcaption script noscript strong "
        "svg g path defs use text tspan clippath rect circle",
    )
)


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory):
    """The same page with harmless names."""
    return page_of(tmp_path_factory.mktemp("plain") / "p", [f"name{i}" for i in range(12)])


@pytest.mark.parametrize("first", [0, 7])
def test_names_in_the_page_are_text(tmp_path, plain_page, first):
    page = page_of(tmp_path / "p", PAYLOADS[first:] + PAYLOADS[:first])
    parsed, plain = Elements(), Elements()
    parsed.feed(page)
    plain.feed(plain_page)
    assert {tag for tag, _ in parsed.elements} <= ALLOWED
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "srcdoc"]
        for name in ("href", "src", "action", "formaction"):
            address = attributes.get(name)
            assert address is None or address.startswith("#") or address == "data:,", tag
    assert len(parsed.scripts) == len(plain.scripts)


def test_security_policy_is_first_of_the_page(plain_page):
    page = plain_page
    assert page.index("Content-Security-Policy") < page.index("<title>")
    assert "default-src 'none'" in html.unescape(page)
    assert "unsafe-eval" not in page


def test_the_fuzzer_counts_and_keeps_what_it_finds(tmp_path, judged):
    folder, findings = tmp_path / "run", tmp_path / "findings"
    folder.mkdir()
    counter = engines.Counter("texts", folder, findings, folder / "status.json")
    engines.with_hypothesis(counter, 80, seed=1)
    assert counter.inputs == 80
    assert counter.findings == {}
    broken = dataclasses.replace(counter.target, attempt=lambda data, folder: {}[data])
    counter.target = broken
    for data in (b"long", b"s", b"longer"):
        counter.attempt(data)
    (output,) = counter.findings.values()
    assert output["kind"] == "exception"
    assert [path.read_bytes() for path in findings.iterdir()] == [b"s"]
    assert json.loads((folder / "status.json").read_text())["findings"] == [output]
