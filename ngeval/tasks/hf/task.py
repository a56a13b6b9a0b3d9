"""`hub_task`: a Hugging Face model, its adapters and a data set as a `Task`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ngeval.errors import InputError, TaskError, check_choice, nearest_name
from ngeval.model.batches import Batch
from ngeval.tasks.base import Task, shuffled_batches
from ngeval.tasks.hf.encoding import Encoder, pixel_batch
from ngeval.tasks.hf.glue import GLUE, PAIR_COLUMNS, REGRESSION, TextForm
from ngeval.tasks.hf.models import OBJECTIVES, HubModel
from ngeval.tasks.hf.sources import Rows, load_rows
from ngeval.utils.optional import optional_module

REGRESSION_LIKELIHOOD = "gaussian:0.5"
"""The squared error that transformers trains with, (z − y)² without a half."""

SAMPLES = {"token": "causal", "first-token": "seq2seq"}
"""The kinds of samples besides sequences, each with the objective that it is for."""

IMAGE_COLUMNS = ("image", "img")
IMAGE_LABELS = ("label", "fine_label", "labels")


def hub_task(
    model: str,
    *,
    dataset: str,
    subset: str | None = None,
    split: str = "train",
    data_dir: Path | None = None,
    adapters: Sequence[str] = (),
    objective: str | None = None,
    columns: Sequence[str] = (),
    label_column: str | None = None,
    template: str | None = None,
    label_words: Sequence[str] = (),
    max_length: int = 256,
    max_target_tokens: int = 16,
    padding_side: str = "right",
    samples: str = "sequence",
    processor: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """A task with a Hugging Face model and data set.

    Args:
        model: a folder of ``save_pretrained``, or a name on the hub.
        dataset: ``glue``, ``cifar10``, ``cifar100``, a data set on the hub, or a folder.
        subset: a part of the data set, such as ``sst2`` of ``glue``.
        split: a split of the data set.
        data_dir: the folder with its files, in any layout of `ngeval.tasks.hf.sources.load_rows`.
        adapters: folders of PEFT adapters that will be graded on this model; their configurations
            name the objective, and whether they bring a head.
        objective: ``seq2seq``, ``classification``, ``causal`` or ``image``; default: the one in
            the configurations of the adapters and the model.
        columns: the text or image columns; default: those of the task or template.
        label_column: the column of the labels; default: ``label``.
        template: a prompt with columns in braces, ``"sst2 sentence: {sentence}"``; default: GLUE's
            own, or the first column.
        label_words: for language models: the answer for each class, in the order of the classes.
        max_length: the most tokens of a text.
        max_target_tokens: the most tokens of an answer, including its end.
        padding_side: ``right`` or ``left``; the results are the same.
        samples: ``sequence``: all tokens of an answer or text. For causal models also ``token``:
            one token of each sequence, drawn uniformly, given those before it. For
            sequence-to-sequence models also ``first-token``: the first token of the label words
            alone, as in the paper's released code.
        processor: the folder of the tokenizer or image processor, if it is not the model's.
        attention: ``eager``, ``sdpa``, …; default: that of transformers.
        trust_remote_code: run Python code of the model's repository.

    Returns:
        A task whose likelihood is categorical over classes or vocabulary, ``gaussian:0.5`` for
        STS-B with a classifier, and that of the configuration for other regression and multi-label
        models.

    Raises:
        TaskError: the model, tokenizer or data do not exist, do not fit, or lack a column.
        CheckpointError: an adapter's configuration cannot be read.
        DependencyError: transformers, datasets or peft are not installed.
    """
    check_choice("padding side", padding_side, ("left", "right"))
    check_choice("kind of samples", samples, ("sequence", *SAMPLES))
    if max_length < 2 or max_target_tokens < 1:
        raise InputError("max_length must be at least 2 and max_target_tokens at least 1")
    if dataset == "glue" and subset not in GLUE:
        raise TaskError(
            f"glue has no subset {subset!r}; {nearest_name(subset or '', GLUE)} (--subset)"
        )
    source = HubModel.of(model, adapters, objective, attention, trust_remote_code)
    if (needed := SAMPLES.get(samples, source.objective)) != source.objective:
        raise TaskError(
            f"samples={samples!r} (--samples) is for {needed} models, and this is a model for "
            f"{source.objective}; leave it out"
        )
    rows = load_rows(dataset, subset, split, data_dir)
    place = " ".join(part for part in (dataset, subset, split) if part)
    if source.objective == "image":
        names, labels = rows.column_names, (label_column,) if label_column else IMAGE_LABELS
        column = _column(place, names, columns[:1] or IMAGE_COLUMNS, "--columns")
        label = _column(place, names, labels, "--label-column")
        images = source.processor(processor, "AutoImageProcessor")
        data: _Images | _Texts = _Images(source, rows, place, label, column, images)
    else:
        form = _form(source, rows, dataset, subset, columns, template, label_words, label_column)
        side = _side(source, padding_side, samples)
        tokenizer = source.processor(processor, "AutoTokenizer")
        length = min(max_length, tokenizer.model_max_length, source.positions)
        pad = getattr(source.config, "pad_token_id", None)
        encoder = Encoder(tokenizer, length, side, _takes_positions(source), pad)
        glue = subset if dataset == "glue" else None
        data = _Texts(
            source,
            rows,
            place,
            form.label,
            form,
            encoder,
            glue,
            samples=samples,
            max_target_tokens=max_target_tokens,
        )
    return Task(
        name=f"{Path(model).name} {place}",
        build_model=lambda: source.build(data.num_labels),
        load_batches=data.batches,
        likelihood=data.likelihood,
        description=f"{model} ({source.objective}) on {place}",
        output=_last_logits if samples == "token" else None,
        load_indices=data.indices,
    )


@dataclass
class _Data(ABC):
    """Batches of the rows of a data set."""

    source: HubModel
    rows: Rows
    place: str
    label: str

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """The batches of `ngeval.Task.load_batches`."""
        generator = torch.Generator().manual_seed(seed)
        for chosen in self.indices(batch_size, num_batches, seed):
            yield self.batch([self.rows[index] for index in chosen], generator)

    def indices(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[list[int]]:
        """The numbers of the rows in each batch."""
        usable = self.usable()
        for chosen in shuffled_batches(len(usable), batch_size, num_batches, seed):
            yield [usable[int(index)] for index in chosen]

    def usable(self) -> Sequence[int]:
        """The numbers of the rows that are samples."""
        return range(len(self.rows))

    @abstractmethod
    def batch(self, rows: list[dict[str, Any]], generator: torch.Generator) -> Batch:
        """The tensors of some rows."""

    @property
    def num_labels(self) -> int | None:
        """The classes of a head that the data defines; None where the model has a head."""
        if self.source.has_head:
            return None
        names = getattr(getattr(self.rows, "features", {}).get(self.label), "names", None)
        if names:
            return len(names)
        if self.source.objective not in ("classification", "image"):
            return None
        return 1 + max(self.class_of(self.rows[i]) for i in range(len(self.rows)))

    def class_of(self, row: dict[str, Any]) -> int:
        """A row's label, which must be the number of a class."""
        label = row[self.label]
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            hint = (
                "an empty cell of a .csv makes its column text; " if isinstance(label, str) else ""
            )
            raise TaskError(
                f"label {label!r} in column {self.label!r} of {self.place} is not the number of a "
                f"class ({hint}−1 marks a test split without labels)"
            )
        return label

    def real_labels(self, row: dict[str, Any]) -> Any:
        """A row's label for a regression or several labels: a number, or a list of them."""
        label = row[self.label]
        numbers = label if isinstance(label, list) else [label]
        if not numbers or not all(isinstance(number, int | float) for number in numbers):
            raise TaskError(
                f"label {label!r} in column {self.label!r} of {self.place} is neither a number nor "
                f"a list of numbers, as {self.source.config.problem_type or 'regression'} needs"
            )
        return label


@dataclass
class _Texts(_Data):
    """Batches of texts, in the form that the model's objective needs."""

    form: TextForm
    encoder: Encoder
    glue: str | None
    samples: str
    max_target_tokens: int

    @cached_property
    def kind(self) -> str | None:
        """The ``problem_type`` of a classifier, by which transformers chooses its loss."""
        if self.source.objective != "classification":
            return None
        default = "regression" if self.glue == REGRESSION else None
        return getattr(self.source.config, "problem_type", None) or default

    @property
    def is_real(self) -> bool:
        """Whether labels are numbers or lists of numbers, not classes."""
        return self.kind in ("regression", "multi_label_classification")

    @property
    def likelihood(self) -> str:
        """The likelihood of the model's loss."""
        kinds = {"regression": REGRESSION_LIKELIHOOD, "multi_label_classification": "bernoulli"}
        return kinds.get(self.kind or "", "categorical")

    @property
    def num_labels(self) -> int | None:
        if self.is_real and not self.source.has_head:
            first = self.real_labels(self.rows[0])
            return len(first) if isinstance(first, list) else 1
        return super().num_labels

    def usable(self) -> Sequence[int]:
        if self.form.label:
            return super().usable()
        # Collections of plain text have empty lines.
        column = self.form.columns[0]
        return [i for i in range(len(self.rows)) if str(self.rows[i][column]).strip()]

    def batch(self, rows: list[dict[str, Any]], generator: torch.Generator) -> Batch:
        objective, encoder = self.source.objective, self.encoder
        if objective == "classification":
            columns = PAIR_COLUMNS.get(self.glue or "", self.form.columns)
            texts = [[str(row[name]) for name in columns] for row in rows]
            read = self.real_labels if self.is_real else self.class_of
            return encoder.classification(texts, [read(row) for row in rows], self.is_real)
        prompts = [self.form.prompt(row) for row in rows]
        answers = [self._answer(row) for row in rows] if self.form.label else None
        limit = self.max_target_tokens
        if objective == "seq2seq":
            start = self.source.config.decoder_start_token_id
            inputs, targets = encoder.seq2seq(prompts, answers or [], start or 0, limit)
            if self.samples == "first-token":  # the decoder sees no later position
                inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :1]
                targets = targets[:, :1]
            return inputs, targets
        sequences, fronts = encoder.causal(prompts, answers, limit)
        short = [p for p, ids, f in zip(prompts, sequences, fronts, strict=True) if len(ids) <= f]
        if short:
            raise TaskError(
                f"the text {short[0][:60]!r} in {self.place} has fewer than two tokens, so nothing "
                "is predicted; leave such rows out"
            )
        if self.samples == "token":
            return encoder.single_tokens(sequences, fronts, generator)
        return encoder.next_tokens(sequences, fronts)

    def _answer(self, row: dict[str, Any]) -> str:
        label = row[self.label]
        if self.form.words and self.class_of(row) >= len(self.form.words):
            raise TaskError(
                f"label {label} in {self.place} has no label words; there are "
                f"{len(self.form.words)}: {', '.join(self.form.words)} (--label-words)"
            )
        return self.form.answer(label)


@dataclass
class _Images(_Data):
    """Batches of images with one class each."""

    column: str
    processor: Any
    likelihood: ClassVar[str] = "categorical"

    def batch(self, rows: list[dict[str, Any]], generator: torch.Generator) -> Batch:
        labels = [self.class_of(row) for row in rows]
        return pixel_batch(self.processor, [row[self.column] for row in rows], labels)


def _form(
    source: HubModel,
    rows: Rows,
    dataset: str,
    subset: str | None,
    columns: Sequence[str],
    template: str | None,
    words: Sequence[str],
    label_column: str | None,
) -> TextForm:
    """How rows become texts: by the options, by GLUE's own form, or from the first column."""
    place = dataset if subset is None else f"{dataset}/{subset}"
    known = GLUE[subset] if dataset == "glue" and subset is not None else None
    if template is None and columns:
        template = " ".join(f"{{{name}}}" for name in columns)
    if template is None:
        fallback = _column(place, rows.column_names, ("text", "sentence"), "--columns", bool(known))
        template = known.template if known else f"{{{fallback}}}"
    label = label_column or (known.label if known else "label")
    plain_text = source.objective == "causal" and not (known or words or label_column)
    if len(set(words)) < len(words) or not all(words):
        raise TaskError(f"label words {', '.join(map(repr, words))}: each class needs its own word")
    form = TextForm(
        template, tuple(words) or (known.words if known else ()), "" if plain_text else label
    )
    for name in form.columns if plain_text else [*form.columns, label]:
        option = "--label-column" if name == label else "--columns or --template"
        _column(place, rows.column_names, (name,), option)
    return form


def _column(
    place: str, names: Sequence[str], choices: Sequence[str], option: str, optional: bool = False
) -> str:
    """The first of some columns that a table has; an empty text if an optional one is missing."""
    for name in choices:
        if name in names:
            return name
    if optional:
        return ""
    raise TaskError(
        f"{place} has no column {' or '.join(map(repr, choices))}; it has {', '.join(names)} "
        f"(choose one with {option})"
    )


def _side(source: HubModel, side: str, samples: str) -> str:
    """The side of padding that the model and the kind of samples allow."""
    if source.objective == "classification" and side == "left":
        raise TaskError(
            "classifiers of texts can read the class from the first token, so padding must be on "
            "the right (padding never counts: the results are the same)"
        )
    if source.objective != "causal":
        return side
    if source.has_prompt and (side == "left" or samples == "token"):
        raise TaskError(
            "virtual tokens before the text and padding on the left cannot be combined (PEFT takes "
            "no position ids); use padding on the right and whole sequences as samples"
        )
    return "left" if samples == "token" else side


def _takes_positions(source: HubModel) -> bool:
    """Whether the model's forward has ``position_ids``."""
    transformers = optional_module("transformers")
    auto: Any = getattr(transformers, OBJECTIVES[source.objective])
    try:
        forward: Callable[..., Any] = auto._model_mapping[type(source.config)].forward
    except KeyError:  # code from a repository
        return True
    return "position_ids" in inspect.signature(forward).parameters


def _last_logits(raw: Any) -> Tensor:
    """The logits at the last position, which with left padding is that of the sample's token."""
    logits: Tensor = getattr(raw, "logits", raw)
    return logits[:, -1]
