"""``ngeval plan``: what is counted, extrapolated and told, against counts and sums by hand."""

import dataclasses
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ngeval
from ngeval.cli import console
from ngeval.checkpoints import Checkpoint
from ngeval.cli import plan as command
from ngeval.errors import InputError
from ngeval.model.tangents import push_directions
from ngeval.jacobians import gram_matrix
from ngeval.curvature.logit_kernel import (
    GramKernel,
    JacobianKernel,
    MatrixFreeKernel,
    StripKernel,
    dense_is_feasible,
    logit_kernel,
)
from ngeval.planning import plan
from ngeval.planning.ladder import (
    Factorisation,
    Rung,
    extrapolate,
    iterations_at,
    memory_at,
    predict,
    rung_sizes,
    shapes_at,
)
from ngeval.planning.passes import Passes, count_passes
from ngeval.planning.probing import FactorTimer, form_of, take_form, timed_parts
from ngeval.results.table_files import ResultFile
from ngeval.runs.run import Grading, Run

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

ENGINES = ("layers", "vmap", "loop")
FORMS = {
    "jacobian": JacobianKernel,
    "gram": GramKernel,
    "strip": StripKernel,
    "matrix-free": MatrixFreeKernel,
}
OWN = Grading(natural=False)


def network(width=8, features=5, classes=3):
    """A perceptron, always the same."""
    torch.manual_seed(1)
    layers = (torch.nn.Linear(features, width), torch.nn.Tanh(), torch.nn.Linear(width, classes))
    return torch.nn.Sequential(*layers).eval()


def data(samples, features=5, classes=3, seed=0):
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, features, generator=generator)
    return inputs, torch.randint(0, classes, (samples,), generator=generator)


def problem_of(samples=6, engine="auto", **sizes):
    """The network on random data, without probes."""
    batch = data(samples, **{k: v for k, v in sizes.items() if k != "width"})
    return ngeval.Problem(network(**sizes), *batch, "categorical", engine=engine, probes=False)


def batches(size, count, seed):
    """Random batches."""
    return (data(size, seed=seed + index) for index in range(count or 4))


def run_of(batch_size=32, num_batches=3, checkpoints=2, load_batches=batches):
    """A run over a model as it is built."""
    task = ngeval.Task("mine", network, load_batches, "categorical")
    found = [Checkpoint(Path(f"epoch-{n}"), {}, as_built=True) for n in range(checkpoints)]
    return Run(task, found, batch_size=batch_size, num_batches=num_batches)


class TestPasses:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_products_are_counted(self, engine):
        problem = problem_of(engine=engine)
        with count_passes() as counter:
            problem.vjp(problem.residual)
            problem.jvp(torch.ones(problem.num_parameters))
        assert counter.per_batch(6) == Passes(1, 1, 1)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_every_cotangent_and_tangent_counts(self, engine):
        problem = problem_of(engine=engine)
        with count_passes() as counter:
            GramKernel(problem)  # one run, three outputs pulled back, together or not
        assert counter.per_batch(6) == pytest.approx(Passes(1, 3, 0))
        with count_passes() as counter:
            push_directions(problem.function, torch.randn(4, problem.num_parameters))
        assert counter.per_batch(6) == Passes(0, 0, 4)

    def test_parts_of_a_batch_make_parts_of_a_pass(self):
        problem = problem_of(8)
        with count_passes() as counter:
            problem.function.on(slice(0, 2)).vjp(problem.residual[:2])
        assert counter.per_batch(8) == Passes(0.25, 0.25, 0)

    def test_tangents_by_two_backward_passes_are_tangents(self):
        problem = problem_of()
        function = dataclasses.replace(problem.function, forward_mode=False)
        with count_passes() as counter:
            function.jvp(function.parameters)
        assert counter.per_batch(6) == Passes(0, 0, 1)

    def test_grading_sgd_by_hand(self):
        # The residual's rows would be pushed by Θ; g is one gradient, its γ one tangent.
        problem = problem_of(40, width=256, features=64, classes=10)
        with count_passes() as counter:
            ngeval.evaluate(problem, ["sgd"], [1e-3], natural=False)
        assert counter.per_batch(40) == Passes(1, 1, 1)

    def test_nothing_stays_wrapped(self):
        function = type(problem_of().function)
        kept = (function.__call__, function.jvp, torch.func.vmap, torch.autograd.grad)
        problem = problem_of()
        with pytest.raises(InputError, match="cotangent has shape"), count_passes():
            problem.vjp(torch.ones(4, 3))
        assert (function.__call__, function.jvp, torch.func.vmap, torch.autograd.grad) == kept

    def test_results_are_the_same(self):
        problem, other = problem_of(), problem_of()
        plain = gram_matrix(problem.rows, problem.residual.unsqueeze(1))
        with count_passes():
            counted = gram_matrix(other.rows, other.residual.unsqueeze(1))
        assert torch.equal(plain, counted)


class TestLadder:
    @pytest.mark.parametrize(
        ("samples", "most", "sizes"),
        [
            (160, None, [10, 20, 40, 80, 160]),
            (160, 40, [10, 20, 40]),
            (8, None, [2, 4, 8]),
            (5, 3, [2, 3]),
            (1, None, [1]),
            (2, 1, [1]),
        ],
    )
    def test_sizes(self, samples, most, sizes):
        assert rung_sizes(samples, most) == sizes

    @pytest.mark.parametrize("power", [0, 0.5, 1, 2])
    def test_a_power_is_continued(self, power):
        sizes = [10, 20, 40]
        found = extrapolate(sizes, [3.0 * n**power for n in sizes], 160)
        assert found == pytest.approx(3 * 160**power)

    def test_a_single_value(self):
        assert extrapolate([10], [3.0], 160) == pytest.approx(48.0)
        assert extrapolate([10], [3.0], 160, 5.0) == pytest.approx(15.0)
        assert extrapolate([10, 20], [0.0, 0.0], 160) == 0

    @given(powers=st.sampled_from([(0, 1), (1, 2)]), share=st.floats(0, 1), noise=st.floats(0, 0.1))
    def test_from_a_quarter_of_the_batch(self, powers, share, noise):
        """What does not depend on N with what goes with N, or that with what goes with N²."""

        def cost(n):
            return (1 - share) * (n / 40) ** powers[0] + share * (n / 40) ** powers[1]

        found = extrapolate([20, 40], [cost(20), cost(40)], 160)
        assert 0.7 * cost(160) <= found <= 1.0001 * cost(160)
        noisy = extrapolate([20, 40], [cost(20), (1 + noise) * cost(40)], 160)
        assert noisy <= found * (1 + noise) ** 3 * 1.0001

    def test_what_falls_stays(self):
        assert extrapolate([10, 20, 40], [1.2, 1.1, 1.0], 160) == 1.0

    def test_at_least_as_a_gradient(self):
        assert extrapolate([10, 20], [3.0, 3.0], 160, 6.0) == 18.0
        assert extrapolate([10, 20], [1.0, 2.0], 160, 6.0) == 16.0

    def test_a_unit_is_the_sum_of_its_parts(self):
        def rung(n):
            rest, each, factor = 1e-3 * n**2, 0.01 * n, 1e-6 * (10 * n) ** 3
            return Rung(
                n,
                rest + 8 * each + factor,
                (Factorisation("gram", (10 * n, 10 * n), factor),),
                8 * each,
                8,
                gradient_seconds=1e-3 * n,
                memory=1e6 + 1e4 * n,
                passes=Passes(4, 5, 6),
                rows=12,
            )

        rungs = [rung(n) for n in (10, 20, 40)]
        asked = []

        def time_of(kind, shape):
            asked.append((kind, shape))
            return 1e-6 * shape[0] ** 3

        cost = predict(rungs, 160, time_of, 300, 1e9)
        rest, each = 1e-3 * 160**2, 0.01 * 160
        assert asked == [("gram", (1600, 1600))]
        assert cost.factoring == pytest.approx(1e-6 * 1600**3)
        assert cost.krylov == pytest.approx(8 * each)
        assert cost.seconds == pytest.approx(rest + 8 * each + cost.factoring)
        assert cost.gradient_seconds == pytest.approx(0.16)
        assert cost.memory == pytest.approx(1e6 + 1e4 * 160)
        assert (cost.iterations, cost.passes, cost.rows) == (8, Passes(4, 5, 6), 12)

    def test_a_batch_that_was_reached_is_taken_as_it_is(self):
        rungs = [Rung(10, 1.0), Rung(20, 7.0, memory=5.0, passes=Passes(1, 2, 3), rows=4)]
        cost = predict(rungs, 20, lambda *_: pytest.fail("nothing to time"), 300, 1.0)
        assert (cost.seconds, cost.memory, cost.passes) == (7.0, 5.0, Passes(1, 2, 3))

    def test_krylov_iterations_follow_their_trend_to_the_limit(self):
        rungs = [Rung(10, 1.0, iterations=10), Rung(40, 1.0, iterations=20)]
        assert iterations_at(rungs, 160, 300) == 40
        assert iterations_at(rungs, 160, 25) == 25
        assert iterations_at(rungs[1:], 160, 300) == 20
        assert iterations_at([Rung(10, 1.0)], 160, 300) == 0

    def test_nothing_grows_less_than_a_gradient(self):
        rungs = [
            Rung(n, 3.0, krylov_seconds=1.0, iterations=4, gradient_seconds=1.0) for n in (5, 10)
        ]
        cost = predict(rungs, 40, lambda *_: 0.0, 300, 1.0, gradient_seconds=2.5)
        assert (cost.krylov, cost.seconds) == (2.5, 7.5)
        assert cost.gradient_seconds == 2.5
        assert predict(rungs[1:], 40, lambda *_: 0.0, 300, 1.0, gradient_seconds=2.5).seconds == 7.5
        assert predict(rungs[1:], 40, lambda *_: 0.0, 300, 1.0).seconds == 12.0

    def test_memory_of_logits_is_known_and_the_rest_a_line(self):
        def rungs(*sizes):
            return [Rung(n, 1.0, memory=7 * n**2 + 1e3 * max(n, 10) + 500) for n in sizes]

        assert memory_at(rungs(5, 10, 20), 80, 7.0) == 7 * 80**2 + 1e3 * 80 + 500
        assert memory_at(rungs(5, 10), 80, 7.0) == 7 * 80**2 + 1e4 + 500  # no growth seen
        assert memory_at(rungs(20), 80, 7.0) == 7 * 80**2 + 2 * (2e4 + 500)
        assert memory_at(rungs(20), 20, 7.0) == rungs(20)[0].memory

    def test_more_iterations_are_more_passes(self):
        rungs = [
            Rung(n, 1.0, krylov_seconds=0.5, iterations=k, passes=Passes(k + 2, k + 3, k))
            for n, k in ((10, 10), (40, 20))
        ]
        cost = predict(rungs, 160, lambda *_: 0.0, 300, 1.0)
        assert cost.passes == Passes(42, 43, 40)

    def test_memory_is_capped_by_the_budget(self):
        rungs = [Rung(n, 1.0, memory=1e6 * n) for n in (10, 20)]
        assert predict(rungs, 160, lambda *_: 0.0, 0, 3e7).memory == 3e7

    def test_sides_that_grow_with_the_samples(self):
        def rung(n, *shapes):
            return Rung(n, 1.0, tuple(Factorisation("rows", shape, 0.0) for shape in shapes))

        both = [rung(10, (20, 80), (7, 7)), rung(20, (40, 80), (7, 7))]
        assert shapes_at(both, 160) == [("rows", (320, 80)), ("rows", (7, 7))]
        assert shapes_at(both[1:], 160) == [("rows", (320, 640)), ("rows", (7, 7))]

    def test_a_large_factorisation_is_timed_at_a_smaller_size(self, monkeypatch):
        monkeypatch.setattr("ngeval.planning.probing.FACTORED_SIZE", 20)
        ticks = itertools.count()
        timer = FactorTimer("cpu", lambda: float(next(ticks)))
        assert timer("gram", (20, 20)) == 1.0
        assert timer("gram", (60, 60)) == pytest.approx(27.0)
        assert timer("rows", (60, 30)) == pytest.approx(27.0)  # 20 × 10
        assert next(ticks) == 4  # each size is timed once


LARGE = {"width": 256, "features": 64, "classes": 10}


class TestForms:
    @pytest.mark.parametrize(
        ("samples", "sizes", "exact", "pushes", "form"),
        [
            (20, {}, True, 100, "jacobian"),
            (40, LARGE, True, 100, "gram"),
            (40, LARGE, False, 100, "strip"),
            (40, LARGE, False, 1, "matrix-free"),
            (700, LARGE, True, 100, "strip"),
        ],
    )
    def test_a_small_problem_tells_what_a_large_one_does(self, samples, sizes, exact, pushes, form):
        large, small = problem_of(samples, **sizes), problem_of(4, **sizes)
        memory = large.rows.memory
        found = form_of(small, samples, memory, exact=exact, pushes=pushes)
        kernel = logit_kernel(large, exact=exact, pushes=pushes)
        assert found.kernel == form
        assert type(kernel) is FORMS[form]
        assert found.dense is dense_is_feasible(large)

    @pytest.mark.parametrize(("samples", "iterations"), [(40, False), (700, True)])
    def test_a_small_problem_goes_the_large_one_s_way(self, samples, iterations):
        small = problem_of(4, **LARGE)
        form = form_of(small, samples, small.rows.memory, exact=True, pushes=100)
        take_form(small, form, 1e-4)
        table = ngeval.evaluate(small, ["sgd", "ief", "ng"], [1e-3, 1.0])
        plain = ngeval.evaluate(problem_of(4, **LARGE), ["sgd", "ief", "ng"], [1e-3, 1.0])
        assert (small.recall("krylov_run") is not None) is iterations
        assert type(small.recall("dense_kernel")) is FORMS[form.kernel]
        torch.testing.assert_close(
            torch.tensor(table["gamma"]), torch.tensor(plain["gamma"]), rtol=1e-3, atol=0
        )


class Broken:
    """A method that cannot be computed."""

    name = "broken"

    def prepare(self, problem, seed=0):
        """Fail."""
        raise RuntimeError("out of order")


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """Units are run once: no test is about how long they take."""
    monkeypatch.setattr("ngeval.planning.probing.SHORT_SECONDS", 0.0)


class TestPlan:
    @pytest.fixture(scope="class")
    @staticmethod
    def made():
        with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
            patch.setattr("ngeval.planning.probing.SHORT_SECONDS", 0.0)
            return plan(run_of(), ["sgd", "ief", "ng"], [1e-3, 1.0], probe_seconds=30)

    def test_reaches_a_small_batch(self, made):
        assert made.measured
        assert [rung.samples for rung in made.rungs] == [2, 4, 8, 16, 32]
        assert (made.units, made.unit.rows, made.num_parameters) == (6, 6, 75)
        assert (made.kernel, made.solver, made.engine) == ("jacobian", "dense", "layers")
        assert made.model_bytes == 4 * 75
        assert 0 < made.unit.seconds < made.seconds()

    def test_passes_are_those_of_a_unit(self, made):
        run = run_of(num_batches=1, checkpoints=1)
        with count_passes() as counter:
            list(run.gammas(["sgd", "ief", "ng"], [1e-3, 1.0]))
        assert made.unit.passes == counter.per_batch(32)
        assert made.passes.tangent == 6 * made.unit.passes.tangent

    def test_ranks_share_units_and_load_what_they_need(self, made):
        unit = dataclasses.replace(made.unit, seconds=10.0)
        other = dataclasses.replace(
            made,
            **{"unit": unit, "checkpoints": 13, "batches": 5, "startup_seconds": 2.0},
            **{"load_seconds": 0.5, "threads": 1, "cores": 2},
        )
        assert other.seconds() == 2 + 13 * 0.5 + 65 * 10
        assert other.seconds(4) == 2 + 13 * 0.5 + 17 * 10
        assert other.seconds(40) == 2 + 2 * 0.5 + 2 * 10
        assert other.seconds(1000) == 2 + 0.5 + 10
        assert other.seconds_here(2) == other.seconds(2)
        assert other.seconds_here(8) == 4 * other.seconds(8)

    def test_stops_in_time(self):
        ticks = itertools.count(step=10)
        made = plan(
            run_of(), ["sgd"], [1.0], grading=OWN, probe_seconds=50, clock=lambda: next(ticks)
        )
        assert not made.measured
        assert made.rungs[-1].samples < 32

    @pytest.mark.parametrize(("methods", "metric"), [(["sgd", "ief"], 1), (["sgd", "ng"], None)])
    def test_no_work_is_done_that_the_run_does_not_do(self, monkeypatch, methods, metric):
        # As a whole batch that keeps Θ's strips would be treated, on the batch itself.
        monkeypatch.setattr("ngeval.curvature.logit_kernel.EXPLICIT_ENTRIES", 0)
        monkeypatch.setattr("ngeval.planning.probing.EXPLICIT_ENTRIES", 0)
        grading = Grading(metric, natural=False)
        run = run_of(batch_size=4, num_batches=1, checkpoints=1)
        made = plan(run, methods, [1e-3, 1.0], grading=grading)
        with count_passes() as counter, timed_parts(time.perf_counter) as parts:
            list(run.gammas(methods, [1e-3, 1.0], grading=grading))
        factored = sorted(one.shape for one in parts.factorisations)
        assert sorted(one.shape for one in made.rungs[-1].factorisations) == factored
        assert made.unit.passes == counter.per_batch(4)

    def test_most_samples(self):
        made = plan(run_of(8, 1, 1), ["sgd", "ief"], [1e-3], grading=OWN, max_samples=4)
        assert [rung.samples for rung in made.rungs] == [2, 4]
        assert not made.measured
        assert made.unit.seconds > 0

    @pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
    def test_disk_is_that_of_the_file(self, made, tmp_path, suffix):
        path = tmp_path / f"out{suffix}"
        with ResultFile(path) as file:
            for table in run_of().gammas(["sgd", "ief", "ng"], [1e-3, 1.0]):
                file.append(table)
        assert made.disk[suffix] == pytest.approx(path.stat().st_size, rel=0.3)

    def test_imbalance_has_a_row_for_each_sample(self):
        made = plan(run_of(checkpoints=1), ["ef"], [0.0], command="imbalance", max_samples=2)
        assert made.unit.rows == 32

    def test_layers_have_rows_for_each_layer(self):
        made = plan(run_of(2, 1, 1), ["sgd", "ief"], [1e-3], command="layers")
        assert made.unit.rows == 4

    def test_failed_rows_are_told(self):
        made = plan(run_of(2, 1, 1), ["sgd", Broken()], [1e-3], grading=OWN)
        assert "1 of 2 rows of the probe failed: RuntimeError: out of order" in made.notes

    def test_krylov_iterations_are_told(self):
        def large(size, count, seed):
            return (data(size, 64, 10, seed + index) for index in range(count))

        task = ngeval.Task("large", lambda: network(**LARGE), large, "categorical")
        checkpoint = Checkpoint(Path("built"), {}, as_built=True)
        run = Run(task, [checkpoint], batch_size=700, num_batches=1)
        made = plan(run, ["sgd"], [1.0], max_samples=1)
        assert (made.kernel, made.solver) == ("matrix-free", "krylov")
        assert made.unit.iterations >= 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"command": "gama"}, "unknown command 'gama'"),
            ({"probe_seconds": 0}, "positive number of seconds"),
            ({"probe_seconds": float("nan")}, "positive number of seconds"),
            ({"damping_scale": "none"}, "unknown damping scale"),
        ],
    )
    def test_wrong_arguments(self, options, message):
        with pytest.raises(InputError, match=message):
            plan(run_of(), ["sgd"], [1.0], **options)


app = typer.Typer(cls=console.Commands, pretty_exceptions_enable=False)
app.command()(command.plan)
app.callback()(lambda: None)

TASK_FILE = """
import torch
import ngeval


def batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 4):
        x = torch.randn(batch_size, 4, generator=generator)
        yield x, torch.randint(3, (batch_size,), generator=generator)


task = ngeval.Task("mine", lambda: torch.nn.Linear(4, 3), batches, "categorical")
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The options of a small run: a task file, and a checkpoint for it."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "mine.py").write_text(TASK_FILE)
    torch.save(torch.nn.Linear(4, 3).state_dict(), folder / "last.pt")
    return ["--task", f"{folder}/mine.py:task", "-c", f"{folder}/last.pt", "--batch-size", "8"]


def call(*args, code=0):
    """Run the command in this process; a wrong exit code shows what it printed."""
    result = CliRunner().invoke(app, ["plan", *map(str, args)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


class TestCommand:
    def test_tables_verdict_and_figures(self, asked, tmp_path):
        path = tmp_path / "plan.json"
        options = ("--methods", "sgd,ef", "--dampings", "1e-3,1", "--ranks", "1,16")
        shown = call(*asked, *options, "--output", path).stdout
        assert "5 units: 1 checkpoints × 5 batches of 8" in shown
        assert "a unit, measured on all 8 samples" in shown
        assert "starting the program" in shown
        assert "on 16 ranks" in shown
        assert "--shard samples" in shown
        told = json.loads(path.read_text())
        assert told["units"] == 5
        assert told["unit"]["rows"] == 4
        assert told["ranks"]["16"]["seconds"] < told["ranks"]["1"]["seconds"]
        assert told["disk"].keys() == {".csv", ".parquet", ".jsonl"}

    def test_checkpoints_that_cannot_be_loaded_are_noted(self, asked, tmp_path):
        folder, path = tmp_path / "several", tmp_path / "plan.json"
        folder.mkdir()
        for name in ("epoch-1.pt", "epoch-3.pt"):
            (folder / name).write_bytes(b"no checkpoint")
        torch.save(torch.nn.Linear(4, 3).state_dict(), folder / "epoch-2.pt")
        options = ("-m", "sgd", "--no-natural", "--output", path)
        shown = call(*asked[:3], folder, *asked[4:], *options).stdout
        assert "15 units" in shown
        assert shown.count("cannot be graded") == 2
        assert "epoch-1.pt" in shown
        assert "epoch-3.pt" in shown
        told = json.loads(path.read_text())
        parts = told["launch_seconds"] + told["startup_seconds"] + 3 * told["load_seconds"]
        assert told["ranks"]["1"]["seconds"] == pytest.approx(parts + 15 * told["unit"]["seconds"])
        assert told["launch_seconds"] > 0

    def test_other_ranks_of_torchrun_are_silent(self, asked, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr("ngeval.planning.plan", lambda *_, **__: pytest.fail("a plan is made"))
        assert call(*asked).output == ""

    def test_results_that_exist_need_force(self, asked, tmp_path):
        path = tmp_path / "plan.json"
        path.write_text("{}")
        assert "pass --force" in call(*asked, "--output", path, code=2).output
        again = call(*asked, "-m", "sgd", "--no-natural", "--output", path, "--force", "--quiet")
        assert again.output == ""
        assert json.loads(path.read_text())["methods"] == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--methods", "sdg"), "did you mean 'sgd'?"),
            (("--ranks", "0"), "ranks '0': write numbers of processes"),
            (("--ranks", "four"), "ranks 'four'"),
            (("--dampings", "-1"), "damping -1.0 is not allowed"),
            (("--probe-seconds", "-1"), "positive number of seconds"),
            (("--output", "plan.csv"), "use one of .json"),
            (("--command", "sweeep"), "unknown command 'sweeep'"),
            (("--checkpoint", "nowhere.pt"), "nowhere.pt"),
        ],
    )
    def test_errors_are_one_message(self, asked, options, message):
        result = call(*asked, *options, code=2)
        assert message in result.output
        assert "Traceback" not in result.output

    def test_a_checkpoint_that_does_not_fit(self, asked, tmp_path):
        torch.save(torch.nn.Linear(5, 3).state_dict(), tmp_path / "other.pt")
        result = call(*asked[:3], tmp_path / "other.pt", *asked[4:], code=2)
        assert "other.pt" in result.output
