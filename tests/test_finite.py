"""An update that is not finite at one λ costs that λ, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import ngeval
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import DirectionUpdates, SpaceUpdates
from ngeval.grading.grade import grade
from ngeval.grading.prepare import prepare
from ngeval.problem.metric_batch import Metric

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

DAMPINGS = (1e-3, 1e-1, 10.0)


def problem() -> ngeval.Problem:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    inputs = torch.randn(6, 3, dtype=torch.float64)
    return ngeval.Problem(model.double(), inputs, torch.arange(6) % 3, "categorical")


def rows(of: ngeval.Problem, method: str) -> SpaceUpdates:
    built = prepare(Kernel(of), ngeval.get_method(method), DAMPINGS, "absolute", 0).updates
    assert isinstance(built, SpaceUpdates)
    return built


def spoiled(updates: SpaceUpdates, value: float) -> SpaceUpdates:
    coordinates = updates.coordinates.clone()
    coordinates[1, 0] = value
    return replace(updates, coordinates=coordinates)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("other_batch", [False, True])
@pytest.mark.parametrize("kind", ["rows", "directions"])
def test_the_others_are_what_they_were(kind, other_batch, value):
    of = problem()
    ief, ef = rows(of, "ief"), rows(of, "ef")
    makes = {
        "rows": lambda updates: updates,
        "directions": lambda updates: DirectionUpdates(3, updates.direction),
    }
    make = makes[kind]
    metric = Metric(of) if other_batch else None
    expected = grade(Kernel(of), [make(ief), make(ef)], metric)
    result = grade(Kernel(of), [make(spoiled(ief, value)), make(ef)], metric)
    for index, (graded, unspoiled) in enumerate(zip(result, expected, strict=True)):
        for name, values in graded._asdict().items():
            lost = torch.arange(3) == 1 if index == 0 else torch.zeros(3, dtype=torch.bool)
            assert values.isnan().tolist() == lost.tolist()
            if name == "errors":  # of rounding, which the other updates of a basis change
                assert float(values[~lost].max()) < 1e-9
                continue
            reference = getattr(unspoiled, name)
            torch.testing.assert_close(values[~lost], reference[~lost], rtol=1e-9, atol=0)
