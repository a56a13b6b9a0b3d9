"""The two engines, one target in each process: ``python -m tests.fuzz.engines``."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FIRST = ("torch", "pandas", "scipy.stats", "matplotlib.pyplot", "typer.testing", "hypothesis")
"""What is imported before the coverage-guided engine looks at imports, which takes it minutes."""

READERS = ("torch._weights_only_unpickler", "pickletools", "zipfile")
"""Readers in Python whose branches it sees as well, beside all of ngeval's."""

MEMORY = 12 * 2**30
"""Bytes of address space: what asks for terabytes gets an error."""

DEAD = 120
"""Seconds after which an input in native code ends the process."""


class Counter:
    """Counts inputs and keeps the smallest one of each finding.

    Attributes:
        inputs: how many were tried.
        findings: by their keys: what they are, and the file that holds the input.
    """

    def __init__(self, target: str, folder: Path, findings: Path, status: Path) -> None:
        """Keep where things go."""
        from tests.fuzz import oracle  # noqa: PLC0415
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415

        self.target, self.folder = TARGETS[target], folder
        self.findings_folder, self.status = findings, status
        self.inputs = 0
        self.findings: dict[str, dict[str, str]] = {}
        self._sizes: dict[str, int] = {}
        self._told = 0.0
        self._judged = oracle.judged
        (folder / "work").mkdir()
        oracle.listen()

    def attempt(self, data: bytes) -> None:
        """Try one input."""
        (self.folder / "last").write_bytes(data)
        faulthandler.dump_traceback_later(DEAD, exit=True)
        result = self._judged(self.target.attempt, data, self.folder / "work")
        faulthandler.cancel_dump_traceback_later()
        self.inputs += 1
        if result is not None and len(data) < self._sizes.get(result.key, sys.maxsize):
            self._sizes[result.key] = len(data)
            digest = hashlib.sha256(result.key.encode()).hexdigest()[:12]
            path = self.findings_folder / f"{self.target.name}-{digest}.bin"
            self.findings_folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            output = {"kind": result.kind, "text": result.text, "where": result.where}
            self.findings[result.key] = output | {"input": path.name}
            self.tell()
        if time.monotonic() - self._told > 0.5:
            self.tell()

    def tell(self) -> None:
        """Say how far it is, in a file that is replaced whole."""
        self._told = time.monotonic()
        output = {"inputs": self.inputs, "findings": list(self.findings.values())}
        place = self.status.with_suffix(".part")
        place.write_text(json.dumps(output))
        place.replace(self.status)


def with_hypothesis(counter: Counter, count: int, seed: int) -> None:
    """Inputs of the right form with something odd in them, and valid ones that are damaged."""
    import hypothesis  # noqa: PLC0415

    for data in counter.target.seeds():
        counter.attempt(data)
    options = hypothesis.settings(
        max_examples=max(1, count),
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    strategy = counter.target.structured()
    while counter.inputs < count:

        @hypothesis.seed(seed + counter.inputs)
        @options
        @hypothesis.given(strategy)
        def attempt(data: bytes) -> None:
            if counter.inputs < count:
                counter.attempt(data)

        attempt()


def with_atheris(counter: Counter, count: int, seed: int) -> None:
    """Inputs that reach new branches are kept and changed further."""
    import atheris  # noqa: PLC0415

    corpus = counter.folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(counter.target.seeds()):
        (corpus / f"{number:03d}").write_bytes(data)
    words = counter.folder / "words"
    lines = [f'"{_escaped(word)}"' for word in counter.target.words if word]
    words.write_text("\n".join(lines) + "\n")
    flags = [f"-atheris_runs={count}", f"-seed={seed + 1}", f"-dict={words}", "-timeout=0"]
    flags += ["-rss_limit_mb=0", "-malloc_limit_mb=0", "-max_len=4096", "-len_control=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], counter.attempt)
    atheris.Fuzz()


def _escaped(word: str | bytes) -> str:
    """A word as libFuzzer's dictionaries have it."""
    data = word if isinstance(word, bytes) else word.encode()
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in data)


ENGINES: dict[str, Callable[[Counter, int, int], None]] = {
    "hypothesis": with_hypothesis,
    "atheris": with_atheris,
}


@contextlib.contextmanager
def instrumented(engine: str) -> Iterator[None]:
    """Imports whose branches are counted, for the coverage-guided engine."""
    if engine != "atheris":
        yield
        return
    import atheris  # noqa: PLC0415

    for name in FIRST:
        importlib.import_module(name)
    for name in READERS:
        with atheris.instrument_imports(include=[name]):
            again = importlib.reload(sys.modules[name])
        if "." in name:
            setattr(sys.modules["torch.serialization"], name.rpartition(".")[2], again)
    with atheris.instrument_imports(include=["ngeval"]):
        yield


def main() -> None:
    """One target with one engine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--findings", type=Path, required=True)
    job = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(job.folder / "hf"), "COLUMNS": "160"}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with instrumented(job.engine):
        counter = Counter(job.target, job.folder, job.findings, job.folder / "status.json")
    try:
        ENGINES[job.engine](counter, job.inputs, job.seed)
    finally:
        counter.tell()


if __name__ == "__main__":
    main()
