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
from ngeval.curvature import row_space
from ngeval.curvature.krylov import KrylovRun
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

    @pytest.mark.parametrize("cls", ALL)
    def test_a_closure_by_its_name(self, cls: type[ExactOptimizer]):
        model, other = mlp(), mlp()
        loss = cls(model.parameters(), 0.1).step(problem_of(model))
        again = cls(other.parameters(), 0.1).step(closure=lambda: problem_of(other))
        assert torch.equal(loss, again)
        assert all(map(torch.equal, weights(model), weights(other)))
        optimizer, problem = cls(model.parameters(), 0.1), problem_of(model)
        with pytest.raises(InputError, match="a problem or a closure, not both"):
            optimizer.step(problem, closure=lambda: problem)

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

        moves = [moved(0, 0), moved(0, 1), moved(1, 0)]
        assert torch.equal(moves[0], moved(0, 0))
        assert not torch.equal(moves[0], moves[1])
        assert not torch.equal(moves[0], moves[2])

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

    def test_momentum_follows_the_dtype_of_the_model(self):
        model, optimizer = started()
        twin, other = copy.deepcopy((model, optimizer))
        model.double()
        twin.double()
        for parameter in twin.parameters():
            entry = other.state[parameter]
            entry["momentum_buffer"] = entry["momentum_buffer"].double()
        for each, its in ((model, optimizer), (twin, other)):
            inputs, targets = batch(1)
            its.step(ngeval.Problem(each, inputs.double(), targets, "categorical"))
        assert all(map(torch.equal, weights(model), weights(twin)))
        assert {e["momentum_buffer"].dtype for e in optimizer.state.values()} == {torch.float64}


class TestStatesThatAreRefused:
    """As they are given to `load_state_dict`; nothing changes."""

    def refused(self, optimizer: ExactOptimizer, state: object, message: str) -> None:
        model = optimizer.param_groups[0]["params"]
        holder = nn.ParameterList(model)
        with Untouched(holder, optimizer), pytest.raises(InputError, match=message):
            optimizer.load_state_dict(state)

    @pytest.mark.parametrize(
        ("build", "missing"),
        [
            (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "damping, max_norm"),
            (torch.optim.Adam, "damping, max_norm, momentum"),
            (ngeval.optim.FAdam, "damping, max_norm, momentum"),
        ],
    )
    def test_of_other_classes(self, build: Callable[..., torch.optim.Optimizer], missing: str):
        model = mlp()
        other = build(model.parameters())
        model(batch()[0]).sum().backward()
        other.step()
        self.refused(started()[1], other.state_dict(), f"of another optimizer.*has no {missing}$")

    def test_with_and_without_draws(self):
        (_, ief), (_, sampled) = started(), started(SF)
        self.refused(ief, sampled.state_dict(), "iEF: .*also has mc_samples, seed")
        self.refused(sampled, ief.state_dict(), "SF: .*has no mc_samples, seed")

    def test_of_other_shapes(self):
        _, optimizer = started()
        wider = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
        other = iEF(wider.parameters(), 0.1, momentum=0.9)
        other.step(problem_of(wider))
        message = r"parameter 0 does not fit: momentum_buffer has shape \(6, 4\).*\(5, 4\)"
        self.refused(optimizer, other.state_dict(), message)

    def test_of_other_groups(self):
        model, optimizer = started()
        other = iEF(groups_of(model), 0.1)
        self.refused(optimizer, other.state_dict(), r"groups of \[2, 2\] tensors, here of \[4\]")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s["param_groups"][0].update(lr=math.nan), "lr must be ≥ 0, not nan"),
            (lambda s: s["state"][1].update(step=-1), "step must be a whole number"),
            (lambda s: s["state"][1].update(exp_avg=0.0), "exp_avg is of another optimizer"),
            (lambda s: s["state"][1].update(momentum_buffer=2.0), "is a float, not a tensor"),
            (lambda s: s["state"].update({1: 3}), "it is a int, not a dict"),
            (lambda s: s.pop("state"), "not a state_dict"),
        ],
    )
    def test_that_were_changed(self, change: Callable[[dict], object], message: str):
        _, optimizer = started()
        state = copy.deepcopy(optimizer.state_dict())
        change(state)
        self.refused(optimizer, state, message)

    def test_what_is_no_state(self):
        self.refused(started()[1], [1, 2], "not a state_dict")


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

    @pytest.mark.parametrize("seed", [0.5, "one", None, math.inf])
    def test_seeds(self, seed: object):
        with pytest.raises(InputError, match="seed must be a whole number"):
            SF(mlp().parameters(), 0.1, seed=seed)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("lr", value) for value in (math.nan, math.inf, -1.0, None, "0.1", True)),
            *(("lr", value) for value in (torch.tensor([0.1, 0.2]),)),
            *(("momentum", value) for value in (2.0, None)),
            *(("weight_decay", value) for value in (math.nan, None)),
            ("max_norm", -1.0),
            ("damping", None),
        ],
    )
    def test_changed_between_steps(self, name: str, value: object):
        model, optimizer = started()
        problem = problem_of(model)
        optimizer.add_param_group(
            {"params": [], "lr": 0.1}
        )  # it is the other group's that is wrong
        original = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = value
        before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
        with pytest.raises(InputError, match=f"{name} "):
            optimizer.step(problem)
        assert all(map(torch.equal, before, weights(model)))
        assert all(
            torch.equal(entry["momentum_buffer"], state[key]["momentum_buffer"])
            for key, entry in optimizer.state_dict()["state"].items()
        )
        for group in optimizer.param_groups:
            group[name] = original
        optimizer.step(problem)

    def test_a_rate_that_is_a_tensor(self):
        (model, optimizer), (twin, other) = started(), started()
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        other.param_groups[0]["lr"] = 0.25
        optimizer.step(problem_of(model))
        other.step(problem_of(twin))
        assert all(map(torch.equal, weights(model), weights(twin)))

    def test_groups_that_disagree(self):
        model = mlp()
        groups = [
            {"params": model[0].parameters(), "damping": 1.0},
            {"params": model[2].parameters()},
        ]
        with pytest.raises(InputError, match="damping is a setting of the whole update"):
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
        message = r"missing 0\.weight.*unexpected one of shape \(5, 4\)"
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

    def test_a_natural_gradient_that_is_not_known(self):
        model, optimizer = started(NG)
        with (
            Untouched(model, optimizer),
            pytest.raises(NumericalError, match=r"after 2 Krylov iterations.*raise memory= of"),
        ):
            optimizer.step(problem_of(model, memory=1000))

    def test_too_few_iterations_for_the_natural_gradient(self, monkeypatch: pytest.MonkeyPatch):
        model = mlp().double()
        inputs, targets = batch()
        problem = ngeval.Problem(model, inputs.double(), targets, "categorical")
        exact = NG(model.parameters(), 0.1).direction(problem, 0.01)
        monkeypatch.setattr(row_space, "DENSE_SIZE", 0)
        optimizer = NG(model.parameters(), 0.1)
        by_krylov = optimizer.direction(problem, 0.01)
        assert float((by_krylov - exact).norm() / exact.norm()) < 0.05
        problem = ngeval.Problem(model, inputs.double(), targets, "categorical")
        monkeypatch.setattr(KrylovRun, "limit", 1)
        with pytest.raises(
            NumericalError, match=r"γ is known only within .*raise the damping from 0\.01"
        ):
            optimizer.direction(problem, 0.01)

    @pytest.mark.parametrize("method", ["direction", "overflow"])
    def test_an_update_that_is_not_finite(self, method: str, monkeypatch: pytest.MonkeyPatch):
        model, optimizer = started()
        value = math.nan if method == "direction" else 1e39  # beyond float32's range

        def bad(problem: ngeval.Problem, _: float) -> Tensor:
            return torch.full((problem.num_parameters,), value, dtype=torch.float64)

        monkeypatch.setattr(optimizer, "direction", bad)
        message = r"the update of '0\.weight' is NaN or infinite; raise the damping from 1e-07"
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
