"""Problem, Fisher and Jacobian rows against explicit matrices; the model stays untouched."""

import copy
import functools
import math
import types
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse.linalg as sparse
import torch
from torch import Tensor, nn

import ngeval
from ngeval.curvature.kernel import Kernel
from ngeval.jacobians import gram_matrix
from ngeval.model.inputs import map_tensors
from tests import problems, reference
from tests.problems import EXACT_NAMES, NAMES, relative_gap


def random_like(problem: ngeval.Problem, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(problem.dtype)


class TestAgainstReference:
    @pytest.mark.parametrize("name", NAMES)
    def test_outputs_loss_and_residual(self, name):
        case, problem, dense = problems.case(name), *shared(name)
        assert problem.outputs.dtype == torch.float64
        assert problem.outputs.shape == dense.logits.shape
        assert relative_gap(problem.outputs, dense.logits) < case.tolerance
        assert relative_gap(problem.residual, dense.residual) < case.tolerance
        expected = reference.loss(dense.logits, case.targets, case.family)
        assert relative_gap(problem.loss, expected) < case.tolerance

    @pytest.mark.parametrize("name", NAMES)
    def test_sizes(self, name):
        problem, dense = shared(name)
        sizes = (problem.num_samples, problem.num_outputs, problem.num_parameters)
        assert sizes == tuple(dense.jacobian.shape)

    @pytest.mark.parametrize("name", NAMES)
    def test_jvp(self, name):
        problem, dense = shared(name)
        direction = random_like(problem, problem.num_parameters)
        expected = torch.einsum("ncp,p->nc", dense.jacobian, direction.double())
        assert relative_gap(problem.jvp(direction), expected) < problems.case(name).tolerance

    @pytest.mark.parametrize("name", NAMES)
    def test_vjp(self, name):
        problem, dense = shared(name)
        cotangent = torch.randn(problem.outputs.shape, dtype=torch.float64)
        expected = torch.einsum("ncp,nc->p", dense.jacobian, cotangent.flatten(1))
        result = problem.vjp(cotangent)
        assert result.dtype == problem.dtype
        assert relative_gap(result, expected) < problems.case(name).tolerance

    @pytest.mark.parametrize("name", NAMES)
    def test_gradient(self, name):
        problem, dense = shared(name)
        gap = relative_gap(problem.gradient(), reference.gradient(dense))
        assert gap < problems.case(name).tolerance

    @pytest.mark.parametrize("name", NAMES)
    def test_fisher_times_vector_and_matrix(self, name):
        problem, dense = shared(name)
        expected = reference.fisher(dense)
        vectors = random_like(problem, problem.num_parameters, 3)
        operator = problem.fisher()
        assert operator.shape == tuple(expected.shape)
        product = operator @ vectors
        assert product.dtype == vectors.dtype
        assert relative_gap(product, expected @ vectors.double()) < problems.case(name).tolerance
        assert torch.equal(operator @ vectors[:, 0], product[:, 0])
        assert (operator @ vectors[:, :0]).shape == (problem.num_parameters, 0)

    @pytest.mark.parametrize("name", NAMES)
    def test_fisher_diagonal(self, name):
        problem, dense = shared(name)
        diagonal = problem.fisher().diagonal()
        assert diagonal.dtype == torch.float64
        expected = reference.fisher(dense).diagonal()
        assert relative_gap(diagonal, expected) < problems.case(name).tolerance

    @pytest.mark.parametrize("name", NAMES)
    def test_kernels(self, name):
        problem, dense = shared(name)
        tolerance = problems.case(name).tolerance
        rows = dense.jacobian.flatten(0, 1)
        assert relative_gap(Kernel(problem).logits.theta, rows @ rows.T) < tolerance
        gradients = reference.per_sample_gradients(dense)
        assert (
            relative_gap(
                gram_matrix(problem.rows, problem.residual.unsqueeze(1)), gradients @ gradients.T
            )
            < tolerance
        )

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_spectrum_has_the_eigenvalues_of_the_fisher(self, name):
        problem, dense = shared(name)
        rows = Kernel(problem).fisher_rows
        small = (rows.scale * rows.singular).square().sort(descending=True)[0]
        large = torch.linalg.eigvalsh(reference.fisher(dense)).flip(0)
        count = min(len(small), len(large))
        gap = (small[:count] - large[:count]).abs().max()
        assert float(gap) < 1e-12 * float(large[0])

    @pytest.mark.parametrize("name", NAMES)
    def test_gradient_norms(self, name):
        problem, dense = shared(name)
        tolerance = problems.case(name).tolerance
        table = ngeval.gradient_norms(problem)
        norms = reference.per_sample_gradients(dense).norm(dim=1)
        assert list(table["sample"]) == list(range(problem.num_samples))
        assert relative_gap(torch.tensor(table["gradient_norm"]), norms) < tolerance
        expected = dense.residual.norm(dim=1)
        assert relative_gap(torch.tensor(table["residual_norm"]), expected) < tolerance
        assert relative_gap(torch.tensor(table["loss"]), problem.loss) == 0
        smallest = float(norms.min())
        expected_ratio = float(norms.max()) / smallest if smallest > 0 else math.inf
        assert table.attrs["imbalance"] == pytest.approx(expected_ratio, rel=tolerance)

    @pytest.mark.parametrize("name", NAMES)
    def test_gamma_of_any_direction(self, name):
        problem, dense = shared(name)
        tolerance = 100 * problems.case(name).tolerance
        direction = random_like(problem, problem.num_parameters)
        expected = reference.gamma(dense, direction.double())
        assert ngeval.gamma(problem, direction) == pytest.approx(expected, rel=tolerance)
        assert problem.gamma(direction) == ngeval.gamma(problem, direction)

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_loss_change_is_the_derivative_of_every_loss(self, name):
        case, problem = problems.case(name), problems.problem_of(name)
        direction = random_like(problem, problem.num_parameters)
        direction /= direction.norm()
        step = 1e-5
        losses = []
        for sign in (-1, 1):
            model = moved(case.model, sign * step * direction)
            with torch.no_grad():
                outputs = reference.forward(model, case.inputs)
            losses.append(reference.loss(outputs, case.targets, case.family))
        numeric = (losses[0] - losses[1]) / (2 * step)
        change = ngeval.loss_change(problem, direction)
        assert change.shape == (problem.num_samples,)
        torch.testing.assert_close(change, numeric, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_dtype_float64_of_a_float32_model_is_the_exact_problem(self, name):
        single = problems.case(name.replace("float64", "float32"))
        problem = single.problem(dtype=torch.float64)
        assert problem.dtype == torch.float64
        dense = single.reference()
        assert relative_gap(problem.gradient(), reference.gradient(dense)) < 1e-12
        assert relative_gap(problem.fisher().diagonal(), reference.fisher(dense).diagonal()) < 1e-12
        assert all(p.dtype == torch.float32 for p in single.model.parameters())


class TestScipy:
    name = "categorical-mlp-float64"

    def operator(self) -> tuple[sparse.LinearOperator, np.ndarray]:
        problem, dense = shared(self.name)
        return problem.fisher().to_scipy(), reference.fisher(dense).numpy()

    def test_products(self):
        operator, matrix = self.operator()
        vectors = np.random.default_rng(0).standard_normal((matrix.shape[0], 2))
        np.testing.assert_allclose(operator @ vectors, matrix @ vectors, rtol=0, atol=1e-12)
        column = vectors[:, :1]
        np.testing.assert_allclose(operator @ column, matrix @ column, rtol=0, atol=1e-12)
        row = operator.rmatvec(vectors[:, 0])
        np.testing.assert_allclose(row, matrix.T @ vectors[:, 0], rtol=0, atol=1e-12)

    def test_eigsh(self):
        operator, matrix = self.operator()
        start = np.ones(matrix.shape[0])
        result = sparse.eigsh(operator, k=3, which="LA", v0=start, return_eigenvectors=False)
        np.testing.assert_allclose(sorted(result), np.linalg.eigvalsh(matrix)[-3:], rtol=1e-10)

    def test_cg(self):
        operator, matrix = self.operator()
        identity = sparse.aslinearoperator(sparse_eye(matrix.shape[0]))
        right = np.random.default_rng(1).standard_normal(matrix.shape[0])
        result, code = sparse.cg(operator + 0.1 * identity, right, rtol=1e-12)
        assert code == 0
        expected = np.linalg.solve(matrix + 0.1 * np.eye(matrix.shape[0]), right)
        np.testing.assert_allclose(result, expected, rtol=1e-8)

    def test_a_float32_model_takes_float64_vectors(self):
        problem, dense = shared("categorical-mlp-float32")
        result = problem.fisher().to_scipy() @ np.ones(problem.num_parameters)
        assert result.dtype == np.float64
        expected = reference.fisher(dense).sum(1)
        assert relative_gap(torch.from_numpy(result), expected) < 2e-5


def sparse_eye(size: int) -> np.ndarray:
    return np.eye(size)


def shared(name: str) -> tuple[ngeval.Problem, reference.Dense]:
    return problems.problem_of(name), problems.reference_of(name)


def moved(model: nn.Module, step: Tensor) -> nn.Module:
    """A copy of the model at θ + step."""
    model = copy.deepcopy(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    parts = step.split([p.numel() for p in trainable])
    with torch.no_grad():
        for parameter, part in zip(trainable, parts, strict=True):
            parameter.add_(part.reshape(parameter.shape))
    return model


class TwoInputs(nn.Module):
    """Two tensors in, an object with .logits out."""

    def __init__(self, wrap: bool = False) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3).double()
        self.right = nn.Embedding(5, 3).double()
        self.wrap = wrap

    def forward(self, features: Tensor, token: Tensor) -> object:
        z = torch.tanh(self.left(features)) + self.right(token)
        return types.SimpleNamespace(logits=z, loss=None) if self.wrap else z


class WithUnused(nn.Module):
    """A trainable layer that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class TestInputsAndOutputs:
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    token = torch.tensor([0, 1, 2, 2, 4])
    targets = torch.tensor([0, 1, 2, 1, 0])

    @pytest.mark.parametrize("engine", ["vmap", "loop"])
    @pytest.mark.parametrize("wrap", [False, True], ids=["tensor", "object"])
    @pytest.mark.parametrize("kind", ["tuple", "dict"])
    def test_tuple_and_dict_inputs_tensor_and_object_outputs(self, kind, wrap, engine):
        model = TwoInputs(wrap)
        inputs = (self.features, self.token)
        if kind == "dict":
            # Not in the order of the signature: names decide.
            inputs = {"token": self.token, "features": self.features}
        problem = ngeval.Problem(model, inputs, self.targets, "categorical", engine=engine)
        dense = reference.build(model, inputs, self.targets, reference.Family("categorical"))
        assert relative_gap(problem.gradient(), reference.gradient(dense)) < 1e-12
        assert relative_gap(problem.fisher().diagonal(), reference.fisher(dense).diagonal()) < 1e-12
        rows = dense.jacobian.flatten(0, 1)
        assert relative_gap(Kernel(problem).logits.theta, rows @ rows.T) < 1e-12

    def test_a_parameter_that_is_not_used_has_zero_gradient(self):
        model = WithUnused().double()
        dense = reference.build(model, self.features, self.targets, reference.Family("categorical"))
        for engine in ("vmap", "loop"):
            problem = ngeval.Problem(
                model, self.features, self.targets, "categorical", engine=engine
            )
            assert relative_gap(problem.gradient(), reference.gradient(dense)) < 1e-12
            assert bool((problem.gradient()[-6:] == 0).all())
            assert bool((problem.fisher().diagonal()[-6:] == 0).all())

    def test_a_single_sample(self):
        model = nn.Linear(4, 3).double()
        problem = ngeval.Problem(model, self.features[:1], self.targets[:1], "categorical")
        floor = ngeval.gamma_floor(problem)
        assert ngeval.gamma_min(problem) == pytest.approx(floor, rel=1e-12)
        table = ngeval.evaluate(problem, ["sgd", "ef", "ief"], [0.0])
        assert table["gamma"].max() == pytest.approx(table["gamma"].min(), rel=1e-12)


class Busy(nn.Module):
    """Buffers, an in-place first layer, and a forward that may fail."""

    calls = 0  # of the class, because what forward sets on the module is restored

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.fail_at = -1
        Busy.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Busy.calls += 1
        if Busy.calls == self.fail_at:
            raise ZeroDivisionError("forward failed")
        return self.linear(self.norm(self.first(x)))


class Counting(nn.Linear):
    """A buffer that counts the calls, and has no part in the outputs."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return super().forward(x)


class Snapshot:
    """Everything of a model and its inputs that ngeval must leave as it was."""

    def __init__(self, model: nn.Module, inputs: reference.Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        self.tensors = dict(model.named_parameters())
        self.versions = {k: v._version for k, v in model.state_dict(keep_vars=True).items()}
        self.gradients = {
            k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()
        }
        self.modes = {k: m.training for k, m in model.named_modules()}
        self.hooks = {k: dict(m._forward_hooks) for k, m in model.named_modules()}
        self.requires = {k: p.requires_grad for k, p in model.named_parameters()}
        self.batch = map_tensors(inputs, torch.clone)

    def check(self) -> None:
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            assert torch.equal(tensor, self.state[key]), key
            assert tensor._version == self.versions[key], key
        for key, parameter in self.model.named_parameters():
            assert parameter is self.tensors[key]
            assert parameter.requires_grad == self.requires[key]
            before = self.gradients[key]
            if before is None:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, before)
        assert {k: m.training for k, m in self.model.named_modules()} == self.modes
        hooks = {k: dict(m._forward_hooks) for k, m in self.model.named_modules()}
        assert hooks == self.hooks
        assert torch.equal(self.inputs, self.batch)
        assert not self.inputs.requires_grad


class TestTheModelIsOnlyRead:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 1, 0])

    def busy(self) -> Busy:
        model = Busy().eval()
        model.linear.register_forward_hook(lambda _, __, output: output)
        model.linear.weight.grad = torch.full_like(model.linear.weight, 7.0)
        model.norm.bias.requires_grad_(False)
        return model

    @pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
    @pytest.mark.parametrize("dtype", [None, torch.float64], ids=["own-dtype", "float64"])
    def test_after_everything(self, engine, dtype):
        model = self.busy()
        before = Snapshot(model, self.inputs)
        problem = ngeval.Problem(
            model, self.inputs, self.targets, "categorical", engine=engine, dtype=dtype
        )
        ngeval.evaluate(problem, problems.METHODS, [0.0, 1.0])
        problem.fisher() @ problem.gradient()
        ngeval.gradient_norms(problem)
        before.check()

    @pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
    def test_a_buffer_that_forward_counts_up(self, engine):
        model = Counting().eval()
        before = Snapshot(model, self.inputs)
        problem = ngeval.Problem(model, self.inputs, self.targets, "categorical", engine=engine)
        dense = reference.build(
            copy.deepcopy(model), self.inputs, self.targets, reference.Family("categorical")
        )
        assert relative_gap(problem.gradient(), reference.gradient(dense)) < 2e-5
        direction = torch.randn(problem.num_parameters)
        expected = reference.gamma(dense, direction.double())
        assert problem.gamma(direction) == pytest.approx(expected, rel=1e-4)
        before.check()

    def test_values_do_not_depend_on_what_was_evaluated_before(self):
        model = self.busy()
        first = ngeval.Problem(model, self.inputs, self.targets, "categorical").gradient()
        again = ngeval.Problem(model, self.inputs, self.targets, "categorical").gradient()
        assert torch.equal(first, again)

    @pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
    def test_after_an_exception_at_any_call_of_forward(self, engine):
        failures = 0
        for fail_at in range(1, 100):
            model = self.busy()
            model.fail_at = fail_at
            before = Snapshot(model, self.inputs)
            message = ""
            try:
                problem = ngeval.Problem(
                    model, self.inputs, self.targets, "categorical", engine=engine
                )
                table = ngeval.evaluate(problem, ["sgd", "diag"], [1.0])
                failed = table["status"] != "ok"  # other rows may have notes
                message = "".join(table["reason"][failed])
            except ngeval.NgevalError as error:
                message = str(error)
            before.check()
            if model.calls < fail_at:
                break
            # An engine or a mode that fails may be replaced by another; the rest must be told.
            failures += bool(message)
            assert "forward failed" in message or not message
        # The forward pass, the determinism probe, a row and a product, at the least.
        assert failures >= 4
        assert model.calls < fail_at

    def test_under_no_grad_and_inference_mode(self):
        model = self.busy()
        expected = ngeval.Problem(model, self.inputs, self.targets, "categorical").gradient()
        for context in (torch.no_grad, torch.inference_mode):
            for engine in ("vmap", "loop"):
                with context():
                    problem = ngeval.Problem(
                        model, self.inputs, self.targets, "categorical", engine=engine
                    )
                    assert torch.allclose(problem.gradient(), expected)
                    ngeval.evaluate(problem, ["ef", "ng", "diag"], [1.0])

    @pytest.mark.parametrize("style", ["one-method", "two-methods"])
    def test_double_backward_where_forward_mode_has_no_rule(self, style):
        function = {"one-method": OneMethodTanh, "two-methods": TwoMethodTanh}[style]
        model = nn.Sequential(nn.Linear(4, 3), ReverseOnly(function))
        problem = ngeval.Problem(model, self.inputs, self.targets, "categorical", engine="loop")
        plain = ngeval.Problem(
            nn.Sequential(model[0], nn.Tanh()), self.inputs, self.targets, "categorical"
        )
        direction = torch.randn(problem.num_parameters)
        assert relative_gap(problem.jvp(direction), plain.jvp(direction)) < 1e-5
        assert problem.gamma(direction) == pytest.approx(plain.gamma(direction), rel=1e-4)


class OneMethodTanh(torch.autograd.Function):
    """tanh with a backward rule alone, in the older style that saves in forward."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class TwoMethodTanh(torch.autograd.Function):
    """tanh with a backward rule alone, in the style that torch.func asks for."""

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class ReverseOnly(nn.Module):
    """An activation that has no forward-mode rule."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Random(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class Centring(nn.Module):
    """Every sample sees the mean of the batch."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(z) + 0.3 * (z - z.mean(0))


class Neighbourly(nn.Module):
    """Samples 1 and 2 see each other; the first and the last stand alone."""

    def forward(self, z: Tensor) -> Tensor:
        return z if len(z) < 4 else torch.cat([z[:1], z[1:2] + z[2:3].tanh(), z[2:]])


class Centred(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Centring()(super().forward(x))


class Neighbours(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Neighbourly()(super().forward(x))


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class TestProbes:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 1, 0])

    def make(self, model: nn.Module, **options: object) -> ngeval.Problem:
        return ngeval.Problem(model.eval(), self.inputs, self.targets, "categorical", **options)

    def test_random_outputs(self):
        with pytest.raises(ngeval.ModelError, match=r"two different outputs.*model.eval\(\)"):
            self.make(Random(4, 3))

    @pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("kind", [Centred, Neighbours])
    def test_samples_that_see_each_other(self, kind, engine, dtype):
        with pytest.raises(ngeval.EngineError, match="samples of the batch see each other"):
            self.make(kind(4, 3), engine=engine, dtype=dtype)

    @pytest.mark.parametrize("engine", ["auto", "layers"])
    @pytest.mark.parametrize("kind", [Centring, Neighbourly])
    def test_samples_that_see_each_other_behind_plain_layers(self, kind, engine):
        model = nn.Sequential(nn.Linear(4, 3), kind())
        with pytest.raises(ngeval.EngineError, match="samples of the batch see each other"):
            self.make(model, engine=engine)

    @pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
    def test_batch_statistics_in_eval_mode(self, engine):
        with pytest.raises(ngeval.NgevalError, match="see each other"):
            self.make(BatchStatistics(), engine=engine)

    def test_probes_can_be_switched_off(self):
        assert self.make(Centred(4, 3), probes=False).num_samples == 5
        assert self.make(Random(4, 3), probes=False).num_samples == 5

    @pytest.mark.parametrize("name", NAMES)
    def test_probes_do_not_fire_on_the_zoo(self, name):
        assert problems.case(name).problem(probes=True).num_samples == problems.NUM_SAMPLES

    @pytest.mark.parametrize(
        "use", ["jvp", "vjp", "gamma", "evaluate", "diagonal", "rows", "kernel", "ng"]
    )
    def test_modified_parameters_are_noticed(self, use):
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
        problem = self.make(model)
        ones = torch.ones(problem.num_parameters)
        with torch.no_grad():
            model[2].bias.add_(1.0)
        actions = {
            "jvp": lambda: problem.jvp(ones),
            "vjp": lambda: problem.vjp(problem.residual),
            "gamma": lambda: problem.gamma(ones),
            "evaluate": lambda: ngeval.evaluate(problem, ["sgd"], [1.0]),
            "diagonal": lambda: problem.fisher().diagonal(),
            "rows": lambda: ngeval.gradient_norms(problem),
            "kernel": lambda: Kernel(problem).logits,
            "ng": lambda: ngeval.gamma_min(problem),
        }
        with pytest.raises(ngeval.ModelError, match=r"'2.bias' was modified.*new\s+Problem"):
            actions[use]()

    def test_an_optimizer_step_is_noticed(self):
        model = nn.Linear(4, 3)
        problem = self.make(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        nn.functional.cross_entropy(model(self.inputs), self.targets).backward()
        optimizer.step()
        with pytest.raises(ngeval.ModelError, match="modified"):
            problem.jvp(torch.ones(problem.num_parameters))

    def test_an_optimizer_step_is_noticed_by_evaluate(self):
        model = nn.Linear(4, 3)
        problem = self.make(model)
        ngeval.evaluate(problem, ["ef"], [1.0])
        with torch.no_grad():
            model.weight.mul_(2)
        with pytest.raises(ngeval.ModelError, match="modified"):
            ngeval.evaluate(problem, ["sgd", "ef", "ng", "diag"], [1.0])


@functools.cache
def loop_problem(name: str) -> ngeval.Problem:
    return problems.case(name).problem(engine="loop")


class TestEnginesAndMemory:
    @pytest.mark.parametrize("engine", ["vmap", "layers"])
    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_engines_agree_with_the_loop(self, name, engine):
        case, loop = problems.case(name), loop_problem(name)
        problem = case.problem(engine=engine)
        assert (problem.engine, loop.engine) == (engine, "loop")
        assert relative_gap(Kernel(problem).logits.theta, Kernel(loop).logits.theta) < 1e-10
        assert relative_gap(problem.fisher().diagonal(), loop.fisher().diagonal()) < 1e-10
        columns = ["gamma", "gamma_min", "gamma_floor", "update_norm"]
        tables = [
            ngeval.evaluate(p, ["sgd", "ef", "ief", "ng", "diag", "diag-ef"], [1e-3, 1.0])
            for p in (problem, loop)
        ]
        np.testing.assert_allclose(*(t[columns].to_numpy() for t in tables), rtol=1e-10)

    @pytest.mark.parametrize("engine", ["vmap", "loop", "layers"])
    @pytest.mark.parametrize("rows", [2, 3, 7, 20])
    def test_a_small_memory_gives_the_same_gram_matrix_and_diagonal(self, engine, rows):
        name = "categorical-sequence-float64"
        whole = loop_problem(name)
        memory = rows * whole.num_parameters * 16
        problem = problems.case(name).problem(engine=engine, memory=memory)
        vectors = torch.randn(7, 4, 3, 3, dtype=torch.float64)
        if engine == "layers" and rows == 2:  # it counts the activations as well
            with pytest.raises(ngeval.EngineError, match="raise memory"):
                gram_matrix(problem.rows, vectors)
            return
        expected = gram_matrix(whole.rows, vectors)
        assert relative_gap(gram_matrix(problem.rows, vectors), expected) < 1e-12
        diagonal = problem.fisher().diagonal()
        assert relative_gap(diagonal, whole.fisher().diagonal()) < 1e-12

    def test_auto_loops_over_a_unit_where_vmap_cannot_trace(self):
        class Branching(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                z = x @ self.weight.T + self.bias
                return z if float(z.detach().sum()) > 1e9 else torch.tanh(z)

        model = Branching(4, 3).double()
        inputs = torch.randn(5, 4, dtype=torch.float64)
        targets = torch.tensor([0, 1, 2, 1, 0])
        problem = ngeval.Problem(model, inputs, targets, "categorical")
        assert problem.engine == "layers"
        assert [hooked.vmap_fails for hooked in problem.rows.plan.modules] == [True]
        dense = reference.build(model, inputs, targets, reference.Family("categorical"))
        rows = dense.jacobian.flatten(0, 1)
        assert relative_gap(Kernel(problem).logits.theta, rows @ rows.T) < 1e-12

    def test_a_batch_over_the_budget_says_how_many_samples_fit(self):
        case = problems.make("categorical-linear-float64", num_samples=60)
        # 40 samples: 5 matrices of 40² entries of 8 bytes.
        problem = case.problem(memory=40 * 40**2)
        with pytest.raises(ngeval.EngineError, match=r"at most 40 samples fit.*memory="):
            _ = Kernel(problem).logits

    @pytest.mark.parametrize("engine", ["vmap", "layers"])
    def test_a_row_over_the_budget_is_said_at_once(self, engine):
        with pytest.raises(ngeval.EngineError, match=r"one row of the Jacobian.*raise memory="):
            problems.case("categorical-mlp-float64").problem(memory=100, engine=engine)


class TestDirections:
    problem = property(lambda _: problems.problem_of("categorical-frozen-float64"))

    def as_dict(self, vector: Tensor) -> dict[str, Tensor]:
        return self.problem.function.unflatten(vector)

    def test_dict_and_vector_are_one(self):
        vector = torch.randn(self.problem.num_parameters, dtype=torch.float64)
        named = self.as_dict(vector)
        assert list(named) == ["2.weight", "4.weight", "4.bias"]
        backwards = dict(reversed(named.items()))
        assert self.problem.gamma(backwards) == self.problem.gamma(vector)
        assert torch.equal(self.problem.jvp(backwards), self.problem.jvp(vector))
        change = ngeval.loss_change(self.problem, backwards)
        assert torch.equal(change, ngeval.loss_change(self.problem, vector))

    def test_order_is_that_of_named_parameters(self):
        model = problems.case("categorical-frozen-float64").model
        z = torch.nn.functional.cross_entropy(
            model(problems.case("categorical-frozen-float64").inputs),
            problems.case("categorical-frozen-float64").targets,
            reduction="sum",
        )
        trainable = [p for p in model.parameters() if p.requires_grad]
        parts = torch.autograd.grad(z, trainable)
        flat = torch.cat([part.flatten() for part in parts])
        assert relative_gap(self.problem.gradient(), flat) < 1e-13

    @pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
    def test_extreme_sizes_neither_overflow_nor_vanish(self, size):
        vector = torch.randn(self.problem.num_parameters, dtype=torch.float64)
        single = problems.problem_of("categorical-frozen-float32")
        for problem in (self.problem, single):
            result = problem.jvp(vector * size) / size
            assert relative_gap(result, problem.jvp(vector)) < 1e-6

    def test_zero(self):
        zero = torch.zeros(self.problem.num_parameters, dtype=torch.float64)
        assert bool((self.problem.jvp(zero) == 0).all())
        cotangent = torch.zeros_like(self.problem.outputs)
        assert bool((self.problem.vjp(cotangent) == 0).all())
        with pytest.raises(ngeval.NumericalError, match="undefined"):
            self.problem.gamma(zero)

    def test_a_direction_orthogonal_to_the_gradient_has_no_gamma(self):
        gradient = self.problem.gradient()
        vector = torch.randn(self.problem.num_parameters, dtype=torch.float64)
        model = nn.Linear(1, 2, bias=False).double()
        one = torch.ones(2, 1, dtype=torch.float64)
        problem = ngeval.Problem(model, one, torch.tensor([0, 1]), "categorical")
        # Both weights up by the same amount: the softmax does not move.
        with pytest.raises(ngeval.NumericalError, match="undefined"):
            problem.gamma(torch.ones(2, dtype=torch.float64))
        assert self.problem.gamma(vector + gradient) > 0

    def test_messages(self):
        vector = torch.ones(self.problem.num_parameters, dtype=torch.float64)
        named = self.as_dict(vector)
        cases = [
            (vector[:-1], rf"needs \({len(vector)},\)"),
            (vector.unsqueeze(0), "one entry for each trainable scalar"),
            (vector * math.nan, "NaN or infinite"),
            (vector * math.inf, "NaN or infinite"),
            ({**named, "extra": vector}, r"unknown \['extra'\]"),
            ({k: v for k, v in named.items() if k != "4.bias"}, r"missing \['4.bias'\]"),
            ({**named, "4.bias": torch.ones(2)}, r"'4.bias' has shape \(2,\).*\(3,\)"),
            ({**named, "4.bias": torch.full((3,), math.nan)}, "NaN or infinite"),
        ]
        for direction, words in cases:
            with pytest.raises(ngeval.InputError, match=words):
                self.problem.gamma(direction)

    def test_cotangents_of_the_wrong_shape(self):
        with pytest.raises(ngeval.InputError, match=r"\(7, 2\).*\(7, 3\)"):
            self.problem.vjp(torch.ones(7, 2))

    def test_fisher_operands_of_the_wrong_kind(self):
        operator = self.problem.fisher()
        with pytest.raises(ngeval.InputError, match=r"vector \(P,\) or matrix"):
            operator @ np.ones(operator.shape[0])
        with pytest.raises(ngeval.InputError, match=r"vector \(P,\) or matrix"):
            operator @ torch.ones(operator.shape[0], 1, 1)
        with pytest.raises(ngeval.InputError, match="rows, not 2"):
            operator @ torch.ones(2)


class Returns(nn.Linear):
    """A linear layer whose output goes through a function first."""

    def __init__(self, function: object) -> None:
        super().__init__(4, 3)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(super().forward(x))


class TestOutputs:
    """Which of several outputs is z."""

    @pytest.mark.parametrize(
        ("function", "output"),
        [
            (lambda z: z, None),
            (lambda z: SimpleNamespace(logits=z, other=2 * z), None),
            (lambda z: {"logits": z, "other": 2 * z}, None),
            (lambda z: {"other": 2 * z, "topic": z}, "topic"),
            (lambda z: SimpleNamespace(topic=z), "topic"),
            (lambda z: (2 * z, z), 1),
            (lambda z: [2 * z, z], -1),
            (lambda z: {"deep": (2 * z, {"z": z})}, lambda raw: raw["deep"][1]["z"]),
        ],
    )
    def test_each_way_of_saying_it(self, function, output):
        torch.manual_seed(0)
        model, x, y = Returns(function), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
        problem = ngeval.Problem(model, x, y, "categorical", output=output)
        plain = nn.Linear(4, 3)
        plain.load_state_dict(model.state_dict())
        expected = ngeval.Problem(plain, x, y, "categorical")
        assert torch.equal(problem.outputs, expected.outputs)
        assert problem.gamma(problem.gradient()) == expected.gamma(expected.gradient())
        metric = ngeval.Metric(problem, [(x, y), (x + 1, y)])
        other = ngeval.Metric(expected, [(x, y), (x + 1, y)])
        assert metric.totals == other.totals


class TestMessages:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 1, 0])

    def expect(self, error, words, model=None, inputs=None, **options):
        model = nn.Linear(4, 3) if model is None else model
        inputs = self.inputs if inputs is None else inputs
        with pytest.raises(error, match=words):
            ngeval.Problem(model, inputs, self.targets, "categorical", **options)

    def test_model(self):
        self.expect(ngeval.ModelError, "torch.nn.Module, not function", lambda x: x)
        self.expect(
            ngeval.ModelError, r"requires_grad_\(True\)", nn.Linear(4, 3).requires_grad_(False)
        )

    def test_weights_that_are_not_finite(self):
        for value in (math.nan, math.inf):
            model = nn.Linear(4, 3)
            with torch.no_grad():
                model.bias[1] = value
            self.expect(ngeval.ModelError, "parameter 'bias' holds NaN or infinite", model)
        model = nn.Linear(4, 3)
        model.register_buffer("mean", torch.tensor([math.nan]))
        self.expect(ngeval.ModelError, "buffer 'mean' holds NaN", model)

    def test_a_mask_of_minus_infinity_is_allowed(self):
        model = nn.Linear(4, 3)
        model.register_buffer("mask", torch.tensor([-math.inf, 0.0]))
        problem = ngeval.Problem(model, self.inputs, self.targets, "categorical")
        assert problem.num_parameters == 15

    @pytest.mark.parametrize(
        ("layer", "words"),
        [
            (nn.Dropout(0.1), r"1 \(Dropout\).*model.eval\(\)"),
            (nn.BatchNorm1d(3), r"1 \(BatchNorm1d\)"),
            (nn.RReLU(), r"1 \(RReLU\)"),
        ],
        ids=["dropout", "batchnorm", "rrelu"],
    )
    def test_train_mode(self, layer, words):
        model = nn.Sequential(nn.Linear(4, 3), layer)
        self.expect(ngeval.ModelError, words, model.train())
        problem = ngeval.Problem(model.eval(), self.inputs, self.targets, "categorical")
        assert problem.num_samples == 5

    def test_train_mode_without_consequence_is_allowed(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0), nn.LayerNorm(3)).train()
        problem = ngeval.Problem(model, self.inputs, self.targets, "categorical")
        assert problem.num_samples == 5
        assert model.training

    def test_outputs(self):
        error = ngeval.ModelError
        self.expect(error, r"returned a tuple of 2; .*\.logits", Returns(lambda z: (z, z)))
        self.expect(error, r"a dict with 'z', 'a'; .*\.logits", Returns(lambda z: {"z": z, "a": z}))
        self.expect(error, r"output='b'", Returns(lambda z: {"z": z}), output="b")
        self.expect(error, r"a tuple of 2; .*output=2", Returns(lambda z: (z, z)), output=2)
        self.expect(error, "NoneType", Returns(lambda z: None))
        self.expect(error, "ZeroDivisionError", Returns(lambda z: z), output=lambda z: 1 / 0)
        self.expect(error, r"\(5,\).*batch first", Returns(lambda z: z.sum(1)))
        self.expect(error, r"\(3, 5\).*batch first", Returns(lambda z: z.T))
        self.expect(error, "NaN or infinite", Returns(lambda z: z / 0))

    def test_outputs_that_are_not_finite_name_the_samples(self):
        def spoil(z: Tensor) -> Tensor:
            bad = torch.zeros_like(z)
            bad[3] = math.inf
            return z + bad

        self.expect(ngeval.ModelError, r"samples \[3\]", Returns(spoil))

    def test_inputs(self):
        error, nan = ngeval.InputError, self.inputs.clone()
        nan[2, 1] = math.nan
        model = TwoInputs()
        self.expect(error, "not an empty list", inputs=[])
        self.expect(error, "non-empty tuple", inputs=())
        self.expect(error, "dict of tensors, not an empty dict", inputs={})
        self.expect(error, "or dict of tensors, not dict", inputs={"x": 1.0})
        self.expect(error, r"inputs\[1\] is a ndarray, not", inputs=(self.inputs, np.ones(5)))
        values = [1.0, 2.0, 3.0, 4.0, 5.0]
        self.expect(error, r"inputs\[1\] is a list of 5 values", inputs=(self.inputs, values))
        self.expect(error, "no batch dimension", inputs=torch.tensor(1.0))
        self.expect(error, r"NaN.*first at index \(2, 1\)", inputs=nan)
        self.expect(error, "batch is empty", inputs=self.inputs[:0])
        short = (self.inputs, torch.zeros(4).long())
        self.expect(error, r"inputs\[0\]: 5, inputs\[1\]: 4", model, short)

    def test_targets(self):
        with pytest.raises(ngeval.InputError, match="hold 4 samples"):
            ngeval.Problem(nn.Linear(4, 3), self.inputs, self.targets[:4], "categorical")
        with pytest.raises(ngeval.InputError, match="did you mean 'categorical'"):
            ngeval.Problem(nn.Linear(4, 3), self.inputs, self.targets, "categorial")

    def test_options(self):
        self.expect(ngeval.InputError, "floating-point", dtype=torch.int64)
        self.expect(ngeval.InputError, "did you mean 'vmap'", engine="vmpa")
        for memory in (0, -1):
            self.expect(ngeval.InputError, "positive whole number of bytes", memory=memory)
