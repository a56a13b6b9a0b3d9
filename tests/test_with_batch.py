"""`Problem.with_batch`: the next batch at the present weights is what a fresh Problem would be."""

from __future__ import annotations

import problems
import pytest
import torch
import zoo
from torch import Tensor, nn

import ngeval
import ngeval.following
from ngeval.errors import InputError, ModelError
from ngeval.jacobians.onepass import OnePass


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
        found, expected = (
            p.gamma(ngeval.get_method(method).prepare(p, 3).direction(1e-2)) for p in (one, other)
        )
        assert found == pytest.approx(expected, rel=1e-9)


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
        made = count_probed(monkeypatch)
        short = entry.inputs[:, :2], entry.targets[:, :2]
        for inputs, targets in (short, (entry.inputs, entry.targets), short):
            problem = problem.with_batch(inputs, targets)
            same(problem, ngeval.Problem(model, inputs, targets, entry.likelihood))
        assert made.count("following") == 1

    def test_dictionaries_with_other_keys(self):
        entry = zoo.ENTRIES["dict-output"]
        model = entry.model()
        first = ngeval.Problem(model, entry.inputs, entry.targets, entry.likelihood)
        following = first.with_batch(dict(reversed(entry.inputs.items())), entry.targets)
        same(following, first)
        with pytest.raises(ModelError, match="failed on its inputs"):
            first.with_batch({"ids": entry.inputs["ids"]}, entry.targets)


def count_probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Says for each new choice of an engine whether `with_batch` asked for it."""
    made: list[str] = []
    original = ngeval.following._afresh

    def counted(*arguments: object) -> ngeval.Problem:
        made.append("following")
        return original(*arguments)

    monkeypatch.setattr(ngeval.following, "_afresh", counted)
    return made


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
        with pytest.raises(ModelError, match=r"parameter '0\.weight' is not the tensor"):
            first.with_batch(*batches(4))

    def test_another_requires_grad(self):
        model = mlp()
        first = first_of(model)
        model[0].bias.requires_grad_(False)
        with pytest.raises(ModelError, match=r"'0\.bias' has another requires_grad"):
            first.with_batch(*batches(4))


class TestTheRecordedPass:
    def test_is_handed_out_once_and_only_that_of_the_last_problem_is_kept(self):
        first = first_of(mlp())
        one, two = (first.with_batch(*batches(count)) for count in (3, 5))
        assert one._pass is None
        kept = two._pass
        assert isinstance(kept, OnePass)
        assert two.one_pass() is kept
        assert two._pass is None
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
        assert following._pass is None
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
        made = count_probed(monkeypatch)
        following = first.with_batch(*batches(5))
        assert made == ["following"]
        same(following, ngeval.Problem(model, *batches(5), "categorical", engine="vmap"))
