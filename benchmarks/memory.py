"""Peak memory of K over that of a plain gradient, each in a separate process.

``python -m benchmarks.memory MODEL plain|gram|grade`` prints the measurement of one such process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ngeval
from benchmarks.claims import Claim, Measured
from benchmarks.models import BUILDERS, Workload, build
from benchmarks.pipeline import problem_of
from benchmarks.products import gradient_gram
from benchmarks.timing import Job, Settings, interleave, plain_gradient

GIB = 2**30
MOST_PROCESSES = 3
GRADING_MEMORY = 3 * GIB
"""The option ``memory`` of `grading`, beside the model, its outputs and one backward pass."""


def memory(workload: Workload, settings: Settings) -> Measured:
    """The ratio of peaks; the workload is built again in each process."""
    processes = min(settings.repeats, 1 if workload.name in ("gpt", "t5") else MOST_PROCESSES)
    peaks: dict[str, dict[str, float]] = {}
    for what in ("plain", "gram"):
        settings.on_step(f"{what} in a separate process")
        runs = [_in_process(workload.name, what, settings) for _ in range(processes)]
        peaks[what] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    ratios = {key: peaks["gram"][key] / peaks["plain"][key] for key in ("added", "loaded")}
    title = "peak memory of K over a gradient's"
    claims = [
        Claim(title, ratios["added"], "×", "≤", 1.5),
        Claim(f"{title}, torch's lazy parts loaded before", ratios["loaded"], "×", "≤", 1.5),
    ]
    if workload.name == "gpt":
        total = peaks["gram"]["whole"] / GIB
        claims.append(Claim("peak memory of K, whole process", total, "GiB", "≤", 8.0))
    details = {
        f"{what}, {key}, MiB": value / 2**20
        for what, peak in peaks.items()
        for key, value in peak.items()
    }
    return Measured(claims, {}, details, [_note(peaks, settings.device, processes)])


def grading(workload: Workload, settings: Settings) -> Measured:
    """Peak memory of a whole process that grades ef, ief and sf at three dampings, and its time."""
    settings.on_step("grading in a separate process")
    result = _run(workload.name, "grade", settings)
    claims = [
        Claim(
            "peak memory of a process that grades ef, ief and sf at 3 dampings",
            result["whole"] / GIB,
            "GiB",
            "≤",
            8.0,
        ),
        Claim("its time (Problem included)", result["seconds"] / result["gradient"], "GE"),
    ]
    outputs = workload.targets.numel()
    note = (
        f"{outputs} positions with {workload.num_parameters:,} trainable parameters; γ at λ = "
        "1e-6, 1e-3, 1 without the exact natural gradient, memory=3 GiB; "
        f"{result['added'] / 2**20:.0f} MiB above "
        "the imports, the model included"
    )
    return Measured(
        claims, {"grading": result["seconds"], "gradient": result["gradient"]}, {}, [note]
    )


def _note(peaks: dict[str, dict[str, float]], device: str, processes: int) -> str:
    on_gpu = device == "cuda"
    kind = "most memory allocated" if on_gpu else "peak RSS less that after the imports"
    added, loaded = (
        " over ".join(f"{peaks[what][key] / 2**20:.0f}" for what in ("gram", "plain"))
        for key in ("added", "loaded")
    )
    return (
        f"{kind}, the model and (for K) the Problem included: {added} MiB; {loaded} MiB where a "
        "toy of the same kind has run before the measurement, so that modules which torch imports "
        "at first use do not count (sympy, imported by autograd.grad with a cotangent, and rules "
        f"for forward mode); median of {processes} process(es)"
    )


def _in_process(name: str, what: str, settings: Settings) -> dict[str, float]:
    """Bytes ``added`` to the imports, ``whole``, and ``loaded``: added after all lazy imports."""
    result = _run(name, what, settings)
    return {**result, "loaded": _run(name, what, settings, "--loaded")["added"]}


def _run(name: str, what: str, settings: Settings, *flags: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", name, what, "--device", settings.device]
    if settings.quick:
        command.append("--quick")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{what} ended with {done.returncode}: {last}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def resident(*, peak: bool) -> int:
    """Bytes of memory of this process, current or peak.

    On Linux ``getrusage`` of a child includes the parent's peak, so the high-water mark of the
    process is read from /proc.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def measure(name: str, what: str, device: str, *, quick: bool, loaded: bool) -> dict[str, float]:
    """Run a measurement once; return the memory above the imports and in total."""
    if loaded:
        _work(build(name, device, quick=True, trained=False), what)
        _give_back_heap()
    base = resident(peak=False)
    # Without the brief training: its own peak would count.
    workload = build(name, device, quick=quick, trained=False)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    _work(workload, what)
    seconds = time.perf_counter() - started
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        highest, base = peak, 0
    else:
        highest = resident(peak=True)
    result = {"added": highest - base, "whole": highest}
    if what == "grade":  # a gradient after the peak was read
        yardstick = {"gradient": Job(lambda _: plain_gradient(workload))}
        timings = interleave(yardstick, Settings(device, repeats=3, quick=True))
        result |= {"seconds": seconds, "gradient": timings["gradient"]}
    return result


def _give_back_heap() -> None:
    """Return the toy's freed memory to the system and reset the peak."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark


def _work(workload: Workload, what: str) -> None:
    if what == "plain":
        plain_gradient(workload)
    elif what == "gram":
        gradient_gram(problem_of(workload))
    else:
        problem = problem_of(workload, GRADING_MEMORY)
        ngeval.evaluate(problem, ["sgd", "ef", "ief", "sf"], [1e-6, 1e-3, 1.0], natural=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BUILDERS)
    parser.add_argument("what", choices=("plain", "gram", "grade"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--loaded", action="store_true")
    args = parser.parse_args()
    result = measure(args.name, args.what, args.device, quick=args.quick, loaded=args.loaded)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
