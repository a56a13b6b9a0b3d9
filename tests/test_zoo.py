"""Every engine against the dense truth on every architecture of the zoo.

An engine may refuse what `CANNOT` lists for it; a wrong number is never allowed.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import ngeval
from ngeval.jacobians import RowSource, gram_matrix, squared_column_sums
from tests import zoo

ENGINES = ("layers", "loop", "vmap", "auto")
TOLERANCE = 1e-10

EXCEPTIONS = {
    "sorted": "the order of the samples inside depends on the data",
    "routed": "which samples a layer sees depends on the data",
    "branching": "Python decides by a value of the data",
    "embedding-bag": "torch has neither its forward-mode nor its second derivative",
}
"""Where ``auto`` need not choose the layer-by-layer engine, and why."""

AUTO_LAYERS = {name: name not in EXCEPTIONS for name in zoo.ENTRIES}
"""Whether ``auto`` must choose the layer-by-layer engine."""

CANNOT = {
    "layers": set(EXCEPTIONS),
    "vmap": {
        "routed",  # a boolean mask has a length that depends on the data
        "branching",
        "frozen",  # torch's batching rule for the backward of PReLU is wrong when nested
        "activations",  # the same
        "frames",  # torch's GRU works in place on tensors that vmap has not seen
        "gru",
        "recurrent-cells",
        "sparse-embedding",
        "embedding-bag",
    },
    "loop": {"embedding-bag"},
    "auto": {"embedding-bag"},
}
"""What an engine may refuse; it may not be wrong on it."""

GRADED = ("gpt", "vit-lora", "t5", "resnet", "parametrized", "lstm")

# Torch says so where vmap falls back on a loop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


def pairs(*engines: str) -> pytest.MarkDecorator:
    """Every architecture with every one of these engines, as ``name`` and ``engine``."""
    both = [(name, engine) for name in zoo.ENTRIES for engine in engines]
    return pytest.mark.parametrize(("name", "engine"), both, ids=["-".join(pair) for pair in both])


def plain(value: object) -> object:
    """What can be compared: tensors and modules by identity."""
    if isinstance(value, Tensor | nn.Module):
        return id(value)
    if isinstance(value, weakref.ref):
        return id(value())
    if isinstance(value, dict):
        return [(key, plain(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def state_of(model: nn.Module) -> dict[str, object]:
    """All that could be left behind on a module, and on torch."""
    state: dict[str, object] = {
        "grad mode": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "global hooks": [
            len(hooks)
            for name, hooks in vars(nn.modules.module).items()
            if name.startswith("_global_") and isinstance(hooks, dict)
        ],
    }
    for prefix, module in model.named_modules():
        state[f"{prefix} itself"] = (type(module), plain(vars(module)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = parameter.grad
        state[f"parameter {name}"] = (
            type(parameter),
            parameter.requires_grad,
            parameter._version,
            parameter._backward_hooks,
            None if grad is None else (id(grad), grad.flatten().tolist()),
        )
    for name, value in model.state_dict().items():
        state[f"value {name}"] = value.flatten().tolist()
    return state


@dataclass(frozen=True)
class Made:
    """A model, its state before anything was done with it, and what came of a `Problem`."""

    model: nn.Module
    before: dict[str, object]
    result: ngeval.Problem | ngeval.EngineError


@functools.cache
def made(name: str, engine: str) -> Made:
    """A shared problem; where ``auto`` chose the layer-by-layer engine, that is the one."""
    if engine == "layers":
        chosen = made(name, "auto")
        if isinstance(chosen.result, ngeval.Problem) and chosen.result.engine == engine:
            return chosen
    entry = zoo.ENTRIES[name]
    model = entry.model()
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    before = state_of(model)
    result: ngeval.Problem | ngeval.EngineError
    try:
        result = ngeval.Problem(model, entry.inputs, entry.targets, entry.likelihood, engine=engine)
    except ngeval.EngineError as error:
        result = error
    return Made(model, before, result)


def problem_of(name: str, engine: str) -> ngeval.Problem:
    """The shared problem; a refusal is a failure unless it is listed."""
    result = made(name, engine)
    assert state_of(result.model) == result.before
    if isinstance(result.result, ngeval.Problem):
        return result.result
    if name not in CANNOT[engine]:
        pytest.fail(f"refused: {result.result}")
    pytest.skip(f"refused, as it may be: {result.result}")


@functools.cache
def truth_of(name: str) -> zoo.Truth:
    return zoo.truth(zoo.ENTRIES[name])


def shared_with(name: str, engine: str) -> str:
    """The engine under which a problem was made: ``auto`` where that chose this engine."""
    return "auto" if made(name, engine) is made(name, "auto") else engine


def random_cotangents(name: str, count: int) -> Tensor:
    """v of shape ``(N, Q, *positions, C)``."""
    shape = truth_of(name).outputs.shape
    generator = torch.Generator().manual_seed(count)
    return torch.randn(shape[0], count, *shape[1:], generator=generator, dtype=torch.float64)


def collected_rows(source: RowSource, cotangents: Tensor) -> dict[str, Tensor]:
    """The rows of all blocks in their places; a row that no block gives is NaN."""
    count = cotangents.shape[0] * cotangents.shape[1]
    result: dict[str, Tensor] = {}
    filled = torch.zeros(count)
    for block, rows in source.iterate(cotangents):
        filled[block.rows] += 1
        for name, part in rows.items():
            empty = torch.full((count, part.shape[1]), torch.nan, dtype=part.dtype)
            result.setdefault(name, empty)[block.rows] = part
    assert (filled == 1).all()
    return result


def largest(tensors: dict[str, Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


def check_by_parameter(
    found: dict[str, Tensor], expected: dict[str, Tensor], least: float = 1e-3
) -> None:
    """Each parameter relative to its own size, or to a small part of the largest one's."""
    assert list(found) == list(expected)
    floor = least * largest(expected)
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        gap = float((found[name] - truth).abs().max()) / max(float(truth.abs().max()), floor)
        assert gap <= TOLERANCE, f"{name}: {gap:.1e}"


def check_gram(found: Tensor, rows: dict[str, Tensor]) -> None:
    matrix = torch.cat(list(rows.values()), 1)
    sizes = matrix.norm(dim=1)
    gaps = (found - matrix @ matrix.T).abs()
    assert found.dtype == torch.float64
    assert bool((gaps <= TOLERANCE * torch.outer(sizes, sizes)).all()), float(gaps.max())


def test_the_entries_are_what_they_say():
    assert len(zoo.ENTRIES) >= 60
    for name, entry in zoo.ENTRIES.items():
        outputs = zoo.forward(entry.model(), entry.inputs)
        torch.testing.assert_close(outputs, truth_of(name).outputs, rtol=1e-10, atol=1e-12)
        assert all(
            torch.equal(a, b)
            for a, b in zip(entry.model().parameters(), entry.model().parameters(), strict=True)
        )
    assert set(EXCEPTIONS) <= set(zoo.ENTRIES)
    assert set.union(*CANNOT.values()) <= set(zoo.ENTRIES)


@functools.cache
def check_rows(name: str, engine: str) -> None:
    """Once for each shared problem; a failure is not cached."""
    problem, cotangents = problem_of(name, engine), random_cotangents(name, 2)
    torch.testing.assert_close(problem.outputs, truth_of(name).outputs, rtol=1e-10, atol=1e-12)
    check_by_parameter(collected_rows(problem.rows, cotangents), truth_of(name).rows(cotangents))


@pairs(*ENGINES)
def test_rows(name, engine):
    problem_of(name, engine)
    check_rows(name, shared_with(name, engine))


@pairs("layers", "loop", "vmap")
def test_gram_matrices(name, engine):
    """As many cotangents as samples, too: then shapes tell nothing about which is which."""
    problem = problem_of(name, engine)
    for count in (1, 2, zoo.NUM_SAMPLES):
        cotangents = random_cotangents(name, count)
        check_gram(gram_matrix(problem.rows, cotangents), truth_of(name).rows(cotangents))


@pairs("layers", "loop", "vmap")
def test_squared_column_sums(name, engine):
    problem = problem_of(name, engine)
    for count in (1, 2):
        cotangents = random_cotangents(name, count)
        sums = squared_column_sums(problem.rows, cotangents)
        expected = {n: r.square().sum(0) for n, r in truth_of(name).rows(cotangents).items()}
        assert sums.dtype == torch.float64
        parts = sums.split([part.numel() for part in expected.values()])
        check_by_parameter(dict(zip(expected, parts, strict=True)), expected, 1e-6)


@functools.cache
def check_products(name: str, engine: str) -> None:
    """Once for each shared problem; a failure is not cached."""
    problem, jacobian = problem_of(name, engine), truth_of(name).matrix
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(jacobian.shape[1], generator=generator, dtype=torch.float64)
    expected = jacobian @ direction
    gap = (problem.jvp(direction).flatten() - expected).abs().max()
    assert float(gap) <= TOLERANCE * float(expected.abs().max())
    cotangent = random_cotangents(name, 1)[:, 0]
    expected = cotangent.flatten() @ jacobian
    gap = (problem.vjp(cotangent) - expected).abs().max()
    assert float(gap) <= TOLERANCE * float(expected.abs().max())


@pairs(*ENGINES)
def test_products(name, engine):
    problem_of(name, engine)
    check_products(name, shared_with(name, engine))


def check_with_room_for(name: str, engine: str, rows: int, count: int) -> None:
    """The Gram matrix with so little memory, or with the least multiple that is enough."""
    cotangents, problem = random_cotangents(name, count), problem_of(name, engine)
    expected = truth_of(name).rows(cotangents)
    for room in (rows, 3 * rows, 9 * rows):
        source = replace(problem.rows, memory=16 * problem.num_parameters * room)
        try:
            gram = gram_matrix(source, cotangents)
        except ngeval.EngineError as error:
            assert "raise memory" in str(error)  # noqa: PT017
            continue
        check_gram(gram, expected)
        if count > rows // 2:
            check_by_parameter(collected_rows(source, cotangents), expected)
        return
    pytest.fail("the memory of nine times as many rows is not enough")


@pairs("layers")
def test_a_tight_memory_budget_changes_nothing(name, engine):
    """Room for eight rows: two samples at a time, where blocks go in pairs."""
    check_with_room_for(name, engine, 8, 2)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", [*GRADED, "tied-weight", "dict-output"])
def test_a_tight_memory_budget_for_whole_rows(name, engine):
    """These engines do not care what a row is made of: some architectures do."""
    check_with_room_for(name, engine, 8, 2)


@pytest.mark.parametrize("engine", ["layers", "loop", "vmap"])
@pytest.mark.parametrize("name", ["tied-weight", "text-convolution"])
def test_room_for_a_part_of_a_sample(name, engine):
    """Room for four rows: where blocks go in pairs, less than a sample has cotangents."""
    check_with_room_for(name, engine, 4, 3)


@pytest.mark.parametrize("name", list(zoo.ENTRIES))
def test_the_engine_that_auto_chooses(name):
    problem = problem_of(name, "auto")
    assert problem.engine in ("layers", "vmap", "loop")
    if AUTO_LAYERS[name]:
        assert problem.engine == "layers"


@pairs("layers", "vmap", "loop")
def test_the_module_is_as_before(name, engine):
    """Whatever was asked of the problem in the tests above, and when it goes wrong."""
    problem, cotangents = problem_of(name, engine), random_cotangents(name, 1)
    problem.jvp(problem.vjp(problem.residual))
    squared_column_sums(problem.rows, cotangents)
    assert state_of(made(name, engine).model) == made(name, engine).before
    with pytest.raises(ngeval.NgevalError):
        squared_column_sums(problem.rows, torch.cat([cotangents, cotangents], -1))
    assert state_of(made(name, engine).model) == made(name, engine).before


class Fused(nn.Module):
    """Fails half-way through, once the fuse is lit."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))
        self.lit = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.inner(x))
        if self.lit:
            raise ValueError("the fuse was lit")
        return self.out(torch.tanh(hidden * self.scale))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_module_is_as_before_when_it_fails_half_way(engine):
    model = Fused().double().eval()
    problem = ngeval.Problem(
        model, zoo.VECTORS, zoo.integers(3, seed=1), "categorical", engine=engine
    )
    model.lit = True
    before = state_of(model)
    cotangents = torch.randn(zoo.NUM_SAMPLES, 1, 3, dtype=torch.float64)
    for compute in (gram_matrix, squared_column_sums, lambda rows, v: list(rows.iterate(v))):
        with pytest.raises(ngeval.ModelError, match="the fuse was lit"):
            compute(problem.rows, cotangents)
        assert state_of(model) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_what_takes_no_part_has_zero_rows(engine):
    problem, cotangents = problem_of("unused", engine), random_cotangents("unused", 2)
    rows = collected_rows(problem.rows, cotangents)
    spare = [name for name in rows if name.startswith("spare")]
    assert len(spare) == 8
    assert all(not bool(rows[name].any()) for name in spare)
    used = [name for name in rows if name not in spare]
    assert all(bool(rows[name].abs().sum(1).gt(0).all()) for name in used)
    sums = problem.function.unflatten(squared_column_sums(problem.rows, cotangents))
    assert all(not bool(sums[name].any()) for name in spare)


@pytest.mark.parametrize("name", GRADED)
def test_grades_do_not_depend_on_the_engine(name):
    methods, dampings = ["sgd", "ef", "ief", "sf", "ng", "diag"], [1e-4, 1.0]
    tables = [
        ngeval.evaluate(problem_of(name, engine), methods, dampings)
        for engine in ("layers", "loop")
    ]
    assert list(tables[0]["engine"].unique()) == ["layers"]
    assert all((table["status"] == "ok").all() for table in tables)
    result, expected = (table["gamma"].to_numpy() for table in tables)
    assert result == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["unet", "swin"])
def test_a_gradient_that_is_mere_rounding_is_no_fault(name, dtype, engine):
    """A norm does not see the bias before it, a softmax not that of the keys."""
    entry = zoo.ENTRIES[name]
    inputs = entry.inputs
    assert isinstance(inputs, Tensor)
    for _ in range(4):
        model = entry.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model = model.to(dtype)
        ngeval.Problem(model, inputs.to(dtype), entry.targets, entry.likelihood, engine=engine)
