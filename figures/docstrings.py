"""A text task without any download: ``python -m figures.docstrings`` in a clone.

The data are docstrings of Python's library, labelled by the area of the library. A small T5 is
trained on them, then tuned by LoRA and by prompt tuning, and both are graded at every second epoch
by ``ngeval gamma`` and ``ngeval imbalance``. figures/make.py draws the rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import peft
import torch
import transformers
import typer
from torch import nn
from torch.nn.functional import cross_entropy

from ngeval.analysis.summary import summarize
from ngeval.cli.app import app
from ngeval.tasks.base import Batch, Task
from ngeval.tasks.hf import hub_task
from studies.docstrings import (
    AREAS,
    TEMPLATE,
    Base,
    docstrings,
    labelled,
    pretrain,
    split,
)

DEFAULT_FOLDER = Path("docstrings-run")
SEED = 0
LINEAR = ["q", "k", "v", "o", "wi", "wo"]


@dataclass(frozen=True)
class Size:
    """The extent of a size.

    Attributes:
        base: the T5.
        sentences: numbers of each class in the training and in the held-out data.
        epochs: of tuning; every second one has a checkpoint.
        batch_size: N of the graded batches.
        num_batches: graded batches at each checkpoint.
        parts: of the library to read; None: all.
    """

    base: Base
    sentences: tuple[int, int]
    epochs: int
    batch_size: int
    num_batches: int
    parts: tuple[str, ...] | None = None


FULL = Size(
    Base(
        {"d_model": 96, "d_kv": 24, "num_heads": 4, "d_ff": 384, "num_layers": 2},
        vocabulary=1500,
        steps=1800,
    ),
    (250, 60),
    epochs=24,
    batch_size=32,
    num_batches=5,
)
QUICK = Size(
    Base(
        {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1},
        vocabulary=400,
        steps=4,
    ),
    (8, 4),
    epochs=2,
    batch_size=6,
    num_batches=2,
    parts=("asyncio", "email", "http", "_pydecimal.py", "statistics.py"),
)


def write_data(everything: list[tuple[str, str]], sizes: tuple[int, int], folder: Path) -> None:
    """Save the labelled first paragraphs, the same number of each class."""
    trained, held_out = split(labelled(everything, SEED), sizes)
    folder.mkdir(parents=True, exist_ok=True)
    trained.to_parquet(folder / "train.parquet", index=False)
    held_out.to_parquet(folder / "validation.parquet", index=False)


def make_base(everything: list[tuple[str, str]], base: Base, folder: Path) -> None:
    """Pre-train the base model, and save it."""
    losses: list[float] = []
    model, tokenizer = pretrain(everything, base, SEED, losses.append)
    last = losses[-100:]
    print(f"base: {model.num_parameters()} parameters, loss {sum(last) / len(last):.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_task(folder: Path, split: str) -> Task:
    """The task of ``ngeval gamma`` with the options of `grade`."""
    form: dict[str, Any] = {"objective": "seq2seq", "columns": ["text"], "template": TEMPLATE}
    model, data = str(folder / "base"), str(folder / "data")
    return hub_task(model, dataset=data, split=split, label_words=list(AREAS), **form)


def score(model: nn.Module, batches: Iterable[Batch]) -> str:
    """Loss per sentence, and the share of sentences with all target tokens right."""
    losses, right, count = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = model(**inputs).logits
            losses += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            hits = logits.argmax(-1).eq(targets) | targets.eq(-100)
            right, count = right + int(hits.all(1).sum()), count + len(targets)
    return f"loss {losses / count:.3f}, right {right / count:.3f}"


def tune(folder: Path, name: str, config: Any, lr: float, size: Size) -> None:
    """Train one adapter and save it at the start and after every second epoch."""
    torch.manual_seed(SEED)
    task, held_out = make_task(folder, "train"), make_task(folder, "validation")
    model = peft.get_peft_model(task.model(), config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    print(f"{name}: {sum(parameter.numel() for parameter in trainable)} parameters")
    step = 0
    for epoch in range(size.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / (size.epochs + 2))
        # Dropout is 0 everywhere, so eval mode is right for training too.
        for inputs, targets in task.batches(16, None, SEED + epoch) if epoch else ():
            logits = model(**inputs).logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if epoch % 2:
            continue
        checkpoint = folder / name / f"epoch-{epoch:03d}"
        model.save_pretrained(checkpoint)
        state = json.dumps({"epoch": epoch, "global_step": step})
        (checkpoint / "trainer_state.json").write_text(state)
        graded = score(model, task.batches(size.batch_size, size.num_batches, SEED))
        others = score(model, held_out.batches(size.sentences[1], None, SEED))
        print(f"{name}, epoch {epoch}: {graded}; held out: {others}", flush=True)


def grade(folder: Path, name: str, size: Size) -> pd.DataFrame:
    """Run ``ngeval gamma`` and ``ngeval imbalance`` on all epochs of an adapter; return γ."""
    shared = [
        f"--hf-model={folder / 'base'}",
        f"--adapter={folder / name}",
        f"--dataset={folder / 'data'}",
        "--objective=seq2seq",
        "--columns=text",
        f"--template={TEMPLATE}",
        f"--label-words={','.join(AREAS)}",
        f"--batch-size={size.batch_size}",
        f"--num-batches={size.num_batches}",
        "--force",
        "--quiet",
    ]
    updates = ["--methods", "sgd,ef,ief,sf", "--damping", "1e-8,1e-4,1e-1", "--no-natural"]
    gammas, samples = (folder / f"docstrings-{name}{end}.parquet" for end in ("", "-norms"))
    for kind, output, options in (("gamma", gammas, updates), ("imbalance", samples, [])):
        words = [kind, *options, *shared, "--output", output]
        app([str(word) for word in words], standalone_mode=False)
    return pd.read_parquet(gammas)


def main(
    output: Annotated[Path, typer.Option(help="For data, models and results.")] = DEFAULT_FOLDER,
    quick: Annotated[bool, typer.Option("--quick", help="A small size of a few seconds.")] = False,
) -> None:
    """Make the data, the models and the rows, all in one folder."""
    size = QUICK if quick else FULL
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    start = time.perf_counter()
    everything = list(docstrings(size.parts))
    write_data(everything, size.sentences, output / "data")
    make_base(everything, size.base, output / "base")
    kind: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM"}
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, **kind)
    # One submodule: the prompt goes to the encoder alone.
    prompt = peft.PromptTuningConfig(num_virtual_tokens=20, num_transformer_submodules=1, **kind)
    runs = ("lora", "LoRA", lora, 3e-3), ("prompt", "prompt tuning", prompt, 0.2)
    for name, title, config, lr in runs:
        print(f"{time.perf_counter() - start:.0f} s: {title}")
        tune(output, name, config, lr, size)
        table = grade(output, name, size)
        summary = summarize(table[table["damping"] == table["damping"].min()], ("epoch", "method"))
        wide = summary.pivot(index="epoch", columns="method", values="gamma_over_sgd_geomean")
        print(f"{title}: γ/γ_SGD at the smallest damping\n{wide.to_string(float_format='%.3g')}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
