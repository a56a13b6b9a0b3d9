"""Text tasks of the study *optimization*: LoRA and prompt tuning of a small T5.

The data and the pre-training are those of `ngeval.studies.docstrings`, but that the T5 is taught
the areas of sentences of its own, with the template in front of them. The task's sentences come
without it: what is left to tune is to answer with the area all the same. They are padded to one
length, and the answer is the first token of the label word, which no two classes share: accuracy is
that of sentences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ngeval.errors import TaskError
from ngeval.tasks.base import Batch, Task
from ngeval.tasks.sampling import shuffled_batches
from ngeval.utils.optional import optional_module
from studies.docstrings import AREAS, Base, docstrings, labelled, pretrain, split
from studies.images import adapted

LENGTH = 24
"""Tokens of a prompt: longer ones are cut."""

SHAPE = {"d_model": 48, "d_kv": 12, "num_heads": 4, "d_ff": 96, "num_layers": 1}
VOCABULARY, RATE = 600, 5e-3
LINEAR = ["q", "v", "wi", "wo"]
VIRTUAL = 10
"""Tokens of a tuned prompt."""


class PromptTuned(nn.Module):
    """A frozen T5 with virtual tokens before the text, of which the embeddings are tuned.

    As PEFT's, but that every sample looks its prompt up for itself, so that per-sample gradients
    need no loop over samples.
    """

    def __init__(self, model: Any) -> None:
        """Begin with the embeddings of tokens drawn from the vocabulary."""
        super().__init__()
        self.model = model.requires_grad_(False)
        words = model.get_input_embeddings().weight
        self.prompt = nn.Embedding(VIRTUAL, words.shape[1])
        with torch.no_grad():
            self.prompt.weight.copy_(words[torch.randint(len(words), (VIRTUAL,))])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Any:
        """The T5's output."""
        places = torch.arange(VIRTUAL, device=input_ids.device).expand(len(input_ids), -1)
        words = self.model.get_input_embeddings()(input_ids)
        return self.model(
            inputs_embeds=torch.cat([self.prompt(places), words], 1),
            attention_mask=torch.cat([torch.ones_like(places), attention_mask], 1),
            decoder_input_ids=decoder_input_ids,
        )


@dataclass(frozen=True)
class Sentences:
    """Token ids and mask ``(n, LENGTH)``, and the token that answers ``(n, 1)``."""

    ids: Tensor
    mask: Tensor
    answers: Tensor

    def batch(self, chosen: Tensor) -> Batch:
        """Some of them, as the T5 takes them."""
        started = torch.zeros_like(self.answers[chosen])
        inputs = {
            "input_ids": self.ids[chosen],
            "attention_mask": self.mask[chosen],
            "decoder_input_ids": started,
        }
        return inputs, self.answers[chosen]

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Any:
        """As `ngeval.Task.load_batches`."""
        for chosen in shuffled_batches(len(self.answers), batch_size, num_batches, seed):
            yield self.batch(chosen)

    def whole(self) -> list[Batch]:
        """All of them in one batch."""
        return [self.batch(torch.arange(len(self.answers)))]


def text_task(kind: str, steps: int, sizes: tuple[int, int, int] = (60, 40, 80)) -> Task:
    """LoRA (r = 4) or prompt tuning (10 tokens) of a T5 that is pre-trained on the spot.

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

    train, validation, test = parts
    told = "LoRA" if kind == "lora" else "prompt tuning"
    return Task(
        f"t5-{kind}",
        build,
        train.batches,
        "categorical",
        validation.whole,
        f"{told} of a small T5: what part of Python's library is a docstring from?",
        load_test=test.whole,
    )


@cache
def _prepared(steps: int, sizes: tuple[int, int, int]) -> tuple[Any, list[Sentences]]:
    """The pre-trained T5, and the three parts of the data, whose labels it has not seen."""
    pairs = list(docstrings([part for parts in AREAS.values() for part in parts]))
    table = labelled(pairs, seed=0)
    counts = table["label"].value_counts()
    if len(counts) < len(AREAS) or int(counts.min()) < 2 * sizes[0] + sum(sizes[1:]):
        raise TaskError(
            f"Python's library here has too few docstrings of {', '.join(AREAS)} (of one area "
            f"{int(counts.min())}); is it installed without its sources?"
        )
    parts = split(table, sizes)
    kept = {text for part in parts for text in part["text"]}
    words = list(AREAS)
    taught = [  # with an ending, by which `pretrain` does not take them for areas to be guessed
        ("" if text in kept else f"{words[label]}.py", text)
        for text, label in zip(table["text"], table["label"], strict=True)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = pretrain(taught, Base(SHAPE, VOCABULARY, steps, RATE), seed=0)
    answers = [int(tokenizer(area)["input_ids"][0]) for area in AREAS]
    if len(set(answers)) < len(answers):
        raise TaskError("two label words begin with the same token")
    model.config.use_cache = False
    return model.eval(), [_encoded(part, tokenizer, answers) for part in parts]


def _encoded(part: pd.DataFrame, tokenizer: Any, answers: list[int]) -> Sentences:
    encoded = tokenizer(
        list(part["text"]),
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    chosen = torch.tensor([answers[label] for label in part["label"]]).unsqueeze(1)
    return Sentences(encoded["input_ids"], encoded["attention_mask"], chosen)
