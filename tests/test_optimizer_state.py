"""Optimizers' states in files: found, read, matched by name or order, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import ngeval
from ngeval.checkpoints import (
    find_checkpoints,
    load_checkpoint,
    read_optimizer,
    save_checkpoint,
    save_optimizer,
)
from ngeval.errors import CheckpointError, DependencyError, InputError, ModelError
from ngeval.methods.optimizer.build import build_optimizers
from ngeval.methods.optimizer.by_name import NamedOptimizer
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.methods.optimizer.load_state import load_optimizer_state
from ngeval.methods.optimizer.step import OptimizerStep
from ngeval.methods.stage import Stage
from tests.optimizers import (
    THIRD_PARTY,
    batches,
    build,
    case,
    flat,
    graded_at,
    load_batches,
    net,
    run,
    same,
    step_of,
    train,
    trained,
)
from tests.problems import prepared


def named(name: str) -> NamedOptimizer:
    return NamedOptimizer.parse(name, name.partition(":")[2])


class TestTrainingKeepsStates:
    @pytest.mark.parametrize("name", [*OPTIMIZERS, *THIRD_PARTY[:2], THIRD_PARTY[3]])
    def test_from_a_run_to_the_graded_step(self, tmp_path, name):
        run(tmp_path, name)
        last = find_checkpoints([str(tmp_path)])[-1]
        assert last.optimizer == tmp_path / "epoch-002.optimizer.pt"
        model, problem, stage = graded_at(last)
        step = prepared(named(name).at(stage), problem).direction(0.0)
        # By torch's own load_state_dict, in the order in which the optimizers were built.
        optimizers = build_optimizers(name, model)
        saved = torch.load(last.optimizer, weights_only=True)
        assert saved["optimizer"] == name
        for optimizer, state in zip(optimizers, saved["states"], strict=True):
            optimizer.load_state_dict(state)
        assert torch.equal(step, step_of(optimizers, problem))
        assert step.any()
        fresh = prepared(named(f"{name}:0"), problem).direction(0.0)
        if name not in ("sgd", "asgd"):  # whose steps are the gradient's
            assert not torch.allclose(step, fresh, rtol=1e-3)

    def test_every_checkpoint_has_its_own(self, tmp_path):
        run(tmp_path, "adamw")
        names = sorted(path.name for path in tmp_path.iterdir())
        kinds = ("json", "optimizer.pt", "safetensors")
        assert names == [f"epoch-00{i}.{kind}" for i in range(3) for kind in kinds]
        steps = []
        for checkpoint in find_checkpoints([str(tmp_path)]):
            states = read_optimizer(checkpoint.optimizer).states
            steps.append([float(s["step"]) for s in states[0]["state"].values()][:1])
        assert steps == [[], [3.0], [6.0]]

    def test_the_empty_state_of_epoch_zero_is_the_first_step(self, tmp_path):
        run(tmp_path, "adamw", epochs=0)
        [checkpoint] = find_checkpoints([str(tmp_path)])
        _, problem, stage = graded_at(checkpoint)
        state = prepared(named("adamw").at(stage), problem)
        fresh = prepared(named("adamw:0"), problem)
        assert torch.equal(state.direction(0.0), fresh.direction(0.0))
        assert state.notes == (
            "the optimizer had not stepped at this checkpoint: this is its first step",
        )

    def test_force_removes_them(self, tmp_path):
        run(tmp_path, "adamw", epochs=2)
        run(tmp_path, "muon", epochs=0, force=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "epoch-000.json",
            "epoch-000.optimizer.pt",
            "epoch-000.safetensors",
        ]

    def test_two_optimizers_are_stepped(self, tmp_path):
        run(tmp_path, "muon", epochs=1)
        first, last = find_checkpoints([str(tmp_path)])
        model, *_ = graded_at(first)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        load_checkpoint(model, last)
        assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
        metadata = json.loads((tmp_path / "epoch-001.json").read_text())
        assert (metadata["optimizer"], metadata["learning_rate"]) == ("muon", 1e-3)


class TestNamed:
    def test_k_batches_at_fixed_weights(self, tmp_path):
        run(tmp_path, "adamw")
        model, problem, stage = graded_at(find_checkpoints([str(tmp_path)])[-1])
        expected = step_of(
            torch.optim.NAdam(model.parameters(), lr=2e-3),
            problem,
            warmup=list(load_batches(8, 4, 5)),
        )
        state = prepared(named("nadam:4").at(stage), problem)
        assert torch.equal(state.direction(0.0), expected)

    @pytest.mark.parametrize("name", ["adamw:4", "muon:4", "pytorch_optimizer.FAdam:4"])
    def test_the_state_is_accumulated_once_for_all_batches_of_a_checkpoint(self, tmp_path, name):
        run(tmp_path, "adamw")
        checkpoints = find_checkpoints([str(tmp_path)])[1:]
        method, request = named(name), []

        def batches_of(count):
            request.append(count)
            return load_batches(8, count, 5)

        for checkpoint in checkpoints:
            model, problem, stage = graded_at(checkpoint)
            bound = method.at(replace(stage, batches=batches_of))
            x, y = next(iter(load_batches(9, 1, 78)))
            other = ngeval.Problem(model, x, y, "categorical")
            steps = [prepared(bound, p).direction(0.0) for p in (problem, other, problem)]
            for step, one in zip(steps, (problem, other, problem), strict=True):
                alone = prepared(named(name).at(stage), one).direction(0.0)
                assert torch.equal(step, alone)
        assert request == [4, 4]

    def test_large_states_are_not_kept(self, tmp_path):
        run(tmp_path, "adamw", epochs=0)
        [checkpoint] = find_checkpoints([str(tmp_path)])
        model, problem, stage = graded_at(checkpoint)
        x, y = next(iter(load_batches(9, 1, 77)))
        small = ngeval.Problem(model, x, y, "categorical", memory=16_000)
        request = []
        stage = replace(stage, batches=lambda k: [request.append(k), *load_batches(8, k, 5)][1:])
        bound = named("adam:2").at(stage)
        first, again = (prepared(bound, small).direction(0.0) for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(first, prepared(named("adam:2").at(stage), problem).direction(0.0))
        assert request == [2, 2, 2]

    @pytest.mark.parametrize("decay", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_options_of_the_stage(self, tmp_path, decay, reduction):
        run(tmp_path, "adamw", epochs=0)
        [checkpoint] = find_checkpoints([str(tmp_path)])
        model, problem, stage = graded_at(checkpoint, weight_decay=decay, reduction=reduction)
        adamw = torch.optim.AdamW(model.parameters())
        expected = step_of(adamw, problem, weight_decay=decay, reduction=reduction)
        assert torch.equal(prepared(named("adamw").at(stage), problem).direction(0.0), expected)

    def test_dotted_names(self):
        one = case()
        method = named("torch.optim.SGD:0")
        expected = 1e-3 * one.problem().gradient() / 7
        assert not method.needs_stage
        torch.testing.assert_close(prepared(method, one.problem()).direction(0.0), expected)

    def test_no_state_beside_the_checkpoint(self):
        stage = Stage("run/epoch-1.pt", None, None, lambda k: [])
        with pytest.raises(CheckpointError, match=r"run/epoch-1\.pt.*--optimizer-state.*adam:20"):
            named("adam").at(stage)

    @pytest.mark.parametrize("name", ["adam", "adam:20"])
    def test_without_a_checkpoint(self, name):
        with pytest.raises(InputError, match=r"ngeval\.OptimizerStep.*adam:0"):
            prepared(named(name), case().problem())

    @pytest.mark.parametrize("name", ["adam:-1", "adam:x", "adam:1.5", "adam:9999999"])
    def test_bad_parameters(self, name):
        with pytest.raises(InputError, match=r"number of batches"):
            named(name)

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("adamm", InputError, "did you mean 'adam"),
            (
                "no_such_package_here.Adam",
                DependencyError,
                r"pip install no_such_package_here \(or, where",
            ),
            ("torch.optim.Adamm", InputError, "is not in torch.optim"),
            ("torch.nn.Linear", InputError, "is not a class of a torch.optim.Optimizer"),
        ],
    )
    def test_unknown_optimizers(self, name, error, message):
        with pytest.raises(error, match=message):
            named(name)

    def test_a_class_without_a_rate_of_its_own(self, tmp_path):
        run(tmp_path, "transformers.Adafactor")
        last = find_checkpoints([str(tmp_path)])[-1]
        assert last.metadata["learning_rate"] is None
        model, problem, stage = graded_at(last)
        step = prepared(named("transformers.Adafactor").at(stage), problem).direction(0.0)
        theirs = transformers.Adafactor(model.parameters())
        theirs.load_state_dict(torch.load(last.optimizer, weights_only=True)["states"][0])
        assert torch.equal(step, step_of(theirs, problem))

    def test_a_class_that_needs_more(self):
        method = named("torch.optim.Optimizer:0")
        with pytest.raises(InputError, match=r"cannot be built.*ngeval\.OptimizerStep"):
            prepared(method, case().problem())

    def test_muon_without_a_matrix(self):
        model = nn.Sequential(nn.LayerNorm(3)).eval()
        with pytest.raises(InputError, match="no trainable matrix"):
            build_optimizers("muon", model)
        with pytest.raises(ModelError, match="no trainable parameter"):
            build_optimizers("muon", model.requires_grad_(False))


def saved(tmp_path: Path, content: object, name: str = "optimizer.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


class Call:
    """Calls a function where it is unpickled."""

    def __reduce__(self):
        return repr, ("hook",)


class TestLayouts:
    """One AdamW's state in the files of several training programs."""

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: [state],
            lambda state: {"optimizer": state, "model": {}, "epoch": 3},
            lambda state: {"optimizer_state_dict": state, "loss": 0.3},
            lambda state: {"optimizer_states": [state], "state_dict": {}, "lr_schedulers": []},
            lambda state: {"optimizer": {"main": state}},
        ],
        ids=["bare", "list", "optimizer", "tutorial", "lightning", "by-name"],
    )
    def test_where_programs_keep_it(self, tmp_path, wrap):
        one, [adamw] = trained("adamw", 3)
        state = adamw.state_dict()
        for group in state["param_groups"]:
            del group["param_names"]
        path = saved(tmp_path, wrap(state))
        fresh = build("adamw", one.model)
        assert load_optimizer_state(fresh, one.model, path) == ()
        assert torch.equal(step_of(fresh, one.problem()), step_of(adamw, one.problem()))

    def test_no_state_in_the_file(self, tmp_path):
        one = case()
        path = saved(tmp_path, {"model": one.model.state_dict()})
        with pytest.raises(CheckpointError, match=r"no optimizer's state.*optimizer_state_dict"):
            load_optimizer_state(build("adam", one.model), one.model, path)

    def test_malformed(self, tmp_path):
        one = case()
        path = saved(tmp_path, {"state": {}, "param_groups": [{"lr": 1.0}]})
        with pytest.raises(CheckpointError, match="form of optimizer"):
            load_optimizer_state(build("adam", one.model), one.model, path)

    def test_code_is_refused(self, tmp_path):
        one, [adam] = trained("adam", 1)
        path = saved(tmp_path, {"optimizer": adam.state_dict(), "hook": Call()})
        with pytest.raises(CheckpointError, match="asks to run code"):
            load_optimizer_state(build("adam", one.model), one.model, path)
        fresh = build("adam", one.model)
        load_optimizer_state(fresh, one.model, path, allow_pickle=True)
        assert torch.equal(step_of(fresh, one.problem()), step_of(adam, one.problem()))

    def test_truncated(self, tmp_path):
        one = case()
        path = tmp_path / "optimizer.pt"
        path.write_bytes(b"PK\x03\x04 no more")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_optimizer_state(build("adam", one.model), one.model, path)


class TestMatching:
    def test_transformers_order_of_two_groups(self, tmp_path):
        """Weights with decay first, then biases and all of a LayerNorm's, without names."""
        torch.manual_seed(0)
        model = net().eval()
        decayed = [model[0].weight, model[3].weight]
        rest = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
        trainer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}],
            lr=5e-3,
        )
        train(model, [trainer], batches(3, torch.float32))
        path = saved(tmp_path, trainer.state_dict())
        fresh = build("adamw", model)
        load_optimizer_state(fresh, model, path)
        for parameter in model.parameters():
            assert same(fresh[0].state[parameter], trainer.state[parameter])
        x, y = batches(1, torch.float32)[0]
        problem = ngeval.Problem(model, x, y, "categorical")
        assert torch.equal(step_of(fresh, problem), step_of(trainer, problem))
        without = step_of(fresh, problem, weight_decay=False)
        assert not torch.equal(step_of(fresh, problem), without)

    def test_two_groups_of_which_one_is_empty(self, tmp_path):
        """As the Trainer's are where an adapter trains nothing but matrices."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).eval()
        trainer = torch.optim.AdamW([{"params": list(model.parameters())}, {"params": []}])
        train(model, [trainer], batches(2, torch.float32))
        fresh = build("adamw", model)
        load_optimizer_state(fresh, model, saved(tmp_path, trainer.state_dict()))
        x, y = batches(1, torch.float32)[0]
        problem = ngeval.Problem(model, x, y, "categorical")
        assert torch.equal(step_of(fresh, problem), step_of(trainer, problem))

    def test_names_go_before_order(self, tmp_path):
        one = case()
        shuffled = dict(reversed(list(one.model.named_parameters())))
        adam = torch.optim.Adam(list(shuffled.items()))
        train(one.model, [adam], batches(2))
        path = saved(tmp_path, adam.state_dict())
        fresh = build("adam", one.model)
        load_optimizer_state(fresh, one.model, path)
        assert torch.equal(step_of(fresh, one.problem()), step_of(adam, one.problem()))

    def test_names_of_a_compiled_or_wrapped_model(self, tmp_path):
        one, [adam] = trained("adam", 2)
        state = adam.state_dict()
        state["param_groups"][0]["param_names"] = [
            f"module._orig_mod.{name}" for name in state["param_groups"][0]["param_names"]
        ]
        fresh = build("adam", one.model)
        load_optimizer_state(fresh, one.model, saved(tmp_path, state))
        assert torch.equal(step_of(fresh, one.problem()), step_of(adam, one.problem()))

    def test_frozen_parameters_that_the_run_gave_too(self, tmp_path):
        one = case(model="frozen")
        everything = torch.optim.Adam(one.model.parameters())
        train(one.model, [everything], batches(2))
        fresh = build("adam", one.model)
        load_optimizer_state(fresh, one.model, saved(tmp_path, everything.state_dict()))
        assert torch.equal(step_of(fresh, one.problem()), step_of(everything, one.problem()))

    def test_an_order_that_does_not_fit(self, tmp_path):
        one = case()
        adam = torch.optim.Adam(list(reversed(list(one.model.parameters()))))
        train(one.model, [adam], batches(1))
        path = saved(tmp_path, adam.state_dict())
        with pytest.raises(CheckpointError, match=r"wrong shape: 0\.weight \(5, 4\).*\(3,\)"):
            load_optimizer_state(build("adam", one.model), one.model, path)

    def test_groups_of_other_sizes(self, tmp_path):
        one = case()
        adam = torch.optim.Adam([{"params": [p]} for p in one.model.parameters()])
        train(one.model, [adam], batches(1))
        path = saved(tmp_path, adam.state_dict())
        with pytest.raises(CheckpointError, match=r"groups of 1, 1, 1, 1.*OptimizerStep"):
            load_optimizer_state(build("adam", one.model), one.model, path)
        same_groups = torch.optim.Adam([{"params": [p]} for p in one.model.parameters()])
        load_optimizer_state([same_groups], one.model, path)
        assert torch.equal(step_of(same_groups, one.problem()), step_of(adam, one.problem()))

    def test_hyperparameters_are_the_files(self, tmp_path):
        one = case()
        adam = torch.optim.Adam(one.model.parameters(), 0.5, (0.5, 0.6), amsgrad=True, eps=0.1)
        train(one.model, [adam], batches(2))
        fresh = build("adam", one.model)
        load_optimizer_state(fresh, one.model, saved(tmp_path, adam.state_dict()))
        assert torch.equal(step_of(fresh, one.problem()), step_of(adam, one.problem()))
        assert fresh[0].param_groups[0]["betas"] == (0.5, 0.6)


class TestGroupsWithoutNames:
    """Two groups whose parameters only their order tells."""

    def saved_groups(self, tmp_path, model, groups, kind=torch.optim.SGD, **options) -> Path:
        optimizer = kind(groups, lr=1e-3, **options)
        train(model, [optimizer], batches(2, torch.float32))
        return saved(tmp_path, optimizer.state_dict())

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()

    def body_and_head(self, model: nn.Module) -> list[dict]:
        return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1.0}]

    def test_without_any_state_nothing_tells_them_apart(self, tmp_path):
        model = self.model()
        path = self.saved_groups(tmp_path, model, self.body_and_head(model))
        with pytest.raises(CheckpointError, match=r"no shape in its state.*load_state_dict.*named"):
            load_optimizer_state(build("sgd", model), model, path)

    def test_unless_the_optimizer_has_such_groups_itself(self, tmp_path):
        model = self.model()
        path = self.saved_groups(tmp_path, model, self.body_and_head(model))
        fresh = torch.optim.SGD(self.body_and_head(model))
        load_optimizer_state([fresh], model, path)
        assert [group["lr"] for group in fresh.param_groups] == [1e-3, 1.0]
        assert [p.shape for p in fresh.param_groups[1]["params"]] == [(3, 6), (3,)]

    def test_groups_that_do_not_differ_need_no_order(self, tmp_path):
        model = self.model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        fresh = build("sgd", model)
        load_optimizer_state(fresh, model, self.saved_groups(tmp_path, model, groups))
        x, y = batches(1, torch.float32)[0]
        problem = ngeval.Problem(model, x, y, "categorical")
        expected = 1e-3 * problem.gradient().double() / 5
        torch.testing.assert_close(step_of(fresh, problem), expected)

    def test_the_trainers_with_momentum_are_confirmed_by_shapes(self, tmp_path):
        model = self.model()
        groups = [
            {"params": [model[0].weight, model[2].weight], "weight_decay": 0.5},
            {"params": [model[0].bias, model[2].bias]},
        ]
        fresh = build("momentum", model)
        load_optimizer_state(fresh, model, self.saved_groups(tmp_path, model, groups, momentum=0.9))
        assert [group["weight_decay"] for group in fresh[0].param_groups] == [0.5, 0]

    @pytest.mark.parametrize("kind", ["adamw", "adafactor"])
    def test_two_orders_that_both_fit(self, tmp_path, kind):
        """One spares all that is called a norm, the other all that is a vector."""

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.gain = nn.Parameter(torch.ones(4))
                self.norm = nn.Linear(1, 4, bias=False)
                self.last = nn.Linear(4, 3)

            def forward(self, x):
                return self.last(self.gain * x + self.norm(x[:, :1]))

        torch.manual_seed(0)
        model = Odd().eval()
        by_shape = [model.norm.weight, model.last.weight], [model.gain, model.last.bias]
        make = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[kind]
        groups = [{"params": by_shape[0], "weight_decay": 0.5}, {"params": by_shape[1]}]
        path = self.saved_groups(tmp_path, model, groups, make)
        fresh = build(kind, model)
        if kind == "adamw":  # the moments have the parameters' shapes
            load_optimizer_state(fresh, model, path)
            assert fresh[0].param_groups[0]["params"][0] is model.norm.weight
        else:
            with pytest.raises(CheckpointError, match="no shape in its state determines"):
                load_optimizer_state(fresh, model, path)


class TestMisfits:
    def refused(self, tmp_path, name: str, state: object, message: str) -> None:
        one = case()
        path = saved(tmp_path, state)
        with pytest.raises(CheckpointError, match=message):
            load_optimizer_state(build(name, one.model), one.model, path, name=name)

    def test_a_missing_entry(self, tmp_path):
        _, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        del state["state"][2]["exp_avg_sq"]
        message = r"exp_avg_sq missing for 2\.weight; is the file adamw's\?"
        self.refused(tmp_path, "adamw", state, message)

    def test_a_parameter_without_state(self, tmp_path):
        _, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        del state["state"][3]
        self.refused(tmp_path, "adamw", state, r"exp_avg missing for 2\.bias")

    def test_no_state_at_all(self, tmp_path):
        _, [adamw] = trained("adamw", 0)
        self.refused(tmp_path, "adamw", adamw.state_dict(), r"no parameter has any")

    def test_a_wrong_shape(self, tmp_path):
        _, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        state["state"][0]["exp_avg"] = torch.zeros(4, 5)
        message = r"exp_avg of 0\.weight \(4, 5\) instead of \(5, 4\)"
        self.refused(tmp_path, "adamw", state, message)

    @pytest.mark.parametrize(
        ("entry", "value", "message"),
        [
            ("exp_avg_sq", torch.full((3, 5), torch.inf), r"exp_avg_sq of 2\.weight is NaN or inf"),
            ("exp_avg", torch.full((3, 5), torch.nan), r"exp_avg of 2\.weight is NaN or inf"),
            (
                "exp_avg",
                torch.ones(3, 5, dtype=torch.complex64),
                r"exp_avg of 2.*complex64",
            ),
            ("exp_avg", torch.ones(3, 5, dtype=torch.int32), r"exp_avg of 2\.weight.*torch\.int32"),
            ("step", torch.tensor(torch.inf), r"step of 2\.weight is inf"),
            ("step", torch.tensor(-3.0), r"step of 2\.weight is -3\.0, which is not a number of"),
            ("step", "three", r"step of 2\.weight is 'three'"),
        ],
    )
    def test_values_that_cannot_be_stepped_with(self, tmp_path, entry, value, message):
        _, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        state["state"][2][entry] = value
        self.refused(tmp_path, "adamw", state, message)

    def test_infinity_deep_in_a_state(self, tmp_path):
        name = "pytorch_optimizer.Shampoo"
        _, [shampoo] = trained(name, 2)
        state = shampoo.state_dict()
        state["state"][2]["pre_cond_1"][0, 0] = torch.inf
        self.refused(tmp_path, name, state, r"pre_cond_1 of 2\.weight is NaN or infinite")

    @pytest.mark.parametrize("rate", [None, "fast", float("nan"), float("inf"), True])
    def test_a_rate_that_is_none(self, tmp_path, rate):
        _, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        state["param_groups"][0]["lr"] = rate
        self.refused(tmp_path, "adamw", state, r"lr in its groups is .*set it in the file's")

    @pytest.mark.parametrize(
        ("where", "key", "value", "message"),
        [
            ("state", 3, torch.ones(3), r"the entries of state\[3\]"),
            ("param_groups", "param_names", 3, r"the param_names of param_groups\[0\]"),
            ("param_groups", "param_names", ["0.weight"], r"the param_names of param_groups"),
            ("param_groups", "params", [[0]] * 4, r"the params of param_groups\[0\]"),
        ],
    )
    def test_another_form(self, tmp_path, where, key, value, message):
        _, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        (state[where] if where == "state" else state[where][0])[key] = value
        self.refused(tmp_path, "adamw", state, rf"optimizer\.pt: {message}.*save that as it is")

    def test_names_that_are_none_are_no_names(self, tmp_path):
        one, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        state["param_groups"][0]["param_names"] = None
        fresh = build("adamw", one.model)
        load_optimizer_state(fresh, one.model, saved(tmp_path, state))
        assert torch.equal(step_of(fresh, one.problem()), step_of(adamw, one.problem()))

    def test_missing_and_unexpected_parameters(self, tmp_path):
        _, [adamw] = trained("adamw", 1)
        state = adamw.state_dict()
        state["param_groups"][0]["param_names"][1] = "0.offset"
        self.refused(tmp_path, "adamw", state, r"missing: 0\.bias; unexpected: 0\.offset")

    @pytest.mark.parametrize("theirs", ["adam", "adamw", "nadam", "radam", "adamax", "adagrad"])
    @pytest.mark.parametrize("ours", ["adam", "adamw", "nadam", "radam", "adamax", "adagrad"])
    def test_no_class_takes_anothers_state(self, tmp_path, ours, theirs):
        if ours != theirs:
            _, [other] = trained(theirs, 2)
            self.refused(tmp_path, ours, other.state_dict(), r"is the file|decoupled_weight_decay")

    def test_adamw_never_becomes_adam(self, tmp_path):
        _, [adam] = trained("adam", 1)
        message = r"decoupled_weight_decay=False, as Adam has"
        self.refused(tmp_path, "adamw", adam.state_dict(), message)

    def test_our_files_say_which_optimizer_they_are_of(self, tmp_path):
        one, optimizers = trained("momentum", 1)
        path = tmp_path / "x.optimizer.pt"
        save_optimizer(optimizers, path, "momentum")
        with pytest.raises(CheckpointError, match="state of momentum, not of nesterov"):
            load_optimizer_state(build("nesterov", one.model), one.model, path, name="nesterov")

    def test_the_number_of_optimizers(self, tmp_path):
        one, optimizers = trained("muon", 1)
        path = saved(tmp_path, [o.state_dict() for o in optimizers])
        with pytest.raises(CheckpointError, match="2 optimizers; adamw consists of 1"):
            load_optimizer_state(build("adamw", one.model), one.model, path, name="adamw")


class TestFinding:
    def test_a_neighbours_state_is_not_taken(self, tmp_path):
        for name in ("a", "b"):
            save_checkpoint(net(), tmp_path / f"{name}.safetensors", {})
        model = net()
        save_optimizer(build("adam", model), tmp_path / "b.optimizer.pt", "adam")
        torch.save({}, tmp_path / "optimizer.pt")
        result = find_checkpoints([str(tmp_path)])
        assert [c.path.name for c in result] == ["a.safetensors", "b.safetensors"]
        assert [c.optimizer for c in result] == [None, tmp_path / "b.optimizer.pt"]

    def test_a_trainers_folder(self, tmp_path):
        folder = tmp_path / "checkpoint-5"
        folder.mkdir()
        save_checkpoint(net(), folder / "model.safetensors", {})
        (folder / "config.json").write_text("{}")
        torch.save({}, folder / "optimizer.pt")
        [by_folder] = find_checkpoints([str(tmp_path)])
        [by_file] = find_checkpoints([str(folder / "model.safetensors")])
        assert by_folder.optimizer == by_file.optimizer == folder / "optimizer.pt"

    @pytest.mark.parametrize("new_format", [True, False])
    def test_a_checkpoint_that_holds_it(self, tmp_path, new_format):
        model = net()
        [adam] = build("adam", model)
        train(model, [adam], batches(2, torch.float32))
        content = {"model": model.state_dict(), "optimizer": adam.state_dict()}
        path = tmp_path / "last.pt"
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        torch.save(model.state_dict(), tmp_path / "plain.pt")
        last, plain = find_checkpoints([str(tmp_path)])
        assert (last.optimizer, plain.optimizer) == (path, None)
        loaded, problem, stage = graded_at(last)
        step = prepared(named("adam").at(stage), problem).direction(0.0)
        by_torch = torch.optim.Adam(loaded.parameters())
        by_torch.load_state_dict(adam.state_dict())
        assert torch.equal(step, step_of(by_torch, problem))


class TestOnlyRead:
    def test_the_model_is_not_touched(self, tmp_path):
        run(tmp_path, "muon", epochs=1)
        model, problem, stage = graded_at(find_checkpoints([str(tmp_path)])[-1])
        before, generator = flat(model), torch.get_rng_state()
        method = named("muon").at(stage)
        first = prepared(method, problem).direction(0.0)
        assert torch.equal(first, prepared(method, problem).direction(0.0))
        assert torch.equal(before, flat(model))
        assert torch.equal(generator, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        assert OptimizerStep(build("muon", model)).name == "muon+adamw"
