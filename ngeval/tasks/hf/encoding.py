"""Texts and images as batches of tensors, with padding masked and never counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ngeval.errors import TaskError
from ngeval.model.batches import Batch

IGNORED = -100
"""The target of a position that is not counted."""


@dataclass(frozen=True)
class Encoder:
    """Turns texts into token ids of at most ``max_length``, padded on a ``side``.

    Attributes:
        positions: whether the model takes ``position_ids``, which left padding needs.
        pad: the padding token of the model's configuration, by which classifiers on decoders find
            the end of a text; None: the tokenizer's.
    """

    tokenizer: Any
    max_length: int
    side: str = "right"
    positions: bool = False
    pad: int | None = None

    def ids(self, text: str, **options: Any) -> list[int]:
        """Token ids of one text, truncated to ``max_length``."""
        encoded = self.tokenizer(text, truncation=True, max_length=self.max_length, **options)
        ids: list[int] = list(encoded["input_ids"])
        return ids

    @property
    def padding(self) -> int:
        """The padding token, or 0 if there is none; padding is masked, so any token will do."""
        token = self.tokenizer.pad_token_id if self.pad is None else self.pad
        return 0 if token is None else int(token)

    def inputs(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, and ``position_ids`` if they are needed."""
        inputs = {
            "input_ids": padded(sequences, self.padding, self.side),
            "attention_mask": padded([[1] * len(ids) for ids in sequences], 0, self.side),
        }
        if self.positions and self.side == "left":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return inputs

    def classification(
        self, texts: Sequence[Sequence[str]], labels: Sequence[Any], real: bool
    ) -> Batch:
        """A text or a pair of texts for each sample, with its class or its real labels."""
        encoded = [
            self.tokenizer(*parts, truncation=True, max_length=self.max_length) for parts in texts
        ]
        inputs = self.inputs([list(text["input_ids"]) for text in encoded])
        if "token_type_ids" in encoded[0]:
            types = [list(text["token_type_ids"]) for text in encoded]
            inputs["token_type_ids"] = padded(types, 0, self.side)
        targets = torch.tensor(labels)
        if not real:
            return inputs, targets
        return inputs, (targets.unsqueeze(1) if targets.ndim == 1 else targets).float()

    def seq2seq(
        self, prompts: Sequence[str], answers: Sequence[str], start: int, limit: int
    ) -> Batch:
        """Prompts for the encoder, and all tokens of the answers, at most ``limit``, as targets.

        The decoder's input begins with the token ``start``.
        """
        answered = [list(self.tokenizer(text_target=answer)["input_ids"]) for answer in answers]
        check_answers(answers, answered, limit)
        targets = padded(answered, IGNORED, "right")
        started, before = torch.full((len(answered), 1), start), targets[:, :-1]
        decoder = torch.cat([started, before.masked_fill(before < 0, self.padding)], 1)
        inputs = self.inputs([self.ids(prompt) for prompt in prompts])
        return inputs | {"decoder_input_ids": decoder}, targets

    def causal(
        self, prompts: Sequence[str], answers: Sequence[str] | None, limit: int
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids, and the number of tokens at the front of each that are not predicted.

        Without answers every token but the first is predicted. With answers only their tokens are,
        and a long prompt is truncated to leave room for them.
        """
        if answers is None:
            sequences = [self.ids(prompt) for prompt in prompts]
            return sequences, [1] * len(sequences)
        plain = {"add_special_tokens": False}
        answered = [list(self.tokenizer(f" {answer}", **plain)["input_ids"]) for answer in answers]
        check_answers(answers, answered, limit)
        room = [max(1, self.max_length - len(ids)) for ids in answered]  # for the prompt
        prompted = [self.ids(prompt)[:most] for prompt, most in zip(prompts, room, strict=True)]
        sequences = [front + back for front, back in zip(prompted, answered, strict=True)]
        return sequences, [max(1, len(front)) for front in prompted]

    def next_tokens(self, sequences: Sequence[list[int]], fronts: Sequence[int]) -> Batch:
        """One sample for each sequence: at every position the next token is the target."""
        shifted = [
            [IGNORED] * (front - 1) + ids[front:] + [IGNORED]
            for ids, front in zip(sequences, fronts, strict=True)
        ]
        return self.inputs(sequences), padded(shifted, IGNORED, self.side)

    def single_tokens(
        self, sequences: Sequence[list[int]], fronts: Sequence[int], generator: torch.Generator
    ) -> Batch:
        """One sample for each sequence: one of its tokens, drawn uniformly, given those before."""
        chosen = [
            int(torch.randint(front, len(ids), (), generator=generator))
            for ids, front in zip(sequences, fronts, strict=True)
        ]
        inputs = self.inputs([ids[:at] for ids, at in zip(sequences, chosen, strict=True)])
        return inputs, torch.tensor([ids[at] for ids, at in zip(sequences, chosen, strict=True)])


def padded(sequences: Sequence[list[int]], value: int, side: str) -> Tensor:
    """Sequences as a matrix ``(N, longest)``, padded with a value on one side."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def check_answers(answers: Sequence[str], encoded: Sequence[list[int]], limit: int) -> None:
    """Refuse answers of more tokens than are allowed, or of none."""
    for answer, ids in zip(answers, encoded, strict=True):
        if len(ids) > limit:
            raise TaskError(
                f"label words {answer!r} are {len(ids)} tokens, and {limit} are allowed; raise "
                "--max-target-tokens (max_target_tokens=), or give different --label-words"
            )
        if not ids:
            raise TaskError(
                f"label words {answer!r} have no tokens; give different ones (--label-words)"
            )


def pixel_batch(processor: Any, images: Sequence[Any], labels: Sequence[int]) -> Batch:
    """Images as ``pixel_values (N, channels, height, width)``, and their classes."""
    encoded = processor([image.convert("RGB") for image in images], return_tensors="pt")
    return {"pixel_values": encoded["pixel_values"]}, torch.tensor(labels)
