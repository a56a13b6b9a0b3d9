"""Every family of models × adapter × attention against autograd, sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ngeval
from ngeval.checkpoints import Checkpoint
from ngeval.checkpoints.adapters import AlignedOutputs
from tests import hf_layouts as layouts

MATRIX = [
    (family, how, attention)
    for family in layouts.FAMILIES
    for how in ("full", "lora", "ia3", "prompt", "prefix")
    for attention in ("eager", "sdpa")
    if not (family in layouts.IMAGE_FAMILIES and how in ("prompt", "prefix"))
    and not (family == "resnet" and attention == "eager")  # it has none
]
TOLERANCE = 1e-6


def model_of(family: str, how: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    base = layouts.build(family, attention, vocabulary=50)
    if how == "full":
        return base.double()
    model = layouts.adapted(base, layouts.adapter_config(family, how)).double()
    return AlignedOutputs(model) if how == "prompt" else model


def batch_of(family: str) -> tuple[dict[str, Tensor], Tensor]:
    if family not in layouts.IMAGE_FAMILIES:
        return layouts.text_batch(family)
    inputs, targets = layouts.image_batch()
    return {"pixel_values": inputs["pixel_values"].double()}, targets


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def sample_gradients(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """g_n by plain autograd, one sample at a time: shape ``(N, P)``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for n in range(len(targets)):
        logits = logits_of(model, {key: value[n : n + 1] for key, value in inputs.items()})
        loss = nn.functional.cross_entropy(
            logits.flatten(0, -2), targets[n : n + 1].flatten(), reduction="sum"
        )
        result = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(result, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def jacobian_products(
    model: nn.Module, inputs: dict[str, Tensor], directions: Iterable[Tensor]
) -> list[Tensor]:
    """J d of each d by two backward passes through the whole batch, the first for all of them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        logits = logits_of(model, inputs)
    dummy = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(
        logits, parameters, dummy, create_graph=True, materialize_grads=True
    )
    results = []
    for direction in directions:
        parts = direction.split([p.numel() for p in parameters])
        along = [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]
        results += torch.autograd.grad(pulled, [dummy], along, retain_graph=True)
    return results


def probabilities_of(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor):
    """p and u = p − e_y, zero where a position does not count."""
    logits = logits_of(model, inputs).detach()
    counted = (targets != -100).unsqueeze(-1)
    probabilities = logits.softmax(-1) * counted
    labels = nn.functional.one_hot(targets.clamp_min(0), logits.shape[-1])
    return probabilities, (probabilities - labels) * counted


def gamma_of(tangent: Tensor, probabilities: Tensor, residual: Tensor) -> float:
    """√(Σ tᵀ(diag p − ppᵀ)t) / |Σ uᵀt|."""
    mean = (probabilities * tangent).sum(-1, keepdim=True)
    curvature = (probabilities * (tangent - mean).square()).sum()
    return float(curvature.sqrt() / (residual * tangent).sum().abs())


def expected_gammas(
    model: nn.Module,
    inputs: dict[str, Tensor],
    targets: Tensor,
    gradients: Tensor,
    damping: float,
) -> dict[str, float]:
    """γ of sgd, ef and ief from the formulas, dense and by hand."""
    probabilities, residual = probabilities_of(model, inputs, targets)
    scale = residual.square().flatten(1).sum(1)
    gram = gradients @ gradients.T + damping * torch.eye(len(gradients))
    right = {"ef": torch.ones(len(gradients)), "ief": scale}
    directions = {
        name: gradients.T @ torch.linalg.solve(gram, vector.double())
        for name, vector in right.items()
    }
    directions["sgd"] = gradients.sum(0)
    tangents = jacobian_products(model, inputs, directions.values())
    return {
        name: gamma_of(tangent, probabilities, residual)
        for name, tangent in zip(directions, tangents, strict=True)
    }


@pytest.mark.parametrize(("family", "how", "attention"), MATRIX)
def test_gamma_is_that_of_the_formulas(family: str, how: str, attention: str):
    model, (inputs, targets) = model_of(family, how, attention), batch_of(family)
    problem = ngeval.Problem(model, inputs, targets, "categorical")
    gradients = sample_gradients(model, inputs, targets)
    expected = expected_gammas(model, inputs, targets, gradients, 1e-2)
    table = ngeval.evaluate(problem, list(expected), [1e-2], natural=False)
    for method, value in zip(table["method"], table["gamma"], strict=True):
        assert value == pytest.approx(expected[method], rel=TOLERANCE)
    result = torch.tensor(ngeval.gradient_norms(problem)["gradient_norm"].to_numpy())
    assert torch.allclose(result, gradients.norm(dim=1), rtol=TOLERANCE, atol=0)
    assert problem.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "how"),
    [("bert", "lora"), ("gpt", "lora"), ("vit", "ia3"), ("t5", "prompt"), ("t5", "prefix")],
)
def test_the_exact_fisher_and_its_diagonal(family: str, how: str):
    """F column by column from a backward pass each, and γ of (F + λI)⁻¹g and g/(diag F + λ)."""
    model, (inputs, targets) = model_of(family, how, "sdpa"), batch_of(family)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    eye = torch.eye(count, dtype=torch.float64)
    columns = torch.stack(jacobian_products(model, inputs, eye))
    probabilities, residual = probabilities_of(model, inputs, targets)
    centred = columns - (probabilities * columns).sum(-1, keepdim=True)
    root = (probabilities.sqrt() * centred).flatten(1)
    fisher, gradient = root @ root.T, (residual * columns).flatten(1).sum(1)
    expected = {
        "ng": torch.linalg.solve(fisher + 0.1 * eye, gradient),
        "diag": gradient / (fisher.diagonal() + 0.1),
    }
    problem = ngeval.Problem(model, inputs, targets, "categorical")
    table = ngeval.evaluate(problem, ["ng", "diag"], [0.1], max_iterations=2000, gap=1e-8)
    for method, value in zip(table["method"], table["gamma"], strict=True):
        direction = expected[method]
        curvature = direction @ fisher @ direction
        assert value == pytest.approx(float(curvature.sqrt() / (direction @ gradient)), rel=1e-6)


class TestEngine:
    def test_a_tied_embedding_under_three_names_needs_no_loop(self):
        model, (inputs, targets) = model_of("t5", "full", "eager"), batch_of("t5")
        problem = ngeval.Problem(model, inputs, targets, "categorical")
        assert problem.engine == "layers"
        assert not any("loop" in note for note in problem.notes)

    def test_rounding_inside_a_model_is_known_and_said(self):
        # T5 takes its norms and its softmax in float32, whatever the weights are.
        model, (inputs, targets) = model_of("t5", "lora", "eager"), batch_of("t5")
        problem = ngeval.Problem(model, inputs, targets, "categorical")
        assert problem.function.row_epsilon == torch.finfo(torch.float32).eps
        assert any("rounds to 1.2e-07" in note for note in problem.notes)
        ones, labels = torch.ones(2, 4).double(), torch.tensor([0, 2])
        plain = ngeval.Problem(nn.Linear(4, 3).double(), ones, labels, "categorical")
        assert plain.function.row_epsilon == torch.finfo(torch.float64).eps


class TestAlignedOutputs:
    @pytest.mark.parametrize("family", ["t5", "gpt"])
    def test_virtual_tokens_have_no_outputs(self, family: str):
        inputs, targets = layouts.text_batch(family)
        inner = layouts.adapted(layouts.build(family), layouts.adapter_config(family, "prompt"))
        outputs = AlignedOutputs(inner)(**inputs)
        assert outputs.shape[:2] == targets.shape
        with torch.no_grad(), warnings.catch_warnings():
            assert torch.equal(outputs, inner(**inputs).logits[:, -targets.shape[1] :])

    def test_classes_are_left_alone(self):
        inputs, _ = layouts.text_batch("bert")
        inner = layouts.adapted(layouts.build("bert"), layouts.adapter_config("bert", "prompt"))
        assert AlignedOutputs(inner)(**inputs).shape == (5, 2)


def test_a_checkpoint_as_built_is_no_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert Checkpoint(tmp_path, {}).is_adapter
    assert not Checkpoint(tmp_path, {}, as_built=True).is_adapter
