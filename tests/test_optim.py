"""The exact optimizers as torch's: groups, hooks, state, errors that leave all untouched."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ngeval
from ngeval.errors import EngineError, InputError, ModelError, NumericalError
from ngeval.optim import EF, NG, SF, iEF
from ngeval.optim.base import ExactOptimizer

ALL = (EF, iEF, SF, NG)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(7, 4, generator=generator), torch.randint(3, (7,), generator=generator)


def problem_of(model: nn.Module, step: int = 0, **options: object) -> ngeval.Problem:
    return ngeval.Problem(model, *batch(step), "categorical", **options)


def groups_of(model: nn.Module, **first: float) -> list[dict[str, object]]:
    """One group for each layer, the first with settings of its own."""
    return [{"params": model[0].parameters(), **first}, {"params": model[2].parameters()}]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(
    optimizer: ExactOptimizer, model: nn.Module, steps: range, scheduler: object = None
) -> list[float]:
    losses, problem = [], problem_of(model)
    for step in steps:
        problem = problem.with_batch(*batch(step))
        losses.append(float(optimizer.step(problem)))
        if scheduler is not None:
            scheduler.step()
    return losses


class TestLikeTorchs:
    def test_exported(self):
        assert ngeval.optim.iEF is iEF
        assert issubclass(iEF, torch.optim.Optimizer)

    @pytest.mark.parametrize("cls", ALL)
    def test_a_closure_is_called_with_gradients_enabled(self, cls: type[ExactOptimizer]):
        model, other = mlp(), mlp()
        cls(model.parameters(), 0.1).step(problem_of(model))
        seen = []

        def closure() -> ngeval.Problem:
            seen.append(torch.is_grad_enabled())
            return problem_of(other)

        with torch.no_grad():
            cls(other.parameters(), 0.1).step(closure)
        assert seen == [True]
        assert all(map(torch.equal, weights(model), weights(other)))

    def test_hooks_zero_grad_and_named_parameters(self):
        model, calls = mlp(), []
        optimizer = iEF(model.named_parameters(), 0.1)
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        optimizer.zero_grad()
        optimizer.step(problem_of(model))
        optimizer.zero_grad(set_to_none=False)
        assert calls == ["before", "after"]
        assert all(p.grad is None for p in model.parameters())

    def test_gradients_of_the_caller_are_left_alone(self):
        model = mlp()
        model(batch()[0]).sum().backward()
        before = [p.grad.clone() for p in model.parameters()]
        EF(model.parameters(), 0.1).step(problem_of(model))
        assert all(map(torch.equal, before, (p.grad for p in model.parameters())))

    def test_added_group(self):
        model = mlp()
        optimizer = iEF(model[0].parameters(), 0.1)
        with pytest.raises(InputError, match=r"missing 2\.weight, 2\.bias"):
            optimizer.step(problem_of(model))
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.0})
        before = weights(model)
        optimizer.step(problem_of(model))
        moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
        assert moved == [True, True, False, False]

    @pytest.mark.parametrize("cls", ALL)
    def test_a_schedule_reaches_the_step(self, cls: type[ExactOptimizer]):
        model = mlp()
        optimizer = cls(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
        train(optimizer, model, range(1), scheduler)
        before = weights(model)
        train(optimizer, model, range(1, 3), scheduler)
        assert all(map(torch.equal, before, weights(model)))

    def test_frozen_parameters_are_left_alone(self):
        model = mlp()
        model[0].requires_grad_(False)
        before = weights(model)
        iEF(model.parameters(), 0.1, weight_decay=0.5, momentum=0.5).step(problem_of(model))
        moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
        assert moved == [False, False, True, True]

    def test_a_double_precision_problem_moves_single_precision_weights(self):
        model, other = mlp(), mlp()
        iEF(model.parameters(), 0.1, damping=1e-2).step(problem_of(model, dtype=torch.float64))
        iEF(other.parameters(), 0.1, damping=1e-2).step(problem_of(other))
        for one, two in zip(weights(model), weights(other), strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


class TestState:
    @pytest.mark.parametrize("cls", ALL)
    def test_resumed_from_a_file_is_the_same_trajectory(self, cls: type[ExactOptimizer]):
        def start() -> tuple[nn.Module, ExactOptimizer, torch.optim.lr_scheduler.StepLR]:
            model = mlp()
            groups = [
                {"params": model[0].parameters(), "lr": 0.02},
                {"params": model[2].parameters()},
            ]
            optimizer = cls(
                groups, 0.05, damping=1.0, momentum=0.9, weight_decay=0.01, max_norm=3.0
            )
            return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

        model, optimizer, scheduler = start()
        train(optimizer, model, range(4), scheduler)
        file = io.BytesIO()
        parts = (model, optimizer, scheduler)
        torch.save([part.state_dict() for part in parts], file)
        losses = train(optimizer, model, range(4, 8), scheduler)
        file.seek(0)
        resumed = start()
        for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert train(resumed[1], resumed[0], range(4, 8), resumed[2]) == losses
        assert all(map(torch.equal, weights(model), weights(resumed[0])))
        assert resumed[1].steps == 8

    def test_draws_differ_from_step_to_step_and_from_seed_to_seed(self):
        def moved(seed: int, steps: int) -> Tensor:
            model = mlp()
            optimizer = SF(model.parameters(), 0.0, seed=seed)
            for _ in range(steps):  # with a rate of 0, which leaves the weights alone
                optimizer.step(problem_of(model))
            optimizer.param_groups[0]["lr"] = 1.0
            before = torch.cat([w.flatten() for w in weights(model)])
            optimizer.step(problem_of(model))
            return torch.cat([w.flatten() for w in weights(model)]) - before

        found = [moved(0, 0), moved(0, 1), moved(1, 0)]
        assert torch.equal(found[0], moved(0, 0))
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_copies_are_apart(self):
        model = mlp()
        optimizer = iEF(model.parameters(), 0.1, momentum=0.9)
        optimizer.step(problem_of(model))
        twin_model, twin = copy.deepcopy((model, optimizer))
        before = weights(twin_model)
        train(optimizer, model, range(2))
        assert all(map(torch.equal, before, weights(twin_model)))
        train(twin, twin_model, range(2))
        assert all(map(torch.equal, weights(model), weights(twin_model)))


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lr": -0.1}, "lr must be ≥ 0"),
            ({"lr": math.nan}, "lr must be ≥ 0"),
            ({"damping": -1.0}, "damping must be ≥ 0"),
            ({"damping": "big"}, "damping must be ≥ 0, not 'big'"),
            ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
            ({"weight_decay": -1e-3}, "weight_decay must be ≥ 0"),
            ({"max_norm": 0.0}, "max_norm must be > 0, or None"),
        ],
    )
    @pytest.mark.parametrize("cls", ALL)
    def test_out_of_range(
        self, cls: type[ExactOptimizer], options: dict[str, object], message: str
    ):
        with pytest.raises(InputError, match=message):
            cls(mlp().parameters(), **{"lr": 0.1, **options})

    def test_draws(self):
        for count in (0, 1.5):
            with pytest.raises(InputError, match="mc_samples must be a whole number ≥ 1"):
                SF(mlp().parameters(), 0.1, mc_samples=count)

    def test_groups_that_disagree(self):
        model = mlp()
        groups = [
            {"params": model[0].parameters(), "damping": 1.0},
            {"params": model[2].parameters()},
        ]
        with pytest.raises(InputError, match="damping is one setting of the whole update"):
            iEF(groups, 0.1)
        optimizer = iEF([{"params": list(model[i].parameters())} for i in (0, 2)], 0.1)
        optimizer.param_groups[1]["damping"] = 5.0
        with pytest.raises(InputError, match=r"two parameter groups have 1e-07 and 5\.0"):
            optimizer.step(problem_of(model))
        optimizer.param_groups[0]["damping"] = 5.0
        assert optimizer.step(problem_of(model)).isfinite()


class Untouched:
    """Weights and state are the same after the block as before."""

    def __init__(self, model: nn.Module, optimizer: ExactOptimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def __enter__(self) -> None:
        self.weights = weights(self.model)
        self.state = copy.deepcopy(self.optimizer.state_dict())

    def __exit__(self, *_: object) -> None:
        assert all(map(torch.equal, self.weights, weights(self.model)))
        now = self.optimizer.state_dict()
        assert now["param_groups"] == self.state["param_groups"]
        assert now["state"].keys() == self.state["state"].keys()
        for key, entry in now["state"].items():
            assert entry["step"] == self.state["state"][key]["step"]
            assert torch.equal(
                entry["momentum_buffer"], self.state["state"][key]["momentum_buffer"]
            )


def started(cls: Callable[..., ExactOptimizer] = iEF) -> tuple[nn.Module, ExactOptimizer]:
    model = mlp()
    optimizer = cls(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step(problem_of(model))
    return model, optimizer


class TestFailuresLeaveAllUntouched:
    @pytest.mark.parametrize("cls", ALL)
    @pytest.mark.parametrize("wrong", [None, 3.0, lambda: torch.tensor(1.0)])
    def test_no_problem(self, cls: type[ExactOptimizer], wrong: object):
        model, optimizer = started(cls)
        with (
            Untouched(model, optimizer),
            pytest.raises(InputError, match=r"needs the ngeval\.Problem"),
        ):
            optimizer.step(wrong) if wrong is not None else optimizer.step()

    @pytest.mark.parametrize("cls", ALL)
    def test_a_problem_of_earlier_weights(self, cls: type[ExactOptimizer]):
        model, optimizer = started(cls)
        problem = problem_of(model)
        optimizer.step(problem)
        with Untouched(model, optimizer), pytest.raises(ModelError, match="was modified after"):
            optimizer.step(problem)

    def test_another_models_problem(self):
        model, optimizer = started()
        message = r"missing 0\.weight.*too many one of shape \(5, 4\)"
        with Untouched(model, optimizer), pytest.raises(InputError, match=message):
            optimizer.step(problem_of(mlp()))

    @pytest.mark.parametrize("cls", ALL)
    def test_train_mode(self, cls: type[ExactOptimizer]):
        model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
        first = problem_of(model)
        optimizer = cls(model.parameters(), 0.1)
        model.train()
        with Untouched(model, optimizer), pytest.raises(ModelError, match=r"model\.eval\(\) first"):
            optimizer.step(lambda: first.with_batch(*batch(1)))

    def test_an_improbable_label_for_the_natural_gradient(self):
        model, optimizer = started(NG)
        with torch.no_grad():
            model[2].bias[0] = 2000.0
        with Untouched(model, optimizer), pytest.raises(NumericalError, match="probability below"):
            optimizer.step(problem_of(model))

    @pytest.mark.parametrize("method", ["direction", "overflow"])
    def test_an_update_that_is_not_finite(self, method: str, monkeypatch: pytest.MonkeyPatch):
        model, optimizer = started()
        value = math.nan if method == "direction" else 1e39  # beyond float32's range

        def bad(problem: ngeval.Problem, _: float) -> Tensor:
            return torch.full((problem.num_parameters,), value, dtype=torch.float64)

        monkeypatch.setattr(optimizer, "direction", bad)
        message = r"the update of '0\.weight' is NaN or infinite; raise the damping \(now 1e-07\)"
        wide = problem_of(model, dtype=torch.float64)
        with Untouched(model, optimizer), pytest.raises(NumericalError, match=message):
            optimizer.step(wide)

    def test_gradients_that_overflow(self):
        model = nn.Linear(2, 2).double()
        optimizer = iEF(model.parameters(), 0.1)
        huge = torch.full((3, 2), 1e200, dtype=torch.float64)
        problem = ngeval.Problem(model, huge, huge, "gaussian", probes=False)
        with Untouched(model, optimizer), pytest.raises(NumericalError, match="overflow"):
            optimizer.step(problem)

    def test_too_many_samples_for_the_memory(self):
        model, optimizer = started()
        problem = problem_of(model, memory=1500)
        with Untouched(model, optimizer), pytest.raises(EngineError, match="raise memory="):
            optimizer.step(problem)
