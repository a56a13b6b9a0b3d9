"""Text tasks of the study *optimization*: LoRA and prompt tuning of a small T5.

The data and the pre-training are those of `studies.docstrings`, except that the T5 is pre-trained
to name the areas of other sentences, which begin with the template. The task's sentences do not:
tuning teaches the T5 to name the area without it. Sentences are padded to one length, and the
answer is the first token of the label word, which differs between classes, so that accuracy is that
of sentences.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ngeval.errors import TaskError
from ngeval.tasks.base import Task
from ngeval.utils.optional import optional_module
from studies.docstrings import AREAS, Base, docstrings, labelled, pretrain, split
from studies.images import Samples, adapted, make_task

LENGTH = 24
"""Tokens of a sentence: longer ones are cut."""

SHAPE = {"d_model": 48, "d_kv": 12, "num_heads": 4, "d_ff": 96, "num_layers": 1}
VOCABULARY, RATE = 600, 5e-3
LINEAR = ["q", "v", "wi", "wo"]
VIRTUAL = 10
"""Virtual tokens of a tuned prompt."""


class PromptTuned(nn.Module):
    """A frozen T5 with virtual tokens before the text, whose embeddings are tuned.

    The embeddings are initialised with those of random tokens. Unlike in PEFT, every sample looks
    up the prompt, so that per-sample gradients need no loop over samples.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        words = model.get_input_embeddings().weight
        self.prompt = nn.Embedding(VIRTUAL, words.shape[1])
        with torch.no_grad():
            self.prompt.weight.copy_(words[torch.randint(len(words), (VIRTUAL,))])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Any:
        positions = torch.arange(VIRTUAL, device=input_ids.device).expand(len(input_ids), -1)
        words = self.model.get_input_embeddings()(input_ids)
        return self.model(
            inputs_embeds=torch.cat([self.prompt(positions), words], 1),
            attention_mask=torch.cat([torch.ones_like(positions), attention_mask], 1),
            decoder_input_ids=decoder_input_ids,
        )


def text_task(kind: str, steps: int, sizes: tuple[int, int, int] = (60, 40, 80)) -> Task:
    """LoRA (r = 4) or prompt tuning (10 tokens) of a T5 that is pre-trained here.

    Args:
        kind: ``"lora"`` or ``"prompt"``.
        steps: of the pre-training.
        sizes: sentences of each class in the training, validation and test parts.

    Raises:
        DependencyError: transformers or peft are not installed.
        TaskError: Python's library here has too few docstrings.
    """
    peft = optional_module("peft")
    base, parts = _prepared(steps, sizes)

    def build() -> nn.Module:
        model = copy.deepcopy(base)
        if kind == "prompt":
            return PromptTuned(model)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="SEQ_2_SEQ_LM")
        return adapted(model, config)

    adapter = "LoRA" if kind == "lora" else "prompt tuning"
    return make_task(
        f"t5-{kind}",
        build,
        parts,
        f"{adapter} of a small T5: what part of Python's library is a docstring from?",
    )


@cache
def _prepared(steps: int, sizes: tuple[int, int, int]) -> tuple[Any, list[Samples]]:
    """The pre-trained T5, and the three parts of the data, which it was not trained on."""
    pairs = list(docstrings([part for parts in AREAS.values() for part in parts]))
    table = labelled(pairs, seed=0)
    counts = table["label"].value_counts()
    if len(counts) < len(AREAS) or int(counts.min()) < 2 * sizes[0] + sum(sizes[1:]):
        raise TaskError(
            f"Python's library here has too few docstrings of {', '.join(AREAS)} (of one area "
            f"{int(counts.min())}); is it installed without its sources?"
        )
    parts = split(table, sizes)
    reserved = {text for part in parts for text in part["text"]}
    words = list(AREAS)
    pairs = [  # the ending keeps `pretrain` from replacing these areas by random answers
        ("" if text in reserved else f"{words[label]}.py", text)
        for text, label in zip(table["text"], table["label"], strict=True)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = pretrain(pairs, Base(SHAPE, VOCABULARY, steps, RATE), seed=0)
    answers = [int(tokenizer(area)["input_ids"][0]) for area in AREAS]
    if len(set(answers)) < len(answers):
        raise TaskError(f"label words among {', '.join(AREAS)} begin with the same token")
    model.config.use_cache = False
    return model.eval(), [_encoded(part, tokenizer, answers) for part in parts]


def _encoded(part: pd.DataFrame, tokenizer: Any, answers: list[int]) -> Samples:
    encoded = tokenizer(
        list(part["text"]),
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    targets = torch.tensor([answers[label] for label in part["label"]]).unsqueeze(1)
    inputs = {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "decoder_input_ids": torch.zeros_like(targets),
    }
    return Samples(inputs, targets)
