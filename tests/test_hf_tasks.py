"""Hugging Face tasks from folders: data in every layout, encodings, adapters, the command line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ngeval
from ngeval.checkpoints import CheckpointLoader, find_checkpoints
from ngeval.cli.app import app
from ngeval.errors import CheckpointError, InputError, TaskError
from ngeval.tasks.hf import hub_task
from ngeval.tasks.hf.encoding import Encoder
from ngeval.tasks.hf.glue import GLUE
from ngeval.tasks.hf.sources import load_rows
from tests import hf_layouts as layouts

TEXTS = layouts.sentences(24)
LABELS = [i % 2 for i in range(24)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models, adapters and data of every kind."""
    home = tmp_path_factory.mktemp("hf")
    for family in ("t5", "bert", "gpt", "vit"):
        layouts.save_base(home / family, family)
    sst2 = home / "glue" / "sst2"
    sst2.mkdir(parents=True)
    table = pd.DataFrame({"sentence": TEXTS, "label": LABELS})
    table.to_parquet(sst2 / "train-00000-of-00001.parquet")
    table.assign(label=-1).to_parquet(sst2 / "test-00000-of-00001.parquet")
    save_cifar(home / "cifar" / "cifar-10-batches-py")
    return home


def save_cifar(folder: Path, names: tuple[str, ...] = ("train", "test")) -> None:
    folder.mkdir(parents=True)
    files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    for name in names:
        for i, file in enumerate(files[name]):
            pixels = np.random.default_rng(i).integers(0, 256, (4, 3072), dtype=np.uint8)
            content = {b"data": pixels, b"labels": [0, 1, 1, 0], b"filenames": [b"x"] * 4}
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))


def sst2(home: Path, family: str, **options) -> ngeval.Task:
    argument = {"dataset": "glue", "subset": "sst2", "data_dir": home / "glue"} | options
    return hub_task(str(home / family), **argument)


def first_batch(task: ngeval.Task, size: int = 6):
    return next(iter(task.batches(size, 1, 0)))


def problem_of(task: ngeval.Task, size: int = 6) -> ngeval.Problem:
    inputs, targets = first_batch(task, size)
    return ngeval.Problem(
        task.model(), inputs, targets, task.likelihood, output=task.output, dtype=torch.float64
    )


class TestRows:
    """One table in every layout gives the same rows."""

    table = pd.DataFrame({"sentence": ["NA", "a joy", "null"], "label": [0, 1, 0]})

    @pytest.mark.parametrize(
        "layout",
        ["csv", "tsv", "jsonl", "json", "parquet", "shards", "data", "disk", "disk-dict", "arrow"],
    )
    def test_layouts(self, tmp_path: Path, layout: str):
        table, file = self.table, tmp_path / f"train.{layout}"
        whole = datasets.Dataset.from_pandas(table)
        if layout in ("csv", "tsv"):
            table.to_csv(file, index=False, sep="\t" if layout == "tsv" else ",")
        elif layout in ("json", "jsonl"):
            table.to_json(file, orient="records", lines=layout == "jsonl")
        elif layout == "parquet":
            table.to_parquet(file)
        elif layout in ("shards", "data"):
            place = tmp_path / "data" if layout == "data" else tmp_path
            place.mkdir(exist_ok=True)
            table[:2].to_parquet(place / "train-00000-of-00002.parquet")
            table[2:].to_parquet(place / "train-00001-of-00002.parquet")
        elif layout == "disk":
            whole.save_to_disk(tmp_path)
        elif layout == "disk-dict":
            datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path)
        else:
            whole.save_to_disk(tmp_path / "x")
            next((tmp_path / "x").glob("*.arrow")).rename(tmp_path / "train-00000-of-00001.arrow")
        rows = load_rows(str(tmp_path), None, "train", None)
        assert [(row["sentence"], row["label"]) for row in (rows[i] for i in range(3))] == [
            ("NA", 0),
            ("a joy", 1),
            ("null", 0),
        ]

    @pytest.mark.parametrize(
        ("subset", "folder", "text", "expected"),
        [
            ("cola", "CoLA", 'gj04\t0\t*\tHe "did.\n', {"sentence": 'He "did.', "label": 0}),
            ("sst2", "SST-2", "sentence\tlabel\nNone \t1\n", {"sentence": "None ", "label": 1}),
            (
                "mrpc",
                "MRPC",
                "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\tA b\tC d\n",
                {"sentence1": "A b", "sentence2": "C d", "label": 1},
            ),
            (
                "stsb",
                "STS-B",
                "index\tsentence1\tsentence2\tscore\n0\tA\tB\t2.25\n",
                {"sentence1": "A", "sentence2": "B", "label": 2.25},
            ),
            (
                "qqp",
                "QQP",
                "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t0\n",
                {"question1": "A?", "question2": "B?", "label": 0},
            ),
            (
                "mnli",
                "MNLI",
                "sentence1\tsentence2\tgold_label\nA\tB\tcontradiction\nC\tD\t-\n",
                {"premise": "A", "hypothesis": "B", "label": 2},
            ),
            (
                "qnli",
                "QNLI",
                "index\tquestion\tsentence\tlabel\n0\tA?\tB\tnot_entailment\n",
                {"question": "A?", "sentence": "B", "label": 1},
            ),
            (
                "rte",
                "RTE",
                "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n",
                {"sentence1": "A", "sentence2": "B", "label": 0},
            ),
            (
                "wnli",
                "WNLI",
                "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n",
                {"sentence1": "A", "sentence2": "B", "label": 1},
            ),
        ],
    )
    def test_original_glue(self, tmp_path: Path, subset, folder, text, expected):
        place = tmp_path / folder
        place.mkdir()
        (place / "dev.tsv").write_text(text)
        rows = load_rows("glue", subset, "validation", tmp_path)
        assert len(rows) == 1
        assert rows[0] == expected

    @pytest.mark.parametrize("binary", [False, True])
    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_original_cifar(self, tmp_path: Path, name: str, binary: bool):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
        labels = np.array([3, 1, 2], np.uint8)
        if binary:
            front = [labels] if name == "cifar10" else [labels + 10, labels]
            records = np.column_stack([*front, pixels])
            file = "test_batch.bin" if name == "cifar10" else "test.bin"
            records.tofile(tmp_path / file)
        else:
            key = b"labels" if name == "cifar10" else b"fine_labels"
            content = {b"data": pixels, key: labels.tolist()}
            file = "test_batch" if name == "cifar10" else "test"
            (tmp_path / file).write_bytes(pickle.dumps(content, protocol=2))
        rows = load_rows(name, None, "test", tmp_path)
        assert [rows[i]["label"] for i in range(3)] == [3, 1, 2]
        image = np.asarray(rows[1]["image"])
        # Channel by channel in the file, each row by row.
        assert (image[4, 7] == pixels[1].reshape(3, 32, 32)[:, 4, 7]).all()

    def test_a_cifar_file_runs_no_code(self, tmp_path: Path):
        class Evil:
            def __reduce__(self):
                return print, ("ran",)

        (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
        with pytest.raises(TaskError, match=r"asks to run builtins\.print"):
            load_rows("cifar10", None, "test", tmp_path)

    def test_what_is_missing_is_said(self, tmp_path: Path, home: Path):
        with pytest.raises(TaskError, match=r"no split 'dev' of glue/sst2.*train-00000"):
            load_rows("glue", "sst2", "dev", home / "glue")
        with pytest.raises(TaskError, match="does not exist"):
            load_rows("glue", "sst2", "train", tmp_path / "nowhere")
        with pytest.raises(TaskError, match="train and test, not 'validation'"):
            load_rows("cifar10", None, "validation", home / "cifar")
        (home / "cifar" / "cifar-10-batches-py" / "data_batch_3").rename(tmp_path / "gone")
        with pytest.raises(TaskError, match="lacks data_batch_3"):
            load_rows("cifar10", None, "train", home / "cifar")
        (tmp_path / "gone").rename(home / "cifar" / "cifar-10-batches-py" / "data_batch_3")
        (tmp_path / "train.parquet").write_bytes(b"nonsense")
        with pytest.raises(TaskError, match=r"train\.parquet cannot be read"):
            load_rows(str(tmp_path), None, "train", None)

    def test_without_a_network(self, monkeypatch):
        monkeypatch.setattr("ngeval.tasks.hf.sources.hub_is_reachable", lambda: False)
        with pytest.raises(TaskError, match=r"neither a folder nor in the local cache.*--data-dir"):
            load_rows("glue", "sst2", "train", None)


class TestEncodings:
    def test_every_glue_task_has_a_prompt_and_answers(self, home: Path, tmp_path: Path):
        for subset, form in GLUE.items():
            row = {name: f"the {name}" for name in form.columns}
            labels = [3.14, 0.0] if subset == "stsb" else [0, 1]
            pd.DataFrame([{**row, "label": label} for label in labels]).to_parquet(
                tmp_path / "train.parquet"
            )
            task = hub_task(
                str(home / "t5"), dataset="glue", subset=subset, data_dir=tmp_path,
                max_target_tokens=64,
            )  # fmt: skip
            inputs, targets = first_batch(task, 2)
            read = layouts.tokenizer().decode
            prompts = {read(ids[mask == 1]) for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)}  # noqa: E501  # fmt: skip
            assert prompts == {form.template.format(**row) + "</s>"}
            answers = {read(ids[ids >= 0]) for ids in targets}
            words = ("3.2", "0.0") if subset == "stsb" else form.words[:2]
            assert answers == {f"{word}</s>" for word in words}

    def test_the_decoder_sees_the_answer_one_token_late(self, home: Path):
        inputs, targets = first_batch(sst2(home, "t5"))
        decoder = inputs["decoder_input_ids"]
        assert decoder.shape == targets.shape
        assert (decoder[:, 0] == 0).all()
        later = targets[:, :-1]
        assert torch.equal(decoder[:, 1:][later >= 0], later[later >= 0])

    def test_pairs_for_a_classifier(self, home: Path, tmp_path: Path):
        row = {"premise": "a joy", "hypothesis": "a dull plot", "label": 2}
        pd.DataFrame([row]).to_parquet(tmp_path / "train.parquet")
        task = hub_task(str(home / "bert"), dataset="glue", subset="mnli", data_dir=tmp_path)
        inputs, targets = first_batch(task, 1)
        expected = layouts.tokenizer("bert")("a joy", "a dull plot")
        assert inputs["input_ids"][0].tolist() == expected["input_ids"]
        assert inputs["token_type_ids"][0].tolist() == expected["token_type_ids"]
        assert targets.tolist() == [2]

    def test_scores_by_a_classifier_are_regression(self, home: Path, tmp_path: Path):
        rows = [{"sentence1": "a", "sentence2": "b", "label": v} for v in (2.5, 0.0)]
        pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
        layouts.save_base(tmp_path / "one", "bert", labels=1)
        task = hub_task(str(tmp_path / "one"), dataset="glue", subset="stsb", data_dir=tmp_path)
        assert task.likelihood == "gaussian:0.5"
        problem = problem_of(task, 2)
        logits = problem.outputs[:, 0]
        squares = (logits - first_batch(task, 2)[1].double()[:, 0]).square()
        constant = 0.5 * np.log(2 * np.pi * 0.5)
        assert torch.allclose(problem.loss, squares + constant)

    def test_a_causal_model_is_asked_for_the_answer_alone(self, home: Path):
        inputs, targets = first_batch(sst2(home, "gpt"))
        read = layouts.tokenizer("gpt").decode
        for ids, mask, expected in zip(
            inputs["input_ids"], inputs["attention_mask"], targets, strict=True
        ):
            assert read(expected[expected >= 0]) in (" negative", " positive")
            # The logits at position t are for the token at t + 1.
            at = (expected >= 0).nonzero().flatten()
            assert torch.equal(ids[at + 1], expected[at])
            assert mask[at + 1].all()

    def test_plain_text_counts_every_token_but_the_first(self, home: Path, tmp_path: Path):
        pd.DataFrame({"text": ["a dull plot", " ", "everyone left happy"]}).to_csv(
            tmp_path / "train.csv", index=False
        )
        task = hub_task(str(home / "gpt"), dataset=str(tmp_path))
        inputs, targets = first_batch(task, 2)
        assert (targets >= 0).sum(1).tolist() == (inputs["attention_mask"].sum(1) - 1).tolist()

    def test_tokens_as_samples(self, home: Path):
        inputs, targets = first_batch(sst2(home, "gpt", samples="token"))
        assert targets.shape == (6,)
        problem = problem_of(sst2(home, "gpt", samples="token"))
        model = sst2(home, "gpt").model().double()
        for n in range(6):
            front = inputs["input_ids"][n : n + 1, inputs["attention_mask"][n] == 1]
            logits = model(input_ids=front).logits[0, -1]
            loss = nn.functional.cross_entropy(logits, targets[n])
            assert float(problem.loss[n]) == pytest.approx(loss.item(), rel=1e-6)

    def test_first_tokens_as_samples(self, home: Path):
        whole = problem_of(sst2(home, "t5"))
        first = problem_of(sst2(home, "t5", samples="first-token"))
        assert first.outputs.shape == (6, 1, whole.outputs.shape[-1])
        torch.testing.assert_close(first.outputs, whole.outputs[:, :1], rtol=1e-6, atol=1e-8)
        inputs, targets = first_batch(sst2(home, "t5"))
        model = sst2(home, "t5").model().double()
        with torch.no_grad():
            logits = model(**inputs).logits[:, 0]
        loss = nn.functional.cross_entropy(logits, targets[:, 0], reduction="none")
        torch.testing.assert_close(first.loss, loss, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize(
        ("family", "samples", "words"),
        [
            ("gpt", "first-token", "for seq2seq models"),
            ("t5", "token", "for causal models"),
            ("bert", "token", "for causal models"),
        ],
    )
    def test_samples_of_another_objective(self, home: Path, family, samples, words):
        with pytest.raises(TaskError, match=f"--samples.*{words}"):
            sst2(home, family, samples=samples)

    def test_images_are_as_the_processor_makes_them(self, home: Path):
        task = hub_task(str(home / "vit"), dataset="cifar10", data_dir=home / "cifar")
        inputs, targets = first_batch(task, 3)
        assert inputs["pixel_values"].shape == (3, 3, 16, 16)
        assert float(inputs["pixel_values"].abs().max()) <= 1
        assert targets.shape == (3,)

    @pytest.mark.parametrize("family", ["t5", "bert", "gpt"])
    def test_batches_are_repeatable(self, home: Path, family: str):
        one, two = (list(sst2(home, family).batches(4, 3, 7)) for _ in range(2))
        for (a, x), (b, y) in zip(one, two, strict=True):
            assert torch.equal(x, y)
            assert all(torch.equal(a[key], b[key]) for key in a)


class TestSamplesAreWhatYouSay:
    """A sample's numbers depend on nothing but the sample."""

    @pytest.mark.parametrize("family", ["t5", "bert", "gpt"])
    @pytest.mark.parametrize("other", ["left", "alone"])
    def test_padding_and_company(self, home: Path, family: str, other: str):
        def sizes(task: ngeval.Task, *batches: list[int]) -> np.ndarray:
            data, model, norms = task.load_batches.__self__, task.model(), []
            for rows in batches:
                inputs, targets = data.batch([data.rows[i] for i in rows], torch.Generator())
                problem = ngeval.Problem(
                    model, inputs, targets, task.likelihood, dtype=torch.float64
                )
                norms.append(ngeval.gradient_norms(problem)["gradient_norm"].to_numpy())
            return np.concatenate(norms)

        task = sst2(home, family)
        together = sizes(task, [0, 1, 2, 3, 4])
        if other == "left" and family == "bert":  # which reads its class off the first token
            with pytest.raises(TaskError, match="first token"):
                sst2(home, family, padding_side="left")
            return
        if other == "left":
            again = sizes(sst2(home, family, padding_side="left"), [0, 1, 2, 3, 4])
        else:
            again = sizes(task, *([i] for i in range(5)))
        # T5 and BERT take some of their steps in float32.
        np.testing.assert_allclose(again, together, rtol=2e-6)


class TestAdapters:
    @pytest.mark.parametrize("how", ["lora", "ia3", "prompt", "prefix"])
    def test_weights_and_trainable_set_are_the_adapters(self, home: Path, tmp_path, how: str):
        config = layouts.adapter_config("t5", how)
        run = layouts.save_run(tmp_path / "run", home / "t5", "t5", config)
        task = sst2(home, "t5")
        base = task.model()
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        loader = CheckpointLoader(base)
        inputs, _ = layouts.text_batch("t5")
        for step, checkpoint in enumerate(find_checkpoints([str(run)]), 1):
            assert (checkpoint.epoch, checkpoint.step) == (step / 2, 10 * step)
            model = loader.load(checkpoint).eval()
            expected = layouts.adapted(layouts_base(home / "t5"), config, seed=step)
            result = model(**inputs)
            result = result if isinstance(result, torch.Tensor) else result.logits
            assert torch.allclose(result, expected(**inputs).logits[:, -3:], atol=1e-6)
            count = sum(p.numel() for p in expected.parameters() if p.requires_grad)
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())

    def test_biases_of_the_base_are_the_adapters_own(self, home: Path, tmp_path: Path):
        config = layouts.adapter_config("bert", "lora", bias="lora_only")
        run = layouts.save_run(tmp_path / "run", home / "bert", "bert", config)
        base = sst2(home, "bert").model()
        bias = base.bert.encoder.layer[0].attention.self.query.bias.detach().clone()
        loader = CheckpointLoader(base)
        model = loader.load(find_checkpoints([str(run)])[0])
        assert any(n.endswith("query.base_layer.bias") for n, _ in named_trainable(model))
        named = {n: p for n, p in named_trainable(model) if n.endswith("layer.0.attention.self.query.base_layer.bias")}  # noqa: E501  # fmt: skip
        assert len(named) == 1
        assert not any(torch.equal(p, bias) for p in named.values())
        assert torch.equal(base.bert.encoder.layer[0].attention.self.query.bias, bias)

    def test_a_head_may_come_with_the_adapter(self, home: Path, tmp_path: Path):
        # As ViT of ImageNet-21k with LoRA and a new classifier: the base has no head.
        import transformers  # noqa: PLC0415

        layouts.build("vit").vit.save_pretrained(tmp_path / "base")
        with pytest.raises(TaskError, match=r"no weights for classifier\.bias, classifier\.weight"):
            hub_task(
                str(tmp_path / "base"), dataset="cifar10", data_dir=home / "cifar",
                objective="image", processor=str(home / "vit"),
            ).model()  # fmt: skip
        base = transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path / "base", num_labels=2
        )
        adapter = tmp_path / "adapter"
        layouts.adapted(base, layouts.adapter_config("vit", "lora")).save_pretrained(adapter)
        task = hub_task(
            str(tmp_path / "base"), dataset="cifar10", data_dir=home / "cifar",
            adapters=[str(adapter)], objective="image", processor=str(home / "vit"),
        )  # fmt: skip
        model = CheckpointLoader(task.model()).load(find_checkpoints([str(adapter)])[0])
        names = [name for name, _ in named_trainable(model)]
        assert any("classifier" in name for name in names)

    def test_whole_models_of_a_trainers_run(self, home: Path, tmp_path: Path):
        # transformers 5 writes a ViT's weights under other names than the module has.
        for step in (2, 10):
            place = tmp_path / "run" / f"checkpoint-{step}"
            layouts.stirred(layouts.build("vit"), seed=step).save_pretrained(place)
        task = hub_task(str(home / "vit"), dataset="cifar10", data_dir=home / "cifar")
        loader = CheckpointLoader(task.model())
        checkpoints = find_checkpoints([str(tmp_path / "run")])
        assert [c.step for c in checkpoints] == [2, 10]
        for checkpoint in checkpoints:
            model = loader.load(checkpoint)
            expected = layouts.stirred(layouts.build("vit"), seed=int(checkpoint.step))
            for name, p in expected.named_parameters():
                assert torch.equal(p, dict(model.named_parameters())[name]), name


def layouts_base(folder: Path):
    import transformers  # noqa: PLC0415

    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)


def named_trainable(model: nn.Module):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def run_cli(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


class TestCommandLine:
    def test_a_folder_of_t5_lora_checkpoints(self, home: Path, tmp_path: Path):
        config = layouts.adapter_config("t5", "lora")
        run = layouts.save_run(tmp_path / "run", home / "t5", "t5", config)
        output = tmp_path / "gamma.csv"
        result = run_cli(
            "gamma", "--hf-model", home / "t5", "--adapter", run, "--dataset", "glue",
            "--subset", "sst2", "--data-dir", home / "glue", "--batch-size", 4,
            "--num-batches", 2, "--methods", "sgd,ief", "--damping", "1e-2", "--no-natural",
            "--output", output,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "768 of 16,576 parameters trainable" in result.output
        table = pd.read_csv(output)
        assert table["epoch"].tolist() == [0.5] * 4 + [1.0] * 4
        # The same by hand: PEFT's model, the task's batch, a Problem.
        model = layouts.adapted(layouts_base(home / "t5"), config, seed=2)
        task = sst2(home, "t5")
        inputs, targets = list(task.batches(4, 2, 0))[1]
        problem = ngeval.Problem(model, inputs, targets, "categorical")
        by_hand = ngeval.evaluate(problem, ["sgd", "ief"], [1e-2], natural=False)
        actual = table[(table["epoch"] == 1) & (table["batch"] == 1)]["gamma"]
        assert actual.to_numpy() == pytest.approx(by_hand["gamma"].to_numpy(), rel=1e-5)

    def test_a_folder_of_vit_lora_checkpoints(self, home: Path, tmp_path: Path):
        run = layouts.save_run(
            tmp_path / "run", home / "vit", "vit", layouts.adapter_config("vit", "lora")
        )
        result = run_cli(
            "sweep", "--hf-model", home / "vit", "--adapter", run / "checkpoint-*", "--dataset",
            "cifar10", "--data-dir", home / "cifar", "--batch-size", 4, "--num-batches", 1,
            "--dampings", "1e-3:1:3", "--output", tmp_path / "s.parquet", "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert result.output == ""
        table = pd.read_parquet(tmp_path / "s.parquet")
        assert len(table) == 2 * 6 * 3
        assert (table["status"] == "ok").all()

    def test_the_model_itself(self, home: Path):
        result = run_cli(
            "imbalance", "--hf-model", home / "bert", "--dataset", "glue", "--subset", "sst2",
            "--data-dir", home / "glue", "--batch-size", 4, "--num-batches", 1,
        )  # fmt: skip
        assert result.exit_code == 0, result.output


class TestBadInput:
    """One clear message for each."""

    def refused(self, words: str, home: Path, *arguments: object, model: str = "t5") -> None:
        result = run_cli(
            "gamma", "--hf-model", home / model, "--dataset", "glue", "--subset", "sst2",
            "--data-dir", home / "glue", "--batch-size", 4, "--num-batches", 1, *arguments,
        )  # fmt: skip
        assert result.exit_code == 2
        messages = [line for line in result.output.splitlines() if line.startswith("ngeval: ")]
        assert len(messages) == 1, result.output
        assert words in messages[0]
        assert "Traceback" not in result.output

    def test_an_adapter_of_another_model(self, home: Path, tmp_path: Path):
        run = layouts.save_run(
            tmp_path / "run", home / "gpt", "gpt", layouts.adapter_config("gpt", "lora"), 1
        )
        place = run / "checkpoint-10"
        self.refused(f"{place} does not fit the base model", home, "--objective", "seq2seq", "--adapter", place)  # noqa: E501  # fmt: skip

    def test_an_adapter_of_another_width(self, home: Path, tmp_path: Path):
        adapter = self.adapter(home, tmp_path)
        from safetensors.torch import load_file, save_file  # noqa: PLC0415

        file = adapter / "adapter_model.safetensors"
        state = {name: torch.cat([t, t], -1) for name, t in load_file(file).items()}
        save_file(state, file)
        self.refused("does not fit the base model", home, "--adapter", adapter)

    def test_an_adapter_with_a_weight_missing_or_too_many(self, home: Path, tmp_path: Path):
        from safetensors.torch import load_file, save_file  # noqa: PLC0415

        adapter = self.adapter(home, tmp_path)
        file = adapter / "adapter_model.safetensors"
        state = load_file(file)
        name = next(iter(state))
        save_file({n: t for n, t in state.items() if n != name}, file)
        self.refused("missing: ", home, "--adapter", adapter)
        save_file(state | {"base_model.model.extra.weight": torch.ones(2)}, file)
        self.refused("unexpected: base_model.model.extra.weight", home, "--adapter", adapter)
        save_file(state | {name: torch.full_like(state[name], torch.nan)}, file)
        self.refused("NaN", home, "--adapter", adapter)

    def test_an_adapter_with_nothing_trainable(self, home: Path, tmp_path: Path, monkeypatch):
        adapter = self.adapter(home, tmp_path)
        monkeypatch.setattr(
            "peft.get_peft_model",
            lambda base, config: frozen(layouts.peft.PeftModelForSeq2SeqLM(base, config)),
        )
        self.refused("nothing trainable", home, "--adapter", adapter)

    def test_what_is_no_adapter(self, home: Path, tmp_path: Path):
        self.refused("is not a PEFT adapter", home, "--adapter", home / "bert")
        self.refused("no checkpoint at", home, "--adapter", tmp_path / "nowhere")
        adapter = self.adapter(home, tmp_path)
        (adapter / "adapter_config.json").write_text("{")
        self.refused("cannot be read as JSON", home, "--adapter", adapter)
        (adapter / "adapter_config.json").write_text("{}")
        self.refused("no peft_type", home, "--adapter", adapter)

    def adapter(self, home: Path, tmp_path: Path) -> Path:
        config = layouts.adapter_config("t5", "lora")
        return layouts.save_run(tmp_path / "r", home / "t5", "t5", config, 1) / "checkpoint-10"

    def test_a_tokenizer_that_is_missing(self, home: Path, tmp_path: Path):
        layouts.build("t5").save_pretrained(tmp_path / "bare")
        self.refused("no tokenizer in", home, "--hf-model", tmp_path / "bare")

    def test_an_image_processor_that_is_missing(self, home: Path, tmp_path: Path):
        layouts.build("vit").save_pretrained(tmp_path / "bare")
        with pytest.raises(TaskError, match="no image processor in"):
            hub_task(str(tmp_path / "bare"), dataset="cifar10", data_dir=home / "cifar")

    def test_label_words_that_are_too_long(self, home: Path):
        self.refused("label words 'negative' are", home, "--max-target-tokens", 1)
        self.refused("has no label words; there are 1: bad", home, "--label-words", "bad")

    def test_columns_that_are_not_there(self, home: Path):
        self.refused("no column 'review'; it has sentence, label", home, "--columns", "review")
        self.refused("no column 'stars'", home, "--label-column", "stars")
        self.refused("names no column", home, "--template", "hello")
        self.refused("template '{sentence'", home, "--template", "{sentence")

    def test_a_split_without_labels(self, home: Path):
        self.refused("label -1 in column 'label'", home, "--split", "test")

    def test_names_that_are_nowhere(self, home: Path, monkeypatch):
        for module in ("hub", "sources"):
            monkeypatch.setattr(f"ngeval.tasks.hf.{module}.hub_is_reachable", lambda: False)
        self.refused("neither a folder nor in the local cache", home, "--hf-model", "acme/nothing")
        self.refused("there is no such folder", home, "--hf-model", "./nothing/at/all")
        self.refused("glue has no subset 'sst'; did you mean 'sst2'", home, "--subset", "sst")

    def test_code_of_a_repository(self, home: Path, tmp_path: Path):
        layouts.save_base(tmp_path / "remote", "t5")
        file = tmp_path / "remote" / "config.json"
        content = json.loads(file.read_text())
        content |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Strange"}}
        file.write_text(json.dumps(content))
        (tmp_path / "remote" / "code.py").write_text("raise SystemExit('ran')")
        self.refused("--trust-remote-code", home, "--hf-model", tmp_path / "remote")

    def test_a_shard_that_is_missing(self, home: Path, tmp_path: Path):
        place = tmp_path / "sharded"
        layouts.build("t5").save_pretrained(place, max_shard_size="20KB")
        layouts.tokenizer().save_pretrained(place)
        shards = sorted(place.glob("model-*.safetensors"))
        assert len(shards) > 1
        shards[0].unlink()
        self.refused(shards[0].name, home, "--checkpoint", place)
        self.refused("model", home, "--hf-model", place)

    def test_options_that_do_not_go_together(self, home: Path, tmp_path: Path):
        self.refused("either --task or --hf-model", home, "--task", "digits-mlp")
        self.refused("unknown padding side 'middle'", home, "--padding-side", "middle")
        self.refused("unknown objective 'regress'", home, "--objective", "regress")
        result = run_cli("gamma", "--task", "digits-mlp", "--subset", "sst2", "-c", "x")
        assert "--subset goes with --hf-model" in result.output
        result = run_cli("gamma", "--hf-model", home / "t5")
        assert "needs a --dataset" in result.output
        result = run_cli("gamma", "--task", "digits-mlp")
        assert "no checkpoint given" in result.output

    def test_virtual_tokens_and_padding_on_the_left(self, home: Path, tmp_path: Path):
        run = layouts.save_run(
            tmp_path / "run", home / "gpt", "gpt", layouts.adapter_config("gpt", "prompt"), 1
        )
        for option in (("--padding-side", "left"), ("--samples", "token")):
            self.refused("virtual tokens", home, "--adapter", run, *option, model="gpt")

    def test_adapters_and_whole_models_in_one_run(self, home: Path, tmp_path: Path):
        adapter = find_checkpoints([str(self.adapter(home, tmp_path))])
        whole = find_checkpoints([str(home / "t5")])
        for first, second in ((adapter, whole), (whole, adapter)):
            loader = CheckpointLoader(sst2(home, "t5").model())
            loader.load(first[0])
            with pytest.raises(CheckpointError, match="separate runs"):
                loader.load(second[0])

    def test_lengths_that_are_none(self, home: Path):
        with pytest.raises(InputError, match="at least 2"):
            sst2(home, "t5", max_length=1)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def test_a_prompt_is_cut_and_the_answer_kept():
    encoder = Encoder(layouts.tokenizer("gpt"), max_length=12)
    [ids], [front] = encoder.causal(["the film was a quiet joy and everyone"], ["positive"], 8)
    assert len(ids) == 12
    assert layouts.tokenizer("gpt").decode(ids[front:]) == " positive"
