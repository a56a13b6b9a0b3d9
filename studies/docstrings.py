"""Text that comes with Python: the docstrings of its library, and a small T5 trained on them.

Paragraphs are labelled by the area of the library that they are from. The T5 is trained to fill in
a missing word of a sentence and to name the package of a sentence. For the areas of the task the
answer is random, so that it learns their names, but not which sentence belongs to which.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ngeval.utils.optional import optional_module

AREAS = {
    "asyncio": ("asyncio", "selectors.py", "concurrent"),
    "email": ("email", "mailbox.py", "imaplib.py", "smtplib.py", "poplib.py"),
    "http": ("http", "urllib", "wsgiref", "xmlrpc", "socketserver.py", "ftplib.py"),
    "decimal": ("_pydecimal.py", "fractions.py", "statistics.py", "datetime.py", "_pydatetime.py"),
}
"""Parts of the library that belong to each class, by its label word."""

TEMPLATE = "package of: {text}"
PADDING, END, MISSING = "<pad>", "</s>", "<extra_id_0>"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
IGNORED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Base:
    """Size of the T5 and length of its training.

    Attributes:
        shape: of transformers' ``T5Config``.
        vocabulary: maximum number of tokens.
        steps: of AdamW, on batches of 32 sentences.
        learning_rate: maximum of a one-cycle schedule.
    """

    shape: dict[str, int]
    vocabulary: int
    steps: int
    learning_rate: float = 3e-3


def docstrings(parts: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Pairs of a part of the library and a paragraph; files are parsed, not imported.

    The part is empty for all but the first paragraph of a docstring.

    Args:
        parts: files and folders to read; None: all.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).parts
        if IGNORED & set(place) or (parts is not None and place[0] not in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # lib2to3 brings files that are wrong on purpose
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            for number, paragraph in enumerate((text or "").split("\n\n")):
                sentence = " ".join(paragraph.split())
                if 20 <= len(sentence) <= 200 and ">>>" not in sentence:
                    yield place[0] if number == 0 else "", sentence


def labelled(pairs: Sequence[tuple[str, str]], seed: int) -> pd.DataFrame:
    """First paragraphs that occur in a single area: columns ``text, label``, shuffled."""
    areas_of: dict[str, set[str]] = {}
    owners = {part: area for area, parts in AREAS.items() for part in parts}
    for part, sentence in pairs:
        if part in owners:
            areas_of.setdefault(sentence, set()).add(owners[part])
    clear = {sentence: areas.pop() for sentence, areas in areas_of.items() if len(areas) == 1}
    labels = [list(AREAS).index(area) for area in clear.values()]
    table = pd.DataFrame({"text": list(clear), "label": labels})
    return table.sample(frac=1, random_state=seed)  # files in order would split by file


def split(table: pd.DataFrame, sizes: Sequence[int]) -> list[pd.DataFrame]:
    """Split into parts with these numbers of sentences of each class."""
    place = table.groupby("label").cumcount()
    parts, start = [], 0
    for size in sizes:
        parts.append(table[(place >= start) & (place < start + size)])
        start += size
    return parts


def make_tokenizer(sentences: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of these sentences.

    Raises:
        DependencyError: transformers is not installed.
    """
    transformers, tokenizers = optional_module("transformers"), optional_module("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PADDING, END, MISSING],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PADDING, eos_token=END
    )


def pretrain(
    pairs: Sequence[tuple[str, str]],
    base: Base,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[Any, Any]:
    """Make a tokenizer and train a T5 to fill in a missing word or to name the package.

    For the areas of the task a random one of them is the answer, so that which sentence belongs to
    which remains to be tuned. Weights are drawn from torch's global generator.

    Args:
        pairs: part of the library (or "") and sentence.
        base: size of the model and length of the training.
        seed: for the choice of sentences, words and answers.
        on_step: called with the loss of each step.

    Returns:
        The model, in train mode, and the tokenizer.

    Raises:
        DependencyError: transformers is not installed.
    """
    transformers = optional_module("transformers")
    known = {part for parts in AREAS.values() for part in parts}
    names = {text: "?" if part in known else part.removesuffix(".py") for part, text in pairs}
    texts = sorted(names, key=lambda text: (len(text), text))
    tokenizer = make_tokenizer(texts, base.vocabulary)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = transformers.T5Config(
        vocab_size=len(tokenizer), dropout_rate=0.0, **base.shape, **ends
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    rate, steps = base.learning_rate, base.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    choices = random.Random(seed)  # no secrets here
    for _ in range(steps):
        start = choices.randrange(len(texts) - 32)  # similar lengths need little padding
        prompts, answers = [], []
        for text in texts[start : start + 32]:
            prompt, answer = _question(text, names, choices)
            prompts.append(torch.tensor(tokenizer(prompt)["input_ids"]))
            answers.append(torch.tensor(tokenizer(answer)["input_ids"]))
        inputs = nn.utils.rnn.pad_sequence(prompts, True, 0)
        labels = nn.utils.rnn.pad_sequence(answers, True, -100)
        loss = model(input_ids=inputs, attention_mask=inputs.ne(0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(float(loss.detach()))
    return model, tokenizer


def _question(text: str, names: dict[str, str], choices: random.Random) -> tuple[str, str]:
    """A prompt made of a sentence, and its answer."""
    prompt, answer = TEMPLATE.format(text=text), names[text]
    if not answer or choices.random() < 0.5:
        words = text.split()
        first = choices.randrange(len(words))
        return " ".join([*words[:first], MISSING, *words[first + 1 :]]), words[first]
    return prompt, choices.choice(list(AREAS)) if answer == "?" else answer
