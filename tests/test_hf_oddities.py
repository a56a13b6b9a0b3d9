"""What an attacker of the Hugging Face tasks found, and what became of it."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers
from torch import nn

import ngeval
from ngeval.checkpoints import CheckpointLoader, find_checkpoints, load_checkpoint
from ngeval.checkpoints.adapters import AdapterLoader
from ngeval.errors import CheckpointError, TaskError
from ngeval.tasks.hf import hub, hub_task
from ngeval.tasks.hf.glue import TextForm
from ngeval.utils.optional import optional_module
from tests import hf_layouts as layouts
from tests.small_runs import run
from tests.test_hf_models import sample_gradients


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("odd")
    for family in ("t5", "bert", "gpt"):
        layouts.save_base(home / family, family)
    return home


def saved(folder: Path, family: str, config: peft.PeftConfig) -> Path:
    layouts.adapted(layouts.build(family), config).save_pretrained(folder)
    return folder


def by_peft(family: str, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(layouts.build(family), folder).eval()


def classifier(home: Path, rows: list[dict], model: str = "bert", **options) -> ngeval.Task:
    pd.DataFrame(rows).to_parquet(home / "train.parquet")
    return hub_task(str(home / model), dataset=str(home), **options)


class TestAdapters:
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (
                peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
                "P_TUNING trains an encoder",
            ),
            (
                layouts.adapter_config("gpt", "prefix", prefix_projection=True),
                "PREFIX_TUNING with prefix_projection trains an encoder",
            ),
        ],
    )
    def test_encoders_that_are_not_saved_are_refused(self, tmp_path, config, words):
        with pytest.raises(CheckpointError, match=words):
            AdapterLoader(layouts.build("gpt")).load(saved(tmp_path, "gpt", config))

    @pytest.mark.parametrize("start", ["olora", "pissa"])
    def test_initialisations_that_change_the_base(self, tmp_path: Path, start: str):
        config = layouts.adapter_config("bert", "lora", init_lora_weights=start)
        odd = saved(tmp_path / "odd", "bert", config)
        plain = saved(tmp_path / "plain", "bert", layouts.adapter_config("bert", "lora"))
        base, (inputs, _) = layouts.build("bert"), layouts.text_batch("bert")
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        loader = AdapterLoader(base)
        for folder in (odd, plain, odd):
            expected = by_peft("bert", folder)
            with torch.no_grad():
                result = loader.load(folder).eval()(**inputs).logits
                assert torch.allclose(result, expected(**inputs).logits, atol=1e-6)
        assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())

    def test_dora(self, tmp_path: Path):
        # Its layers get modules as arguments, whose parameters record gradients.
        config = layouts.adapter_config("bert", "lora", use_dora=True)
        model = AdapterLoader(layouts.build("bert")).load(saved(tmp_path, "bert", config))
        model, (inputs, targets) = model.double().eval(), layouts.text_batch("bert")
        problem = ngeval.Problem(model, inputs, targets, "categorical")
        result = ngeval.gradient_norms(problem)["gradient_norm"].to_numpy()
        expected = sample_gradients(model, inputs, targets).norm(dim=1).numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        table = ngeval.evaluate(problem, ["sgd", "ef", "ief", "sf", "ng", "diag"], [1e-2])
        assert (table["status"] == "ok").all()

    def test_all_biases_and_a_head(self, tmp_path: Path):
        config = layouts.adapter_config("bert", "lora", bias="all")
        folder = saved(tmp_path, "bert", config)
        model = AdapterLoader(layouts.build("bert")).load(folder).eval()
        expected = by_peft("bert", folder)
        inputs, _ = layouts.text_batch("bert")
        assert torch.allclose(model(**inputs).logits, expected(**inputs).logits, atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"peft_type": "WONDER"}, "has no adapters of type 'WONDER'"),
            ({"peft_type": 5}, "no peft_type"),
            ({"task_type": ["SEQ_CLS"]}, "not what PEFT writes"),
            ({"modules_to_save": 5}, "not what PEFT writes"),
            ({"modules_to_save": [["a"]]}, "not what PEFT writes"),
            ({"target_parameters": ["classifier.weight"]}, "target_parameters"),
        ],
    )
    def test_configurations(self, tmp_path: Path, change: dict, words: str):
        folder = saved(tmp_path, "bert", layouts.adapter_config("bert", "lora"))
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(CheckpointError, match=words):
            AdapterLoader(layouts.build("bert")).load(folder)

    def test_folders_of_several_adapters(self, tmp_path: Path):
        model = layouts.adapted(layouts.build("bert"), layouts.adapter_config("bert", "lora"))
        model.add_adapter("other", layouts.adapter_config("bert", "lora"))
        model.save_pretrained(tmp_path)
        result = [c.path for c in find_checkpoints([str(tmp_path)])]
        assert result == [tmp_path, tmp_path / "other"]

    def test_where_a_model_is_wanted(self, tmp_path: Path):
        folder = saved(tmp_path, "bert", layouts.adapter_config("bert", "lora"))
        with pytest.raises(TaskError, match="is a PEFT adapter; give its base"):
            hub_task(str(folder), dataset="glue", subset="sst2")

    def test_of_another_objective(self, home: Path, tmp_path: Path):
        folder = saved(tmp_path, "t5", layouts.adapter_config("t5", "lora"))
        with pytest.raises(TaskError, match=r"\(gpt2\) has no form for seq2seq, which .* is for"):
            hub_task(str(home / "gpt"), dataset="x", adapters=[str(folder)])


class TestPadding:
    def test_a_classifier_that_finds_the_end_by_the_padding(self, tmp_path: Path):
        config = transformers.GPT2Config(
            vocab_size=320, n_embd=16, n_layer=1, n_head=2, pad_token_id=1, num_labels=2
        )
        torch.manual_seed(0)
        transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "m")
        layouts.tokenizer("gpt").save_pretrained(tmp_path / "m")  # it has no padding
        rows = [{"text": t, "label": i % 2} for i, t in enumerate(layouts.sentences(6))]
        task = classifier(tmp_path, rows, "m")
        model, data = task.model().eval(), task.load_batches.__self__
        together, _ = data.batch(rows, torch.Generator())
        alone = [data.batch([row], torch.Generator())[0] for row in rows]
        with torch.no_grad():
            expected = torch.cat([model(**one).logits for one in alone])
            assert torch.allclose(model(**together).logits, expected, atol=1e-5)

    def test_texts_longer_than_the_positions(self, home: Path):
        rows = [{"text": "joy " * 300, "label": 1}, {"text": "noise", "label": 0}]
        inputs, _ = next(iter(classifier(home, rows).batches(2, 1, 0)))
        assert inputs["input_ids"].shape[1] == 64


class TestLabels:
    def test_several_labels(self, home: Path):
        model = layouts.build("bert", labels=3)
        model.config.problem_type = "multi_label_classification"
        model.save_pretrained(home / "tags")
        layouts.tokenizer("bert").save_pretrained(home / "tags")
        rows = [{"text": t, "label": [1.0, 0.0, 1.0]} for t in layouts.sentences(4)]
        task = classifier(home, rows, "tags")
        assert task.likelihood == "bernoulli"
        inputs, targets = next(iter(task.batches(4, 1, 0)))
        problem = ngeval.Problem(task.model(), inputs, targets, task.likelihood)
        loss = nn.functional.binary_cross_entropy_with_logits(
            problem.outputs, targets.double(), reduction="none"
        )
        assert torch.allclose(problem.loss, loss.sum(1))

    def test_several_values(self, home: Path):
        model = layouts.build("bert", labels=2)
        model.config.problem_type = "regression"
        model.save_pretrained(home / "values")
        layouts.tokenizer("bert").save_pretrained(home / "values")
        rows = [{"text": t, "label": [1.5, -0.5]} for t in layouts.sentences(4)]
        _, targets = next(iter(classifier(home, rows, "values").batches(4, 1, 0)))
        assert targets.shape == (4, 2)
        rows[1]["label"] = None
        with pytest.raises(TaskError, match=r"label None .* as regression needs"):
            list(classifier(home, rows, "values").batches(4, 1, 0))

    def test_an_empty_cell(self, home: Path, tmp_path: Path):
        (tmp_path / "train.csv").write_text("text,label\na,0\nb,\nc,1\n")
        task = hub_task(str(home / "bert"), dataset=str(tmp_path))
        with pytest.raises(TaskError, match="empty cell"):
            list(task.batches(3, 1, 0))

    @pytest.mark.parametrize("words", [["bad", "bad"], ["bad", ""]])
    def test_words_that_tell_nothing(self, home: Path, words: list[str]):
        rows = [{"text": "a", "label": 0}]
        with pytest.raises(TaskError, match="each class needs its own word"):
            classifier(home, rows, "t5", label_words=words)


class TestTemplates:
    @pytest.mark.parametrize(
        "template", ["{text} {}", "{text:d}", "{text:{label}}", "{text!x}", "{text!r}", "{text:>9}"]
    )
    def test_braces_hold_names_alone(self, template: str):
        with pytest.raises(TaskError, match=r"template .*braces hold|template .*:"):
            TextForm(template).columns  # noqa: B018

    def test_names_are_taken_as_they_stand(self):
        form = TextForm("{a.b} and {0} and {{x}}")
        assert form.columns == ["a.b", "0"]
        assert form.prompt({"a.b": 1, "0": "two"}) == "1 and two and {x}"
        with pytest.raises(TaskError, match=r"has no column 'text\.__class__'"):
            raise_missing("{text.__class__}")


def raise_missing(template: str) -> None:
    from ngeval.tasks.hf.task import _column  # noqa: PLC0415

    for name in TextForm(template).columns:
        _column("place", ["text"], (name,), "--template")


def test_a_slip_in_a_folder_s_name(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ngeval.tasks.hf.hub.hub_is_reachable", lambda: False)
    monkeypatch.chdir(home.parent)
    with pytest.raises(TaskError, match=rf"{home.name}/nope' does not exist; {home.name} holds"):
        hub_task(f"{home.name}/nope", dataset="glue", subset="sst2")


def test_tied_weights_of_a_loader_s_base_stay_tied(home: Path):
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(home / "t5")
    loader = CheckpointLoader(base)
    assert loader.load(find_checkpoints([str(home / "t5")])[0]) is base
    assert base.lm_head.weight is base.shared.weight


def test_an_adapter_of_a_different_base(home: Path, tmp_path: Path):
    for name in ("gpt", "gpt-large"):
        folder = saved(tmp_path / name, "gpt", layouts.adapter_config("gpt", "lora"))
        content = json.loads((folder / "adapter_config.json").read_text())
        content["base_model_name_or_path"] = f"team/{name}"
        (folder / "adapter_config.json").write_text(json.dumps(content))
    loader = CheckpointLoader(transformers.AutoModelForCausalLM.from_pretrained(home / "gpt"))
    right, wrong = find_checkpoints([str(tmp_path)])
    loader.load(right)
    assert loader.remarks == []
    loader.load(wrong)
    assert "an adapter of 'team/gpt-large'" in loader.remarks[0]
    assert "mean nothing" in loader.remarks[0]


@pytest.mark.parametrize("flag", [["--no-strict"], ["--checkpoint-key", "model"]])
def test_options_of_whole_models_for_an_adapter(home: Path, tmp_path: Path, flag: list[str]):
    saved(tmp_path, "gpt", layouts.adapter_config("gpt", "lora"))
    pd.DataFrame([{"text": "good and bad", "label": 0}]).to_parquet(home / "train.parquet")
    words = ["--hf-model", home / "gpt", "--adapter", tmp_path, "--dataset", home]
    result = run("gamma", *words, *flag, code=2)
    assert f"{flag[0]} is for files of whole models" in result.stderr


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


class TestTasksThatBuildAdapters:
    """``build_model`` returns a PEFT model, alone or inside another module."""

    @pytest.mark.parametrize("wrap", [nn.Module.eval, Logits])
    def test_their_adapters_are_loaded(self, tmp_path: Path, wrap):
        config, ids = layouts.adapter_config("gpt", "lora"), torch.arange(3, 9).reshape(2, 3)
        sources = [layouts.adapted(layouts.build("gpt"), config, seed) for seed in (1, 2)]
        for step, source in enumerate(sources):
            source.save_pretrained(tmp_path / f"checkpoint-{step}")
        loader = CheckpointLoader(wrap(layouts.adapted(layouts.build("gpt"), config, 3)).eval())
        for checkpoint, source in zip(find_checkpoints([str(tmp_path)]), sources, strict=True):
            outputs = loader.load(checkpoint)(ids)
            outputs = getattr(outputs, "logits", outputs)
            torch.testing.assert_close(outputs, source(ids).logits)

    @pytest.mark.parametrize("options", [{"lora_alpha": 5}, {"use_rslora": True}])
    def test_their_scale_must_agree(self, tmp_path: Path, options):
        saved(tmp_path, "gpt", layouts.adapter_config("gpt", "lora"))
        config = layouts.adapter_config("gpt", "lora", **options)
        with pytest.raises(CheckpointError, match=rf"{next(iter(options))} .* instead of"):
            load_checkpoint(layouts.adapted(layouts.build("gpt"), config), tmp_path)

    def test_their_modules_must_agree(self, tmp_path: Path):
        saved(tmp_path, "gpt", layouts.adapter_config("gpt", "lora"))
        config = layouts.adapter_config("gpt", "lora", layers_to_transform=[0])
        with pytest.raises(CheckpointError, match="unexpected"):
            load_checkpoint(layouts.adapted(layouts.build("gpt"), config), tmp_path)


class TestHub:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        hub.hub_is_reachable.cache_clear()
        yield
        hub.hub_is_reachable.cache_clear()

    def test_whether_it_is_reachable(self, monkeypatch: pytest.MonkeyPatch):
        request = []
        monkeypatch.setattr(hub.socket, "getaddrinfo", lambda *place: request.append(place))
        assert hub.hub_is_reachable()
        assert hub.hub_is_reachable()
        assert request == [("huggingface.co", 443)]
        hub.hub_is_reachable.cache_clear()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub.hub_is_reachable()

    def test_a_proxy_resolves_names(self, monkeypatch: pytest.MonkeyPatch):
        def fail(*_: object) -> None:
            raise OSError

        monkeypatch.setattr(hub.socket, "getaddrinfo", fail)
        assert not hub.hub_is_reachable()
        hub.hub_is_reachable.cache_clear()
        monkeypatch.setenv("https_proxy", "http://proxy:3128")
        assert hub.hub_is_reachable()

    def test_an_adapter_on_it(self, home: Path, monkeypatch: pytest.MonkeyPatch):
        assert hub.adapter_folder(str(home / "t5")) == str(home / "t5")
        assert hub.adapter_folder("runs/*") == "runs/*"
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(
            TaskError, match="adapter 'acme/lora' is neither a folder nor in the local cache"
        ):
            hub.adapter_folder("acme/lora")


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ngeval.DependencyError, match=r"peft is needed .*ngeval\[hf\]"):
        optional_module("peft")
