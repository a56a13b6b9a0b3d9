"""Likelihoods against autograd through torch.distributions, and against explicit matrices."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

import ngeval
from ngeval.likelihoods import OutputDistribution, get_likelihood
from tests import reference

VARIANCE = 0.5
NAMES = ("categorical", "gaussian:0.5", "bernoulli")
SHAPES = {"flat": (5, 4), "sequence": (4, 3, 2)}
CASES = [pytest.param(n, s, id=f"{n}-{k}") for n in NAMES for k, s in SHAPES.items()]


def torch_distribution(name: str, logits: Tensor) -> distributions.Distribution:
    if name == "categorical":
        return distributions.Categorical(logits=logits)
    if name == "bernoulli":
        return distributions.Bernoulli(logits=logits)
    return distributions.Normal(logits, math.sqrt(VARIANCE))


def make(name: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "categorical":
        return logits, torch.randint(shape[-1], shape[:-1], generator=generator)
    if name == "bernoulli":
        return logits, torch.randint(2, shape, generator=generator).double()
    return logits, torch.randn(shape, generator=generator, dtype=torch.float64)


def bind(name: str, shape: tuple[int, ...], seed: int = 0) -> OutputDistribution:
    return get_likelihood(name).bind(*make(name, shape, seed))


def explicit_fisher(name: str, logits: Tensor) -> Tensor:
    """H_n by the exact expectation over labels, with autograd's scores: (N, C, C)."""
    size = logits[0].numel()
    if name.startswith("gaussian"):
        return (torch.eye(size).double() / VARIANCE).expand(logits.shape[0], size, size)
    matrices = []
    for row in logits:
        leaf = row.clone().requires_grad_()
        model = torch_distribution(name, leaf)
        choices = range(row.shape[-1]) if name == "categorical" else (0.0, 1.0)
        count = row[..., 0].numel() if name == "categorical" else row.numel()
        shape = row.shape[:-1] if name == "categorical" else row.shape
        total = torch.zeros(size, size, dtype=torch.float64)
        for labels in itertools.product(choices, repeat=count):
            log_p = model.log_prob(torch.tensor(labels, dtype=torch.float64).reshape(shape)).sum()
            (score,) = torch.autograd.grad(log_p, leaf, retain_graph=True)
            total += log_p.exp().detach() * torch.outer(score.flatten(), score.flatten())
        matrices.append(total)
    return torch.stack(matrices)


def columns(product, distribution: OutputDistribution) -> Tensor:
    """The matrices (N, C, C) that a product with unit vectors stands for."""
    shape = distribution.logits.shape
    size = distribution.logits[0].numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, 1, *shape[1:])
    applied = product(unit.expand(size, *shape))
    return applied.flatten(2).permute(1, 2, 0)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_loss_and_residual_are_those_of_torch_distributions(name, shape):
    logits, targets = make(name, shape)
    leaf = logits.clone().requires_grad_()
    losses = -torch_distribution(name, leaf).log_prob(targets).reshape(shape[0], -1).sum(1)
    (expected,) = torch.autograd.grad(losses.sum(), leaf)
    bound = get_likelihood(name).bind(logits, targets)
    torch.testing.assert_close(bound.loss(), losses.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bound.residual(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_fisher_is_the_expectation_over_labels(name, shape):
    bound = bind(name, shape)
    expected = explicit_fisher(name, bound.logits)
    torch.testing.assert_close(columns(bound.fisher_product, bound), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_factor_times_its_transpose_is_the_fisher(name, shape):
    bound = bind(name, shape)
    factor = columns(bound.factor_product, bound)
    transpose = columns(bound.factor_transpose_product, bound)
    torch.testing.assert_close(transpose, factor.transpose(1, 2), rtol=0, atol=1e-14)
    expected = explicit_fisher(name, bound.logits)
    torch.testing.assert_close(factor @ factor.transpose(1, 2), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_whitened_residual_is_the_pseudo_inverse_of_the_factor(name, shape):
    bound = bind(name, shape)
    factor = columns(bound.factor_product, bound)
    residual = bound.residual().flatten(1)
    expected = (torch.linalg.pinv(factor, rtol=1e-12) @ residual.unsqueeze(-1)).squeeze(-1)
    whitened = bound.whitened_residual().flatten(1)
    torch.testing.assert_close(whitened, expected, rtol=1e-10, atol=1e-12)
    back = bound.factor_product(bound.whitened_residual()).flatten(1)
    torch.testing.assert_close(back, residual, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_floor_terms_are_those_of_explicit_matrices(name, shape):
    bound = bind(name, shape)
    fisher = explicit_fisher(name, bound.logits)
    residual = bound.residual().flatten(1)
    inverse = torch.linalg.pinv(fisher, rtol=1e-12, hermitian=True)
    expected = torch.einsum("nc,ncd,nd->n", residual, inverse, residual)
    torch.testing.assert_close(bound.floor_terms(), expected, rtol=1e-10, atol=0)


def test_categorical_floor_term_is_one_over_p_minus_one():
    bound = bind("categorical", (5, 4))
    p = torch.softmax(bound.logits, -1).gather(1, bound.targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(bound.floor_terms(), 1 / p - 1, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_products_take_leading_dimensions(name):
    bound = bind(name, (4, 3, 2))
    tangents = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64)
    for product in (
        bound.fisher_product,
        bound.factor_product,
        bound.factor_transpose_product,
    ):
        one_by_one = torch.stack([torch.stack([product(t) for t in row]) for row in tangents])
        torch.testing.assert_close(product(tangents), one_by_one, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_logits_become_float64(name):
    logits, targets = make(name, (5, 4))
    bound = get_likelihood(name).bind(logits.float(), targets)
    for tensor in (bound.logits, bound.loss(), bound.residual(), bound.whitened_residual()):
        assert tensor.dtype == torch.float64


class TestPadding:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.tensor([[0, 1, 2, 3], [4, 0, -100, -100], [-100, -100, -100, -100]])
    kept = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()

    @property
    def bound(self) -> OutputDistribution:
        return get_likelihood("categorical").bind(self.logits, self.targets)

    def test_padded_positions_do_not_exist(self):
        bound = self.bound
        tangent = torch.randn(self.logits.shape, dtype=torch.float64)
        for tensor in (
            bound.residual(),
            bound.whitened_residual(),
            bound.fisher_product(tangent),
            bound.factor_product(tangent),
            bound.factor_transpose_product(tangent),
            *bound.residual(bound.sample(6, torch.Generator().manual_seed(0))),
        ):
            assert bool((tensor[~self.kept] == 0).all())
            assert bool((tensor[self.kept].abs().sum(-1) > 0).all())

    def test_the_rest_is_what_it_is_without_padding(self):
        bound = self.bound
        flat = get_likelihood("categorical").bind(self.logits[self.kept], self.targets[self.kept])
        torch.testing.assert_close(bound.residual()[self.kept], flat.residual())
        torch.testing.assert_close(bound.floor_terms().sum(), flat.floor_terms().sum())
        losses = [flat.loss()[:4].sum(), flat.loss()[4:].sum(), torch.zeros(()).double()]
        torch.testing.assert_close(bound.loss(), torch.stack(losses))

    def test_the_reference_agrees(self):
        family = reference.Family("categorical")
        bound = self.bound
        expected = reference.residual(self.logits, self.targets, family)
        torch.testing.assert_close(bound.residual().flatten(1), expected, rtol=0, atol=1e-14)
        expected = reference.curvature(self.logits, self.targets, family)
        result = columns(bound.fisher_product, bound)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
        expected = reference.loss(self.logits, self.targets, family)
        torch.testing.assert_close(bound.loss(), expected, rtol=1e-13, atol=1e-14)

    def test_another_ignore_index(self):
        targets = torch.where(self.targets == -100, 7, self.targets)
        bound = ngeval.Categorical(ignore_index=7).bind(self.logits, targets)
        assert torch.equal(bound.residual(), self.bound.residual())

    def test_an_ignored_class_inside_the_range(self):
        # Class 0 as padding, as some tokenizers have it.
        bound = ngeval.Categorical(ignore_index=0).bind(self.logits, self.targets.clamp_min(0))
        assert bool((bound.residual()[self.targets <= 0] == 0).all())
        draws = bound.sample(50, torch.Generator().manual_seed(0))
        residuals = bound.residual(draws)
        assert bool((residuals[:, self.targets <= 0] == 0).all())
        # A draw of class 0 at a position that exists is a label like any other.
        assert bool((residuals[:, self.targets > 0].abs().sum(-1) > 0).all())


class TestExtremes:
    """Values that a naive q − y or log(softmax) would lose: relative error 1e-12 is asked for."""

    @pytest.mark.parametrize("gap", [40.0, 60.0, 300.0])
    def test_categorical_right_by_a_wide_gap(self, gap):
        bound = get_likelihood("categorical").bind(
            torch.tensor([[gap, 0.0, 0.0]]).double(), torch.tensor([0])
        )
        small = math.exp(-gap) / (1 + 2 * math.exp(-gap))
        expected = [-2 * small, small, small]
        np.testing.assert_allclose(bound.residual()[0].numpy(), expected, rtol=1e-12)
        loss = math.log1p(2 * math.exp(-gap))
        np.testing.assert_allclose(bound.loss().numpy(), [loss], rtol=1e-12)
        np.testing.assert_allclose(bound.floor_terms().numpy(), [2 * math.exp(-gap)], rtol=1e-12)
        # u = S r, to relative precision in every entry but the label's own.
        back = bound.factor_product(bound.whitened_residual())[0]
        np.testing.assert_allclose(back[1:].numpy(), expected[1:], rtol=1e-12)

    @pytest.mark.parametrize("gap", [40.0, 60.0, 300.0])
    def test_categorical_wrong_by_a_wide_gap(self, gap):
        bound = get_likelihood("categorical").bind(
            torch.tensor([[gap, 0.0, 0.0]]).double(), torch.tensor([1])
        )
        np.testing.assert_allclose(bound.loss().numpy(), [gap], rtol=1e-12)
        np.testing.assert_allclose(bound.residual()[0].numpy(), [1, -1, math.exp(-gap)], rtol=1e-9)
        terms = bound.floor_terms().numpy()
        np.testing.assert_allclose(terms, [math.exp(gap) + 1], rtol=1e-12)

    @pytest.mark.parametrize("z", [40.0, 60.0, 300.0])
    def test_bernoulli_right_by_a_wide_gap(self, z):
        bound = get_likelihood("bernoulli").bind(
            torch.tensor([[z, -z]]).double(), torch.tensor([[1.0, 0.0]])
        )
        small = math.exp(-z)
        np.testing.assert_allclose(bound.residual()[0].numpy(), [-small, small], rtol=1e-12)
        np.testing.assert_allclose(bound.loss().numpy(), [2 * small], rtol=1e-12)
        np.testing.assert_allclose(bound.floor_terms().numpy(), [2 * small], rtol=1e-12)
        fisher = bound.fisher_product(torch.ones(1, 2).double())[0]
        np.testing.assert_allclose(fisher.numpy(), [small, small], rtol=1e-12)

    @pytest.mark.parametrize("z", [40.0, 60.0, 300.0])
    def test_bernoulli_wrong_by_a_wide_gap(self, z):
        bound = get_likelihood("bernoulli").bind(
            torch.tensor([[z, -z]]).double(), torch.tensor([[0.0, 1.0]])
        )
        np.testing.assert_allclose(bound.loss().numpy(), [2 * z], rtol=1e-12)
        np.testing.assert_allclose(bound.residual()[0].numpy(), [1, -1], rtol=1e-12)
        np.testing.assert_allclose(bound.floor_terms().numpy(), [2 * math.exp(z)], rtol=1e-12)

    def test_confident_and_right_is_finite_at_any_gap(self):
        logits = torch.tensor([[2000.0, -2000.0]]).double()
        bernoulli = get_likelihood("bernoulli").bind(logits, torch.tensor([[1.0, 0.0]]))
        categorical = get_likelihood("categorical").bind(logits, torch.tensor([0]))
        for bound in (bernoulli, categorical):
            assert bool((bound.residual() == 0).all())
            assert bool((bound.whitened_residual() == 0).all())
            assert float(bound.loss()) == 0

    def test_soft_bernoulli_targets(self):
        logits = torch.tensor([[0.3, -1.2]]).double()
        targets = torch.tensor([[0.25, 0.9]]).double()
        bound = get_likelihood("bernoulli").bind(logits, targets)
        q = torch.sigmoid(logits)
        torch.testing.assert_close(bound.residual(), q - targets, rtol=1e-12, atol=1e-13)
        expected = torch.nn.functional.binary_cross_entropy(q, targets, reduction="sum")
        torch.testing.assert_close(bound.loss().sum(), expected, rtol=1e-12, atol=0)
        whitened = (q - targets) / (q * (1 - q)).sqrt()
        torch.testing.assert_close(bound.whitened_residual(), whitened, rtol=1e-12, atol=1e-13)


class TestSampling:
    """20,000 draws: frequencies and moments within five standard errors."""

    draws = 20_000

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(3)

    def test_categorical_frequencies(self):
        bound = bind("categorical", (3, 2, 4))
        labels = bound.sample(self.draws, self.generator())
        assert labels.shape == (self.draws, 3, 2)
        p = torch.softmax(bound.logits, -1)
        result = torch.nn.functional.one_hot(labels, 4).double().mean(0)
        error = (p * (1 - p) / self.draws).sqrt()
        assert bool(((result - p).abs() < 5 * error).all()), (result, p)

    def test_bernoulli_frequencies(self):
        bound = bind("bernoulli", (3, 4))
        labels = bound.sample(self.draws, self.generator())
        assert labels.shape == (self.draws, 3, 4)
        assert set(labels.unique().tolist()) == {0.0, 1.0}
        q = torch.sigmoid(bound.logits)
        error = (q * (1 - q) / self.draws).sqrt()
        assert bool(((labels.mean(0) - q).abs() < 5 * error).all())

    def test_gaussian_moments(self):
        bound = bind("gaussian:0.5", (3, 4))
        labels = bound.sample(self.draws, self.generator())
        assert labels.shape == (self.draws, 3, 4)
        centred = labels - bound.logits
        error = math.sqrt(VARIANCE / self.draws)
        assert bool((centred.mean(0).abs() < 5 * error).all())
        spread = VARIANCE * math.sqrt(2 / self.draws)
        assert bool(((centred.var(0) - VARIANCE).abs() < 5 * spread).all())

    @pytest.mark.parametrize("name", NAMES)
    def test_sampled_residuals_have_mean_zero_and_covariance_h(self, name):
        bound = bind(name, (3, 4))
        residuals = bound.residual(bound.sample(self.draws, self.generator()))
        assert residuals.shape == (self.draws, 3, 4)
        second = torch.einsum("knc,knd->ncd", residuals, residuals) / self.draws
        fisher = explicit_fisher(name, bound.logits)
        assert float(residuals.mean(0).abs().max()) < 5 * math.sqrt(2 / self.draws)
        # The entries of one draw's u uᵀ have a standard deviation below 3.
        assert float((second - fisher).abs().max()) < 5 * 3 / math.sqrt(self.draws)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_generator_alone_decides(self, name):
        bound = bind(name, (5, 4))
        first = bound.sample(7, torch.Generator().manual_seed(1))
        torch.manual_seed(99)
        assert torch.equal(first, bound.sample(7, torch.Generator().manual_seed(1)))
        assert not torch.equal(first, bound.sample(7, torch.Generator().manual_seed(2)))


class TestNames:
    def test_names_resolve_and_come_back(self):
        for name in ("categorical", "bernoulli", "gaussian:0.5", "gaussian:1"):
            assert get_likelihood(name).name == name
        assert get_likelihood("gaussian") == ngeval.Gaussian(1.0)
        assert get_likelihood("gaussian:2e-1") == ngeval.Gaussian(0.2)

    def test_objects_pass_through(self):
        likelihood = ngeval.Categorical(ignore_index=3)
        assert get_likelihood(likelihood) is likelihood

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("categorial", "did you mean 'categorical'"),
            ("gausian:0.5", "did you mean 'gaussian'"),
            ("weibull", "known: bernoulli, categorical, gaussian, gaussian-nll, mse, poisson"),
            ("categorical:3", "categorical takes no parameter"),
            ("gaussian:half", "gaussian:0.5"),
            ("gaussian:0", "must be positive"),
            ("gaussian:-1", "must be positive"),
            ("gaussian:nan", "must be positive"),
            ("gaussian:inf", "must be positive"),
        ],
    )
    def test_wrong_names_say_what_to_write(self, name, words):
        with pytest.raises(ngeval.InputError, match=words):
            get_likelihood(name)


class TestBadTargets:
    logits = torch.zeros(3, 4)

    @pytest.mark.parametrize(
        ("targets", "words"),
        [
            ([0, 1, 2], "must be a torch.Tensor, not list"),
            (torch.tensor([0.0, 1.0, 2.0]), r"targets.long\(\)"),
            (torch.tensor([True, False, True]), r"targets.long\(\)"),
            (torch.tensor(1), "hold no samples"),
            (torch.tensor([0, 1]), "hold 2 samples.*for 3"),
            (torch.zeros(3, 4).long(), r"\(3, 4\).*need \(3,\)"),
            (torch.tensor([0, 4, 9]), r"target 4 at index \(1,\).*0\.\.3.*2 such"),
            (torch.tensor([0, -1, 2]), "target -1.*-100 marks padding"),
        ],
    )
    def test_categorical(self, targets, words):
        with pytest.raises(ngeval.InputError, match=words):
            get_likelihood("categorical").bind(self.logits, targets)

    def test_categorical_of_one_class_suggests_bernoulli(self):
        with pytest.raises(ngeval.InputError, match="bernoulli"):
            get_likelihood("categorical").bind(torch.zeros(3, 1), torch.zeros(3).long())

    @pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
    @pytest.mark.parametrize(
        ("targets", "words"),
        [
            ([[0.0] * 4] * 3, "must be a torch.Tensor, not list"),
            (torch.zeros(2, 4), "hold 2 samples.*for 3"),
            (torch.zeros(3), r"\(3,\).*\(3, 4\)"),
            (torch.full((3, 4), math.nan), "NaN"),
            (torch.full((3, 4), math.inf), "infinite"),
            (torch.zeros(3, 4, dtype=torch.complex64), "complex"),
        ],
    )
    def test_real(self, name, targets, words):
        with pytest.raises(ngeval.InputError, match=words):
            get_likelihood(name).bind(self.logits, targets)

    def test_bernoulli_outside_the_unit_interval(self):
        targets = torch.zeros(3, 4)
        targets[1, 2] = 1.5
        with pytest.raises(ngeval.InputError, match=r"target 1.5 at index \(1, 2\).*\[0, 1\]"):
            get_likelihood("bernoulli").bind(self.logits, targets)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
    def test_complex_labels(self, dtype):
        with pytest.raises(ngeval.InputError, match="integer"):
            get_likelihood("categorical").bind(self.logits, torch.zeros(3, dtype=dtype))

    def test_integer_and_boolean_targets_are_numbers_to_the_real_likelihoods(self):
        ones = torch.ones(3, 4)
        for name in ("gaussian", "bernoulli"):
            expected = get_likelihood(name).bind(self.logits, ones).residual()
            for targets in (ones.long(), ones.bool()):
                result = get_likelihood(name).bind(self.logits, targets).residual()
                assert torch.equal(result, expected)
