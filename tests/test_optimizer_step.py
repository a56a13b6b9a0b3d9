"""The step of an optimizer: against hand-computed steps and real ones; the caller untouched."""

from __future__ import annotations

import copy
import math

import accelerate
import pytest
import pytorch_optimizer
import torch
import transformers
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import ngeval
from ngeval.errors import InputError, NgevalError, NumericalError
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.methods.optimizer.clone import clone_optimizers
from ngeval.methods.optimizer.step import OptimizerStep
from ngeval.optim import iEF
from tests import problems
from tests.optimizers import (
    THIRD_PARTY,
    batches,
    build,
    case,
    fingerprint,
    flat,
    mean_gradients,
    same,
    step_of,
    train,
    trained,
)
from tests.problems import prepared

EXACT = {"rtol": 1e-9, "atol": 1e-15}


def gradient_of(model: nn.Module, batch) -> Tensor:
    return torch.cat([g.reshape(-1) for g in mean_gradients(model, batch)])


class TestByHand:
    """Formulas written out in float64, at step k with given moments."""

    def set_up(self, make):
        one = case()
        optimizer = make(one.model.parameters())
        generator = torch.Generator().manual_seed(5)
        moments = {}
        for parameter in one.model.parameters():
            m = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            v = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            moments[parameter] = m, v
        m = torch.cat([m.reshape(-1) for m, _ in moments.values()])
        v = torch.cat([v.reshape(-1) for _, v in moments.values()])
        gradient = gradient_of(one.model, (one.inputs, one.targets))
        return one, optimizer, moments, m, v, gradient

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_sgd_with_momentum(self, nesterov):
        one, optimizer, moments, m, _, g = self.set_up(
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=nesterov)
        )
        for parameter, (first, _) in moments.items():
            optimizer.state[parameter]["momentum_buffer"] = first.clone()
        velocity = 0.8 * m + g
        expected = 0.3 * (g + 0.8 * velocity if nesterov else velocity)
        torch.testing.assert_close(step_of(optimizer, one.problem()), expected, **EXACT)

    @pytest.mark.parametrize(("decoupled", "decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
    @pytest.mark.parametrize("with_decay", [True, False])
    def test_adam_and_adamw_at_step_seven(self, decoupled, decay, with_decay):
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        one, optimizer, moments, m, v, g = self.set_up(
            lambda p: kind(p, lr=2e-3, betas=(0.7, 0.9), eps=1e-5, weight_decay=decay)
        )
        for parameter, (first, second) in moments.items():
            optimizer.state[parameter] |= {
                "step": torch.tensor(6.0),
                "exp_avg": first.clone(),
                "exp_avg_sq": second.clone(),
            }
        decay = decay if with_decay else 0.0
        theta = flat(one.model)
        coupled = g if decoupled else g + decay * theta
        m = 0.7 * m + 0.3 * coupled
        v = 0.9 * v + 0.1 * coupled**2
        expected = 2e-3 * (m / (1 - 0.7**7)) / ((v / (1 - 0.9**7)).sqrt() + 1e-5)
        if decoupled:
            expected = expected + 2e-3 * decay * theta
        step = step_of(optimizer, one.problem(), weight_decay=with_decay)
        torch.testing.assert_close(step, expected, **EXACT)

    def test_rmsprop(self):
        one, optimizer, moments, _, v, g = self.set_up(
            lambda p: torch.optim.RMSprop(p, lr=1e-2, alpha=0.9, eps=1e-4)
        )
        for parameter, (_, second) in moments.items():
            optimizer.state[parameter] |= {
                "step": torch.tensor(3.0),
                "square_avg": second.clone(),
            }
        expected = 1e-2 * g / ((0.9 * v + 0.1 * g**2).sqrt() + 1e-4)
        torch.testing.assert_close(step_of(optimizer, one.problem()), expected, **EXACT)

    def test_adagrad(self):
        one, optimizer, moments, _, v, g = self.set_up(
            lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-4)
        )
        for parameter, (_, second) in moments.items():
            optimizer.state[parameter]["sum"] = second.clone()
        expected = 1e-2 * g / ((v + g**2).sqrt() + 1e-4)
        torch.testing.assert_close(step_of(optimizer, one.problem()), expected, **EXACT)

    def test_muon(self):
        """Newton-Schulz in float64; Muon's own runs in bfloat16, so to its rounding."""
        one = case()
        problem = one.problem()
        step = step_of(build("muon", one.model), problem, weight_decay=False)
        named = problem.function.unflatten(step)
        gradients = problem.function.unflatten(problem.gradient() / 7)
        # The other matrix has a singular value 0, where Muon amplifies bfloat16's noise.
        matrix = gradients["0.weight"] / gradients["0.weight"].norm()
        for _ in range(5):
            gram = matrix @ matrix.T
            matrix = 3.4445 * matrix + (-4.775 * gram + 2.0315 * gram @ gram) @ matrix
        expected = 1e-3 * 0.2 * math.sqrt(max(matrix.shape)) * matrix
        assert problems.relative_gap(named["0.weight"], expected) < 0.06
        # The rest is AdamW's, whose first step is ± the learning rate.
        rates = torch.full((5,), 1e-3, dtype=torch.float64)
        torch.testing.assert_close(named["0.bias"].abs(), rates, rtol=1e-4, atol=0.0)


class TestAgainstRealSteps:
    """Every optimizer, at its third step, against that step taken on a copy of the model."""

    @pytest.mark.parametrize("name", [*OPTIMIZERS, *THIRD_PARTY])
    def test_equals_the_step_that_is_really_taken(self, name):
        one, optimizers = trained(name, 2)
        problem = one.problem()
        before = fingerprint(one.model, optimizers)
        state = prepared(OptimizerStep(optimizers), problem)
        assert same(before, fingerprint(one.model, optimizers))
        theta = flat(one.model)
        train(one.model, optimizers, [(one.inputs, one.targets)])
        expected = theta - flat(one.model)
        assert float(expected.norm()) > 0
        # SOAP's eigenbasis of rank-deficient matrices turns rounding into something larger.
        tolerance = 1e-6 if name.endswith("SOAP") else 1e-8
        torch.testing.assert_close(state.direction(0.0), expected, rtol=tolerance, atol=1e-14)
        assert state.coverage == 100.0
        assert state.notes == ()
        assert math.isnan(state.largest_curvature)

    @pytest.mark.parametrize("name", ["adamw", "muon", "pytorch_optimizer.FAdam"])
    def test_warmup_equals_doing_it_by_hand(self, name):
        one = case()
        problem = one.problem()
        warm = batches(3)
        step = step_of(build(name, one.model), problem, warmup=warm)
        by_hand = copy.deepcopy(one.model)
        theta = flat(by_hand)
        optimizers = build(name, by_hand)
        start = {k: v.clone() for k, v in by_hand.state_dict().items()}
        for batch in warm:
            train(by_hand, optimizers, [batch])
            by_hand.load_state_dict(start)
        train(by_hand, optimizers, [(one.inputs, one.targets)])
        torch.testing.assert_close(step, theta - flat(by_hand), rtol=1e-8, atol=1e-14)
        as_function = step_of(build(name, one.model), problem, warmup=lambda: warm)
        assert torch.equal(step, as_function)

    def test_a_float32_model_is_stepped_in_float64(self):
        one = case("float32")
        adam = torch.optim.Adam(one.model.parameters(), lr=1e-7)
        train(one.model, [adam], batches(2, torch.float32))
        state = adam.state[next(one.model.parameters())]
        step = step_of(adam, one.problem())
        first = next(one.model.parameters())
        g = mean_gradients(one.model, (one.inputs, one.targets))[0].double()
        m = 0.9 * state["exp_avg"].double() + 0.1 * g
        v = 0.999 * state["exp_avg_sq"].double() + 0.001 * g**2
        expected = 1e-7 * (m / (1 - 0.9**3)) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
        actual = step[: first.numel()].reshape(first.shape)
        # In float32 the difference of parameters would have no digit of a step of 1e-7.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-14)

    def test_an_optimizer_that_wants_float32_steps_there_and_says_so(self):
        class Single(torch.optim.SGD):
            @torch.no_grad()
            def step(self):
                for group in self.param_groups:
                    for p in group["params"]:
                        p.addmm_(p.new_zeros(p.shape[0], 1), torch.zeros(1, p.shape[1]))
                        p.sub_(group["lr"] * p.grad)

        torch.manual_seed(0)
        model = nn.Linear(4, 3, bias=False).eval()
        problem = ngeval.Problem(model, torch.randn(7, 4), torch.arange(7) % 3, "categorical")
        state = prepared(OptimizerStep(Single(model.parameters(), lr=0.1)), problem)
        assert "in the parameters' dtype" in state.notes[0]
        expected = 0.1 * problem.gradient() / 7
        torch.testing.assert_close(state.direction(0.0), expected.double(), rtol=1e-4, atol=1e-7)

    def test_adafactor_keeps_the_floor_of_its_parameters_dtype(self):
        """v̂ is at least the machine epsilon of float32, far above these squared gradients."""
        torch.manual_seed(0)
        model = nn.Linear(4, 3).eval()
        x, y = torch.randn(7, 4) * 1e-6, torch.randn(7, 3) * 1e-6
        single = torch.optim.Adafactor([model.weight], lr=0.01, d=1e9)
        problem = ngeval.Problem(model, x, y, "gaussian:1")
        step = problem.function.unflatten(step_of(single, problem))["weight"].double()
        by_hand = copy.deepcopy(model)
        g = problem.function.unflatten(problem.gradient())["weight"].double() / 7
        theirs = torch.optim.Adafactor([by_hand.weight], lr=0.01, d=1e9)
        by_hand.weight.grad = g.float()
        start = by_hand.weight.detach().double()
        theirs.step()
        expected = start - by_hand.weight.detach().double()
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    def test_adafactor_with_parameters_of_two_dtypes(self):
        torch.manual_seed(0)
        single, double = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).double())
        adafactor = torch.optim.Adafactor([double, single])
        for parameter in (single, double):
            parameter.grad = torch.ones_like(parameter)
        adafactor.step()
        copied = clone_optimizers([adafactor], torch.float64)
        floors = {
            id(p): g["eps"][0] for g in copied.optimizers[0].param_groups for p in g["params"]
        }
        for original, clone in copied.parameters.values():
            assert floors[id(clone)] == torch.finfo(original.dtype).eps
        assert [g["eps"][0] for g in adafactor.param_groups] == [None]

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.ASGD])
    def test_a_parameter_without_dimensions_is_stepped_in_float64(self, kind):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.3))

            def forward(self, x):
                return self.scale * self.inner(x)

        torch.manual_seed(0)
        model = Scaled().eval()
        optimizer = kind(model.parameters(), lr=1e-6)
        train(model, [optimizer], batches(2, torch.float32))
        x, y = batches(1, torch.float32)[0]
        problem = ngeval.Problem(model, x, y, "categorical")
        state = prepared(OptimizerStep(optimizer), problem)
        assert state.notes == ()
        # In float32 half of the digits of 1e-6 would be lost beside θ.
        step = problem.function.unflatten(state.direction(0.0))
        if kind is torch.optim.AdamW:
            kept = optimizer.state[model.scale]
            g = mean_gradients(model, (x, y))[0].double()
            m = 0.9 * kept["exp_avg"].double() + 0.1 * g
            v = 0.999 * kept["exp_avg_sq"].double() + 0.001 * g**2
            expected = m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
            expected = 1e-6 * (expected + 0.01 * model.scale.detach().double())
            assert float(step["scale"]) == pytest.approx(float(expected), rel=1e-5)

    def test_random_optimizers_follow_the_seed(self):
        class Noisy(torch.optim.SGD):
            @torch.no_grad()
            def step(self):
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(torch.randn_like(p))

        one = case()
        noisy, problem = Noisy(one.model.parameters()), one.problem()
        before = torch.get_rng_state()
        first, again, other = (step_of(noisy, problem, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(before, torch.get_rng_state())


class TestReduction:
    def test_sum_and_mean(self):
        one = case()
        sgd, problem = torch.optim.SGD(one.model.parameters(), lr=1.0), one.problem()
        gradient = problem.gradient()
        torch.testing.assert_close(step_of(sgd, problem, reduction="sum"), gradient, **EXACT)
        torch.testing.assert_close(step_of(sgd, problem), gradient / 7, **EXACT)

    def test_token_mean_counts_unmasked_positions(self):
        one = case(model="sequence")
        sgd, problem = torch.optim.SGD(one.model.parameters(), lr=1.0), one.problem()
        logits = one.model(one.inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), one.targets.flatten())
        expected = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(loss, list(one.model.parameters()))]
        )
        step = step_of(sgd, problem, reduction="token-mean")
        torch.testing.assert_close(step, expected, **EXACT)

    @pytest.mark.parametrize("reduction", ["sum", "mean", "token-mean"])
    def test_warmup_is_reduced_alike(self, reduction):
        one = case(model="sequence")
        problem = one.problem()
        momentum = torch.optim.SGD(one.model.parameters(), lr=1.0, momentum=1.0)
        local = [(one.inputs, one.targets)] * 3
        once = step_of(momentum, problem, reduction=reduction)
        fourfold = step_of(momentum, problem, reduction=reduction, warmup=local)
        torch.testing.assert_close(fourfold, 4 * once, **EXACT)

    def test_unknown_reduction(self):
        one = case()
        with pytest.raises(InputError, match=r"'average'.*mean"):
            OptimizerStep(torch.optim.SGD(one.model.parameters()), reduction="average")


class Breaking(torch.optim.Adam):
    """Moves a parameter and its state, then fails."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(1.0)
                p.grad.zero_()
                self.state[p]["exp_avg"] = torch.randn_like(p)
                group["lr"] = 5.0
                raise ValueError("on purpose")


class TestCallerIsUntouched:
    def test_after_an_exception(self):
        one, _ = trained("adam", 0)
        breaking = Breaking(one.model.parameters())
        for parameter in one.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        problem = one.problem()
        before = fingerprint(one.model, [breaking])
        with pytest.raises(InputError, match=r"step\(\) failed with ValueError: on purpose"):
            step_of(breaking, problem)
        assert same(before, fingerprint(one.model, [breaking]))

    def test_also_with_warmup_weight_decay_off_and_rate_zero(self):
        one, [optimizer] = trained("adamw", 2)
        optimizer.param_groups[0]["lr"] = 0.0
        problem = one.problem()
        before = fingerprint(one.model, [optimizer])
        step_of(optimizer, problem, weight_decay=False, warmup=batches(2))
        assert same(before, fingerprint(one.model, [optimizer]))

    def test_hooks_and_patched_methods_are_left_out(self):
        one, [optimizer] = trained("adam", 1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        count = scheduler.optimizer._step_count if hasattr(optimizer, "_step_count") else None
        called = []
        optimizer.register_step_pre_hook(lambda *_: called.append("hook"))
        patched = optimizer.step
        optimizer.step = lambda *a, **k: (called.append("patch"), patched(*a, **k))
        state = prepared(OptimizerStep(optimizer), one.problem())
        assert called == []
        assert getattr(optimizer, "_step_count", None) == count
        assert state.notes == ("step hooks of Adam are left out",)
        del optimizer.step
        optimizer._optimizer_step_pre_hooks.clear()
        theta = flat(one.model)
        train(one.model, [optimizer], [(one.inputs, one.targets)])
        torch.testing.assert_close(state.direction(0.0), theta - flat(one.model), **EXACT)

    @pytest.mark.parametrize("fails", [False, True])
    def test_hooks_on_all_optimizers_are_left_out_and_kept(self, fails):
        one = case()
        kind = Breaking if fails else torch.optim.Adam
        adam, called = kind(one.model.parameters()), []
        before = register_optimizer_step_pre_hook(lambda *_: called.append("before"))
        after = register_optimizer_step_post_hook(lambda *_: called.append("after"))
        try:
            if fails:
                with pytest.raises(InputError, match="on purpose"):
                    step_of(adam, one.problem())
            else:
                state = prepared(OptimizerStep(adam), one.problem())
                assert state.notes == ("step hooks of Adam are left out",)
            assert called == []
            train(one.model, [torch.optim.SGD(one.model.parameters())], batches(1))
            assert called == ["before", "after"]
        finally:
            before.remove()
            after.remove()

    def test_an_optimizer_inside_another(self):
        class Wrapper(torch.optim.Optimizer):
            """Twice the step of what it wraps."""

            def __init__(self, inner):
                self.inner = inner
                self.defaults = inner.defaults
                self.param_groups = inner.param_groups
                self.state = inner.state

            @torch.no_grad()
            def step(self, closure=None):
                before = [p.clone() for g in self.param_groups for p in g["params"]]
                self.inner.step()
                after = [p for g in self.param_groups for p in g["params"]]
                for old, p in zip(before, after, strict=True):
                    p.add_(p - old)

        one, [inner] = trained("adam", 2)
        problem = one.problem()
        before = fingerprint(one.model, [inner])
        twice = step_of(Wrapper(inner), problem)
        assert same(before, fingerprint(one.model, [inner]))
        torch.testing.assert_close(twice, 2 * step_of(inner, problem), **EXACT)

    @pytest.mark.parametrize("kind", ["Lookahead", "TRAC", "OrthoGrad", "ScheduleFreeWrapper"])
    def test_third_party_wrappers(self, kind):
        one = case()
        wrapper = getattr(pytorch_optimizer, kind)(torch.optim.AdamW(one.model.parameters()))
        if kind == "ScheduleFreeWrapper":
            wrapper.train()
        train(one.model, [wrapper], batches(4))  # Lookahead looks back in its fifth step
        problem = one.problem()
        before = fingerprint(one.model, [wrapper])
        step = step_of(wrapper, problem)
        assert same(before, fingerprint(one.model, [wrapper]))
        theta = flat(one.model)
        train(one.model, [wrapper], [(one.inputs, one.targets)])
        expected = theta - flat(one.model)
        assert float(expected.norm()) > 0
        torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-14)

    def test_accelerates_wrapper(self):
        one, [inner] = trained("adam", 2)
        accelerate.Accelerator(cpu=True)
        method = OptimizerStep(accelerate.optimizer.AcceleratedOptimizer(inner))
        assert method.name == "adam"
        step = prepared(method, one.problem()).direction(0.0)
        assert torch.equal(step, step_of(inner, one.problem()))


class TestParameters:
    def test_two_optimizers_share_the_parameters_out(self):
        one = case()
        problem = one.problem()
        first = torch.optim.SGD(one.model[0].parameters(), lr=1.0)
        second = torch.optim.SGD(one.model[2].parameters(), lr=2.0)
        step = step_of([second, first], problem)
        split = problem.function.unflatten(problem.gradient() / 7)
        expected = torch.cat(
            [(1.0 if n.startswith("0") else 2.0) * g.reshape(-1) for n, g in split.items()]
        )
        torch.testing.assert_close(step, expected, **EXACT)

    def test_parameters_that_no_optimizer_holds(self):
        one = case()
        state = prepared(
            OptimizerStep(torch.optim.SGD(one.model[2].parameters(), lr=1.0)), one.problem()
        )
        assert state.coverage == pytest.approx(100 * 18 / 43)
        assert state.notes == ("no optimizer holds 0.weight, 0.bias: their update is 0",)
        assert not state.direction(0.0)[:25].any()

    def test_frozen_parameters_in_the_optimizer_do_not_move(self):
        one = case(model="frozen")
        adamw = torch.optim.AdamW(one.model.parameters(), weight_decay=0.5)
        state = prepared(OptimizerStep(adamw), one.problem())
        assert state.coverage == 100.0
        assert state.direction(0.0).shape == (one.problem().num_parameters,)

    def test_parameters_that_take_no_part_are_not_decayed(self):
        class Spare(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.pooler = nn.Linear(4, 3), nn.Linear(4, 4)
                self.dead = nn.Parameter(torch.ones(3))

            def forward(self, x):
                return self.used(x) + 0 * self.dead

        def build_both():
            torch.manual_seed(0)
            model = Spare().double().eval()
            return model, torch.optim.AdamW(model.parameters(), weight_decay=0.5)

        (model, adamw), (real, theirs) = build_both(), build_both()
        x, y = batches(1)[0]
        problem = ngeval.Problem(model, x, y, "categorical")
        for warmup in (None, [(x, y)]):
            state = prepared(OptimizerStep(adamw, warmup=warmup), problem)
            named = problem.function.unflatten(state.direction(0.0))
            assert not named["pooler.weight"].any()
            assert named["dead"].all()  # its gradient is zero: decayed
            note = "the loss does not depend on pooler.weight, pooler.bias: no gradient, no step"
            assert state.notes == (note,)
        start = flat(real)
        nn.functional.cross_entropy(real(x), y).backward()
        theirs.step()
        step = step_of(adamw, problem)
        torch.testing.assert_close(step, start - flat(real), rtol=1e-9, atol=1e-15)

    def test_tied_weights_are_one_parameter(self):
        one = case(model="tied")
        problem = one.problem()
        step = step_of(torch.optim.SGD(one.model.parameters(), lr=7.0), problem)
        torch.testing.assert_close(step, problem.gradient(), **EXACT)

    def test_another_models_optimizer(self):
        one, other = case(), case(seed=1)
        with pytest.raises(InputError, match="build it on"):
            step_of(torch.optim.SGD(other.model.parameters()), one.problem())

    def test_a_problem_in_another_dtype(self):
        one = case("float32")
        sgd = torch.optim.SGD(one.model.parameters(), lr=1.0)
        problem = one.problem(dtype=torch.float64)
        torch.testing.assert_close(step_of(sgd, problem), problem.gradient() / 7, **EXACT)


class TestLearningRateZero:
    def test_the_initial_rate_is_taken(self):
        one, [optimizer] = trained("adam", 2)
        problem = one.problem()
        expected = step_of(optimizer, problem)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
        assert optimizer.param_groups[0]["lr"] == 0.0
        state = prepared(OptimizerStep(optimizer), problem)
        torch.testing.assert_close(state.direction(0.0), expected, **EXACT)
        assert "every learning rate is 0" in state.notes[0]
        assert "0.001" in state.notes[0]

    def test_or_a_small_one(self):
        one = case()
        sgd = torch.optim.SGD(one.model.parameters(), lr=0.0)
        expected = 1e-3 * one.problem().gradient() / 7
        torch.testing.assert_close(step_of(sgd, one.problem()), expected, **EXACT)

    def test_a_class_without_a_rate_of_its_own(self):
        one = case()
        adafactor = transformers.Adafactor(one.model.parameters())
        train(one.model, [adafactor], batches(2))
        problem = one.problem()
        state = prepared(OptimizerStep(adafactor), problem)
        theta = flat(one.model)
        train(one.model, [adafactor], [(one.inputs, one.targets)])
        expected = theta - flat(one.model)
        torch.testing.assert_close(state.direction(0.0), expected, rtol=1e-8, atol=1e-14)
        assert state.notes == ()

    def test_one_group_at_zero_stays_there(self):
        one = case()
        groups = [
            {"params": one.model[0].parameters(), "lr": 0.0},
            {"params": one.model[2].parameters(), "lr": 1.0},
        ]
        step = step_of(torch.optim.SGD(groups), one.problem())
        assert not step[:25].any()
        assert step[25:].any()


class TestRefusals:
    def test_the_exact_optimizers_are_graded_as_methods(self):
        parameters = case().model.parameters()
        with pytest.raises(InputError, match=r"iEF steps on a Problem.*grade the method 'ief'"):
            OptimizerStep(iEF(parameters, lr=0.1, momentum=0.9))

    def test_closures(self):
        one = case()
        with pytest.raises(InputError, match=r"LBFGS.*closure"):
            OptimizerStep(torch.optim.LBFGS(one.model.parameters()))

        class NeedsOne(torch.optim.SGD):
            def step(self, closure):
                return closure()

        with pytest.raises(InputError, match=r"NeedsOne.*closure"):
            OptimizerStep(NeedsOne(one.model.parameters()))

    @pytest.mark.parametrize("kind", ["AdaHessian", "SophiaH"])
    def test_second_derivatives(self, kind):
        one = case()
        method = OptimizerStep(getattr(pytorch_optimizer, kind)(list(one.model.parameters())))
        with pytest.raises(InputError, match=r"second derivatives.*cannot be graded"):
            prepared(method, one.problem())

    def test_nan_state_names_the_parameter(self):
        one, [optimizer] = trained("adam", 1)
        optimizer.state[one.model[2].bias]["exp_avg"][0] = math.nan
        with pytest.raises(NumericalError, match=r"'2\.bias'"):
            step_of(optimizer, one.problem())

    @pytest.mark.parametrize("given", [None, [], "adam", [1], nn.Linear(1, 1)])
    def test_what_is_no_optimizer(self, given):
        with pytest.raises(InputError, match=r"torch\.optim\.Optimizer"):
            OptimizerStep(given)

    def test_what_to_do_with_a_rule_of_ones_own(self):
        with pytest.raises(InputError, match=r"subclass of.*problem\.gamma\(\{name: step\}\)"):
            OptimizerStep(object())

    def test_a_warmup_that_can_be_gone_through_once(self):
        one = case()
        with pytest.raises(InputError, match="only once"):
            OptimizerStep(torch.optim.SGD(one.model.parameters()), warmup=iter(batches(1)))

    def test_an_empty_warmup(self):
        one = case()
        with pytest.raises(InputError, match="no batch"):
            step_of(torch.optim.SGD(one.model.parameters()), one.problem(), warmup=[])


class TestInTables:
    def test_one_line_grades_an_optimizer(self):
        one, [adam] = trained("adam", 3)
        problem = one.problem()
        table = ngeval.evaluate(problem, ["sgd", OptimizerStep(adam)], [1e-3, 1.0])
        rows = table[table["method"] == "adam"]
        expected = problem.gamma(step_of(adam, problem))
        assert rows["gamma"].tolist() == pytest.approx([expected] * 2, rel=1e-12)
        assert (rows["status"] == "ok").all()

    def test_with_and_without_warmup_in_one_table(self):
        one, [adam] = trained("adam", 3)
        warm = batches(2)
        methods = [
            OptimizerStep(adam),
            OptimizerStep(adam, warmup=warm),
            OptimizerStep(adam, warmup=lambda: warm),
            OptimizerStep(adam, warmup=warm, name="mine"),
        ]
        table = ngeval.evaluate(one.problem(), methods, [1.0])
        assert table["method"].tolist() == ["adam", "adam:2", "adam:warm", "mine"]
        cold, *warmed = table["gamma"].tolist()
        assert warmed == [warmed[0]] * 3
        assert cold != warmed[0]

    def test_plain_sgd_is_the_gradient(self):
        one = case()
        method = OptimizerStep(torch.optim.SGD(one.model.parameters()), name="mine")
        table = ngeval.evaluate(one.problem(), ["sgd", method], [1.0])
        assert table["method"].tolist() == ["sgd", "mine"]
        assert table["gamma_over_sgd"].tolist() == pytest.approx([1.0, 1.0], rel=1e-12)

    def test_a_failing_step_is_a_row_with_its_reason(self):
        one = case()
        method = OptimizerStep(Breaking(one.model.parameters()))
        table = ngeval.evaluate(one.problem(), [method], [1.0])
        assert table["status"].tolist() == ["failed"]
        assert "on purpose" in table["reason"][0]

    def test_errors_are_of_ngeval(self):
        one = case()
        with pytest.raises(NgevalError):
            step_of(Breaking(one.model.parameters()), one.problem())
