"""What a step does to the weights and to each sample's loss, against dense references."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ngeval
from ngeval.jacobians import one_pass as onepass
from ngeval.optim import EF, NG, SF, iEF
from ngeval.optim.base import ExactOptimizer
from ngeval.optim.exact import draw_seed
from ngeval.optim.single_update import empirical_update, sampled_update
from tests import problems, reference, zoo
from tests.problems import prepared

CLASSES: dict[str, type[ExactOptimizer]] = {"ef": EF, "ief": iEF, "sf:2": SF, "ng": NG}

NAMES = [
    f"{name}-float64"
    for name in (
        "categorical-mlp",
        "categorical-sequence",
        "categorical-frozen",
        "gaussian-conv",
        "gaussian-linear",
        "bernoulli-tied",
    )
]

ZOO = ("gpt", "vit-lora", "resnet", "lstm", "tied-kinds", "squeeze-excite", "routed", "dict-output")


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def expected_update(case: problems.Case, method: str, damping: float, step: int = 0) -> Tensor:
    """By explicit matrices at the case's present weights."""
    dense = case.reference()
    labels = None
    if method.startswith("sf"):
        labels = problems.labels_of(case.problem(), method, draw_seed(0, step))
    return reference.update(dense, method, damping, labels)


def optimizer_of(method: str, model: nn.Module, lr: float, **options: object) -> ExactOptimizer:
    if method.startswith("sf"):
        options["mc_samples"] = int(method.partition(":")[2])
    return CLASSES[method](trainable(model), lr, **options)


class TestAgainstTheDenseReference:
    @pytest.mark.parametrize("damping", [1e-3, 1.0])
    @pytest.mark.parametrize("method", CLASSES)
    @pytest.mark.parametrize("name", NAMES)
    def test_one_step(self, name: str, method: str, damping: float):
        case = problems.make(name)
        update, before = expected_update(case, method, damping), flat(case.model)
        mean = case.problem().loss.mean()
        optimizer = optimizer_of(method, case.model, 0.3, damping=damping)
        loss = optimizer.step(case.problem().with_batch(case.inputs, case.targets))
        assert problems.relative_gap(before - flat(case.model), 0.3 * update) < 1e-8
        assert loss.shape == ()
        assert loss.dtype == torch.float64
        assert float(loss) == pytest.approx(float(mean), rel=1e-12)

    @pytest.mark.parametrize("method", CLASSES)
    def test_momentum_decay_clipping_and_a_schedule(self, method: str):
        """Five steps by hand: m ← μm + clip(d), p ← p(1 − η·wd) − ηm, η halved every two."""
        case = problems.make("categorical-mlp-float64")
        byhand = copy.deepcopy(case)
        optimizer = optimizer_of(
            method, case.model, 0.2, damping=0.1, momentum=0.8, weight_decay=0.05, max_norm=0.5
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        momentum, clipped = torch.zeros_like(flat(case.model)), 0
        problem = case.problem()
        for step in range(5):
            update = expected_update(byhand, method, 0.1, step)
            length = float(update.norm())
            clipped += length > 0.5
            momentum = 0.8 * momentum + update * min(1.0, 0.5 / length)
            rate = 0.2 * 0.5 ** (step // 2)
            moved = flat(byhand.model) * (1 - rate * 0.05) - rate * momentum
            nn.utils.vector_to_parameters(moved, byhand.model.parameters())
            problem = problem.with_batch(case.inputs, case.targets)
            optimizer.step(problem)
            scheduler.step()
            assert problems.relative_gap(flat(case.model), moved) < 1e-8
        assert clipped

    def test_two_groups(self):
        case = problems.make("categorical-mlp-float64")
        update, before = expected_update(case, "ief", 0.1), flat(case.model)
        first, second = list(case.model[0].parameters()), list(case.model[2].parameters())
        groups = [{"params": second, "lr": 0.5, "weight_decay": 0.1}, {"params": first}]
        iEF(groups, 0.1, damping=0.1).step(case.problem())
        size = sum(p.numel() for p in first)
        expected = torch.cat(
            [
                before[:size] - 0.1 * update[:size],
                before[size:] * (1 - 0.5 * 0.1) - 0.5 * update[size:],
            ]
        )
        assert problems.relative_gap(flat(case.model), expected) < 1e-10


class TestArchitectures:
    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    @pytest.mark.parametrize("name", ZOO)
    def test_ief_and_sf(self, name: str):
        entry = zoo.ENTRIES[name]
        jacobian = zoo.truth(entry).matrix.unflatten(0, (zoo.NUM_SAMPLES, -1))
        first = ngeval.Problem(entry.model(), entry.inputs, entry.targets, entry.likelihood)
        problem = first.with_batch(entry.inputs, entry.targets)
        residual = problem.residual.flatten(1)
        rows = torch.einsum("nc,ncp->np", residual, jacobian)
        gram = rows @ rows.T + 0.1 * torch.eye(len(rows)).double()
        expected = rows.T @ torch.linalg.solve(gram, residual.square().sum(1))
        result = empirical_update(problem, 0.1, improved=True)
        assert problems.relative_gap(result, expected) < 1e-9
        labels = problem.distribution.sample(2, torch.Generator().manual_seed(7))
        drawn = problem.distribution.residual(labels).flatten(2)
        sampled = torch.einsum("knc,ncp->knp", drawn, jacobian).flatten(0, 1)
        fisher = sampled.T @ sampled / 2 + 0.1 * torch.eye(rows.shape[1]).double()
        expected = torch.linalg.solve(fisher, rows.sum(0))
        assert problems.relative_gap(sampled_update(problem, 0.1, 2, 7), expected) < 1e-9


class TestAgainstTheMethods:
    """The same numbers as the methods that are graded, whichever route a step takes."""

    def both(self, problem: ngeval.Problem, damping: float) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for name in ("ef", "ief"):
            result = empirical_update(problem, damping, improved=name == "ief")
            pairs.append((result, prepared(name, problem).direction(damping)))
        result = sampled_update(problem, damping, 2, 3)
        pairs.append((result, prepared("sf:2", problem, 3).direction(damping)))
        return pairs

    @pytest.mark.parametrize("damping", [0.0, 1e-7, 1e-2])
    @pytest.mark.parametrize("name", NAMES)
    def test_also_without_damping(self, name: str, damping: float):
        case = problems.make(name)
        for result, expected in self.both(case.problem(), damping):
            assert problems.relative_gap(result, expected) < 1e-7

    @pytest.mark.parametrize("engine", ["vmap", "loop"])
    def test_engines_without_a_plan(self, engine: str):
        case = problems.make("categorical-mlp-float64")
        for result, expected in self.both(case.problem(engine=engine), 1e-2):
            assert problems.relative_gap(result, expected) < 1e-10

    def test_little_memory(self, monkeypatch: pytest.MonkeyPatch):
        case = problems.make("categorical-conv-float64")
        problem = case.problem(memory=9000)
        monkeypatch.setattr(onepass, "KEPT_SHARE", 0.1)
        assert problem.one_pass() is None
        for result, expected in self.both(problem, 1e-2):
            assert problems.relative_gap(result, expected) < 1e-10

    def test_more_samples_than_parameters(self):
        """K is singular: what a Cholesky factor would make of it is left to the spectrum."""
        case = problems.make("gaussian-linear-float32", num_samples=60)
        for result, expected in self.both(case.problem(), 1e-9)[:2]:
            assert problems.relative_gap(result, expected) < 1e-4

    def test_a_learnt_sample_has_no_row(self):
        """Its residual underflows, and so does its gradient."""
        case = problems.make("categorical-mlp-float64")
        with torch.no_grad():
            case.model[2].bias.copy_(torch.tensor([2000.0, 0.0, 0.0]))
        targets = torch.tensor([0, 0, 1, 0, 2, 1, 0])
        problem = ngeval.Problem(case.model, case.inputs, targets, "categorical")
        assert float(problem.residual[0].abs().sum()) == 0
        result = empirical_update(problem, 1e-3, improved=False)
        expected = prepared("ef", problem).direction(1e-3)
        assert problems.relative_gap(result, expected) < 1e-9


class TestLossOfEachSample:
    """Source: the update's definition; Wu et al. (arXiv 2406.06420), EF against iEF."""

    @pytest.mark.parametrize("name", ["categorical-mlp-float64", "gaussian-mlp-float64"])
    @pytest.mark.parametrize("method", ["ef", "ief"])
    def test_falls_by_the_rate_times_b_to_first_order(self, method: str, name: str):
        case = problems.make(name)
        before = case.problem()
        squares = before.residual.square().flatten(1).sum(1)
        share = squares if method == "ief" else torch.ones_like(squares)
        start = copy.deepcopy(case.model.state_dict())
        rates, errors = [0.02 / 4**i for i in range(4)], []
        for rate in rates:
            case.model.load_state_dict(start)
            optimizer_of(method, case.model, rate, damping=1e-12).step(case.problem())
            change = case.problem().loss - before.loss
            errors.append(float((change + rate * share).abs().max()))
            assert errors[-1] < 0.3 * rate * float(share.max())
        slope = np.polyfit(np.log(rates), np.log(errors), 1)[0]
        assert slope == pytest.approx(2, abs=0.1)


def digits_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    return model, torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


SETTINGS: dict[str, tuple[Callable[..., ExactOptimizer], float]] = {
    "ef": (lambda p: EF(p, 0.1), 1.7),
    "ief": (lambda p: iEF(p, 0.5), 1.0),
    "sf": (lambda p: SF(p, 0.3, damping=30.0), 2.2),
    "ng": (lambda p: NG(p, 0.3, damping=3.0), 0.8),
}
"""How to build each, and the loss that it gets below in fifteen steps of 32 digits."""


class TestTraining:
    @pytest.mark.parametrize("method", SETTINGS)
    def test_the_loss_falls(self, method: str):
        model, inputs, targets = digits_mlp()
        build, reached = SETTINGS[method]
        optimizer, problem = build(model.parameters()), None
        for part in torch.arange(15 * 32).split(32):
            batch = inputs[part], targets[part]
            if problem is None:
                problem = ngeval.Problem(model, *batch, "categorical")
            problem = problem.with_batch(*batch)
            optimizer.step(problem)
        held = slice(1000, 1200)
        loss = float(problem.with_batch(inputs[held], targets[held]).loss.mean())
        assert loss < reached < math.log(10)
