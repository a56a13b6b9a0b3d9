"""The nine GLUE tasks: their columns, their text form for language models, their label words.

The text forms are those of T5's multi-task mixture (Raffel et al. 2020, arXiv 1910.10683,
appendix D), on which checkpoints tuned from T5 were trained. GLUE is Wang et al. 2019, arXiv
1804.07461.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any

from ngeval.errors import TaskError


@dataclass(frozen=True)
class TextForm:
    """How a row of a table becomes a prompt and an answer.

    Attributes:
        template: the prompt, with the columns' names in braces.
        words: the answer for each class; empty where the label itself is the answer.
        label: the column of the label.
        header: the columns of GLUE's original ``.tsv`` file by the names of the hub's, where they
            differ.
    """

    template: str
    words: tuple[str, ...] = ()
    label: str = "label"
    header: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The columns in the template, in its order."""
        return [name for _, name in self._parts() if name]

    def prompt(self, row: dict[str, Any]) -> str:
        """The template with a row's values in place of the columns' names."""
        return "".join(text + (str(row[name]) if name else "") for text, name in self._parts())

    def _parts(self) -> list[tuple[str, str]]:
        """The texts of the template, each with the column that follows it."""
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise TaskError(f"template {self.template!r}: {error}") from error
        for _, name, form, conversion in parsed:
            if name == "" or form or conversion:
                raise TaskError(
                    f"template {self.template!r}: braces hold a column's name and nothing else "
                    "({{ and }} are braces themselves)"
                )
        if not any(name for _, name, _, _ in parsed):
            raise TaskError(f"template {self.template!r} names no column; write one as {{text}}")
        return [(text, name or "") for text, name, _, _ in parsed]

    def answer(self, label: object) -> str:
        """The text with which a language model should answer for a label.

        Numbers, such as STS-B's scores, are rounded to the nearest 0.2.
        """
        if self.words and isinstance(label, int):
            return self.words[label]
        return f"{round(5 * label) / 5:.1f}" if isinstance(label, float) else str(label)


GLUE: dict[str, TextForm] = {
    "cola": TextForm(
        "cola sentence: {sentence}",
        ("unacceptable", "acceptable"),
        header={"sentence": "3", "label": "1"},  # the file has no header
    ),
    "sst2": TextForm("sst2 sentence: {sentence}", ("negative", "positive")),
    "mrpc": TextForm(
        "mrpc sentence1: {sentence1} sentence2: {sentence2}",
        ("not_equivalent", "equivalent"),
        header={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    "stsb": TextForm(
        "stsb sentence1: {sentence1} sentence2: {sentence2}", header={"label": "score"}
    ),
    "qqp": TextForm(
        "qqp question1: {question1} question2: {question2}",
        ("not_duplicate", "duplicate"),
        header={"label": "is_duplicate"},
    ),
    "mnli": TextForm(
        "mnli hypothesis: {hypothesis} premise: {premise}",
        ("entailment", "neutral", "contradiction"),
        header={"hypothesis": "sentence2", "premise": "sentence1", "label": "gold_label"},
    ),
    "qnli": TextForm(
        "qnli question: {question} sentence: {sentence}", ("entailment", "not_entailment")
    ),
    "rte": TextForm(
        "rte sentence1: {sentence1} sentence2: {sentence2}", ("entailment", "not_entailment")
    ),
    "wnli": TextForm(
        "wnli sentence1: {sentence1} sentence2: {sentence2}", ("not_entailment", "entailment")
    ),
}
"""The tasks by the names of the ``glue`` data set on the hub."""

REGRESSION = "stsb"
"""The task whose labels are real numbers."""

FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}
"""The original folders whose names are not the task's name in capitals."""

PAIR_COLUMNS = {"mnli": ["premise", "hypothesis"]}
"""The order of a pair for a classifier, where it differs from the template's."""
