"""`Problem.with_batch`: the next batch at the present weights is what a fresh Problem would be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ngeval
from ngeval.errors import EngineError, InputError, ModelError
from ngeval.jacobians import RowSource
from ngeval.jacobians.one_pass import OnePass, PassRows
from ngeval.optim.single_update import empirical_update
from ngeval.problem import next_batch
from tests import problems, zoo
from tests.problems import prepared


def batches(count: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))
        .double()
        .eval()
    )


def first_of(model: nn.Module, **options: object) -> ngeval.Problem:
    return ngeval.Problem(model, *batches(4), "categorical", **options)


def move(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())


def same(one: ngeval.Problem, other: ngeval.Problem) -> None:
    assert problems.relative_gap(one.gradient(), other.gradient()) < 1e-12
    for method in ("ef", "ief", "sf", "ng"):
        result, expected = (p.gamma(prepared(method, p, 3).direction(1e-2)) for p in (one, other))
        assert result == pytest.approx(expected, rel=1e-9)


class TestAgainstAFreshProblem:
    @pytest.mark.parametrize("name", [n for n in problems.EXACT_NAMES if "bernoulli" not in n])
    def test_other_samples_at_other_weights(self, name: str):
        case, other = problems.make(name), problems.make(name, seed=5, num_samples=4)
        first = case.problem()
        move_trainable(case.model)
        following = first.with_batch(other.inputs, other.targets)
        fresh = ngeval.Problem(case.model, other.inputs, other.targets, case.likelihood)
        assert following.num_samples == 4
        assert following.engine == fresh.engine
        same(following, fresh)

    def test_a_chain_of_steps(self):
        model = mlp()
        problem = first_of(model)
        for step, count in enumerate((1, 9, 2)):
            move(model, step)
            problem = problem.with_batch(*batches(count))
            same(problem, ngeval.Problem(model, *batches(count), "categorical"))

    @pytest.mark.parametrize("engine", ["layers", "vmap", "loop"])
    def test_engine_memory_dtype_and_likelihood_are_kept(self, engine: str):
        model = mlp().float()
        inputs, targets = batches(4)
        options = {"engine": engine, "memory": 2**22, "dtype": torch.float64}
        first = ngeval.Problem(model, inputs.float(), targets, "categorical", **options)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        following = first.with_batch(inputs.float() + 1, targets)
        assert (following.engine, following.rows.memory) == (engine, 2**22)
        assert following.dtype == torch.float64
        assert following.likelihood is first.likelihood
        same(
            following, ngeval.Problem(model, inputs.float() + 1, targets, "categorical", **options)
        )

    def test_frozen_weights_and_buffers_are_those_of_now(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
        model[0].requires_grad_(False)
        for dtype in (None, torch.float64):
            first = first_of(model, dtype=dtype)
            with torch.no_grad():
                model[0].weight.mul_(1.3)
                model[1].running_mean.add_(0.4)
            same(first.with_batch(*batches(5)), first_of(model).with_batch(*batches(5)))
            fresh = ngeval.Problem(model, *batches(5), "categorical", dtype=dtype)
            same(first.with_batch(*batches(5)), fresh)

    def test_output_of_several(self):
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = mlp()

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"other": x, "scores": self.layer(x)}

        model = Two().eval()
        first = first_of(model, output="scores")
        same(
            first.with_batch(*batches(5)),
            ngeval.Problem(model, *batches(5), "categorical", output="scores"),
        )


def move_trainable(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)


class TestSamplesOfAnotherShape:
    def test_a_plan_for_each_length_found_once(self, monkeypatch: pytest.MonkeyPatch):
        entry = zoo.ENTRIES["llama"]
        model = entry.model()
        problem = ngeval.Problem(model, entry.inputs, entry.targets, entry.likelihood)
        created = count_probed(monkeypatch)
        short = entry.inputs[:, :2], entry.targets[:, :2]
        for inputs, targets in (short, (entry.inputs, entry.targets), short):
            problem = problem.with_batch(inputs, targets)
            same(problem, ngeval.Problem(model, inputs, targets, entry.likelihood))
        assert created.count("following") == 1

    def test_dictionaries_with_other_keys(self):
        entry = zoo.ENTRIES["dict-output"]
        model = entry.model()
        first = ngeval.Problem(model, entry.inputs, entry.targets, entry.likelihood)
        following = first.with_batch(dict(reversed(entry.inputs.items())), entry.targets)
        same(following, first)
        with pytest.raises(ModelError, match="failed on its inputs"):
            first.with_batch({"ids": entry.inputs["ids"]}, entry.targets)


def count_probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each new choice of an engine by `with_batch`."""
    created: list[str] = []
    original = ngeval.Problem._set_up

    def counted(self, function, targets, likelihood, chain, memory) -> None:
        if chain.sources:
            created.append("following")
        original(self, function, targets, likelihood, chain, memory)

    monkeypatch.setattr(ngeval.Problem, "_set_up", counted)
    return created


class TestWhatIsRefused:
    def test_inputs_and_targets(self):
        first = first_of(mlp())
        inputs, targets = batches(4)
        for wrong, message in (
            ((inputs * torch.nan, targets), "NaN or infinite values, first at index"),
            ((inputs[:0], targets[:0]), "batch is empty"),
            ((inputs, targets + 3), "outside the classes"),
            ((inputs, targets[:2]), "targets hold 2 samples"),
            ((inputs, targets.double()), "integer"),
            (([1, 2], targets), "inputs must be a tensor"),
        ):
            with pytest.raises(InputError, match=message):
                first.with_batch(*wrong)

    def test_another_width_is_the_models_own_error(self):
        with pytest.raises(ModelError, match="failed on its inputs"):
            first_of(mlp()).with_batch(*batches(4, 7))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, value: float):
        model = mlp()
        first = first_of(model)
        with torch.no_grad():
            model[3].bias[1] = value
        with pytest.raises(ModelError, match=r"parameter '3\.bias' holds NaN"):
            first.with_batch(*batches(4))

    def test_weights_whose_sum_overflows_are_fine(self):
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[3e38, 3e38], [-3e38, -3e38]]))
        inputs, targets = torch.full((3, 2), 1e-38), torch.tensor([0, 1, 0])
        first = ngeval.Problem(model, inputs, targets, "categorical", probes=False)
        assert first.with_batch(inputs, targets).loss.isfinite().all()

    def test_buffers(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
        first = first_of(model)
        model[1].running_mean[0] = torch.nan
        with pytest.raises(ModelError, match=r"buffer '1\.running_mean' holds NaN"):
            first.with_batch(*batches(4))

    def test_train_mode(self):
        model = mlp(dropout=0.5)
        first = first_of(model)
        model.train()
        with pytest.raises(ModelError, match=r"call model\.eval\(\) first"):
            first.with_batch(*batches(4))

    def test_a_replaced_parameter(self):
        model = mlp()
        first = first_of(model)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        with pytest.raises(ModelError, match=r"parameter '0\.weight' is a different tensor"):
            first.with_batch(*batches(4))

    def test_another_requires_grad(self):
        model = mlp()
        first = first_of(model)
        model[0].bias.requires_grad_(False)
        with pytest.raises(ModelError, match=r"'0\.bias' has a different requires_grad"):
            first.with_batch(*batches(4))


class TestTheRecordedPass:
    def test_is_handed_out_once_and_only_that_of_the_last_problem_is_kept(self):
        first = first_of(mlp())
        one, two = (first.with_batch(*batches(count)) for count in (3, 5))
        assert one.recorded is None
        kept = two.recorded
        assert isinstance(kept, OnePass)
        assert two.one_pass() is kept
        assert two.recorded is None
        again = one.one_pass()
        assert again is not None
        assert torch.equal(again.outputs.detach(), one.outputs)

    def test_not_of_changed_weights(self):
        model = mlp()
        following = first_of(model).with_batch(*batches(3))
        move(model)
        with pytest.raises(ModelError, match="was modified"):
            following.one_pass()

    def test_not_where_it_does_not_fit(self):
        first = first_of(mlp(), memory=4000)
        following = first.with_batch(*batches(30))
        assert following.recorded is None
        assert following.one_pass() is None

    def test_another_way_through_the_model_is_planned_anew(self, monkeypatch: pytest.MonkeyPatch):
        class InParts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                parts = x.split(3)
                return self.head(torch.cat([torch.tanh(self.layer(part)) for part in parts]))

        torch.manual_seed(0)
        model = InParts().double().eval()
        first = ngeval.Problem(model, *batches(3), "categorical")
        assert first.engine == "layers"
        created = count_probed(monkeypatch)
        following = first.with_batch(*batches(5))
        assert created == ["following"]
        same(following, ngeval.Problem(model, *batches(5), "categorical", engine="vmap"))


class Siamese(nn.Module):
    """Two inputs through one body, one batch behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(6, 4), nn.Linear(8, 3)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(torch.cat([one, two])))
        return self.out(torch.cat(hidden.chunk(2), 1))


class ByLength(nn.Module):
    """Sorts its samples by length inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        return self.out(torch.tanh(self.body(x[order])))[order.argsort()]


class Unpadded(nn.Module):
    """Its body sees the positions that are not padding, of all samples in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x.reshape(len(x), 3, 2)
        there = torch.arange(3) < lengths.unsqueeze(1)
        hidden = x.new_zeros(*there.shape, 4)
        hidden[there] = torch.tanh(self.body(x[there]))
        return self.out(hidden.sum(1))


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def with_lengths(count: int, lengths: list[int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    inputs, targets = batches(count)
    return (inputs, torch.tensor(lengths)), targets


EQUAL, MIXED = with_lengths(4, [3, 3, 3, 3]), with_lengths(4, [1, 3, 2, 3])


class TestWiringThatTheFirstBatchDoesNotShow:
    def fresh(self, model: nn.Module, inputs: object, targets: Tensor) -> ngeval.Problem:
        return ngeval.Problem(model, inputs, targets, "categorical")

    def test_one_sample_first(self):
        model = built(Siamese)
        inputs, targets = batches(4)
        pair = inputs, inputs.flip(1)
        problem = self.fresh(model, tuple(part[:1] for part in pair), targets[:1])
        same(problem.with_batch(pair, targets), self.fresh(model, pair, targets))

    def test_samples_sorted_inside_show_at_the_second_batch(self):
        model = built(ByLength)
        first = self.fresh(model, *EQUAL)
        assert first.engine == "layers"
        assert first.rows.plan.looped == []
        same(first.with_batch(*MIXED), self.fresh(model, *MIXED))

    def test_or_at_the_next_power_of_two(self):
        model = built(ByLength)
        problem = self.fresh(model, *EQUAL)
        for _ in range(6):
            problem = problem.with_batch(*EQUAL)
        same(problem.with_batch(*MIXED), self.fresh(model, *MIXED))  # the eighth
        same(problem.with_batch(*MIXED), self.fresh(model, *MIXED))

    def test_a_plan_that_holds_is_kept(self):
        model = built(ByLength)
        problem = self.fresh(model, *MIXED)
        plan = problem.rows.plan
        for batch in (EQUAL, MIXED, EQUAL):
            problem = problem.with_batch(*batch)
            assert problem.rows.plan is plan

    def test_probes_at_powers_of_two(self, monkeypatch: pytest.MonkeyPatch):
        model, probed = mlp(), []
        original = next_batch._plan_is_right

        def counted(before: ngeval.Problem, rows: RowSource, targets: Tensor) -> bool:
            probed.append((number, rows.function.num_samples))
            return original(before, rows, targets)

        monkeypatch.setattr(next_batch, "_plan_is_right", counted)
        problem = first_of(model)
        unprobed = first_of(model, probes=False)
        for number in range(2, 18):
            problem = problem.with_batch(*batches(1 + number % 3 // 2))  # alone but each third
            unprobed = unprobed.with_batch(*batches(4))
        assert probed == [(2, 2), (4, 1), (7, 1), (8, 2), (13, 1)]

    def test_probes_leave_no_trace_in_the_numbers(self):
        model = mlp()
        problem, plain = first_of(model), first_of(model, probes=False)
        for step in range(3):
            problem, plain = (each.with_batch(*batches(3 + step)) for each in (problem, plain))
            updates = [empirical_update(each, 1e-3, improved=True) for each in (problem, plain)]
            assert torch.equal(*updates)

    def test_samples_that_see_each_other_later(self):
        class Meets(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(6, 3)

            def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
                shift = x.mean(0) if int(lengths.max()) > int(lengths.min()) else 0.0
                return self.out(x - shift)

        first = self.fresh(built(Meets), *EQUAL)
        with pytest.raises(EngineError, match="see each other"):
            first.with_batch(*MIXED)

    def test_positions_left_out(self):
        model = built(Unpadded)
        problem = ngeval.Problem(model, *EQUAL, "categorical", probes=False)
        with_plan = problem.with_batch(*MIXED)
        assert not with_plan._inherited
        same(with_plan, self.fresh(model, *MIXED))

    @pytest.mark.parametrize("error", [RuntimeError, ModelError])
    def test_an_error_where_rows_are_made(
        self, error: type[Exception], monkeypatch: pytest.MonkeyPatch
    ):
        model, twin = mlp(), mlp()
        calls, original = [], PassRows.gram

        def failing(rows: PassRows) -> Tensor:
            calls.append(rows)
            if len(calls) == 1:
                raise error("The size of tensor a must match")
            return original(rows)

        optimizers = [ngeval.optim.iEF(m.parameters(), 0.1, damping=1e-2) for m in (model, twin)]
        problems_of = [first_of(m).with_batch(*batches(5)) for m in (model, twin)]
        optimizers[1].step(problems_of[1])
        monkeypatch.setattr(PassRows, "gram", failing)
        optimizers[0].step(problems_of[0])
        assert len(calls) == 2
        assert all(map(torch.equal, model.parameters(), twin.parameters()))

    def test_an_error_that_stays(self, monkeypatch: pytest.MonkeyPatch):
        model = mlp()
        optimizer = ngeval.optim.iEF(model.parameters(), 0.1)
        before = [p.detach().clone() for p in model.parameters()]

        def failing(rows: PassRows) -> Tensor:
            raise RuntimeError("The size of tensor a must match")

        problem = first_of(model).with_batch(*batches(5))
        monkeypatch.setattr(PassRows, "gram", failing)
        with pytest.raises(EngineError, match=r"cannot be computed \(The size of tensor"):
            optimizer.step(problem)
        assert all(map(torch.equal, before, model.parameters()))
