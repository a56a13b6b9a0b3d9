"""Texts and images as batches of tensors: padding masked, never counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import TaskError
from ngeval.tasks.base import Batch

IGNORED = -100
"""The target of a position that does not count."""


@dataclass(frozen=True)
class Encoder:
    """Token ids of texts, and their padding.

    Attributes:
        tokenizer: of transformers.
        max_length: tokens of a text at most; what is beyond is cut off.
        side: where padding goes, ``"left"`` or ``"right"``.
        positions: the model takes ``position_ids``, which left padding needs.
        pad: the token that pads, by the model's configuration: classifiers on decoders find a
            text's end by it. None: the tokenizer's.
    """

    tokenizer: Any
    max_length: int
    side: str = "right"
    positions: bool = False
    pad: int | None = None

    def ids(self, text: str, **options: Any) -> list[int]:
        """Token ids of one text, cut to ``max_length``."""
        encoded = self.tokenizer(text, truncation=True, max_length=self.max_length, **options)
        found: list[int] = list(encoded["input_ids"])
        return found

    @property
    def padding(self) -> int:
        """The token that pads; masked, so any will do where neither model nor tokenizer has one."""
        known = self.tokenizer.pad_token_id if self.pad is None else self.pad
        return 0 if known is None else int(known)

    def inputs(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, and ``position_ids`` where they are needed."""
        made = {
            "input_ids": padded(sequences, self.padding, self.side),
            "attention_mask": padded([[1] * len(ids) for ids in sequences], 0, self.side),
        }
        if self.positions and self.side == "left":
            made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return made

    def classification(
        self, texts: Sequence[Sequence[str]], labels: Sequence[Any], real: bool
    ) -> Batch:
        """One text or a pair of them for each sample, and its class or its real labels."""
        encoded = [
            self.tokenizer(*parts, truncation=True, max_length=self.max_length) for parts in texts
        ]
        inputs = self.inputs([list(one["input_ids"]) for one in encoded])
        if "token_type_ids" in encoded[0]:
            types = [list(one["token_type_ids"]) for one in encoded]
            inputs["token_type_ids"] = padded(types, 0, self.side)
        targets = torch.tensor(labels)
        if not real:
            return inputs, targets
        return inputs, (targets.unsqueeze(1) if targets.ndim == 1 else targets).float()

    def seq2seq(
        self, prompts: Sequence[str], answers: Sequence[str], start: int, limit: int
    ) -> Batch:
        """Prompts for the encoder; the answers' tokens as targets, all of them counted.

        Args:
            prompts: one for each sample.
            answers: likewise.
            start: the decoder's first token.
            limit: tokens of an answer at most, its end among them.

        Raises:
            TaskError: an answer has more.
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
        """Token ids, and how many tokens at the front of each are not predicted.

        Without answers every token but the first counts; with them the answers' alone, which keep
        their place where a prompt is cut.

        Raises:
            TaskError: an answer has more than ``limit`` tokens.
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
        """One sample for each sequence: one of its tokens, drawn evenly, given those before it."""
        chosen = [
            int(torch.randint(front, len(ids), (), generator=generator))
            for ids, front in zip(sequences, fronts, strict=True)
        ]
        inputs = self.inputs([ids[:at] for ids, at in zip(sequences, chosen, strict=True)])
        return inputs, torch.tensor([ids[at] for ids, at in zip(sequences, chosen, strict=True)])


def padded(sequences: Sequence[list[int]], value: int, side: str) -> Tensor:
    """Sequences of unequal length as a matrix ``(N, longest)``."""
    longest = max(len(ids) for ids in sequences)
    rows = []
    for ids in sequences:
        filling = [value] * (longest - len(ids))
        rows.append(filling + ids if side == "left" else ids + filling)
    return torch.tensor(rows, dtype=torch.long)


def check_answers(answers: Sequence[str], encoded: Sequence[list[int]], limit: int) -> None:
    """Raise if an answer has more tokens than are allowed, or none.

    Raises:
        TaskError: it names the answer.
    """
    for answer, ids in zip(answers, encoded, strict=True):
        if len(ids) > limit:
            raise TaskError(
                f"label words {answer!r} are {len(ids)} tokens, and {limit} are allowed; raise "
                "--max-target-tokens (max_target_tokens=), or give other --label-words"
            )
        if not ids:
            raise TaskError(f"label words {answer!r} are no tokens; give others (--label-words)")


def pixel_batch(processor: Any, images: Sequence[Any], labels: Sequence[int]) -> Batch:
    """Images as the processor makes them, ``pixel_values (N, channels, height, width)``."""
    made = processor([image.convert("RGB") for image in images], return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}, torch.tensor(labels)
