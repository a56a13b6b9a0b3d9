"""KFAC and its relatives against explicit Kronecker products, and where they are exact."""

from __future__ import annotations

import re

import pytest
import torch
from flint import arb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ngeval
from ngeval.curvature.kronecker_block import DAMPINGS as DAMPING_KINDS
from ngeval.curvature.kronecker_factors import SHARINGS
from ngeval.jacobians import CapturedRows
from ngeval.jacobians.captured_rows import KEPT_SHARE
from ngeval.jacobians.terms import split_rows
from ngeval.methods import METHODS, get_method
from ngeval.methods.kfac import RESTS, Kronecker
from ngeval.methods.label_sources import Labels
from tests import problems, reference, reference_kfac
from tests.problems import prepared
from tests.search.right import Right, Updates, rows_of

LABELS = {
    "kfac": reference_kfac.exact_labels,
    "kfac-ef": reference_kfac.data_labels,
    "kfac-ief": reference_kfac.improved_labels,
}
DAMPINGS = [1e-4, 1e-2, 1.0]


class Attending(nn.Module):
    """Tokens that average over the real ones of their sample; padding reaches no output.

    Padding is named by a mask, or else known to the model alone, as tokens that are 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        real = (tokens.abs().sum(-1) > 0) if attention_mask is None else attention_mask
        real = real.unsqueeze(-1).to(tokens.dtype)
        hidden = torch.tanh(self.first(tokens)) * real
        return self.second(hidden).sum(1)


class DeepLinear(nn.Module):
    """No nonlinearity; with ``pool`` the mean over positions before the last layer."""

    def __init__(self, *, pool: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.pool = pool

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(self.first(inputs))
        return self.third(hidden.mean(1) if self.pool else hidden)


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    return model


MODELS = {
    "mlp": (mlp, (4,)),
    "half frozen": (half_frozen, (4,)),
    "conv": (conv, (2, 6, 6)),
    "padded": (Attending, (3, 4)),
    "masked": (Attending, (3, 4)),
    "sequence": (DeepLinear, (3, 4)),
}


def make(name: str, family: str = "categorical", count: int = 7, seed: int = 0) -> problems.Case:
    build, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double().eval()
    return case_of(model, shape, family, count, seed, masked=name == "masked")


def case_of(
    model: nn.Module,
    shape: tuple[int, ...],
    family: str,
    count: int = 7,
    seed: int = 0,
    *,
    masked: bool = False,
) -> problems.Case:
    generator = torch.Generator().manual_seed(seed + 1)
    inputs: reference.Inputs = torch.randn(
        (count, *shape), generator=generator, dtype=torch.float64
    )
    if isinstance(model, Attending):
        tokens = inputs
        tokens[1, 1:] = 0
        tokens[2, 2:] = 0
        if masked:
            inputs = {"tokens": tokens, "attention_mask": (tokens.abs().sum(-1) > 0).long()}
    kind = reference.Family(family, 0.5 if family == "gaussian" else 1.0)
    with torch.no_grad():
        outputs = reference.forward(model, inputs)
    return problems.Case("", model, inputs, problems.make_targets(kind, outputs, generator), kind)


def direction(problem: ngeval.Problem, method: str, damping: float, seed: int = 0) -> Tensor:
    return prepared(method, problem, seed).direction(damping)


def expected_direction(
    case: problems.Case, labels: reference_kfac.Labels, sharing: str, kind: str, damping: float
) -> Tensor:
    dense = case.reference()
    result = reference_kfac.layers(case.model, case.inputs, dense, labels(dense))
    update = torch.zeros(dense.jacobian.shape[2], dtype=torch.float64)
    for layer in result.values():
        # All positions count but those that a mask leaves out, of which no output depends.
        masked = isinstance(case.inputs, dict) or bool((case.targets == problems.PADDING).any())
        computed = reference_kfac.factors(layer, sharing, skip=masked)
        solved = reference_kfac.solve(layer, computed, damping, kind, dense.num_samples)
        update[layer.places.flatten()] = solved.flatten()
    return update


class TestAgainstExplicitProducts:
    @pytest.mark.parametrize("kind", ["exact", "factored", "pi"])
    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    @pytest.mark.parametrize("method", list(LABELS))
    @pytest.mark.parametrize("model", list(MODELS))
    def test_directions(self, model, method, sharing, kind):
        case = make(model)
        problem = case.problem()
        for damping in DAMPINGS:
            expected = expected_direction(case, LABELS[method], sharing, kind, damping)
            result = direction(problem, f"{method}:{sharing}:{kind}", damping)
            assert problems.relative_gap(result, expected) < 1e-9, damping

    @pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
    def test_other_likelihoods(self, family):
        case = make("conv", family)
        expected = expected_direction(case, LABELS["kfac"], "expand", "exact", 1e-2)
        assert problems.relative_gap(direction(case.problem(), "kfac", 1e-2), expected) < 1e-9

    def test_sampled_labels_are_those_of_sf(self):
        case = make("mlp")
        problem = case.problem()
        labels = problems.labels_of(problem, "sf:3", seed=5)
        assert labels is not None
        dense = case.reference()
        probabilities = torch.softmax(dense.logits, 1)
        drawn = [(probabilities - torch.eye(3).double()[draw]) / 3**0.5 for draw in labels]
        expected = expected_direction(
            case, lambda _: torch.stack(drawn, 1), "expand", "exact", 1e-2
        )
        assert problems.relative_gap(direction(problem, "kfac-sf:3", 1e-2, 5), expected) < 1e-9

    def test_float32_weights(self):
        case = make("mlp")
        single = problems.Case(
            "", case.model.float(), case.inputs.float(), case.targets, case.family
        )
        expected = expected_direction(single, LABELS["kfac"], "expand", "exact", 1e-2)
        assert problems.relative_gap(direction(single.problem(), "kfac", 1e-2), expected) < 1e-5

    @pytest.mark.parametrize(
        ("method", "memory"),
        [
            ("kfac", 30_000),
            ("ekfac", 30_000),
            ("kfac-ief:reduce", 30_000),
            ("kfac-sf:2", 30_000),
            ("block-ng", 141_000),
        ],
    )
    def test_blocks_of_samples_change_nothing(self, method, memory):
        case = make("conv", count=13)
        whole = case.problem()
        tight = case.problem(memory=memory)
        assert len(tight.rows.blocks(torch.zeros(13, 4, 3), KEPT_SHARE)) > 1
        result = direction(tight, method, 1e-3)
        assert problems.relative_gap(result, direction(whole, method, 1e-3)) < 1e-10

    def test_grouped_convolution(self):
        """A grouped convolution is one convolution for each group, with factors of its own."""
        torch.manual_seed(0)
        grouped = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3))
        grouped = grouped.double().eval()

        class Apart(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.head = nn.Conv2d(2, 3, 2), nn.Conv2d(2, 3, 2), nn.Linear(24, 3)

            def forward(self, x: Tensor) -> Tensor:
                parts = self.a(x[:, :2]), self.b(x[:, 2:])
                return self.head(torch.cat(parts, 1).flatten(1))

        apart = Apart().double().eval()
        with torch.no_grad():
            for part, rows in ((apart.a, slice(0, 3)), (apart.b, slice(3, 6))):
                part.weight.copy_(grouped[0].weight[rows])
                part.bias.copy_(grouped[0].bias[rows])
            apart.head.load_state_dict(grouped[2].state_dict())
        cases = [case_of(model, (4, 3, 3), "categorical") for model in (grouped, apart)]
        for method in ("kfac", "ekfac", "kfac-ef:pi", "block-ng"):
            whole, parts = (direction(case.problem(), method, 1e-3) for case in cases)
            names = [dict(case.model.named_parameters()) for case in cases]
            by_name = [
                dict(zip(n, v.split([p.numel() for p in n.values()]), strict=True))
                for n, v in zip(names, (whole, parts), strict=True)
            ]
            joined = torch.cat([by_name[1]["a.weight"], by_name[1]["b.weight"]])
            if method == "block-ng":  # the groups of a layer are one block there
                continue
            assert problems.relative_gap(by_name[0]["0.weight"], joined) < 1e-9
            joined = torch.cat([by_name[1]["a.bias"], by_name[1]["b.bias"]])
            assert problems.relative_gap(by_name[0]["0.bias"], joined) < 1e-9

    def test_a_convolution_is_a_linear_layer_on_patches(self):
        torch.manual_seed(0)
        with_conv = nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.Flatten(2)).double().eval()

        class OnPatches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(nn.functional.unfold(x, 2, stride=2).transpose(1, 2)).mT

        patches = OnPatches().double().eval()
        with torch.no_grad():
            patches.linear.weight.copy_(with_conv[0].weight.flatten(1))
            patches.linear.bias.copy_(with_conv[0].bias)
        cases = [case_of(model, (2, 4, 4), "gaussian") for model in (with_conv, patches)]
        for method in ("kfac", "kfac:reduce", "ekfac", "kfac-ef:factored"):
            first, second = (direction(case.problem(), method, 1e-3) for case in cases)
            assert problems.relative_gap(first, second) < 1e-9, method


class TestExactness:
    @pytest.mark.parametrize("damping", [1e-3, 1.0])
    @pytest.mark.parametrize("method", ["kfac", "ekfac", "kfac:reduce"])
    def test_one_datum(self, method, damping):
        problem = make("mlp", count=1).problem()
        expected = direction(problem, "block-ng", damping)
        assert problems.relative_gap(direction(problem, method, damping), expected) < 1e-9

    @pytest.mark.parametrize("method", ["kfac-ef", "ekfac-ef"])
    def test_one_datum_of_data_labels_is_ef_by_layer(self, method):
        case = make("mlp", count=1)
        dense = case.reference()
        result = reference_kfac.layers(
            case.model, case.inputs, dense, reference_kfac.data_labels(dense)
        )
        update = direction(case.problem(), method, 1e-2)
        for layer in result.values():
            block = reference_kfac.exact_block(layer)
            eye = torch.eye(len(block)).double()
            expected = torch.linalg.solve(block + 1e-2 * eye, layer.gradient.flatten())
            assert problems.relative_gap(update[layer.places.flatten()], expected) < 1e-9

    @pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
    def test_one_linear_layer_with_squared_error_is_the_natural_gradient(self, damping):
        case = case_of(nn.Linear(4, 3).double().eval(), (4,), "gaussian")
        problem = case.problem()
        expected = direction(problem, "ng", damping)
        for method in ("kfac", "ekfac", "block-ng"):
            assert problems.relative_gap(direction(problem, method, damping), expected) < 1e-9
        table = ngeval.evaluate(problem, ["kfac"], [0.0])
        assert table["gamma_over_ng"].item() == pytest.approx(1, abs=1e-9)

    def test_deep_linear_network_with_squared_error(self):
        """Output gradients are the same for all samples, so the blocks are Kronecker products."""
        problem = case_of(DeepLinear().double().eval(), (4,), "gaussian").problem()
        expected = direction(problem, "block-ng", 1e-3)
        assert problems.relative_gap(direction(problem, "kfac", 1e-3), expected) < 1e-9

    def test_deep_linear_network_on_positions(self):
        """Expand is exact for a loss at every position, reduce for one of the positions' mean."""
        for pool, exact, other in ((False, "expand", "reduce"), (True, "reduce", "expand")):
            torch.manual_seed(0)
            problem = case_of(DeepLinear(pool=pool).double().eval(), (3, 4), "gaussian").problem()
            expected = direction(problem, "block-ng", 1e-2)
            result = direction(problem, f"kfac:{exact}", 1e-2)
            assert problems.relative_gap(result, expected) < 1e-9
            worse = direction(problem, f"kfac:{other}", 1e-2)
            assert problems.relative_gap(worse, expected) > 1e-2

    @pytest.mark.parametrize("kind", ["exact", "factored", "pi"])
    def test_large_damping_gives_the_gradient(self, kind):
        problem = make("conv").problem()
        gradient = problem.gradient()
        update = direction(problem, f"kfac:{kind}", 1e12)
        parts = [update, gradient]
        if kind == "pi":  # each layer's √λ is split by its own π, whose product is λ
            parts = [part[:57] for part in parts]
        cosine = parts[0] @ parts[1] / parts[0].norm() / parts[1].norm()
        assert float(cosine) == pytest.approx(1, abs=1e-5)

    def test_kinds_of_damping_agree_without_any(self):
        problem = make("mlp", count=30).problem()
        updates = [direction(problem, f"kfac:{kind}", 0.0) for kind in ("exact", "factored", "pi")]
        assert problems.relative_gap(updates[1], updates[0]) < 1e-9
        assert problems.relative_gap(updates[2], updates[0]) < 1e-9


class TestEigenvalueCorrection:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 1000), model=st.sampled_from(["mlp", "conv", "masked"]))
    def test_never_farther_from_the_exact_block(self, seed, model):
        case = make(model, seed=seed, count=5)
        dense = case.reference()
        columns = reference_kfac.exact_labels(dense)
        problem = case.problem()
        state = prepared("ekfac", problem)
        plain = prepared("kfac", problem)
        layers = reference_kfac.layers(case.model, case.inputs, dense, columns)
        for corrected, block in zip(state.blocks, plain.blocks, strict=True):
            exact = reference_kfac.exact_block(layers[block.layer.name])
            sides = block.output_vectors[0], block.input_vectors[0]
            basis = torch.kron(*(side.contiguous() for side in sides))
            gaps = [
                torch.linalg.norm(basis @ torch.diag(values[0].flatten()) @ basis.T - exact)
                for values in (corrected.values, block.values)
            ]
            assert gaps[0] <= gaps[1] * (1 + 1e-9)
            diagonal = (basis.T @ exact @ basis).diagonal()
            assert problems.relative_gap(corrected.values, diagonal) < 1e-9

    def test_solves_in_the_eigenbasis(self):
        case = make("masked")
        dense = case.reference()
        result = reference_kfac.layers(
            case.model, case.inputs, dense, reference_kfac.data_labels(dense)
        )
        update = direction(case.problem(), "ekfac-ef", 1e-2)
        for layer in result.values():
            a, b, _ = reference_kfac.factors(layer, "expand", skip=True)
            basis = torch.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])
            values = (basis.T @ reference_kfac.exact_block(layer) @ basis).diagonal()
            expected = basis @ ((basis.T @ layer.gradient.flatten()) / (values + 1e-2))
            assert problems.relative_gap(update[layer.places.flatten()], expected) < 1e-9


class TestBlocks:
    @pytest.mark.parametrize("model", list(MODELS))
    @pytest.mark.parametrize("family", ["categorical", "gaussian"])
    def test_against_the_dense_fisher(self, model, family):
        """Layers of fewer parameters than N·C, and of more."""
        case = make(model, family, count=4)
        dense = case.reference()
        fisher = reference.fisher(dense)
        gradient = reference.gradient(dense)
        sizes = {n: p.numel() for n, p in case.model.named_parameters() if p.requires_grad}
        starts = dict(
            zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False)
        )
        update = direction(case.problem(), "block-ng", 1e-2)
        owners = {name.rpartition(".")[0] for name in sizes}
        for owner in owners:
            places = torch.cat(
                [
                    starts[name] + torch.arange(size)
                    for name, size in sizes.items()
                    if name.rpartition(".")[0] == owner
                ]
            )
            block = fisher[places][:, places] + 1e-2 * torch.eye(len(places)).double()
            expected = torch.linalg.solve(block, gradient[places])
            assert problems.relative_gap(update[places], expected) < 1e-8, owner

    def test_many_dampings_in_a_few_passes(self, monkeypatch):
        monkeypatch.setattr("ngeval.curvature.row_space.EXPLICIT_ENTRIES", 0)
        case = make("conv", count=4)
        problem = case.problem()
        state = prepared("block-ng", problem)
        dampings = [1e-3, 1e-2, 1e-1, 1.0]
        expected = [state.direction(damping) for damping in dampings]
        computed = []
        original = CapturedRows.group_combinations
        monkeypatch.setattr(
            CapturedRows,
            "group_combinations",
            lambda *args: computed.append(1) or original(*args),
        )
        updates = state.updates(dampings)
        for i in (0, 1, 2, 3):
            assert problems.relative_gap(updates.direction(i), expected[i]) < 1e-12
        assert len(computed) == 1

    def test_too_large(self, monkeypatch):
        monkeypatch.setattr("ngeval.curvature.row_space.EXPLICIT_ENTRIES", 0)
        monkeypatch.setattr("ngeval.curvature.fisher_blocks.DENSE_SIZE", 10)
        table = ngeval.evaluate(make("mlp").problem(), ["block-ng"], [1e-3])
        assert table["status"].item() == "failed"
        assert "use fewer samples" in table["reason"].item()


class Mixed(nn.Module):
    """Layers that KFAC covers, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.linear(self.table(tokens)))).mean(1))


def mixed_problem(**options: object) -> ngeval.Problem:
    torch.manual_seed(0)
    model = Mixed().double().eval()
    tokens = torch.randint(6, (8, 3), generator=torch.Generator().manual_seed(0))
    return ngeval.Problem(model, tokens, torch.arange(8) % 3, "categorical", **options)


def test_coverage_and_the_rest():
    problem = mixed_problem()
    parts = {}
    for rest in ("diagonal", "gradient", "zero"):
        update = direction(problem, f"kfac:{rest}", 1e-2)
        parts[rest] = problem.function.unflatten(update)
    gradient = problem.function.unflatten(problem.gradient())
    diagonal = problem.function.unflatten(problem.fisher().diagonal())
    for name in ("norm.weight", "norm.bias"):
        assert torch.equal(parts["gradient"][name], gradient[name])
        assert not parts["zero"][name].any()
        expected = gradient[name] / (diagonal[name] + 1e-2)
        assert problems.relative_gap(parts["diagonal"][name], expected) < 1e-10
    for name in ("table.weight", "linear.weight", "linear.bias", "head.weight", "head.bias"):
        assert torch.equal(parts["zero"][name], parts["diagonal"][name])
    table = ngeval.evaluate(problem, ["sgd", "kfac", "kfac:zero"], [1e-2])
    tables = problem.function.parameters["table.weight"].numel()
    covered = 100 * (tables + 20 + 15) / problem.num_parameters
    assert table["coverage"].tolist() == pytest.approx([100, covered, covered])
    assert "norm.weight, norm.bias" in table["note"][1]
    assert "left at 0" in table["note"][2]


class Repeated(nn.Module):
    """One linear layer applied twice: the same module, or two that share weight and bias."""

    def __init__(self, *, separate: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4) if separate else self.first
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


KINDS = ["kfac", "kfac:reduce", "kfac:pi", "ekfac", "kfac-ef"]


def assert_same_updates(first: ngeval.Problem, second: ngeval.Problem) -> None:
    tables = [ngeval.evaluate(p, KINDS, [1e-2, 1.0]) for p in (first, second)]
    assert (tables[0]["coverage"] == 100).all()
    assert tables[0]["gamma"].tolist() == pytest.approx(tables[1]["gamma"].tolist(), rel=1e-9)


def test_layers_that_share_their_weights_are_one_layer():
    torch.manual_seed(0)
    twice = Repeated(separate=False).double().eval()
    shared = Repeated(separate=True).double().eval()
    shared.load_state_dict({**shared.state_dict(), **twice.state_dict()})
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    made = [ngeval.Problem(m, inputs, targets, "categorical") for m in (shared, twice)]
    assert_same_updates(*made)


def test_a_weight_with_two_biases():
    """The weight is shared over both uses; each bias is a layer of its own."""
    torch.manual_seed(0)
    model = problems.Tied().double().eval()
    case = case_of(model, (3,), "categorical")
    problem = case.problem()
    state = prepared("kfac", problem)
    assert state.coverage == 100
    shared = [block for block in state.blocks if block.layer.weight]
    assert [block.count for block in shared] == [2 * problem.num_samples]


class Lookup(nn.Module):
    """A table of six vectors, or the linear layer of one-hot vectors."""

    def __init__(self, table: Tensor, *, one_hot: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, bias=False) if one_hot else nn.Embedding(6, 4)
        with torch.no_grad():
            self.layer.weight.copy_(table.T if one_hot else table)
        self.one_hot, self.head = one_hot, nn.Linear(4, 3)

    def forward(self, indices: Tensor) -> Tensor:
        vectors = nn.functional.one_hot(indices, 6).double() if self.one_hot else indices
        return self.head(torch.tanh(self.layer(vectors)).mean(1))


def test_a_table_is_a_linear_layer_of_one_hot_vectors():
    torch.manual_seed(0)
    table = torch.randn(6, 4)
    models = [Lookup(table, one_hot=one_hot).double().eval() for one_hot in (False, True)]
    models[1].head = models[0].head
    indices, targets = torch.randint(6, (8, 3)), torch.arange(8) % 3
    assert_same_updates(*(ngeval.Problem(m, indices, targets, "categorical") for m in models))


class Bare(nn.Module):
    """A linear layer whose parameters the module itself holds."""

    def __init__(self, linear: nn.Linear, head: nn.Linear) -> None:
        super().__init__()
        self.matrix, self.shift, self.head = linear.weight, linear.bias, head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(nn.functional.linear(inputs, self.matrix, self.shift)).mean(1))


def test_bare_parameters_in_the_function_of_a_linear_layer():
    torch.manual_seed(0)
    linear, head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = linear, head

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(torch.tanh(self.linear(inputs)).mean(1))

    inputs, targets = torch.randn(6, 2, 4, dtype=torch.float64), torch.arange(6) % 3
    models = (Bare(linear, head).eval(), Plain().eval())
    assert_same_updates(*(ngeval.Problem(m, inputs, targets, "categorical") for m in models))


@pytest.mark.parametrize("batch_first", [True, False])
def test_both_projections_of_attention_are_covered(batch_first):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
            self.head = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            tokens = inputs if batch_first else inputs.transpose(0, 1)
            attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return self.head(attended.mean(1 if batch_first else 0))

    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 3, 4, dtype=torch.float64), torch.arange(6) % 3
    problem = ngeval.Problem(Attends().double().eval(), inputs, targets, "categorical")
    state = prepared("kfac", problem)
    assert state.coverage == 100
    assert [block.count for block in state.blocks if "attention" in block.layer.weight] == [18, 18]


def test_a_transposed_convolution_of_single_pixels_is_a_linear_layer():
    torch.manual_seed(0)
    linear = nn.Linear(4, 12, bias=False)
    maps = nn.ConvTranspose2d(4, 3, 2, bias=False)
    with torch.no_grad():
        maps.weight.copy_(linear.weight.T.reshape(4, 3, 2, 2))
    head = nn.Linear(12, 3)
    models = [
        nn.Sequential(nn.Unflatten(1, (4, 1, 1)), maps, nn.Flatten(), nn.Tanh(), head),
        nn.Sequential(linear, nn.Tanh(), head),
    ]
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    made = [ngeval.Problem(m.double().eval(), inputs, targets, "categorical") for m in models]
    assert_same_updates(*made)


def test_a_layer_called_twice_is_covered():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    torch.manual_seed(0)
    model = Twice().double().eval()
    case = case_of(model, (4,), "categorical")
    problem = case.problem()
    state = prepared("kfac", problem)
    assert state.coverage == 100
    block = next(block for block in state.blocks if block.layer.name == "inner")
    first = case.inputs
    second = torch.tanh(model.inner(first)).detach()
    ones = torch.ones(len(first), 1, dtype=torch.float64)
    rows = torch.cat([torch.cat([part, ones], 1) for part in (first, second)])
    computed = block.input_vectors[0] @ torch.diag(block.input_values[0]) @ block.input_vectors[0].T
    assert problems.relative_gap(computed, rows.T @ rows) < 1e-10
    assert block.count == 2 * len(first)


def test_lora_layers_are_covered():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double().eval()
    case = case_of(model, (4,), "categorical")
    problem = case.problem()
    table = ngeval.evaluate(problem, ["kfac", "ekfac", "block-ng"], [1e-2])
    assert (table["coverage"] == 100).all()
    expected = expected_direction(case, LABELS["kfac"], "expand", "exact", 1e-2)
    assert problems.relative_gap(direction(problem, "kfac", 1e-2), expected) < 1e-9


class TestSampled:
    """3,000 draws come within 10 % of the expectation."""

    def test_factors(self):
        problem = make("mlp", count=5).problem()
        exact = prepared("kfac", problem).blocks
        drawn = prepared("kfac-sf:3000", problem, 1).blocks
        for one, other in zip(exact, drawn, strict=True):
            matrices = [
                block.output_vectors[0]
                @ torch.diag(block.output_values[0])
                @ block.output_vectors[0].T
                for block in (one, other)
            ]
            assert problems.relative_gap(matrices[1], matrices[0]) < 0.1

    def test_corrected_eigenvalues_and_diagonal(self):
        problem = make("mlp", count=5).problem()
        diagonal = prepared("diag-sf:3000", problem, 1).diagonal
        assert problems.relative_gap(diagonal, problem.fisher().diagonal()) < 0.1
        exact = direction(problem, "ekfac", 1e-1)
        assert problems.relative_gap(direction(problem, "ekfac-sf:3000", 1e-1, 1), exact) < 0.1


class TestBadRequests:
    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("kfac:expnd", "did you mean 'expand'"),
            ("kfac:pi:factored", "names one thing twice"),
            ("kfac:4", "unknown '4'"),
            ("kfac-sf:0", "whole number"),
            ("ekfac:pi", "no factors left to damp"),
            ("ekfac:reduce", "depend on the eigenbasis, .*'reduce' leave most of it undetermined"),
            ("kfac-sf:2:3", "unknown '3'"),
            ("kfac-sf:" + "9" * 5000, "whole number"),
            ("kfac-sf:٣", "whole number"),
            ("kfac:", "after a colon"),
            ("block-ng:3", "no parameter"),
            ("diag-sf:2:0.5:1", "more after its colon than it takes"),
            ("diag:x", "exponent"),
        ],
    )
    def test_messages(self, method, message):
        with pytest.raises(ngeval.InputError, match=message):
            get_method(method)

    def test_the_table_has_every_word(self):
        words = {
            name: set(re.split("[:|]", METHODS[name].parameter)) - {"draws k (1)"}
            for name in METHODS
            if "kfac" in name
        }
        for name, allowed in words.items():
            expected = {*RESTS} if name.startswith("ekfac") else {*SHARINGS, *DAMPING_KINDS, *RESTS}
            assert allowed == expected
            assert all(get_method(f"{name}:{word}").name for word in allowed)

    def test_from_python(self):
        with pytest.raises(ngeval.InputError, match="no factors left to damp"):
            Kronecker("mine", Labels("exact"), damping="pi", corrected=True)
        with pytest.raises(ngeval.InputError, match="'average' is not in expand, reduce"):
            Kronecker("mine", Labels("exact"), sharing="average")

    def test_an_engine_that_sees_no_layers(self):
        table = ngeval.evaluate(make("mlp").problem(engine="loop"), ["kfac"], [1e-2])
        assert "engine='layers'" in table["reason"].item()

    def test_a_vocabulary_is_left_to_the_rest(self, monkeypatch):
        monkeypatch.setattr("ngeval.methods.kfac.LARGEST_FACTOR", 15)
        state = prepared("kfac", make("conv").problem())
        assert [block.layer.name for block in state.blocks] == ["2", "4"]
        assert "0.weight, 0.bias" in state.notes[0]
        monkeypatch.setattr("ngeval.methods.kfac.LARGEST_FACTOR", 2)
        with pytest.raises(ngeval.EngineError, match="covers no layer"):
            prepared("kfac", make("conv").problem())

    def test_too_many_draws(self):
        table = ngeval.evaluate(make("mlp").problem(), ["kfac-sf:100000000", "diag-sf:999999999"])
        assert (table["status"] == "failed").all()
        assert table["reason"].str.contains("take fewer").all()

    def test_no_room(self):
        problem = make("mlp").problem(memory=20_000)
        problem.rows.__dict__["memory"] = 1000
        with pytest.raises(ngeval.EngineError, match="raise memory="):
            prepared("kfac", problem)


@pytest.mark.parametrize("method", ["kfac", "kfac:pi", "ekfac", "block-ng", "diag-ief:0.5"])
def test_relative_damping(method):
    problem = make("mlp").problem()
    table = ngeval.evaluate(problem, [method], [1e-2], damping_scale="relative")
    largest = prepared(method, problem).largest_curvature
    assert table["damping_absolute"].item() == pytest.approx(1e-2 * largest)
    expected = problem.gamma(direction(problem, method, 1e-2 * largest))
    assert table["gamma"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.25])
def test_diagonals(exponent):
    case = problems.case("categorical-mlp-float64")
    dense = case.reference()
    problem = case.problem()
    gradients = torch.einsum("nc,ncp->np", dense.residual, dense.jacobian)
    squares = dense.residual.square().sum(1, keepdim=True)
    gradient = gradients.sum(0)
    for name, diagonal in (
        ("diag", reference.fisher(dense).diagonal()),
        ("diag-ef", gradients.square().sum(0)),
        ("diag-ief", (gradients.square() / squares).sum(0)),
    ):
        expected = gradient / (diagonal + 1e-3) ** exponent
        result = direction(problem, f"{name}:{exponent}", 1e-3)
        assert problems.relative_gap(result, expected) < 1e-10


class TestTransformersConv1D:
    """GPT-2's layers hold Wᵀ: all is as for a linear layer, transposed."""

    @pytest.fixture
    def pair(self) -> tuple[problems.Case, problems.Case]:
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
        held = nn.Sequential(conv1d(6, 4), nn.Tanh(), conv1d(3, 6)).double().eval()
        with torch.no_grad():
            for one, other in zip(linear, held, strict=True):
                if isinstance(one, nn.Linear):
                    other.weight.copy_(one.weight.T)
                    other.bias.copy_(one.bias)
        return tuple(case_of(model, (3, 4), "categorical", 5) for model in (linear, held))

    def test_by_its_closed_form(self, pair):
        plan = pair[1].problem().rows.plan
        assert [owner.rule is not None and owner.rule.transposed for owner in plan.modules] == [
            True,
            True,
        ]

    @pytest.mark.parametrize(
        "method",
        ["sgd", "ef", "sf:2", "diag", "diag-ief", "kfac", "kfac:reduce", "ekfac", "block-ng", "ng"],
    )
    def test_every_method(self, pair, method):
        linear, held = (case.problem() for case in pair)
        expected = linear.function.unflatten(direction(linear, method, 1e-2))
        result = held.function.unflatten(direction(held, method, 1e-2))
        for name, value in expected.items():
            target = value.T if name.endswith("weight") else value
            assert problems.relative_gap(result[name], target) < 1e-9, name

    def test_rows_in_pieces(self, pair, monkeypatch):
        monkeypatch.setattr("ngeval.jacobians.inner_products.PIECE_ENTRIES", 20)
        linear, held = (case.problem() for case in pair)
        for method in ("ef", "diag-ef", "ekfac-ef", "block-ng"):
            expected = linear.gamma(direction(linear, method, 1e-2))
            result = held.gamma(direction(held, method, 1e-2))
            assert result == pytest.approx(expected, rel=1e-9), method

    def test_rows_are_those_of_a_loop(self, pair):
        loop, layers = (pair[1].problem(engine=engine) for engine in ("loop", "layers"))
        vectors = loop.residual.unsqueeze(1)
        block = loop.rows.blocks(vectors)[0]
        expected, result = loop.rows.rows(vectors, block), layers.rows.rows(vectors, block)
        for name, rows in expected.items():
            assert problems.relative_gap(result[name], rows) < 1e-10, name


class Causal(nn.Module):
    """A small language model: each position sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(tokens)).cumsum(1))


class TestPositions:
    """Which tokens count does not depend on labels, nor on how a sample's cotangents are split."""

    def case(self) -> problems.Case:
        torch.manual_seed(0)
        return case_of(Causal().double().eval(), (4, 4), "categorical", 5)

    @pytest.mark.parametrize("method", ["kfac", "kfac:reduce", "kfac:pi", "ekfac", "ekfac-sf:2"])
    @pytest.mark.parametrize("limit", [1, 3, 24])
    def test_split_cotangents(self, monkeypatch, method, limit):
        expected = direction(self.case().problem(), method, 1e-3)
        problem = self.case().problem()
        monkeypatch.setattr(
            type(problem.rows),
            "blocks",
            lambda _, cotangents, *share: split_rows(*cotangents.shape[:2], limit),
        )
        monkeypatch.setattr("ngeval.jacobians.captured_rows.KEPT_SHARE", 0.0)
        assert problems.relative_gap(direction(problem, method, 1e-3), expected) < 1e-10

    @pytest.mark.parametrize("method", ["kfac", "kfac-ef", "kfac-ief"])
    def test_a_sample_that_fits_exactly_still_counts(self, method):
        case = case_of(DeepLinear().double().eval(), (3, 4), "gaussian", 4)
        with torch.no_grad():
            case.targets[1] = case.model(case.inputs[1:2])[0]
        factors = get_method(method).factors(case.problem())
        assert [each.count for each in factors] == [12, 12, 12]

    def test_masked_outputs_do_not(self):
        case = self.case()
        counts = [each.count for each in get_method("kfac-ef").factors(case.problem())]
        unmasked = int((case.targets != problems.PADDING).sum())
        # The masks are at the ends, and no token there reaches an output that counts.
        assert counts == [unmasked, unmasked]


class TestSaturation:
    """Labels of a probability that leaves nothing of S⁺u in float64."""

    def problem(self, scale: float, dtype: torch.dtype = torch.float64) -> ngeval.Problem:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
        with torch.no_grad():
            model[2].weight.mul_(scale)
            model[2].bias.mul_(scale)
            inputs = torch.randn(6, 4, dtype=torch.float64)
            targets = model(inputs).argmin(1)
        return ngeval.Problem(model, inputs, targets, "categorical", dtype=dtype)

    @pytest.mark.parametrize(
        ("scale", "dtype"),
        [(150.0, torch.float64), (300.0, torch.float64), (900.0, torch.float32)],
    )
    @pytest.mark.parametrize("entries", [0, 2**22])
    def test_every_update_is_right_or_uncertain(self, monkeypatch, scale, dtype, entries):
        monkeypatch.setattr("ngeval.curvature.row_space.EXPLICIT_ENTRIES", entries)
        problem = self.problem(scale, dtype)
        model, targets = problem.function.model, problem.distribution.targets
        assert float(problem.loss.max()) > 80
        table = ngeval.evaluate(problem, ["sgd", "ng", "block-ng", "kfac"], [1e-3, 1.0])
        assert set(table["status"]) <= ({"ok"} if dtype == torch.float64 else {"ok", "uncertain"})
        right = Right(rows_of(model, problem.function.inputs, targets, "categorical", 1.0))
        updates = Updates(right)
        for _, row in table[(table["method"] != "kfac") & (table["status"] == "ok")].iterrows():
            expected = updates.grade(row["method"], arb(row["damping"]), [], right).gamma
            tolerance = 1e-6 if dtype == torch.float64 else 1e-3
            assert row["gamma"] == pytest.approx(expected, rel=tolerance), row["method"]

    @pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
    def test_moderate_losses_are_graded(self, scale):
        problem = self.problem(scale)
        assert (float(problem.loss.max()) > 25) == (scale == 50.0)
        fisher = problem.fisher() @ torch.eye(problem.num_parameters, dtype=torch.float64)
        eye = torch.eye(len(fisher), dtype=torch.float64)
        expected = torch.linalg.solve(fisher + 1e-2 * eye, problem.gradient())
        assert problems.relative_gap(direction(problem, "ng", 1e-2), expected) < 1e-5


class Shifted(nn.Module):
    """A network with one sample that is told to be sure of the wrong class."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 3), nn.Linear(3, 3)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        sure = (x[:, 5:] > 9) * torch.tensor([self.shift, 0, 0], dtype=x.dtype)
        return self.outer(torch.tanh(self.inner(x))) + sure


class TestOneImprobableLabel:
    """One sample of high loss beside ordinary ones: the least γ is its, and is met."""

    def problem(self, shift: float) -> ngeval.Problem:
        torch.manual_seed(0)
        model = Shifted(shift).double().eval()
        inputs = torch.randn(4, 6, dtype=torch.float64)
        inputs[0, 5] = 10
        return ngeval.Problem(model, inputs, torch.tensor([1, 2, 0, 1]), "categorical")

    @pytest.mark.parametrize("shift", [10.0, 20.0, 28.0, 35.0])
    def test_the_best_of_a_layer(self, shift):
        problem = self.problem(shift)
        table = ngeval.layer_table(problem, ["sgd"], [0.0]).set_index("layer")
        best = table.loc["outer", "gamma"] / table.loc["outer", "gamma_over_best"]
        # The outer layer sees four different inputs: it alone can move the one sample.
        hidden = torch.tanh(problem.function.model.inner(problem.function.inputs)).detach()
        wide = torch.cat([hidden, torch.ones(4, 1, dtype=torch.float64)], 1)
        along = torch.linalg.solve(wide, torch.eye(4, dtype=torch.float64)[0])
        step = {n: torch.zeros_like(p) for n, p in problem.function.parameters.items()}
        step["outer.weight"][1], step["outer.bias"][1] = along[:3], along[3]
        assert best <= problem.gamma(step) * (1 + 1e-6)
        assert best >= ngeval.gamma_floor(problem) * (1 - 1e-6)

    @pytest.mark.parametrize("shift", [10.0, 28.0, 34.0, 36.0, 60.0, 300.0, 690.0])
    def test_no_natural_gradient_is_graded_wrongly(self, shift):
        table = ngeval.evaluate(self.problem(shift), ["ng", "block-ng"], [0.0])
        assert (table["status"] == "ok").all()
        assert (table["gamma_over_ng"] < 1.02).all()
        assert (table["gamma_over_ng"] > 1 - 1e-9).all()
