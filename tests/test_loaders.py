"""Batches as training loops have them: loaders, mappings, lists, ragged batches."""

from __future__ import annotations

import math
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typer.testing import CliRunner

import ngeval
from ngeval.cli.app import app
from ngeval.model.inputs import map_tensors, named_tensors

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def expected(batches, methods=("ef", "ng"), likelihood="categorical", **options) -> pd.DataFrame:
    """Each batch as a problem of its own."""
    tables = []
    for number, (x, y) in enumerate(batches):
        problem = ngeval.Problem(linear(), x, y, likelihood, **options)
        table = ngeval.evaluate(problem, methods, [1e-3, 1.0], seed=number)
        tables.append(table.assign(batch=number))
    return pd.concat(tables, ignore_index=True)


def same(actual: pd.DataFrame, wanted: pd.DataFrame) -> None:
    for column in ("batch", "method", "damping", "num_samples"):
        assert actual[column].tolist() == wanted[column].tolist()
    for column in ("gamma", "gamma_over_sgd", "gamma_over_ng"):
        pd.testing.assert_series_equal(actual[column], wanted[column], rtol=1e-12)


class TestEvaluateLoader:
    def test_is_each_batch_on_its_own(self):
        loader = DataLoader(TensorDataset(X, Y), batch_size=10)
        table = ngeval.evaluate_loader(
            linear(), loader, nn.CrossEntropyLoss(), ["ef", "ng"], [1e-3, 1.0], num_batches=3
        )
        same(table, expected([(X[:10], Y[:10]), (X[10:20], Y[10:20]), (X[20:], Y[20:])]))
        assert table.columns[0] == "batch"
        assert (table["note"] == "").all()

    def test_labels_are_drawn_with_the_seed_of_the_batch(self):
        batches = [(X[:12], Y[:12]), (X[12:], Y[12:])]
        table = ngeval.evaluate_loader(linear(), batches, "categorical", ["sf"], [1e-3, 1.0])
        same(table, expected(batches, ["sf"]))

    def test_fewer_batches_than_asked_for_are_remarked(self):
        batches = [(X[:12], Y[:12]), (X[12:], Y[12:])]
        table = ngeval.evaluate_loader(linear(), batches, "categorical", ["sgd"], [1.0])
        assert table["batch"].tolist() == [0, 1]
        assert table["note"].str.contains("2 batches of 5 asked for").all()
        every = ngeval.evaluate_loader(
            linear(), batches, "categorical", ["sgd"], [1.0], num_batches=None
        )
        assert every["batch"].tolist() == [0, 1]
        assert (every["note"] == "").all()

    def test_shuffling_follows_the_seed_and_nothing_else_changes(self):
        loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
        model, before = linear(), torch.get_rng_state()

        def losses(seed: int) -> list[float]:
            table = ngeval.evaluate_loader(
                model, loader, "categorical", ["sgd"], [1.0], num_batches=2, seed=seed
            )
            return table["loss"].tolist()

        assert losses(0) == losses(0) != losses(1)
        assert torch.equal(torch.get_rng_state(), before)

    def test_batches_are_mappings(self):
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = linear()

            def forward(self, pixels: Tensor, scale: float = 1.0, mask: Tensor | None = None):
                return {"logits": self.net(scale * pixels), "mask": mask}

        for name in ("labels", "label", "targets", "target", "y"):
            batch = {"pixels": X, "scale": 1.0, "mask": None, name: Y}
            table = ngeval.evaluate_loader(
                Named().eval(), [batch], "categorical", ["ef", "ng"], [1e-3, 1.0], num_batches=1
            )
            same(table, expected([(X, Y)]))

    def test_other_batches_are_unpacked(self):
        batches = [(X, torch.zeros(24), Y)]
        with pytest.raises(ngeval.InputError, match=r"batch 0 of the loader is a tuple of 3"):
            ngeval.evaluate_loader(linear(), batches, "categorical", ["sgd"], [1.0])
        table = ngeval.evaluate_loader(
            linear(),
            batches,
            "categorical",
            ["ef", "ng"],
            [1e-3, 1.0],
            num_batches=1,
            unpack=lambda batch: (batch[0], batch[2]),
        )
        same(table, expected([(X, Y)]))

    def test_weights_of_samples_are_unpacked(self):
        weights = torch.rand(24, generator=torch.Generator().manual_seed(5))
        table = ngeval.evaluate_loader(
            linear(), [(X, Y, weights)], "categorical", ["ef", "ng"], [1e-3, 1.0], num_batches=1,
            unpack=lambda batch: batch,
        )  # fmt: skip
        same(table, expected([(X, Y)], weights=weights))

    def test_a_stream(self):
        class Stream(IterableDataset):
            def __iter__(self):
                yield from zip(X, Y, strict=True)

        table = ngeval.evaluate_loader(
            linear(), DataLoader(Stream(), batch_size=12), "categorical", ["ef", "ng"], [1e-3, 1.0],
            num_batches=2,
        )  # fmt: skip
        same(table, expected([(X[:12], Y[:12]), (X[12:], Y[12:])]))
        generator = ((X[i : i + 12], Y[i : i + 12]) for i in (0, 12))
        table = ngeval.evaluate_loader(
            linear(), generator, "categorical", ["ef", "ng"], [1e-3, 1.0], num_batches=2
        )
        same(table, expected([(X[:12], Y[:12]), (X[12:], Y[12:])]))

    def test_options_are_passed_on(self):
        table = ngeval.evaluate_loader(
            linear(), [(X, Y)], "categorical", ["sgd"], [1.0], num_batches=1,
            dtype=torch.float32, engine="vmap", damping_scale="mean", natural=False,
            output=lambda z: 2 * z,
        )  # fmt: skip
        row = table.iloc[0]
        assert (row["dtype"], row["engine"], row["damping_scale"]) == ("float32", "vmap", "mean")
        assert math.isnan(row["gamma_min"])
        doubled = ngeval.Problem(linear(), X, Y, "categorical", output=lambda z: 2 * z)
        assert row["loss"] == pytest.approx(float(doubled.loss.mean()), rel=1e-6)

    @pytest.mark.parametrize(
        ("loader", "loss", "options", "words"),
        [
            ([], "categorical", {}, "no batch.*drop_last"),
            (iter([]), "categorical", {}, "no batch"),
            (3, "categorical", {}, "DataLoader.*not int"),
            (X, "categorical", {}, "DataLoader.*not Tensor"),
            ([(X, Y)], "categoric", {}, "did you mean 'categorical'"),
            ([(X, Y)], nn.L1Loss(), {}, "L1Loss is not a loss"),
            ([(X, Y)], "categorical", {"num_batches": 0}, "positive whole number"),
            ([(X, Y)], "categorical", {"methods": ["eff"]}, "did you mean 'ef'"),
            ([(X, Y)], "categorical", {"dampings": [-1]}, "-1"),
            ([{"x": X}], "categorical", {}, "mapping with no labels; its entries are 'x'"),
            ([{"y": Y, "label": Y}], "categorical", {}, r"several entries of labels \(label, y\)"),
            ([(X, Y.tolist())], "categorical", {}, "targets are a list"),
        ],
    )
    def test_messages(self, loader, loss, options, words):
        with pytest.raises(ngeval.InputError, match=words):
            ngeval.evaluate_loader(linear(), loader, loss, **options)

    def test_a_model_in_train_mode_is_refused_before_batches_are_loaded(self):
        def never():
            raise AssertionError
            yield

        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
        with pytest.raises(ngeval.ModelError, match=r"model\.eval\(\)"):
            ngeval.evaluate_loader(model, never(), "categorical")


class Mean(nn.Module):
    """Embeddings, averaged over a mask; options and constants beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids, mask=None, flag=False, name="", extra=(), scale=1):
        hidden = self.words(ids)
        if flag or name != "" or any(e is not None for e in extra):
            raise AssertionError
        weights = torch.ones_like(ids) if mask is None else mask
        weights = weights.unsqueeze(-1).to(hidden.dtype)
        return self.head(scale * (hidden * weights).sum(1) / weights.sum(1))


class Whole(Mean):
    """Takes the batch as one mapping, and its attributes if it has any."""

    def forward(self, batch):
        kind = type(batch)
        if kind.__name__ == "Attributes":
            return super().forward(batch.ids, batch.mask)
        return super().forward(batch["ids"], batch["mask"])


class Attributes(UserDict):
    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Nested(Mean):
    def forward(self, pair, options):
        return super().forward(pair["ids"], options[0][0], flag=options[1])


Pair = namedtuple("Pair", ["ids", "mask"])
IDS = torch.randint(0, 10, (6, 5), generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(5) < torch.tensor([[1], [2], [3], [4], [5], [2]])).long()
KINDS = torch.tensor([0, 1, 2, 1, 0, 2])


@pytest.fixture(scope="module")
def plain() -> ngeval.Problem:
    return ngeval.Problem(Mean().eval(), (IDS, MASK), KINDS, "categorical")


class TestInputs:
    """Every structure of inputs is the plain one."""

    @pytest.mark.parametrize(
        ("model", "inputs"),
        [
            (Mean, [IDS, MASK]),
            (Mean, Pair(IDS, MASK)),
            (Mean, {"ids": IDS, "mask": MASK}),
            (Mean, OrderedDict(ids=IDS, mask=MASK)),
            (Mean, UserDict(ids=IDS, mask=MASK)),
            (Mean, MappingProxyType({"ids": IDS, "mask": MASK})),
            (Mean, {"ids": IDS, "mask": MASK, "flag": False, "name": "", "scale": 1.0}),
            (Mean, {"ids": IDS, "mask": MASK, "extra": (None, None)}),
            (Mean, (IDS, MASK, False, "", [])),
            (Whole, {"ids": IDS, "mask": MASK}),
            (Whole, {"ids": IDS, "mask": MASK, "names": "abc"}),
            (Whole, Attributes(ids=IDS, mask=MASK)),
            (Whole, ({"ids": IDS, "mask": MASK},)),
            (Nested, ({"ids": IDS}, [(MASK,), False])),
            (Nested, {"pair": UserDict(ids=IDS), "options": ([MASK], False)}),
        ],
    )
    @pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
    def test_equal(self, plain, model, inputs, engine):
        kept = [tensor.clone() for _, tensor in named_tensors(inputs)]
        problem = ngeval.Problem(model().eval(), inputs, KINDS, "categorical", engine=engine)
        assert torch.equal(problem.outputs, plain.outputs)
        norms, wanted = (ngeval.gradient_norms(p)["gradient_norm"] for p in (problem, plain))
        pd.testing.assert_series_equal(norms, wanted)
        again = problem.with_batch(map_tensors(inputs, lambda t: t.flip(0)), KINDS.flip(0))
        torch.testing.assert_close(again.outputs, plain.outputs.flip(0))
        metric = ngeval.Metric(problem, [(inputs, KINDS)])
        assert metric.totals.loss == pytest.approx(float(plain.loss.mean()))
        for before, (_, after) in zip(kept, named_tensors(inputs), strict=True):
            assert torch.equal(before, after)

    def test_none_for_a_mask(self):
        without = ngeval.Problem(Mean().eval(), IDS, KINDS, "categorical")
        given = ngeval.Problem(Mean().eval(), {"ids": IDS, "mask": None}, KINDS, "categorical")
        assert torch.equal(given.outputs, without.outputs)

    def test_a_constant_that_differs_is_another_plan(self):
        first = ngeval.Problem(Mean().eval(), {"ids": IDS, "scale": 1}, KINDS, "categorical")
        other = first.with_batch({"ids": IDS, "scale": 2}, KINDS)
        alone = ngeval.Problem(Mean().eval(), {"ids": IDS, "scale": 2}, KINDS, "categorical")
        assert torch.equal(other.outputs, alone.outputs)

    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            ((IDS, ["a", "b", "c", "d", "e", "f"]), r"inputs\[1\] is a list of 6 values, one for"),
            ({"ids": IDS, "graph": object()}, r"inputs\['graph'\] is a object.*split="),
            ([IDS, MASK[:4]], r"samples\) differ.*split="),
            ({"ids": {"deep": IDS.float() / 0}}, r"inputs\['ids'\]\['deep'\] holds NaN or inf"),
            (
                (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),),
                "is a nested tensor",
            ),
            (torch.eye(6).to_sparse(), r"sparse.*to_dense\(\)"),
            (
                nn.utils.rnn.pack_padded_sequence(torch.ones(6, 5, 2), [5] * 6, batch_first=True),
                "PackedSequence",
            ),
        ],
    )
    def test_messages(self, inputs, words):
        with pytest.raises(ngeval.InputError, match=words):
            ngeval.Problem(Mean().eval(), inputs, KINDS, "categorical")


@dataclass
class Result:
    scores: Tensor
    attention: Tensor | None = None


@pytest.mark.parametrize(
    ("tail", "output"),
    [
        (lambda z: (z,), None),
        (lambda z: [z, None, "text"], None),
        (lambda z: {"out": z}, None),
        (Result, None),
        (lambda z: Result(z, z[:, :1]), "scores"),
        (lambda z: Pair(z, z[:, :1]), "ids"),
        (lambda z: Pair(z, z[:, :1]), 0),
    ],
)
def test_outputs_that_are_tuples_and_dataclasses(tail, output):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, x):
            return tail(self.net(x))

    problem = ngeval.Problem(Wrapped().eval(), X, Y, "categorical", output=output)
    assert torch.equal(problem.outputs, ngeval.Problem(linear(), X, Y, "categorical").outputs)


class Graph:
    """A batch of graphs as one, in the way of graph libraries."""

    def __init__(self, x: Tensor, edges: Tensor, batch: Tensor) -> None:
        self.x, self.edges, self.batch = x, edges, batch

    def apply(self, function):
        self.x, self.edges, self.batch = map(function, (self.x, self.edges, self.batch))
        return self


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, graph: Graph) -> Tensor:
        h = torch.tanh(self.first(graph.x))
        h = h.index_add(0, graph.edges[1], h[graph.edges[0]])
        count = int(graph.batch.max()) + 1
        pooled = torch.zeros(count, 5, dtype=h.dtype).index_add(0, graph.batch, h)
        return self.last(pooled)


def graphs() -> Graph:
    generator = torch.Generator().manual_seed(0)
    batch = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    edges = torch.tensor([[0, 1, 2, 3, 5, 6, 8], [1, 2, 0, 4, 6, 7, 5]])
    return Graph(torch.randn(9, 3, generator=generator), edges, batch)


def one_graph(graph: Graph, n: int) -> Graph:
    nodes = (graph.batch == n).nonzero().flatten()
    inside = graph.batch[graph.edges[0]] == n
    return Graph(graph.x[nodes], graph.edges[:, inside] - nodes[0], torch.zeros(len(nodes)).long())


class TestRagged:
    """``split=``: batches that cannot be indexed by sample."""

    def test_graphs(self):
        model, y = GraphNet().eval(), torch.tensor([0, 1, 1])
        problem = ngeval.Problem(model, graphs(), y, "categorical", split=one_graph)
        assert problem.engine == "loop"
        # By autograd, one graph at a time.
        rows = []
        double = GraphNet().double().eval()
        for n in range(3):
            graph = one_graph(graphs(), n)
            graph.x = graph.x.double()
            loss = nn.functional.cross_entropy(double(graph), y[n : n + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*double.parameters()])]))  # fmt: skip  # noqa: E501
        norms = ngeval.gradient_norms(problem)["gradient_norm"].to_numpy()
        assert norms == pytest.approx(torch.stack(rows).norm(dim=1).numpy(), rel=1e-10)
        torch.testing.assert_close(problem.gradient(), torch.stack(rows).sum(0))
        table = ngeval.evaluate(problem, ["sgd", "ef", "sf", "ng", "diag"], [1e-3])
        assert (table["status"] == "ok").all()
        again = problem.with_batch(graphs(), y)
        assert again.gamma(problem.gradient()) == problem.gamma(problem.gradient())
        metric = ngeval.Metric(problem, [(graphs(), y), (graphs(), y)])
        assert metric.totals.num_samples == 6
        by_loader = ngeval.evaluate_loader(
            model, [(graphs(), y)], "categorical", ["ef"], [1e-3], num_batches=1, split=one_graph
        )
        assert by_loader["gamma"][0] == pytest.approx(table["gamma"][1])

    def test_lists_of_unequal_tensors(self):
        class Lists(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = linear()

            def forward(self, parts: list[Tensor]) -> Tensor:
                return torch.stack([self.net(part).mean(0) for part in parts])

        parts = [X[:1], X[1:4], X[4:9]]
        problem = ngeval.Problem(
            Lists().eval(),
            parts,
            Y[:3],
            "categorical",
            split=lambda all_parts, n: ([all_parts[n]],),
        )
        assert problem.num_samples == 3
        assert problem.dtype == torch.float64

    def test_messages(self):
        model, y = GraphNet().eval(), torch.tensor([0, 1, 1])

        def expect(error, words, split=one_graph, targets=y, **options):
            with pytest.raises(error, match=words):
                ngeval.Problem(model, graphs(), targets, "categorical", split=split, **options)

        expect(ngeval.EngineError, "other outputs than the batch", lambda g, n: one_graph(g, 2 - n))
        expect(ngeval.InputError, "engine='loop', not 'vmap'", engine="vmap")
        expect(ngeval.InputError, "split= is a function", split=3)
        expect(ngeval.InputError, "split failed for sample 0.*ZeroDiv", lambda g, n: 1 / 0)
        expect(ngeval.ModelError, "outputs of single samples have shapes", lambda g, n: g)


class TestTaskWithLoader:
    """``Task(load_batches=...)`` takes a loader."""

    def task(self, loader, **options) -> ngeval.Task:
        return ngeval.Task("mine", linear, loader, nn.CrossEntropyLoss(), **options)

    def test_batches(self):
        loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
        task = self.task(loader)
        first = list(task.batches(8, 2, seed=0))
        assert [len(y) for _, y in first] == [8, 8]
        again = list(task.batches(8, 2, seed=0))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
        other = list(task.batches(8, 2, seed=1))
        assert not torch.equal(first[0][0], other[0][0])
        assert sum(len(y) for _, y in task.batches(8, None, seed=0)) == 24

    def test_messages(self):
        task = self.task(DataLoader(TensorDataset(X, Y), batch_size=8))
        with pytest.raises(ngeval.NgevalError, match=r"8 samples, not 160; give --batch-size 8"):
            list(task.batches(160, 1, 0))
        with pytest.raises(ngeval.TaskError, match=r"3 batches of 5.*--num-batches or --batch-siz"):
            list(task.batches(8, 5, 0))
        with pytest.raises(ngeval.NgevalError, match="only once"):
            list(self.task(iter([(X, Y)])).batches(24, 1, 0))

    def test_from_the_command_line(self, tmp_path: Path):
        (tmp_path / "my_task.py").write_text(
            "import torch, ngeval\nfrom torch import nn\n"
            "from torch.utils.data import DataLoader, TensorDataset\n"
            "data = TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))\n"
            "torch.manual_seed(0)\n"
            "data = TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))\n"
            "task = ngeval.Task('mine', lambda: nn.Linear(4, 3),\n"
            "    DataLoader(data, 8, shuffle=True), nn.CrossEntropyLoss(label_smoothing=0.1))\n"
        )
        torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "w.pt")
        arguments = [
            "--task", f"{tmp_path}/my_task.py:task", "--checkpoint", str(tmp_path / "w.pt"),
            "--methods", "ef", "--damping", "1e-3", "--batch-size", "8",
            "--output", str(tmp_path / "r.csv"),
        ]  # fmt: skip
        result = CliRunner().invoke(app, ["gamma", *arguments, "--num-batches", "3"])
        assert result.exit_code == 0, result.output
        table = pd.read_csv(tmp_path / "r.csv")
        assert table["batch"].tolist() == [0, 1, 2]
        assert (table["likelihood"] == "categorical:label_smoothing=0.1").all()
        failed = CliRunner().invoke(app, ["gamma", *arguments, "--force"])
        assert failed.exit_code == 2
        assert "--num-batches" in failed.output
        assert "--batch-size" in failed.output
        trained = CliRunner().invoke(
            app,
            ["train", "--task", f"{tmp_path}/my_task.py:task", "--batch-size", "8", "--epochs", "1",
             "--optimizer", "adamw", "--output", str(tmp_path / "run")],
        )  # fmt: skip
        assert trained.exit_code == 0, trained.output
