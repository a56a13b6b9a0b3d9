"""A text task that any machine can make: ``python figures/docstrings.py`` (5 min, 2 cores).

Docstrings of Python's own library, labelled by the area that they are from; a small T5, trained
here; LoRA and prompt tuning on top of it, both graded at every epoch by ``ngeval gamma``.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import peft
import tokenizers
import torch
import transformers
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ngeval.plots import STYLE, plot_stages, save_figure
from ngeval.summary import summarize
from ngeval.tasks.base import Task
from ngeval.tasks.hf import hub_task

AREAS = {
    "asyncio": ("asyncio", "selectors.py", "concurrent"),
    "email": ("email", "mailbox.py", "imaplib.py", "smtplib.py", "poplib.py"),
    "http": ("http", "urllib", "wsgiref", "xmlrpc", "socketserver.py", "ftplib.py"),
    "decimal": ("_pydecimal.py", "fractions.py", "statistics.py", "random.py", "datetime.py")
    + ("_pydatetime.py",),  # from 3.12 on the Python code of datetime is here
}
"""The classes by their label words, and which parts of the library belong to each."""

TEMPLATE = "package of: {text}"
TRAINED, HELD_OUT = 280, 60
BATCH, EPOCHS, SEED = 32, 10, 0
HOLES = 8
"""Sentinel tokens, so how many spans of a sentence can be missing at most."""


def docstrings() -> Iterator[tuple[str, str]]:
    """Part of the library and paragraph, in the order of the files.

    The files are parsed and not imported, so nothing of them runs.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # lib2to3 brings files that are wrong on purpose
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            for number, paragraph in enumerate((text or "").split("\n\n")):
                sentence = " ".join(paragraph.split())
                if 20 <= len(sentence) <= 200 and ">>>" not in sentence:
                    yield parts[0] if number == 0 else "", sentence


def write_data(folder: Path) -> list[str]:
    """Save the labelled first paragraphs, as many of each class; return all paragraphs."""
    found: dict[str, set[str]] = {}
    everything = list(docstrings())
    owners = {part: area for area, parts in AREAS.items() for part in parts}
    for part, sentence in everything:
        if part in owners:
            found.setdefault(sentence, set()).add(owners[part])
    clear = {sentence: areas.pop() for sentence, areas in found.items() if len(areas) == 1}
    table = pd.DataFrame({"text": list(clear), "area": list(clear.values())})
    table = table.sample(frac=1, random_state=SEED)  # files in order would split by file
    table["label"] = table.pop("area").map({area: i for i, area in enumerate(AREAS)})
    place = table.groupby("label").cumcount()
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (
        ("train", place < TRAINED),
        ("validation", (place >= TRAINED) & (place < TRAINED + HELD_OUT)),
    ):
        part = table[chosen]
        print(f"{name}: {len(part)} sentences, {part['label'].value_counts().to_dict()}")
        part.to_parquet(folder / f"{name}.parquet", index=False)
    return sorted({sentence for _, sentence in everything})


def make_tokenizer(sentences: list[str]) -> Any:
    """A byte-level BPE of these sentences with T5's special tokens."""
    special = ["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(HOLES))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        sentences,
        tokenizers.trainers.BpeTrainer(
            vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>"
    )


def with_holes(ids: list[int], first_hole: int, draw: torch.Generator) -> tuple[list[int], ...]:
    """A sentence with some spans taken out, and what is missing, as T5 was trained.

    Spans are 1 to 3 tokens, and there is one for about every 8 tokens.
    """
    source: list[int] = []
    missing: list[int] = []
    at = 0
    body, end = ids[:-1], ids[-1]
    starts = sorted(torch.randperm(len(body), generator=draw)[: 1 + len(body) // 8].tolist())
    for hole, start in enumerate(starts[:HOLES]):
        stop = min(len(body), max(start, at) + int(torch.randint(1, 4, (), generator=draw)))
        if start < at:  # the span before it has taken this one already
            continue
        source += [*body[at:start], first_hole + hole]
        missing += [first_hole + hole, *body[start:stop]]
        at = stop
    return [*source, *body[at:], end], [*missing, end]


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of unequal length as one matrix."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def pretrain(sentences: list[str], folder: Path, steps: int = 2400) -> None:
    """Train the base model to fill holes, and save it with its tokenizer."""
    tokenizer = make_tokenizer(sentences)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=24,
        num_heads=4,
        d_ff=384,
        num_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    count = sum(parameter.numel() for parameter in model.parameters())
    encoded = sorted((list(tokenizer(text)["input_ids"]) for text in sentences), key=len)
    starts = range(0, len(encoded), 64)  # neighbours in length, so there is little padding
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(SEED)
    recent = 0.0
    for step in range(steps):
        start = starts[int(torch.randint(len(starts), (), generator=draw))]
        pairs = [with_holes(ids, 2, draw) for ids in encoded[start : start + 64]]
        source = padded([pair[0] for pair in pairs], 0)
        labels = padded([pair[1] for pair in pairs], -100)
        loss = model(input_ids=source, attention_mask=source.ne(0), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        recent += 0.01 * (float(loss.detach()) - recent) if step else float(loss.detach())
        if step % 400 == 399:
            print(f"base, step {step + 1}: loss {recent:.3f}")
    print(f"base: {count} parameters, {len(tokenizer)} tokens, {len(sentences)} sentences")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_task(folder: Path, split: str) -> Task:
    """What ``ngeval gamma`` makes of the options that `grade` gives it."""
    return hub_task(
        str(folder / "base"),
        dataset=str(folder / "data"),
        split=split,
        objective="seq2seq",
        columns=["text"],
        template=TEMPLATE,
        label_words=list(AREAS),
    )


def score(model: nn.Module, task: Task) -> tuple[float, float]:
    """Loss for each sentence, and how many have all their target tokens right."""
    losses, right, count = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in task.batches(128, None, SEED):
            logits = model(**inputs).logits
            losses += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            hits = logits.argmax(-1).eq(targets) | targets.eq(-100)
            right, count = right + int(hits.all(1).sum()), count + len(targets)
    return losses / count, right / count


def tune(folder: Path, name: str, config: Any, lr: float, decay: Callable[[int], float]) -> None:
    """Train one adapter and save it at the start and after every epoch."""
    torch.manual_seed(SEED)
    train, validation = make_task(folder, "train"), make_task(folder, "validation")
    model = peft.get_peft_model(train.model(), config)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    print(f"{name}: {sum(parameter.numel() for parameter in chosen)} parameters")
    step = 0
    for epoch in range(EPOCHS + 1):
        for inputs, targets in train.batches(BATCH, None, SEED + epoch) if epoch else ():
            # Dropout is 0 everywhere, so eval mode is also the mode to train in.
            logits = model(**inputs).logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        rate.step()
        place = folder / name / f"epoch-{epoch:03d}"
        model.save_pretrained(place)
        state = json.dumps({"epoch": epoch, "global_step": step})
        (place / "trainer_state.json").write_text(state, encoding="utf-8")
        shown = (*score(model, train), *score(model, validation))
        print(
            "{} {:2d}: loss {:.3f}, right {:.3f}; held out {:.3f}, {:.3f}".format(
                name, epoch, *shown
            )
        )


def grade(folder: Path, name: str) -> pd.DataFrame:
    """Run ``ngeval gamma`` on all epochs of an adapter."""
    output = folder / f"{name}.parquet"
    options = {
        "hf-model": folder / "base",
        "adapter": folder / name,
        "dataset": folder / "data",
        "objective": "seq2seq",
        "columns": "text",
        "template": TEMPLATE,
        "label-words": ",".join(AREAS),
        "batch-size": BATCH,
        "num-batches": 3,
        "methods": "sgd,ef,ief,sf",
        "damping": "1e-8,1e-4,1e-1",
        "output": output,
    }
    given = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    subprocess.run(  # noqa: S603  # the arguments are those above
        [sys.executable, "-m", "ngeval", "gamma", *given, "--no-natural", "--force", "--quiet"],
        check=True,
    )
    return pd.read_parquet(output)


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """One panel for each adapter, at the smallest damping."""
    mpl.use("Agg")
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(tables), figsize=(8.4, 3.4), layout="constrained")
        for ax, (title, table) in zip(axes, tables.items(), strict=True):
            plot_stages(table, ax=ax)
            ax.set_title(f"{title}, {ax.get_title()}")
    save_figure(figure, path)


def main(
    output: Annotated[Path, typer.Option(help="Folder for data, models and results.")] = Path(
        "docstrings-run"
    ),
) -> None:
    """Make the data, the models, the results and the figure."""
    torch.manual_seed(SEED)
    clock = time.perf_counter()

    def lap(what: str) -> None:
        print(f"[{time.perf_counter() - clock:.0f} s] {what}", flush=True)

    pretrain(write_data(output / "data"), output / "base")
    lap("base model trained")
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=16, target_modules=["q", "v"])
    prompt = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=20, num_transformer_submodules=1
    )
    tune(output, "lora", lora, 5e-3, lambda epoch: 1 - epoch / (EPOCHS + 2))
    lap("LoRA trained")
    tune(output, "prompt", prompt, 0.1, lambda epoch: 1 - epoch / (EPOCHS + 2))
    lap("prompt trained")
    tables = {}
    for name, title in (("lora", "LoRA"), ("prompt", "prompt tuning")):
        tables[title] = grade(output, name)
        lap(f"{title} graded")
    draw(tables, Path(__file__).parent / "docstrings.png")
    for title, table in tables.items():
        smallest = table[table["damping"] == table["damping"].min()]
        summary = summarize(smallest, ("epoch", "method"))
        shown = summary.pivot(index="epoch", columns="method", values="gamma_over_sgd_geomean")
        print(f"{title}: γ/γ_SGD at the smallest damping\n{shown.to_string(float_format='%.3g')}")
    lap("done")


if __name__ == "__main__":
    typer.run(main)
