"""`hub_task`: a Hugging Face model, its adapters and a data set as a `Task`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError, TaskError, nearest_name
from ngeval.tasks.base import Batch, Task
from ngeval.tasks.hf.encoding import Encoder, pixel_batch
from ngeval.tasks.hf.glue import GLUE, PAIR_COLUMNS, REGRESSION, TextForm
from ngeval.tasks.hf.models import OBJECTIVES, HubModel
from ngeval.tasks.hf.sources import Rows, load_rows
from ngeval.tasks.sampling import shuffled_batches
from ngeval.utils.optional import optional_module

REGRESSION_LIKELIHOOD = "gaussian:0.5"
"""The squared error as transformers trains with it, (z − y)² without a half."""

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
    """A task made of a Hugging Face model and a data set.

    Args:
        model: a folder of ``save_pretrained``, or a name on the hub.
        dataset: ``glue``, ``cifar10``, ``cifar100``, a data set on the hub, or a folder.
        subset: its part, as ``sst2`` of ``glue``.
        split: of the data set.
        data_dir: the folder that holds it, in any layout of `ngeval.tasks.hf.sources.load_rows`.
        adapters: folders of PEFT adapters that will be graded on this model; they tell the
            objective, and whether a new head comes with them.
        objective: ``seq2seq``, ``classification``, ``causal`` or ``image``; default: what the
            adapters and the model's configuration say.
        columns: the text or image columns; default: those of the task or template.
        label_column: default: ``label``.
        template: a prompt with columns in braces, ``"sst2 sentence: {sentence}"``; default: GLUE's
            own, or the first column.
        label_words: for language models: the answer for each class, in their order.
        max_length: tokens of a text at most.
        max_target_tokens: tokens of an answer at most, the end of it among them.
        padding_side: ``right`` or ``left``; the results are the same.
        samples: for causal models: ``sequence``, or ``token``: one token of each sequence, drawn
            evenly, given those before it.
        processor: where the tokenizer or image processor is, if not with the model.
        attention: ``eager``, ``sdpa``, …; default: transformers'.
        trust_remote_code: run Python code of the model's repository.

    Returns:
        Its likelihood is categorical over classes or vocabulary, ``gaussian:0.5`` for STS-B with a
        classifier, and as the configuration says for other regression and multi-label models.

    Raises:
        TaskError: the model, tokenizer or data are not there, do not fit, or lack a column.
        CheckpointError: an adapter's configuration cannot be read.
        DependencyError: transformers, datasets or peft are not installed.
    """
    _check_choice("padding side", padding_side, ("left", "right"))
    _check_choice("kind of samples", samples, ("sequence", "token"))
    if max_length < 2 or max_target_tokens < 1:
        raise InputError("max_length must be at least 2 and max_target_tokens at least 1")
    if dataset == "glue" and subset not in GLUE:
        raise TaskError(
            f"glue has no subset {subset!r}; {nearest_name(subset or '', GLUE)} (--subset)"
        )
    source = HubModel.of(model, adapters, objective, attention, trust_remote_code)
    rows = load_rows(dataset, subset, split, data_dir)
    place = " ".join(part for part in (dataset, subset, split) if part)
    if source.objective == "image":
        data: _Images | _Texts = _Images(source, rows, place, columns, label_column, processor)
    else:
        form = _form(source, rows, dataset, subset, columns, template, label_words, label_column)
        side = _side(source, padding_side, samples)
        tokenizer = source.processor(processor, "AutoTokenizer")
        length = min(max_length, tokenizer.model_max_length, source.positions)
        pad = getattr(source.config, "pad_token_id", None)
        encoder = Encoder(tokenizer, length, side, _takes_positions(source), pad)
        pair = PAIR_COLUMNS.get(subset or "", form.columns) if dataset == "glue" else form.columns
        is_regression = dataset == "glue" and subset == REGRESSION
        data = _Texts(
            source, rows, place, form, encoder, pair, is_regression, samples, max_target_tokens
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


class _Data(ABC):
    """Batches drawn from rows."""

    def __init__(self, source: HubModel, rows: Rows, place: str, label: str) -> None:
        self.source, self.rows, self.place, self.label = source, rows, place, label

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """See `ngeval.Task.load_batches`."""
        generator = torch.Generator().manual_seed(seed)
        for chosen in self.indices(batch_size, num_batches, seed):
            yield self.batch([self.rows[index] for index in chosen], generator)

    def indices(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[list[int]]:
        """Which rows are in the batches."""
        usable = self.usable()
        for chosen in shuffled_batches(len(usable), batch_size, num_batches, seed):
            yield [usable[int(index)] for index in chosen]

    def usable(self) -> Sequence[int]:
        """The rows that make samples."""
        return range(len(self.rows))

    @abstractmethod
    def batch(self, rows: list[dict[str, Any]], generator: torch.Generator) -> Batch:
        """The tensors of some rows."""

    @property
    def num_labels(self) -> int | None:
        """The classes of the data, if it says how many."""
        if self.source.has_head:  # which knows for itself
            return None
        names = getattr(getattr(self.rows, "features", {}).get(self.label), "names", None)
        if names:
            return len(names)
        if self.source.objective not in ("classification", "image"):
            return None
        return 1 + max(self.class_of(self.rows[i]) for i in range(len(self.rows)))

    def class_of(self, row: dict[str, Any]) -> int:
        """A row's label as the number of a class.

        Raises:
            TaskError: it is none.
        """
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
        """A row's label for a regression or several labels: a number, or a list of them.

        Raises:
            TaskError: it is neither.
        """
        label = row[self.label]
        numbers = label if isinstance(label, list) else [label]
        if not numbers or not all(isinstance(number, int | float) for number in numbers):
            raise TaskError(
                f"label {label!r} in column {self.label!r} of {self.place} is no number and no "
                f"list of numbers, as {self.source.config.problem_type or 'regression'} needs"
            )
        return label


class _Texts(_Data):
    """Batches of texts, in the form that the model's objective asks for."""

    def __init__(
        self,
        source: HubModel,
        rows: Rows,
        place: str,
        form: TextForm,
        encoder: Encoder,
        pair: Sequence[str],
        is_regression: bool,
        samples: str,
        max_target_tokens: int,
    ) -> None:
        super().__init__(source, rows, place, form.label)
        self.form, self.encoder, self.pair = form, encoder, pair
        self.samples, self.max_target_tokens = samples, max_target_tokens
        classifier = source.objective == "classification"
        self.kind = getattr(source.config, "problem_type", None) if classifier else None
        if classifier and self.kind is None and is_regression:
            self.kind = "regression"

    @property
    def is_real(self) -> bool:
        """Whether labels are numbers or lists of them, not classes."""
        return self.kind in ("regression", "multi_label_classification")

    @property
    def likelihood(self) -> str:
        """What the model's loss is."""
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
            texts = [[str(row[name]) for name in self.pair] for row in rows]
            read = self.real_labels if self.is_real else self.class_of
            return encoder.classification(texts, [read(row) for row in rows], self.is_real)
        prompts = [self.form.prompt(row) for row in rows]
        answers = [self._answer(row) for row in rows] if self.form.label else None
        limit = self.max_target_tokens
        if objective == "seq2seq":
            start = self.source.config.decoder_start_token_id
            return encoder.seq2seq(prompts, answers or [], 0 if start is None else start, limit)
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


class _Images(_Data):
    """Batches of images with one class each."""

    likelihood = "categorical"

    def __init__(
        self,
        source: HubModel,
        rows: Rows,
        place: str,
        columns: Sequence[str],
        label_column: str | None,
        processor: str | None,
    ) -> None:
        names = rows.column_names
        self.column = _column(place, names, columns[:1] or IMAGE_COLUMNS, "--columns")
        labels = (label_column,) if label_column else IMAGE_LABELS
        super().__init__(source, rows, place, _column(place, names, labels, "--label-column"))
        self.processor = source.processor(processor, "AutoImageProcessor")

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
    """How rows become texts: GLUE's own form, what was asked for, or the first column."""
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
        raise TaskError(f"label words {', '.join(map(repr, words))}: each class needs its own")
    form = TextForm(
        template, tuple(words) or (known.words if known else ()), "" if plain_text else label
    )
    wanted = form.columns
    for name in wanted if plain_text else [*wanted, label]:
        option = "--label-column" if name == label else "--columns or --template"
        _column(place, rows.column_names, (name,), option)
    return form


def _column(
    place: str, names: Sequence[str], wanted: Sequence[str], option: str, optional: bool = False
) -> str:
    """The first of some columns that is there.

    Raises:
        TaskError: none is.
    """
    for name in wanted:
        if name in names:
            return name
    if optional:
        return ""
    raise TaskError(
        f"{place} has no column {' or '.join(map(repr, wanted))}; it has {', '.join(names)} "
        f"(say which with {option})"
    )


def _side(source: HubModel, asked: str, samples: str) -> str:
    """Where padding goes."""
    if source.objective == "classification" and asked == "left":
        raise TaskError(
            "classifiers of texts may read the class off the first token, so padding goes to the "
            "right (padding never counts: the results are the same)"
        )
    if source.objective != "causal":
        return asked
    if source.has_prompt and (asked == "left" or samples == "token"):
        raise TaskError(
            "virtual tokens before the text and padding on the left do not go together (PEFT takes "
            "no position ids); use padding on the right and whole sequences as samples"
        )
    return "left" if samples == "token" else asked


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
    """The logits at the last position, which left padding makes that of the sample's token."""
    logits: Tensor = getattr(raw, "logits", raw)
    return logits[:, -1]


def _check_choice(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"unknown {what} {given!r}; {nearest_name(given, known)}")
