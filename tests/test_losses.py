"""Losses of torch.nn as likelihoods: u and H against autograd, one sample at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ngeval
from ngeval.likelihoods import OutputDistribution, get_likelihood

W3 = torch.tensor([0.5, 2.0, 1.25])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def soft(*shape: int) -> Tensor:
    return normal(*shape, seed=2).softmax(-1)


def padded(*shape: int) -> Tensor:
    targets = labels(*shape)
    targets[0, 0] = targets[-1, 1:] = 255
    return targets


@dataclass
class Case:
    """A loss as it is given, and its sum over a batch as torch computes it from the logits.

    ``fisher`` is True where H is the expectation over labels, and otherwise the loss's Hessian.
    """

    loss: object
    outputs: Tensor
    targets: Tensor
    total: Callable[[Tensor], Tensor]
    fisher: Callable[[Tensor], Tensor] | None = None


def cross_entropy(outputs: Tensor, targets: Tensor, **options) -> Case:
    loss = nn.CrossEntropyLoss(**options)
    options = {**options, "reduction": "sum"}
    return Case(
        loss, outputs, targets, lambda z: functional.cross_entropy(z, targets, **options).double()
    )


def elementwise(kind: type[nn.Module], outputs: Tensor, targets: Tensor, **options) -> Case:
    """The mean of a sample's terms, summed over samples."""
    count = outputs[0].numel()
    mean, total = kind(**options), kind(**{**options, "reduction": "sum"})
    divisor = count if mean.reduction == "mean" else 1
    return Case(mean, outputs, targets, lambda z: total(z, targets) / divisor)


def gaussian_nll(count: int, **options) -> Case:
    outputs = torch.cat([normal(4, count), normal(4, count, seed=3).exp()], 1)
    targets = normal(4, count, seed=4)
    loss = nn.GaussianNLLLoss(reduction="sum", **options)

    def total(z: Tensor) -> Tensor:
        return loss(z[:, :count], targets, z[:, count:]) / count

    def fisher(z: Tensor) -> Tensor:
        variances = z[:, count:].detach()
        return torch.diag_embed(torch.cat([1 / variances, 0.5 / variances**2], 1)) / count

    return Case(nn.GaussianNLLLoss(**options), outputs, targets, total, fisher)


def poisson_rate() -> Case:
    outputs, targets = normal(4, 3).exp(), labels(4, 3).double()
    case = elementwise(nn.PoissonNLLLoss, outputs, targets, log_input=False, eps=1e-3)
    case.fisher = lambda z: torch.diag_embed(1 / (z.detach() + 1e-3)) / 3
    return case


def binary(**options) -> Case:
    targets = (labels(5, 3) > 0).double()
    return elementwise(nn.BCEWithLogitsLoss, normal(5, 3), targets, **options)


CASES = {
    "cross-entropy": lambda: cross_entropy(normal(6, 3), labels(6)),
    "class weights": lambda: cross_entropy(normal(6, 3), labels(6), weight=W3.double()),
    "a weight of 0": lambda: cross_entropy(
        normal(6, 3), labels(6), weight=torch.tensor([0.0, 1.0, 2.0]).double()
    ),
    "smoothing": lambda: cross_entropy(normal(6, 3), labels(6), label_smoothing=0.2),
    "smoothing and weights": lambda: cross_entropy(
        normal(6, 3), labels(6), label_smoothing=0.2, weight=W3.double()
    ),
    "positions": lambda: cross_entropy(normal(4, 3, 5), labels(4, 5)),
    "images": lambda: cross_entropy(normal(2, 3, 2, 4), labels(2, 2, 4), weight=W3.double()),
    "ignored": lambda: cross_entropy(
        normal(4, 3, 5), padded(4, 5), ignore_index=255, label_smoothing=0.1, weight=W3.double()
    ),
    "square": lambda: cross_entropy(normal(4, 3, 3), labels(4, 3)),
    "soft targets": lambda: cross_entropy(normal(6, 3), soft(6, 3)),
    "soft targets of all kinds": lambda: cross_entropy(
        normal(6, 3), 3 * soft(6, 3), weight=W3.double(), label_smoothing=0.3
    ),
    "soft targets of positions": lambda: cross_entropy(
        normal(4, 3, 5), normal(4, 3, 5, seed=2).softmax(1), weight=W3.double()
    ),
    "soft targets, square": lambda: cross_entropy(
        normal(4, 3, 3), normal(4, 3, 3, seed=2).softmax(1), weight=W3.double()
    ),
    "mse": lambda: elementwise(nn.MSELoss, normal(4, 3), normal(4, 3, seed=5)),
    "mse of images": lambda: elementwise(nn.MSELoss, normal(2, 3, 4), normal(2, 3, 4, seed=5)),
    "mse, sum": lambda: elementwise(
        nn.MSELoss, normal(4, 3), normal(4, 3, seed=5), reduction="sum"
    ),
    "bce": binary,
    "bce, sum": lambda: binary(reduction="sum"),
    "bce, pos_weight": lambda: binary(pos_weight=W3.double()),
    "bce, weight": lambda: binary(weight=W3.double(), pos_weight=torch.tensor(3.0).double()),
    "multi-label": lambda: elementwise(
        nn.MultiLabelSoftMarginLoss, normal(5, 3), (labels(5, 3) > 0).double()
    ),
    "poisson": lambda: elementwise(nn.PoissonNLLLoss, normal(4, 3), labels(4, 3).double()),
    "poisson, rate": poisson_rate,
    "gaussian-nll": lambda: gaussian_nll(2),
    "gaussian-nll, full": lambda: gaussian_nll(3, full=True),
}
CASES["multi-label"] = lambda: Case(
    nn.MultiLabelSoftMarginLoss(),
    normal(5, 3),
    (labels(5, 3) > 0).double(),
    lambda z: 5 * functional.multilabel_soft_margin_loss(z, (labels(5, 3) > 0).double()),
)


@pytest.fixture(params=CASES, name="case")
def one_case(request) -> Case:
    return CASES[request.param]()


class Bound:
    """A loss bound to outputs, whose logits may be arranged differently."""

    def __init__(self, case: Case) -> None:
        self.likelihood = get_likelihood(case.loss)
        arrange = self.likelihood.arrangement(case.outputs, case.targets)
        self.arrange = arrange or (lambda z: z)
        self.distribution = self.likelihood.bind(self.arrange(case.outputs), case.targets)


def field(case: Case) -> tuple[Tensor, Tensor]:
    """The gradient of the summed loss, and its Hessian for each sample, by autograd."""
    bound = Bound(case)
    leaf = bound.arrange(case.outputs).detach().requires_grad_()
    inverse = leaf.movedim(-1, 1) if leaf.ndim > 2 and "CrossEntropy" in repr(case.loss) else leaf
    (slope,) = torch.autograd.grad(case.total(inverse), leaf, create_graph=True)
    size = leaf[0].numel()
    rows = [
        torch.autograd.grad(slope.flatten(1)[:, i].sum(), leaf, retain_graph=True)[0].flatten(1)
        for i in range(size)
    ]
    return slope.detach(), torch.stack(rows, 1)


def matrix(product: Callable[[Tensor], Tensor], distribution: OutputDistribution) -> Tensor:
    shape = distribution.logits.shape
    size = distribution.logits[0].numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, 1, *shape[1:])
    return product(unit.expand(size, *shape)).flatten(2).permute(1, 2, 0)


def test_residual_is_the_gradient(case: Case):
    slope, _ = field(case)
    torch.testing.assert_close(Bound(case).distribution.residual(), slope, rtol=1e-6, atol=1e-7)


def test_curvature_is_the_hessian_or_the_fisher(case: Case):
    distribution = Bound(case).distribution
    expected = field(case)[1] if case.fisher is None else case.fisher(case.outputs)
    actual = matrix(distribution.fisher_product, distribution)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    factor = matrix(distribution.factor_product, distribution)
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-6, atol=1e-8)
    transposed = matrix(distribution.factor_transpose_product, distribution)
    torch.testing.assert_close(transposed.mT, factor, rtol=1e-12, atol=1e-14)


def test_whitened_residual_is_that_of_the_pseudo_inverse(case: Case):
    distribution = Bound(case).distribution
    factor = matrix(distribution.factor_product, distribution)
    residual = distribution.residual().flatten(1).unsqueeze(-1)
    expected = (torch.linalg.pinv(factor, rtol=1e-10) @ residual).squeeze(-1)
    actual = distribution.whitened_residual().flatten(1)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(distribution.floor_terms(), expected.square().sum(1))
    assert distribution.whitening_error() < 1e-13


def test_loss_is_that_of_torch(case: Case):
    distribution = Bound(case).distribution
    loss = float(case.total(case.outputs).detach())
    assert float(distribution.loss().sum()) == pytest.approx(loss, rel=1e-9)


def test_sampled_labels_have_the_curvature(case: Case):
    distribution = Bound(case).distribution
    draws = distribution.sampled_residual(20_000, torch.Generator().manual_seed(0)).flatten(2)
    actual = torch.einsum("knc,knd->ncd", draws, draws) / len(draws)
    expected = matrix(distribution.fisher_product, distribution)
    assert float((actual - expected).abs().max()) < 0.06 * float(expected.abs().max())


class TestForms:
    """The same loss in each form in which people have it."""

    @pytest.mark.parametrize(
        ("given", "same"),
        [
            (functional.cross_entropy, nn.CrossEntropyLoss()),
            (functional.mse_loss, nn.MSELoss()),
            (nn.MSELoss, nn.MSELoss()),
            ("mse", nn.MSELoss()),
            (
                functools.partial(functional.cross_entropy, label_smoothing=0.1),
                nn.CrossEntropyLoss(label_smoothing=0.1),
            ),
            (
                functools.partial(functional.cross_entropy, weight=W3),
                nn.CrossEntropyLoss(weight=W3.clone()),
            ),
            (ngeval.Gaussian(0.5, full=False), nn.MSELoss(reduction="sum")),
            ({"a": nn.MSELoss()}, {"a": "mse"}),
        ],
    )
    def test_equal(self, given, same):
        assert get_likelihood(given) == get_likelihood(same)
        assert get_likelihood(given).name == get_likelihood(same).name
        assert hash(get_likelihood(given)) == hash(get_likelihood(same))

    def test_options_are_in_the_name(self):
        names = {
            get_likelihood(loss).name
            for loss in (
                nn.CrossEntropyLoss(),
                nn.CrossEntropyLoss(weight=W3),
                nn.CrossEntropyLoss(weight=2 * W3),
                nn.CrossEntropyLoss(label_smoothing=0.1),
                nn.MSELoss(),
                nn.MSELoss(reduction="sum"),
                nn.BCEWithLogitsLoss(),
                nn.BCEWithLogitsLoss(reduction="sum"),
                nn.BCEWithLogitsLoss(pos_weight=W3),
            )
        }
        assert len(names) == 9
        assert {"categorical", "mse", "bernoulli", "bernoulli:mean"} <= names

    def test_many_weights_have_a_short_name(self):
        loss = nn.CrossEntropyLoss(weight=torch.rand(5000))
        assert len(get_likelihood(loss).name) < 100
        assert len(repr(get_likelihood(loss))) < 200

    def test_unknown_losses_name_the_known_ones(self):
        class Focal(nn.CrossEntropyLoss):
            def forward(self, z, y):
                return super().forward(z, y) ** 2

        for loss in (nn.L1Loss(), nn.HuberLoss(), Focal(), lambda z, y: 0.0, 3, nn.Linear(2, 2)):
            with pytest.raises(ngeval.InputError, match=r"CrossEntropyLoss.*docs/losses\.md"):
                get_likelihood(loss)

    def test_options_that_do_not_exist(self):
        with pytest.raises(ngeval.InputError, match=r"mse_loss.*smoothing"):
            get_likelihood(functools.partial(functional.mse_loss, smoothing=1))

    def test_weights_that_do_not_fit(self):
        with pytest.raises(ngeval.InputError, match="3 class weights for 4 classes"):
            get_likelihood(nn.CrossEntropyLoss(weight=W3)).bind(normal(2, 4), labels(2))
        with pytest.raises(ngeval.InputError, match="class weights must be finite numbers"):
            get_likelihood(nn.CrossEntropyLoss(weight=-W3))
        with pytest.raises(ngeval.InputError, match="does not broadcast"):
            get_likelihood(nn.BCEWithLogitsLoss(weight=W3)).bind(normal(2, 4), normal(2, 4) * 0)


class Net(nn.Module):
    """A small network with what its tail makes of the last layer."""

    def __init__(self, tail: Callable[[Tensor], object], outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last, self.tail = nn.Linear(4, 5), nn.Linear(5, outputs), tail

    def forward(self, x: Tensor) -> object:
        return self.tail(self.last(torch.tanh(self.hidden(x))))


def dense_gammas(
    model: nn.Module,
    inputs: Tensor,
    losses: Callable[[Tensor, int], Tensor],
    curvature: Callable[[Tensor, int], Tensor],
    read: Callable[[object], Tensor] = lambda raw: raw,
    damping: float = 1e-2,
) -> dict[str, float]:
    """γ of sgd, ef and ng by explicit matrices: ℓ_n and H_n of sample n's outputs z (C,)."""
    parameters = list(model.parameters())
    rows, gradients, fishers = [], [], []
    for n in range(len(inputs)):
        z = read(model(inputs[n : n + 1].double()))[0]
        jacobian = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(e, parameters, retain_graph=True)])
            for e in z.flatten()
        ])  # fmt: skip
        leaf = z.detach().requires_grad_()
        (u,) = torch.autograd.grad(losses(leaf, n), leaf)
        rows.append(jacobian)
        gradients.append(jacobian.T @ u.flatten())
        fishers.append(jacobian.T @ curvature(z.detach(), n) @ jacobian)
    fisher, matrix_g = sum(fishers), torch.stack(gradients)
    g, eye = matrix_g.sum(0), torch.eye(len(matrix_g), dtype=torch.float64)
    ef = matrix_g.T @ torch.linalg.solve(matrix_g @ matrix_g.T + damping * eye, torch.ones(len(g) * 0 + len(matrix_g)).double())  # fmt: skip  # noqa: E501
    ng = torch.linalg.solve(fisher + damping * torch.eye(len(g), dtype=torch.float64), g)
    return {
        name: float((d @ fisher @ d).sqrt() / (d @ g).abs())
        for name, d in {"sgd": g, "ef": ef, "ng": ng}.items()
    }


def softmax_hessian(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


def graded(problem: ngeval.Problem, damping: float = 1e-2) -> dict[str, float]:
    table = ngeval.evaluate(problem, ["sgd", "ef", "ng"], [damping])
    return dict(zip(table["method"], table["gamma"], strict=True))


class TestProblems:
    """Whole problems: γ against explicit matrices."""

    x = normal(6, 4, seed=7)
    y = labels(6)

    def agree(self, problem: ngeval.Problem, expected: dict[str, float]) -> None:
        actual = graded(problem)
        assert actual == pytest.approx(expected, rel=1e-8)

    def test_smoothed_and_weighted(self):
        model, weights = Net(lambda z: z).double(), W3.double()
        options = {"weight": weights, "label_smoothing": 0.1}
        problem = ngeval.Problem(model, self.x, self.y, nn.CrossEntropyLoss(**options))

        def loss(z: Tensor, n: int) -> Tensor:
            return functional.cross_entropy(z, self.y[n], reduction="sum", **options)

        def curvature(z: Tensor, n: int) -> Tensor:
            mass = 0.9 * weights[self.y[n]] + 0.1 * weights.mean()
            return mass * softmax_hessian(z)

        self.agree(problem, dense_gammas(model, self.x, loss, curvature))

    def test_weights_of_samples(self):
        model, weights = Net(lambda z: z).double(), torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.0])
        problem = ngeval.Problem(model, self.x, self.y, "categorical", weights=weights)
        expected = dense_gammas(
            model,
            self.x,
            lambda z, n: weights[n] * functional.cross_entropy(z, self.y[n]),
            lambda z, n: weights[n] * softmax_hessian(z),
        )
        self.agree(problem, expected)
        assert "weighted" in ngeval.evaluate(problem, ["sgd"], [1.0])["likelihood"][0]
        again = problem.with_batch(self.x.flip(0), self.y.flip(0), weights.flip(0))
        assert graded(again) == pytest.approx(expected, rel=1e-8)
        with pytest.raises(ngeval.InputError, match="weights= for all batches"):
            problem.with_batch(self.x, self.y)

    def test_a_sample_of_weight_two_counts_twice(self):
        model = Net(lambda z: z).double()
        weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 3.0])
        order = [0, 1, 1, 2, 3, 4, 5, 5, 5]
        weighted = ngeval.Problem(model, self.x, self.y, "categorical", weights=weights)
        repeated = ngeval.Problem(model, self.x[order], self.y[order], "categorical")
        direction = torch.randn(weighted.num_parameters, dtype=torch.float64)
        assert weighted.gamma(direction) == pytest.approx(repeated.gamma(direction), rel=1e-12)

    def test_weights_that_are_none(self):
        model = Net(lambda z: z)
        for weights in (torch.ones(5), -torch.ones(6), torch.full((6,), math.nan), [1.0] * 6):
            with pytest.raises(ngeval.InputError, match="weights"):
                ngeval.Problem(model, self.x, self.y, "categorical", weights=weights)

    @pytest.mark.parametrize("missing", [math.nan, -1.0])
    def test_missing_labels(self, missing):
        model = Net(lambda z: z).double()
        targets = (labels(6, 3) > 0).double()
        there = torch.ones(6, 3)
        there[0, 1] = there[3, :] = there[5, 0] = 0
        given = torch.where(there > 0, targets, missing)
        problem = ngeval.Problem(model, self.x, given, ngeval.Bernoulli(ignore=missing))

        def loss(z: Tensor, n: int) -> Tensor:
            bce = functional.binary_cross_entropy_with_logits
            return (bce(z, targets[n], reduction="none") * there[n]).sum()

        def curvature(z: Tensor, n: int) -> Tensor:
            q = z.sigmoid()
            return torch.diag(q * (1 - q) * there[n])

        self.agree(problem, dense_gammas(model, self.x, loss, curvature))
        assert bool(torch.isfinite(problem.loss).all())
        real = torch.where(there > 0, normal(6, 3, seed=9), missing)
        problem = ngeval.Problem(model, self.x, real, ngeval.Gaussian(2.0, ignore=missing))
        expected = dense_gammas(
            model,
            self.x,
            lambda z, n: ((z - real[n].nan_to_num()).square() * there[n]).sum() / 4,
            lambda z, n: torch.diag(there[n].double()) / 2,
        )
        self.agree(problem, expected)

    def test_missing_labels_without_the_option_are_an_error(self):
        targets = torch.zeros(6, 3)
        targets[2, 1] = math.nan
        for name in ("bernoulli", "gaussian", nn.MSELoss(), "poisson"):
            with pytest.raises(ngeval.InputError, match=r"NaN.*ignore=math\.nan"):
                ngeval.Problem(Net(lambda z: z), self.x, targets, name)

    def test_the_layout_of_torch(self):
        def tail(z: Tensor) -> Tensor:
            return z.reshape(-1, 3, 3)  # (N, C, T) with C = T

        model, targets = Net(tail, 9).double(), labels(6, 3)
        problem = ngeval.Problem(model, self.x, targets, nn.CrossEntropyLoss())

        def loss(z: Tensor, n: int) -> Tensor:
            return functional.cross_entropy(z[None], targets[n][None], reduction="sum")

        def curvature(z: Tensor, n: int) -> Tensor:
            return torch.autograd.functional.hessian(lambda t: loss(t, n), z).reshape(9, 9)

        self.agree(problem, dense_gammas(model, self.x, loss, curvature))

    def test_single_outputs_without_a_dimension(self):
        targets = (labels(6) > 0).float()
        flat = ngeval.Problem(Net(lambda z: z.squeeze(-1), 1), self.x.float(), targets, "bernoulli")
        column = ngeval.Problem(
            Net(lambda z: z, 1), self.x.float(), targets.unsqueeze(1), nn.BCEWithLogitsLoss()
        )
        assert graded(flat) == graded(column)
        again = flat.with_batch(self.x.float(), targets)
        assert graded(again) == graded(flat)
        metric = ngeval.Metric(flat, [(self.x.float(), targets)])
        assert metric.totals.loss == pytest.approx(float(flat.loss.mean()))
        weighted = ngeval.Problem(
            Net(lambda z: z.squeeze(-1), 1),
            self.x.float(),
            targets,
            "bernoulli",
            weights=torch.ones(6),
        )
        assert graded(weighted) == pytest.approx(graded(flat))

    def test_means_and_variances(self):
        def tail(z: Tensor) -> tuple[Tensor, Tensor]:
            return z[:, :2], functional.softplus(z[:, 2:])  # one variance for both

        model, targets = Net(tail).double(), normal(6, 2, seed=5)
        problem = ngeval.Problem(model, self.x, targets, nn.GaussianNLLLoss())

        def loss(z: Tensor, n: int) -> Tensor:
            return functional.gaussian_nll_loss(z[:2], targets[n], z[2:], reduction="sum") / 2

        def curvature(z: Tensor, n: int) -> Tensor:
            return torch.diag(torch.cat([1 / z[2:], 0.5 / z[2:] ** 2])) / 2

        def read(raw):
            return torch.cat([raw[0], raw[1].expand(1, 2)], 1)

        self.agree(problem, dense_gammas(model, self.x, loss, curvature, read))

    def test_a_negative_variance_is_an_error(self):
        with pytest.raises(ngeval.InputError, match="variances among the model's outputs are neg"):
            ngeval.Problem(Net(lambda z: z, 4), self.x.float(), normal(6, 2), "gaussian-nll")


class TestHeads:
    """Several losses over a model's named outputs."""

    x = normal(6, 4, seed=7)
    targets = MappingProxyType({"kind": labels(6), "place": normal(6, 2, seed=4), "rest": None})

    @staticmethod
    def tail(z: Tensor) -> dict[str, Tensor]:
        return {"place": z[:, :2], "kind": z[:, 2:5], "unused": z}

    def test_sum(self):
        model = Net(self.tail, 5).double()
        losses = {"kind": nn.CrossEntropyLoss(label_smoothing=0.1), "place": nn.MSELoss()}
        problem = ngeval.Problem(model, self.x, self.targets, losses)

        def loss(z: Tensor, n: int) -> Tensor:
            kind = functional.cross_entropy(z[2:], self.targets["kind"][n], label_smoothing=0.1)
            return kind + functional.mse_loss(z[:2], self.targets["place"][n])

        def curvature(z: Tensor, n: int) -> Tensor:
            return torch.block_diag(torch.eye(2).double(), softmax_hessian(z[2:]))

        def read(raw):
            return torch.cat([raw["place"], raw["kind"]], 1)

        expected = dense_gammas(model, self.x, loss, curvature, read)
        assert graded(problem) == pytest.approx(expected, rel=1e-8)
        sampled = ngeval.evaluate(problem, ["sf:2", "diag", "kfac"], [1e-2])
        assert (sampled["status"] == "ok").all()
        with_weights = ngeval.Problem(
            model, self.x, self.targets, losses, weights=torch.full((6,), 2.0)
        )
        assert graded(with_weights, 2e-2)["sgd"] == pytest.approx(expected["sgd"] / 2**0.5)

    def test_positions_of_several_lengths(self):
        def tail(z: Tensor) -> tuple[Tensor, Tensor]:
            return z[:, :6].reshape(-1, 2, 3), z[:, 6:]

        model = Net(tail, 8).double()
        targets = {0: labels(6, 2), 1: normal(6, 2)}
        problem = ngeval.Problem(model, self.x, targets, {0: "categorical", 1: "gaussian"})
        parts = [
            ngeval.Problem(model, self.x, targets[i], name, output=i)
            for i, name in ((0, "categorical"), (1, "gaussian"))
        ]
        v = torch.randn(problem.num_parameters, dtype=torch.float64)
        total = sum(part.fisher() @ v for part in parts)
        torch.testing.assert_close(problem.fisher() @ v, total)
        torch.testing.assert_close(problem.gradient(), sum(part.gradient() for part in parts))
        torch.testing.assert_close(problem.loss, sum(part.loss for part in parts))

    def test_a_head_that_is_a_pair(self):
        def tail(z: Tensor) -> dict[str, object]:
            return {"value": (z[:, :1], z[:, 1:2].exp()), "kind": z[:, 2:]}

        model = Net(tail, 5).double()
        targets = {"value": normal(6, 1, seed=8), "kind": labels(6)}
        losses = {"value": nn.GaussianNLLLoss(), "kind": nn.CrossEntropyLoss()}
        problem = ngeval.Problem(model, self.x, targets, losses)
        raw = model(self.x)
        total = 6 * nn.GaussianNLLLoss()(raw["value"][0], targets["value"], raw["value"][1])
        total = total + 6 * nn.CrossEntropyLoss()(raw["kind"], targets["kind"])
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(total, [*model.parameters()])])
        torch.testing.assert_close(problem.gradient(), wanted)
        assert float(problem.loss.sum()) == pytest.approx(float(total.detach()))

    @pytest.mark.parametrize(
        ("targets", "losses", "options", "words"),
        [
            ({"kind": labels(6)}, {"kind": "categorical", "place": "mse"}, {}, "head 'place'"),
            (labels(6), {"kind": "categorical"}, {}, "are a dict with 'kind', not a Tensor"),
            ({"kind": labels(6)}, {}, {}, "dict of losses is empty"),
            ({"kind": labels(6)}, {"kind": "categorical"}, {"output": "kind"}, "leave out output"),
            ({"kind": labels(5)}, {"kind": "categorical"}, {}, "hold 5 samples"),
        ],
    )
    def test_messages(self, targets, losses, options, words):
        with pytest.raises(ngeval.InputError, match=words):
            ngeval.Problem(Net(self.tail, 5), self.x, targets, losses, **options)

    def test_an_output_that_is_missing(self):
        with pytest.raises(ngeval.ModelError, match=r"'kind'.*output='sort'"):
            ngeval.Problem(Net(self.tail, 5), self.x, {"sort": labels(6)}, {"sort": "categorical"})


class TestMistakes:
    """Mistakes that are cheap to detect are reported, with what to do."""

    x = normal(24, 4, seed=7).float()
    y = labels(24)

    def test_probabilities_of_a_softmax(self):
        model = Net(lambda z: z.softmax(-1))
        for loss in ("categorical", nn.CrossEntropyLoss(), ngeval.Categorical()):
            with pytest.raises(ngeval.ModelError, match=r"sum to 1.*output=torch\.log"):
                ngeval.Problem(model, self.x, self.y, loss)
        taken = ngeval.Problem(model, self.x, self.y, "categorical", output=torch.log)
        plain = ngeval.Problem(Net(lambda z: z), self.x, self.y, "categorical")
        assert graded(taken) == pytest.approx(graded(plain), rel=1e-9)

    def test_log_probabilities(self):
        plain = ngeval.Problem(Net(lambda z: z), self.x, self.y, "categorical")
        logs = ngeval.Problem(Net(lambda z: z.log_softmax(-1)), self.x, self.y, nn.NLLLoss())
        assert graded(logs) == pytest.approx(graded(plain), rel=1e-9)
        with pytest.raises(ngeval.ModelError, match=r"NLLLoss takes log-prob.*CrossEntropyLoss"):
            ngeval.Problem(Net(lambda z: z), self.x, self.y, nn.NLLLoss())

    def test_probabilities_of_a_sigmoid(self):
        targets = (labels(24, 3) > 0).float()
        for tail in (torch.sigmoid, lambda z: z.sigmoid().unsqueeze(1).transpose(1, 2).squeeze(-1)):
            with pytest.raises(ngeval.ModelError, match=r"sigmoid.*output=torch\.logit"):
                ngeval.Problem(Net(tail), self.x, targets, "bernoulli")
        plain = ngeval.Problem(Net(lambda z: z), self.x, targets, nn.BCEWithLogitsLoss())
        of_loss = ngeval.Problem(Net(torch.sigmoid), self.x, targets, nn.BCELoss())
        assert graded(of_loss) == pytest.approx(graded(plain), rel=1e-8)
        with pytest.raises(ngeval.InputError, match="exactly 0 or 1"):
            ngeval.Problem(Net(lambda z: (1e4 * z).sigmoid()), self.x, targets, nn.BCELoss())
        with pytest.raises(ngeval.InputError, match="BCELoss takes probabilities"):
            ngeval.Problem(Net(lambda z: 5 * z), self.x, targets, nn.BCELoss())

    def test_a_sigmoid_by_hand_is_remarked(self):
        targets = (labels(24, 3) > 0).float()
        problem = ngeval.Problem(Net(lambda z: 1 / (1 + (-z).exp())), self.x, targets, "bernoulli")
        assert any("all outputs lie in [0, 1]" in note for note in problem.notes)
        small = Net(lambda z: z)
        small.requires_grad_(True)
        assert ngeval.Problem(small, self.x, targets, "bernoulli").notes == []

    def test_the_layout_by_name(self):
        class Convolved(nn.Module):
            def __init__(self, tail: Callable[[Tensor], Tensor]) -> None:
                super().__init__()
                self.conv, self.tail = nn.Conv1d(2, 3, 2), tail

            def forward(self, x: Tensor) -> Tensor:
                return self.tail(self.conv(x.reshape(-1, 2, 4)[..., :4]))  # (N, 3, 3)

        x, y = normal(6, 8).float(), labels(6, 3)
        with pytest.raises(ngeval.ModelError, match=r"dimension 1.*CrossEntropyLoss\(\)"):
            ngeval.Problem(Convolved(lambda z: z), x, y, "categorical")
        right = ngeval.Problem(Convolved(lambda z: z.transpose(1, 2)), x, y, "categorical")
        assert right.notes == []
        ngeval.Problem(Convolved(lambda z: z), x, y, "categorical", output=lambda z: z)
        unknown = ngeval.Problem(Convolved(torch.tanh), x, y, "categorical")
        assert any("taken to be last" in note for note in unknown.notes)

    def test_layouts_that_do_not_fit(self):
        model = Net(lambda z: z.reshape(-1, 3, 4), 12)
        with pytest.raises(ngeval.InputError, match=r"nn\.CrossEntropyLoss\(\).*movedim"):
            ngeval.Problem(model, self.x, labels(24, 4), "categorical")
        one_hot = functional.one_hot(self.y, 3)
        for targets, words in (
            (one_hot, r"targets\.float\(\)"),
            (self.y[:, None], r"squeeze\(-1\)"),
        ):
            with pytest.raises(ngeval.InputError, match=words):
                ngeval.Problem(Net(lambda z: z), self.x, targets, nn.CrossEntropyLoss())

    def test_classes_last_where_only_that_fits(self):
        model = Net(lambda z: z.reshape(-1, 4, 3), 12)
        flattened = ngeval.Problem(model, self.x, labels(24, 4), nn.CrossEntropyLoss())
        named = ngeval.Problem(model, self.x, labels(24, 4), "categorical")
        assert graded(flattened) == graded(named)

    def test_one_dimension_more(self):
        for loss in ("gaussian", nn.MSELoss(), "bernoulli"):
            with pytest.raises(ngeval.InputError, match=r"broadcast.*unsqueeze\(-1\)"):
                ngeval.Problem(Net(lambda z: z, 1), self.x, torch.zeros(24), loss)

    def test_parameters_without_effect(self):
        model = Net(lambda z: z)
        model.spare = nn.Linear(2, 2)
        problem = ngeval.Problem(model, self.x, self.y, "categorical")
        assert problem.notes == ["no output depends on spare.weight, spare.bias"]
        table = ngeval.evaluate(problem, ["sgd"], [1.0])
        assert "spare.weight" in table["note"][0]

    def test_a_gradient_of_zero(self):
        model = Net(lambda z: z)
        nn.init.zeros_(model.last.weight)
        problem = ngeval.Problem(model, self.x, self.y, "categorical")
        assert problem.notes == ["the gradient of hidden.weight, hidden.bias is exactly 0"]
