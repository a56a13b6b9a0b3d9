"""KFAC's kinds and optimizers on transformers' models: what they cover, and padding."""

from __future__ import annotations

import pytest
import torch

import ngeval
from ngeval.methods import get_method
from tests import hf_layouts as layouts
from tests.problems import prepared
from tests.test_hf_models import batch_of, model_of

METHODS = ["sgd", "kfac-sf:2", "kfac-ief", "ekfac-ef", "kfac-ef:reduce:pi", "diag-ief", "adamw:0"]


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_every_family(family, how):
    model = model_of(family, how, "eager")
    problem = ngeval.Problem(model, *batch_of(family), "categorical")
    table = ngeval.evaluate(problem, METHODS, [1e-2], natural=False).set_index("method")
    assert (table["status"] == "ok").all(), table["reason"].tolist()
    covered = table.loc["kfac-ief", "coverage"]
    assert covered == 100 if how == "lora" else 10 < covered < 100
    # the factors' gradient is the batch's, in its place
    state = prepared("kfac-ief:gradient", problem)
    update = problem.function.unflatten(state.direction(1e12))
    for name, part in problem.function.unflatten(problem.gradient()).items():
        factor = 1.0 if name in state.rest else 1e12
        gap = float((factor * update[name] - part).norm())
        assert gap < 1e-6 * float(problem.gradient().norm()), name


@pytest.mark.parametrize("family", ["t5", "bert", "gpt"])
def test_more_padding_changes_nothing(family):
    """Positions that no output depends on are none of KFAC's."""
    model = model_of(family, "lora", "eager")
    inputs, targets = batch_of(family)
    wider = {
        name: torch.cat([value, torch.zeros_like(value[:, :2])], 1)
        for name, value in inputs.items()
    }
    more = targets
    if targets.ndim == 2 and family == "gpt":
        more = torch.cat([targets, torch.full_like(targets[:, :2], -100)], 1)
    if family == "t5":
        wider = inputs | {name: wider[name] for name in ("input_ids", "attention_mask")}
    for method in ("kfac-ief", "kfac-sf", "kfac-ef:reduce"):
        expected, result = (
            get_method(method).factors(ngeval.Problem(model, batch, labels, "categorical"), 1)
            for batch, labels in ((inputs, targets), (wider, more))
        )
        counts = [[each.count for each in part] for part in (expected, result)]
        assert counts[0] == counts[1], method
