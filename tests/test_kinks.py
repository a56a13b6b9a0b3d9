"""A ReLU whose input is 0 to rounding is on one side in a batch, and on the other alone."""

import torch
from torch import nn
from torch.autograd import forward_ad

import ngeval


class Rounding(nn.Module):
    """What another order of summation does in float32: the last digit depends on the call.

    A sample alone and a tangent are below the kink, the layer engine's batch above it.
    """

    def forward(self, x):
        if x.dtype == torch.float64:
            return x
        below = len(x) == 1 or forward_ad.unpack_dual(x).tangent is not None
        return x + (-1 if below else 1) * torch.finfo(x.dtype).eps


def kinked(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Rounding(), nn.ReLU(), nn.Linear(4, 3))
    inputs, targets = torch.randn(6, 3), torch.arange(6) % 3
    with torch.no_grad():  # the first sample is at the kink of the second unit
        model[0].bias[1] = 0
        model[0].weight[1] -= (
            (model[0].weight[1] @ inputs[0]) / inputs[0].square().sum() * inputs[0]
        )
        model[0].bias[1] = -(model[0].weight[1] @ inputs[0])
    return ngeval.Problem(model, inputs, targets, "categorical", dtype=dtype)


def test_a_kink_does_not_cost_coverage():
    wide, narrow = kinked(torch.float64), kinked(torch.float32)
    assert (wide.engine, narrow.engine) == ("layers", "layers")
    tables = [ngeval.evaluate(p, ["kfac", "ekfac", "ief"], [1e-2]) for p in (wide, narrow)]
    for table in tables:
        assert (table["coverage"] == 100).all()
        assert (table["status"] == "ok").all()
