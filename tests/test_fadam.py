"""FAdam against Algorithm 1 in numpy, against torch's Adam, and where gradients are odd."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ngeval
from ngeval.checkpoints import find_checkpoints
from ngeval.errors import InputError
from ngeval.fadam.optimizer import BLOCK, CORRECTIONS, WITHOUT_CORRECTIONS
from ngeval.methods.diag_ema import AccumulatedDiagonal, NamedAccumulated
from ngeval.methods.optimizer.by_name import NamedOptimizer
from ngeval.optim import FAdam
from tests.optimizers import batches, case, graded_at, run, same, trained
from tests.problems import prepared

SHAPES = ((3, 4), (5,), (), (2, 3, 2))
EACH = [pytest.param(options, id=name.replace(" ", "-")) for name, options in CORRECTIONS.items()]


def starts(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def gradients(steps, dtype=torch.float64, seed=1, scale=1.0):
    """For each step one for each shape; entry-wise scales over three decades, some entries zero."""
    generator = torch.Generator().manual_seed(seed)
    spread = [
        10 ** (3 * torch.rand(s, generator=generator, dtype=torch.float64) - 3) for s in SHAPES
    ]
    result = []
    for _ in range(steps):
        noise = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
        result.append([(scale * a * b).to(dtype) for a, b in zip(noise, spread, strict=True)])
    for each in result:
        each[0][1] = 0.0  # a row of an embedding that is never looked up
    return result


def parameters_of(values):
    return [nn.Parameter(value.clone()) for value in values]


def walk(optimizer, parameters, steps):
    """θ after every step."""
    trace = []
    for each in steps:
        for parameter, gradient in zip(parameters, each, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        trace.append([parameter.detach().clone() for parameter in parameters])
    return trace


def trajectory(values, steps, kind=FAdam, **options):
    parameters = parameters_of(values)
    return walk(kind(parameters, **options), parameters, steps)


def by_numpy(start, steps, lr, exponent, decay, clip, *, without=(), eps=1e-8, betas=(0.9, 0.99)):
    """Algorithm 1 for one tensor, entry by entry as it is printed; and with AdamW's lines."""
    theta, m, f, trace = start.copy(), 0.0 * start, 0.0 * start, []

    def rms(x):
        return math.sqrt(float(np.mean(np.square(x))))

    def clipped(x):
        return x / max(1.0, rms(x) / clip) if "clipping" not in without else x

    for t, g in enumerate(steps, 1):
        if "natural weight decay" in without:
            theta = theta - lr * decay * theta
        if "debiased Fisher" in without:
            f = betas[1] * f + (1 - betas[1]) * g**2
            used = f / (1 - betas[1] ** t)
        else:
            beta = betas[1] * (1 - betas[1] ** (t - 1)) / (1 - betas[1] ** t)
            f = beta * f + (1 - beta) * g**2
            used = f
        e = eps if "adaptive epsilon" in without else min(eps, 0.01 * rms(g))
        base = used**exponent + e ** (2 * exponent)
        if "natural momentum" in without:
            m = betas[0] * m + (1 - betas[0]) * g
            step = clipped(m / (1 - betas[0] ** t) / base)
        else:
            m = betas[0] * m + (1 - betas[0]) * clipped(g / base)
            step = m
        if "natural weight decay" not in without:
            if "clipping" in without:
                step = step + np.minimum(lr * decay / base, 1.0) * theta / lr
            else:
                step = step + decay * clipped(theta / base)
        theta = theta - lr * step
        trace.append(theta)
    return trace


def assert_follows(trace, values, steps, **options):
    for index, start in enumerate(values):
        expected = by_numpy(
            start.double().numpy(), [each[index].double().numpy() for each in steps], **options
        )
        for result, want in zip(trace, expected, strict=True):
            np.testing.assert_allclose(result[index].numpy(), want, rtol=1e-9, atol=1e-12)


class TestAlgorithm:
    @pytest.mark.parametrize("foreach", [None, False])
    @pytest.mark.parametrize("decay", [0.0, 0.05])
    @pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0])
    def test_fifty_steps(self, exponent, decay, foreach):
        values, steps = starts(), gradients(50)
        trace = trajectory(
            values,
            steps,
            lr=0.02,
            betas=(0.9, 0.99),
            exponent=exponent,
            weight_decay=decay,
            foreach=foreach,
        )
        assert_follows(trace, values, steps, lr=0.02, exponent=exponent, decay=decay, clip=1.0)

    @pytest.mark.parametrize("exponent", [0.5, 0.8])
    @pytest.mark.parametrize("name", CORRECTIONS)
    def test_each_correction_off(self, name, exponent):
        values, steps = starts(), gradients(50)
        common = {"lr": 0.02, "exponent": exponent, "eps": 1e-3}
        off = {"clip": 0.7} | CORRECTIONS[name]
        trace = trajectory(values, steps, betas=(0.9, 0.99), weight_decay=0.05, **common, **off)
        assert_follows(trace, values, steps, decay=0.05, clip=0.7, without=(name,), **common)

    def test_against_another_implementation(self):
        values, steps = starts(torch.float32), gradients(30, torch.float32)
        common = {"lr": 0.01, "weight_decay": 0.1, "clip": 0.5}
        ours = trajectory(values, steps, exponent=0.7, **common)
        theirs = trajectory(values, steps, pytorch_optimizer.FAdam, p=0.7, **common)
        for one, other in zip(ours[-1], theirs[-1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_large_tensors_are_clipped_as_a_whole(self):
        generator = torch.Generator().manual_seed(0)
        size = 2 * BLOCK + 5
        start = torch.randn(size, generator=generator, dtype=torch.float64)
        scale = torch.linspace(0.1, 3.0, size, dtype=torch.float64)
        steps = [
            [scale * torch.randn(size, generator=generator, dtype=torch.float64)] for _ in range(3)
        ]
        trace = trajectory([start], steps, betas=(0.9, 0.99), clip=0.4, weight_decay=0.1, lr=0.1)
        assert_follows(trace, [start], steps, lr=0.1, exponent=0.5, decay=0.1, clip=0.4)

    def test_tensors_that_are_not_contiguous(self):
        start = torch.randn(700, 400, generator=torch.Generator().manual_seed(0)).double().T
        steps = [[0.1 * start], [start.cos()]]
        plain = trajectory([start.contiguous()], steps, clip=0.3)
        turned = nn.Parameter(start)
        assert not turned.is_contiguous()
        trace = walk(FAdam([turned], clip=0.3), [turned], steps)
        torch.testing.assert_close(trace[-1][0], plain[-1][0], rtol=1e-12, atol=0)

    def test_maximize(self):
        values, steps = starts(), gradients(5)
        down = [[-gradient for gradient in each] for each in steps]
        assert same(trajectory(values, steps, maximize=True), trajectory(values, down))


class TestAdam:
    """With every correction off it is torch's AdamW, to the last bit."""

    @pytest.mark.parametrize("foreach", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("decay", [0.0, 0.1])
    def test_bit_for_bit(self, decay, dtype, foreach):
        values, steps = starts(dtype), gradients(50, dtype)
        kind = torch.optim.AdamW if decay else torch.optim.Adam
        common = {"lr": 3e-3, "weight_decay": decay, "foreach": foreach}
        theirs = trajectory(values, steps, kind, **common)
        ours = trajectory(values, steps, **common, **WITHOUT_CORRECTIONS)
        assert same(ours, theirs)

    def test_other_hyperparameters(self):
        values, steps = starts(), gradients(20)
        common = {"lr": 1e-2, "betas": (0.5, 0.7), "eps": 1e-2, "maximize": True}
        theirs = trajectory(values, steps, torch.optim.AdamW, weight_decay=0.1, **common)
        ours = trajectory(values, steps, weight_decay=0.1, **common, **WITHOUT_CORRECTIONS)
        assert same(ours, theirs)

    def test_the_debiased_fisher_is_the_same_number(self):
        values, steps = starts(), gradients(50)
        ours = trajectory(values, steps)
        other = trajectory(values, steps, debiased_fisher=False)
        for one, two in zip(ours[-1], other[-1], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("options", EACH[1:])
    def test_every_other_one_changes_the_steps(self, options):
        values, steps = starts(), gradients(50)
        ours = trajectory(values, steps, eps=1e-2, clip=0.7, lr=0.01, weight_decay=0.1)
        kept = {"eps": 1e-2, "clip": 0.7, "lr": 0.01, "weight_decay": 0.1} | options
        other = trajectory(values, steps, **kept)
        gap = max(float((a - b).abs().max()) for a, b in zip(ours[-1], other[-1], strict=True))
        assert gap > 1e-4


class TestInvariance:
    @settings(max_examples=25, deadline=None)
    @given(power=st.integers(-9, 9), exponent=st.sampled_from([0.3, 0.5, 1.0]))
    def test_scale_of_the_loss_with_the_root(self, power, exponent):
        """ḡ has no unit at ρ = ½; at any other, clipping takes the unit out of a large ḡ."""
        values, steps = starts(), gradients(10)
        options = {"exponent": exponent, "eps": 1e9, "clip": 1e-12}
        if exponent == 0.5:
            options["clip"] = None
        options["weight_decay"] = 0.0
        ours = trajectory(values, steps, **options)
        scaled = [[10.0**power * gradient for gradient in each] for each in steps]
        other = trajectory(values, scaled, **options)
        for one, two in zip(ours[-1], other[-1], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-14)

    def test_a_thousand_times_the_loss(self):
        values, steps = starts(), gradients(20)
        ours = trajectory(values, steps)
        other = trajectory(values, [[1000 * g for g in each] for each in steps])
        for one, two in zip(ours[-1], other[-1], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)  # up to ε

    def test_a_step_is_at_most_the_learning_rate(self):
        """RMS(m) ≤ c, and so is the decay's, times λ."""
        values, steps = starts(), gradients(30)
        before = values
        for after in trajectory(values, steps, lr=0.1, clip=0.5, weight_decay=0.2):
            for a, b in zip(before, after, strict=True):
                assert float((a - b).square().mean().sqrt()) <= 0.1 * 0.5 * 1.2 * (1 + 1e-9)
            before = after


class TestOddGradients:
    @pytest.mark.parametrize("options", [{}, WITHOUT_CORRECTIONS, {"exponent": 1.0}, *EACH])
    def test_zero_from_the_first_step(self, options):
        values = starts(torch.float32)
        zeros = [[torch.zeros_like(v) for v in values]] * 5
        trace = trajectory(values, zeros, weight_decay=0.0, **options)
        assert same(trace[-1], values)
        decayed = trajectory(values, zeros, weight_decay=0.1, lr=0.1, **options)[-1]
        for before, after in zip(values, decayed, strict=True):
            assert bool(torch.isfinite(after).all())
            assert float(after.norm()) <= float(before.norm())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-19, 1e-7, 1.0, 1e4, 1e18, 1e30])
    @pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0])
    def test_any_size_gives_finite_steps(self, exponent, scale, dtype):
        if dtype == torch.float16 and scale > 1e4:
            pytest.skip("not a number of float16")
        values, steps = starts(dtype), gradients(5, dtype, scale=scale)
        for options in ({}, *CORRECTIONS.values()):
            trace = trajectory(values, steps, exponent=exponent, weight_decay=0.1, **options)
            assert all(bool(torch.isfinite(value).all()) for value in trace[-1])
        parameters = parameters_of(values)
        optimizer = FAdam(parameters, exponent=exponent)
        walk(optimizer, parameters, steps)
        assert all(
            not bool(torch.isnan(entry).any())
            for state in optimizer.state.values()
            for entry in state.values()
        )

    def test_rows_that_are_never_touched_keep_still(self):
        values, steps = starts(), gradients(20)
        trace = trajectory(values, steps, weight_decay=0.0)
        assert torch.equal(trace[-1][0][1], values[0][1])
        assert not torch.equal(trace[-1][0][0], values[0][0])

    def test_unclipped_decay_takes_nothing_past_zero(self):
        values, steps = starts(), gradients(20)
        trace = trajectory(values, steps, clip=None, weight_decay=0.5, lr=0.1)
        assert not bool(trace[-1][0][1].any())  # f = 0 there: decayed to zero at once

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_stepped_in_float32(self, dtype):
        values, steps = starts(dtype), gradients(8, dtype)
        parameters = parameters_of(values)
        optimizer = FAdam(parameters, lr=0.05)
        single = [value.float() for value in values]
        for each in steps:
            reference = parameters_of(single)
            other = FAdam(reference, lr=0.05)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            walk(optimizer, parameters, [each])
            walk(other, reference, [[gradient.float() for gradient in each]])
            for ours, theirs in zip(parameters, reference, strict=True):
                assert ours.dtype == dtype
                assert torch.equal(ours, theirs.to(dtype))
            single = [parameter.detach().float() for parameter in parameters]
        state = optimizer.state[parameters[0]]
        assert state["fisher"].dtype == state["momentum"].dtype == torch.float32

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_stays_in_its_entry(self, bad):
        values, steps = starts(), gradients(3)
        steps[1][1][2] = bad
        last = trajectory(values, steps)[-1]
        assert torch.isnan(last[1]).tolist() == [False, False, True, False, False]
        assert all(bool(torch.isfinite(last[i]).all()) for i in (0, 2, 3))

    def test_an_empty_tensor(self):
        values = [torch.zeros(0), torch.ones(2)]
        trace = trajectory(values, [[torch.zeros(0), torch.ones(2)]], lr=0.1, weight_decay=0.0)
        torch.testing.assert_close(trace[0][1], torch.full((2,), 0.99))


class TestAsAnOptimizer:
    def test_options_that_are_tensors(self):
        values, steps = starts(), gradients(10)
        plain = {"lr": 0.25, "eps": 0.5, "weight_decay": 0.125, "clip": 0.5, "exponent": 0.75}
        given = {name: torch.tensor(value) for name, value in plain.items()}
        betas = torch.tensor(0.5), torch.tensor(0.75)
        ours = trajectory(values, steps, betas=betas, **given)
        assert same(ours, trajectory(values, steps, betas=(0.5, 0.75), **plain))

    def test_clipping_switched_off_between_steps(self):
        values, steps = starts(), gradients(4)
        parameters = parameters_of(values)
        optimizer = FAdam(parameters, clip=math.inf)
        for group in optimizer.param_groups:
            group["clip"] = None
        assert same(walk(optimizer, parameters, steps), trajectory(values, steps, clip=None))

    def test_groups_have_options_of_their_own(self):
        values, steps = starts(), gradients(10)
        parameters = parameters_of(values)
        groups = [
            {"params": parameters[:2], "lr": 0.1, "clip": None},
            {"params": parameters[2:], "exponent": 1.0, "natural_momentum": False},
        ]
        trace = walk(FAdam(groups, lr=0.01), parameters, steps)
        first = trajectory(values[:2], [s[:2] for s in steps], lr=0.1, clip=None)
        second = trajectory(
            values[2:], [s[2:] for s in steps], lr=0.01, exponent=1.0, natural_momentum=False
        )
        assert same(trace[-1], first[-1] + second[-1])

    def test_parameters_that_come_later_count_their_own_steps(self):
        values, steps = starts(), gradients(6)
        parameters = parameters_of(values)
        optimizer = FAdam(parameters, lr=0.1)
        walk(optimizer, parameters[:2], [each[:2] for each in steps[:3]])
        assert all(p not in optimizer.state for p in parameters[2:])
        walk(optimizer, parameters, steps[3:])
        alone = trajectory(values[2:], [each[2:] for each in steps[3:]], lr=0.1)
        assert same([p.detach() for p in parameters[2:]], alone[-1])
        assert [float(optimizer.state[p]["step"]) for p in parameters] == [6, 6, 3, 3]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_resumed_from_a_file(self, tmp_path, dtype):
        values, steps = starts(dtype), gradients(12, dtype)
        whole = trajectory(values, steps, lr=0.1, clip=None)
        parameters = parameters_of(values)
        optimizer = FAdam(parameters, lr=0.1, clip=None)
        walk(optimizer, parameters, steps[:5])
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        again = parameters_of([parameter.detach() for parameter in parameters])
        resumed = FAdam(again)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same(walk(resumed, again, steps[5:])[-1], whole[-1])
        walk(optimizer, parameters, steps[5:])  # the loaded state is a copy
        assert same([p.detach() for p in parameters], whole[-1])

    def test_copies_go_on_by_themselves(self):
        values, steps = starts(), gradients(6)
        parameters = parameters_of(values)
        optimizer = FAdam(parameters)
        walk(optimizer, parameters, steps[:3])
        twin = copy.deepcopy(optimizer)
        theirs = [p for group in twin.param_groups for p in group["params"]]
        assert same(walk(twin, theirs, steps[3:]), walk(optimizer, parameters, steps[3:]))

    def test_schedules_and_closures(self):
        weight = nn.Parameter(torch.tensor([3.0, -4.0]))
        optimizer = FAdam([weight], lr=0.1, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def closure():
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        # ḡ = ±1 at first, so m = ±0.1; then the gradients shrink by little.
        assert float(optimizer.step(closure).detach()) == 25.0
        torch.testing.assert_close(weight.detach(), torch.tensor([2.99, -3.99]))
        schedule.step()
        assert float(optimizer.step(closure).detach()) == pytest.approx(2.99**2 + 3.99**2)
        expected = torch.tensor([2.99 - 0.05 * 0.19, -3.99 + 0.05 * 0.19])
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=0)

    def test_training_lowers_the_loss(self):
        one = case()
        parts = batches(1) * 60
        optimizer = FAdam(one.model.parameters(), lr=0.05)
        losses = []
        for inputs, targets in parts:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(one.model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.05 * losses[0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lr": -1.0}, "lr must be a number ≥ 0"),
            ({"lr": math.nan}, "lr must be"),
            ({"lr": math.inf}, "lr must be"),
            ({"lr": "fast"}, "lr must be"),
            ({"betas": 0.9}, "two numbers"),
            ({"betas": (1.0, 0.9)}, r"first of betas must be a number in \[0, 1\)"),
            ({"betas": (0.9, -0.1)}, "second of betas"),
            ({"eps": -1e-8}, "eps must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"clip": 0.0}, "clip must be a positive number, or None"),
            ({"clip": math.nan}, "clip must be"),
            ({"exponent": 0.0}, r"exponent must be a number in \(0, 1\]"),
            ({"exponent": 1.1}, "exponent must be"),
            ({"exponent": True}, "exponent must be"),
        ],
    )
    def test_options_out_of_range(self, options, message):
        weight = nn.Parameter(torch.ones(2))
        with pytest.raises(InputError, match=message):
            FAdam([weight], **options)
        with pytest.raises(InputError, match=message):
            FAdam([{"params": [weight], **options}])

    def test_a_bad_group_is_not_added(self):
        optimizer = FAdam([nn.Parameter(torch.ones(2))])
        with pytest.raises(InputError, match="exponent"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "exponent": 2.0})
        assert len(optimizer.param_groups) == 1

    def test_complex_parameters(self):
        weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(InputError, match=r"'?spectrum.* is complex.*view_as_real"):
            FAdam([("spectrum", weight)])

    def test_sparse_gradients(self):
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = FAdam(table.parameters())
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(InputError, match=r"parameter 0 .* is sparse.*sparse=False"):
            optimizer.step()

    def test_sparse_gradients_in_a_later_group(self):
        weight, table = nn.Parameter(torch.ones(2)), nn.Embedding(5, 3, sparse=True)
        optimizer = FAdam([{"params": [weight]}, {"params": table.parameters()}])
        table(torch.tensor([1, 2])).sum().backward()
        weight.grad = torch.ones(2)
        with pytest.raises(InputError, match="is sparse"):
            optimizer.step()
        assert torch.equal(weight.detach(), torch.ones(2))
        assert not optimizer.state

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("lr", math.nan),
            ("lr", None),
            ("weight_decay", -1.0),
            ("clip", -1),
            ("exponent", 0),
            ("betas", (0.9,)),
            ("betas", (0.9, None)),
        ],
    )
    def test_options_changed_between_steps(self, name, value):
        values, steps = starts(), gradients(1)
        parameters = parameters_of(values)
        optimizer = FAdam([{"params": parameters[:2]}, {"params": parameters[2:]}])
        optimizer.param_groups[1][name] = value
        with pytest.raises(InputError, match=name):
            walk(optimizer, parameters, steps)
        assert same([p.detach() for p in parameters], values)
        assert not optimizer.state

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, pytorch_optimizer.FAdam])
    def test_states_of_other_classes(self, kind):
        values, steps = starts(torch.float32), gradients(2, torch.float32)
        parameters, others = parameters_of(values), parameters_of(values)
        optimizer, other = FAdam(parameters), kind(others, lr=0.1)
        walk(optimizer, parameters, steps)
        walk(other, others, steps)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(InputError, match="state is of another optimizer: its group has no ada"):
            optimizer.load_state_dict(other.state_dict())
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(
            torch.equal(after["state"][i][k], v)
            for i, entry in before["state"].items()
            for k, v in entry.items()
        )

    def test_states_of_other_shapes_or_out_of_range(self):
        optimizer = FAdam([nn.Parameter(torch.ones(3))])
        other = FAdam([nn.Parameter(torch.ones(2))])
        walk(other, other.param_groups[0]["params"], [[torch.ones(2)]])
        with pytest.raises(InputError, match=r"momentum has shape \(2,\), the parameter \(3,\)"):
            optimizer.load_state_dict(other.state_dict())
        state = optimizer.state_dict()
        state["param_groups"][0]["exponent"] = 0.0
        with pytest.raises(InputError, match="exponent must be"):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["exponent"] == 0.5


class TestGraded:
    @pytest.mark.parametrize("options", [{}, {"clip": None, "debiased_fisher": False}])
    def test_the_accumulated_fisher(self, options):
        one, _ = trained("adam", 0)
        optimizer = FAdam(one.model.parameters(), lr=0.0, betas=(0.9, 0.8), **options)
        total = 0.0
        for age, (inputs, targets) in zip((2, 1, 0), batches(3), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(one.model(inputs), targets).backward()
            optimizer.step()
            gradient = torch.cat([p.grad.reshape(-1) for p in one.model.parameters()])
            total = total + 0.2 * 0.8**age * gradient**2
        expected = 49 * total / (1 - 0.8**3)  # summed over 7 samples
        state = prepared(AccumulatedDiagonal(optimizer), one.problem())
        torch.testing.assert_close(state.diagonal, expected, rtol=1e-9, atol=1e-18)

    def test_a_run_on_the_command_line(self, tmp_path):
        run(tmp_path, "fadam")
        _, problem, stage = graded_at(find_checkpoints([str(tmp_path)])[-1])
        step = prepared(NamedOptimizer.parse("fadam").at(stage), problem)
        assert step.notes == ()
        warmed = prepared(NamedOptimizer.parse("fadam:5", "5").at(stage), problem)
        assert not torch.allclose(warmed.direction(0.0), step.direction(0.0), rtol=1e-2)
        named = prepared(NamedAccumulated.parse("diag-ema", "").at(stage), problem)
        assert named.direction(0.0).isfinite().all()

    def test_a_state_whose_optimizer_is_not_told(self, tmp_path):
        one, [optimizer] = trained("fadam", 2)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        stage = ngeval.methods.stage.Stage("x", tmp_path / "optimizer.pt", None, lambda k: [])
        state = prepared(NamedAccumulated.parse("diag-ema", "").at(stage), one.problem())
        expected = prepared(AccumulatedDiagonal(optimizer), one.problem())
        assert torch.equal(state.direction(0.1), expected.direction(0.1))
