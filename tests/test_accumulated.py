"""``diag-ema``: the second moment in an optimizer's state, in sum-reduced units."""

from __future__ import annotations

import pytest
import torch
import transformers

import ngeval
from ngeval.checkpoints import find_checkpoints
from ngeval.errors import CheckpointError, InputError
from ngeval.methods.diag_ema import AccumulatedDiagonal, NamedAccumulated
from ngeval.methods.stage import Stage
from tests.optimizers import (
    batches,
    build,
    case,
    flat,
    graded_at,
    mean_gradients,
    run,
    train,
    trained,
)
from tests.problems import prepared

FULL = ("adam", "adamw", "nadam", "radam", "rmsprop", "adadelta", "adagrad")


def stepped_on_the_spot(name: str, steps: int):
    """Optimizers after steps on one batch at one θ, and the gradient that all of them had."""
    one = case()
    optimizers = build(name, one.model)
    start = {key: value.clone() for key, value in one.model.state_dict().items()}
    gradients = mean_gradients(one.model, (one.inputs, one.targets))
    for _ in range(steps):
        train(one.model, optimizers, [(one.inputs, one.targets)])
        one.model.load_state_dict(start)
    return one, optimizers, gradients


class TestMoments:
    @pytest.mark.parametrize("steps", [1, 4])
    @pytest.mark.parametrize("name", [*FULL, "pytorch_optimizer.FAdam"])
    def test_the_average_of_one_gradient_is_its_square(self, name, steps):
        one, optimizers, gradients = stepped_on_the_spot(name, steps)
        state = prepared(AccumulatedDiagonal(optimizers), one.problem())
        # Summed over 7 samples, where the optimizer saw the mean.
        expected = torch.cat([(7 * g).reshape(-1) for g in gradients]) ** 2
        torch.testing.assert_close(state.diagonal, expected, rtol=1e-9, atol=1e-18)
        assert state.largest_curvature == pytest.approx(float(expected.max()), rel=1e-9)

    @pytest.mark.parametrize("steps", [1, 4])
    def test_adafactor_is_put_together_from_rows_and_columns(self, steps):
        one, optimizers, gradients = stepped_on_the_spot("adafactor", steps)
        problem = one.problem()
        state = prepared(AccumulatedDiagonal(optimizers), problem)
        named = problem.function.unflatten(state.diagonal)
        for moment, gradient in zip(named.values(), gradients, strict=True):
            square = (7 * gradient) ** 2
            if square.ndim == 2:
                square = square.mean(1, keepdim=True) * square.mean(0) / square.mean()
            torch.testing.assert_close(moment, square, rtol=1e-6, atol=1e-15)

    def test_adam_over_several_batches(self):
        one = case()
        adam = torch.optim.Adam(one.model.parameters(), lr=0.0, betas=(0.9, 0.8))
        parts = batches(3)
        train(one.model, [adam], parts)
        total = 0.0
        for age, batch in enumerate(reversed(parts)):
            gradient = torch.cat([g.reshape(-1) for g in mean_gradients(one.model, batch)])
            total = total + 0.2 * 0.8**age * gradient**2
        expected = total / (1 - 0.8**3)
        for reduction, factor in (("mean", 49.0), ("sum", 1.0)):
            state = prepared(AccumulatedDiagonal(adam, reduction=reduction), one.problem())
            torch.testing.assert_close(state.diagonal, factor * expected, rtol=1e-9, atol=1e-18)

    @pytest.mark.parametrize("exponent", [0.5, 1.0])
    def test_the_update(self, exponent):
        one, [adam] = trained("adam", 2)
        problem = one.problem()
        state = prepared(AccumulatedDiagonal(adam, exponent), problem)
        g = problem.gradient()
        for damping in (0.0, 1e-3, 1.0):
            expected = g / (state.diagonal + damping) ** exponent
            torch.testing.assert_close(state.direction(damping), expected)

    def test_the_optimizer_is_only_read(self):
        one, [adam] = trained("adam", 2)
        before = flat(one.model), adam.state[one.model[0].weight]["exp_avg_sq"].clone()
        prepared(AccumulatedDiagonal(adam), one.problem()).direction(1.0)
        after = flat(one.model), adam.state[one.model[0].weight]["exp_avg_sq"]
        assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))

    @pytest.mark.parametrize("steps", [1, 4])
    def test_adagrads_initial_value_is_no_gradient(self, steps):
        one = case()
        adagrad = torch.optim.Adagrad(one.model.parameters(), lr=0.0, initial_accumulator_value=0.5)
        train(one.model, [adagrad], [(one.inputs, one.targets)] * steps)
        gradients = mean_gradients(one.model, (one.inputs, one.targets))
        state = prepared(AccumulatedDiagonal(adagrad), one.problem())
        expected = torch.cat([(7 * g).reshape(-1) for g in gradients]) ** 2
        torch.testing.assert_close(state.diagonal, expected, rtol=1e-9, atol=1e-12)

    def test_a_class_derived_from_one_that_is_read(self):
        class Own(torch.optim.AdamW):
            pass

        one, [adamw] = trained("adamw", 2)
        local = Own(one.model.parameters())
        local.load_state_dict(adamw.state_dict())
        expected = prepared(AccumulatedDiagonal(adamw), one.problem()).diagonal
        assert torch.equal(prepared(AccumulatedDiagonal(local), one.problem()).diagonal, expected)


class TestRefusals:
    @pytest.mark.parametrize(
        "kind", ["SOAP", "Prodigy", "Adan", "Yogi", "StableAdamW", "ADOPT", "MARS"]
    )
    def test_classes_that_keep_something_else_under_that_name(self, kind):
        one, [optimizer] = trained(f"pytorch_optimizer.{kind}", 3)
        assert "exp_avg_sq" in optimizer.state[one.model[0].weight]
        with pytest.raises(InputError, match=rf"state of {kind}, which is not read.*Adam, AdamW"):
            prepared(AccumulatedDiagonal(optimizer), one.problem())

    def test_transformers_adafactor(self):
        one = case()
        adafactor = transformers.Adafactor(one.model.parameters())
        train(one.model, [adafactor], batches(2))
        with pytest.raises(InputError, match="state of Adafactor, which is not read"):
            prepared(AccumulatedDiagonal(adafactor), one.problem())

    @pytest.mark.parametrize("name", ["sgd", "momentum", "muon", "rprop"])
    def test_no_second_moment(self, name):
        one, optimizers = trained(name, 1)
        with pytest.raises(InputError, match=r"no second moment.*0\.weight \(state: "):
            prepared(AccumulatedDiagonal(optimizers), one.problem())

    def test_before_the_first_step(self):
        one, optimizers = trained("adam", 0)
        with pytest.raises(InputError, match=r"state: nothing.*stepped"):
            prepared(AccumulatedDiagonal(optimizers), one.problem())

    def test_parameters_that_are_not_held(self):
        one = case()
        adam = torch.optim.Adam(one.model[2].parameters())
        for parameter in one.model[2].parameters():
            parameter.grad = torch.ones_like(parameter)
        adam.step()
        with pytest.raises(InputError, match=r"0\.weight \(state: not held\)"):
            prepared(AccumulatedDiagonal(adam), case().problem())

    def test_what_is_no_optimizer(self):
        with pytest.raises(InputError, match=r"torch\.optim\.Optimizer"):
            AccumulatedDiagonal(None)
        with pytest.raises(InputError, match="reduction"):
            AccumulatedDiagonal(trained("adam", 1)[1], reduction="max")


class TestNamed:
    @pytest.mark.parametrize("name", ["adamw", "adagrad", "pytorch_optimizer.FAdam"])
    def test_of_a_run(self, tmp_path, name):
        run(tmp_path, name)
        model, problem, stage = graded_at(find_checkpoints([str(tmp_path)])[-1])
        state = prepared(NamedAccumulated.parse("diag-ema:1", "1").at(stage), problem)
        [optimizer] = build(name, model)
        saved = torch.load(stage.optimizer_state, weights_only=True)
        optimizer.load_state_dict(saved["states"][0])
        expected = prepared(AccumulatedDiagonal(optimizer, 1.0), problem)
        assert torch.equal(state.direction(0.1), expected.direction(0.1))
        table = ngeval.evaluate(problem, ["sgd", AccumulatedDiagonal(optimizer)], [1e-6, 1e-2])
        assert (table["status"] == "ok").all()

    @pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "adagrad"])
    def test_of_a_file_that_does_not_say_whose_it_is(self, tmp_path, name):
        one, [optimizer] = trained(name, 2)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        stage = Stage("x", tmp_path / "optimizer.pt", None, lambda k: [])
        state = prepared(NamedAccumulated.parse("diag-ema").at(stage), one.problem())
        expected = prepared(AccumulatedDiagonal(optimizer), one.problem())
        assert torch.equal(state.direction(0.1), expected.direction(0.1))

    def test_of_an_optimizer_without_one(self, tmp_path):
        one, [optimizer] = trained("momentum", 2)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        stage = Stage("x", tmp_path / "optimizer.pt", None, lambda k: [])
        with pytest.raises(CheckpointError, match=r"no second moment that is known.*momentum_buf"):
            prepared(NamedAccumulated.parse("diag-ema").at(stage), one.problem())

    def test_of_a_class_of_ones_own(self, tmp_path):
        one, [optimizer] = trained("adam", 2)
        state = optimizer.state_dict()
        for entries in state["state"].values():
            entries["m"], entries["v"] = entries.pop("exp_avg"), entries.pop("exp_avg_sq")
        torch.save(state, tmp_path / "optimizer.pt")
        stage = Stage("x", tmp_path / "optimizer.pt", None, lambda k: [])
        with pytest.raises(CheckpointError, match=r"no second moment.*but m, step, v; .*diag-ef"):
            prepared(NamedAccumulated.parse("diag-ema").at(stage), one.problem())

    @pytest.mark.parametrize("name", ["StableAdamW", "SOAP", "Yogi"])
    def test_of_another_class_with_entries_of_the_same_name(self, tmp_path, name):
        one, [optimizer] = trained(f"pytorch_optimizer.{name}", 2)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        stage = Stage("x", tmp_path / "optimizer.pt", None, lambda k: [])
        with pytest.raises(CheckpointError, match="fits none of adamw, adam"):
            prepared(NamedAccumulated.parse("diag-ema").at(stage), one.problem())

    def test_without_a_state_or_a_checkpoint(self):
        with pytest.raises(CheckpointError, match=r"--optimizer-state.*diag-ef"):
            NamedAccumulated("diag-ema").at(Stage("x", None, None, lambda k: []))
        with pytest.raises(InputError, match="AccumulatedDiagonal"):
            prepared(NamedAccumulated("diag-ema"), case().problem())

    @pytest.mark.parametrize("text", ["x", "nan", "1:2"])
    def test_bad_exponents(self, text):
        with pytest.raises(InputError, match="exponent"):
            NamedAccumulated.parse(f"diag-ema:{text}", text)
