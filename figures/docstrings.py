"""A text task that any machine can make: ``python figures/docstrings.py``.

Docstrings of Python's own library, labelled by the area that they are from; a small T5, trained
here; LoRA and prompt tuning on top of it, both graded along the way by ``ngeval gamma``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import pandas as pd
import peft
import torch
import transformers
import typer
from torch import nn
from torch.nn.functional import cross_entropy

from ngeval.plots import STYLE, plot_stages, save_figure
from ngeval.studies.docstrings import (
    AREAS,
    TEMPLATE,
    Base,
    docstrings,
    labelled,
    pretrain,
    split,
)
from ngeval.summary import summarize
from ngeval.tasks.base import Batch, Task
from ngeval.tasks.hf import hub_task

DEFAULT_FOLDER = Path("docstrings-run")
TRAINED, HELD_OUT = 250, 60
BATCH, NUM_BATCHES, EPOCHS, EVERY, SEED = 32, 5, 24, 2, 0
SHAPE = {"d_model": 96, "d_kv": 24, "num_heads": 4, "d_ff": 384, "num_layers": 2}
BASE = Base(SHAPE, vocabulary=1500, steps=1800)
LINEAR = ["q", "k", "v", "o", "wi", "wo"]


def write_data(everything: list[tuple[str, str]], folder: Path) -> None:
    """Save the labelled first paragraphs, as many of each class."""
    trained, held_out = split(labelled(everything, SEED), (TRAINED, HELD_OUT))
    folder.mkdir(parents=True, exist_ok=True)
    trained.to_parquet(folder / "train.parquet", index=False)
    held_out.to_parquet(folder / "validation.parquet", index=False)


def make_base(everything: list[tuple[str, str]], folder: Path) -> None:
    """Train the base model to say what is missing in a sentence, and save it."""
    losses: list[float] = []
    model, tokenizer = pretrain(everything, BASE, SEED, losses.append)
    print(f"base: {model.num_parameters()} parameters, loss {sum(losses[-100:]) / 100:.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_task(folder: Path, split: str) -> Task:
    """What ``ngeval gamma`` makes of the options that `grade` gives it."""
    form: dict[str, Any] = {"objective": "seq2seq", "columns": ["text"], "template": TEMPLATE}
    model, data = str(folder / "base"), str(folder / "data")
    return hub_task(model, dataset=data, split=split, label_words=list(AREAS), **form)


def score(model: nn.Module, batches: Iterable[Batch]) -> str:
    """Loss of a sentence, and how many have all their target tokens right."""
    losses, right, count = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = model(**inputs).logits
            losses += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            hits = logits.argmax(-1).eq(targets) | targets.eq(-100)
            right, count = right + int(hits.all(1).sum()), count + len(targets)
    return f"loss {losses / count:.3f}, right {right / count:.3f}"


def tune(folder: Path, name: str, config: Any, lr: float) -> None:
    """Train one adapter and save it at the start and after every second epoch."""
    torch.manual_seed(SEED)
    task, held_out = make_task(folder, "train"), make_task(folder, "validation")
    model = peft.get_peft_model(task.model(), config)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    print(f"{name}: {sum(parameter.numel() for parameter in chosen)} parameters")
    step = 0
    for epoch in range(EPOCHS + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / (EPOCHS + 2))
        # Dropout is 0 everywhere, so eval mode is the mode to train in too.
        for inputs, targets in task.batches(16, None, SEED + epoch) if epoch else ():
            logits = model(**inputs).logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if epoch % EVERY:
            continue
        place = folder / name / f"epoch-{epoch:03d}"
        model.save_pretrained(place)
        state = json.dumps({"epoch": epoch, "global_step": step})
        (place / "trainer_state.json").write_text(state)
        graded = score(model, task.batches(BATCH, NUM_BATCHES, SEED))
        others = score(model, held_out.batches(60, None, SEED))
        print(f"{name}, epoch {epoch}: {graded}; held out: {others}", flush=True)


def grade(folder: Path, name: str) -> pd.DataFrame:
    """Run ``ngeval gamma`` on all epochs of an adapter."""
    output = folder / f"{name}.parquet"
    options = [
        *("--hf-model", folder / "base", "--adapter", folder / name, "--dataset", folder / "data"),
        *("--objective", "seq2seq", "--columns", "text", "--template", TEMPLATE),
        *("--label-words", ",".join(AREAS), "--batch-size", BATCH, "--num-batches", NUM_BATCHES),
        *("--methods", "sgd,ef,ief,sf", "--damping", "1e-8,1e-4,1e-1", "--no-natural"),
        *("--output", output, "--force", "--quiet"),
    ]
    command = [sys.executable, "-m", "ngeval", "gamma", *map(str, options)]
    subprocess.run(command, check=True)  # noqa: S603  # the arguments are those above
    return pd.read_parquet(output)


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """One panel for each adapter, at the smallest damping."""
    plt.switch_backend("Agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(tables), figsize=(8.4, 3.4), layout="constrained")
        for ax, (title, table) in zip(axes, tables.items(), strict=True):
            plot_stages(table, ax=ax)
            ax.set_title(f"{title}, {ax.get_title()}")
    save_figure(figure, path)


def main(
    output: Annotated[Path, typer.Option(help="For data, models and results.")] = DEFAULT_FOLDER,
) -> None:
    """Make the data, the models, the results and the figure."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    start = time.perf_counter()
    everything = list(docstrings())
    write_data(everything, output / "data")
    make_base(everything, output / "base")
    kind: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM"}
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, **kind)
    # One submodule: the prompt goes to the encoder alone.
    prompt = peft.PromptTuningConfig(num_virtual_tokens=20, num_transformer_submodules=1, **kind)
    tables = {}
    runs = ("lora", "LoRA", lora, 3e-3), ("prompt", "prompt tuning", prompt, 0.2)
    for name, title, config, lr in runs:
        print(f"{time.perf_counter() - start:.0f} s: {title}")
        tune(output, name, config, lr)
        table = tables[title] = grade(output, name)
        summary = summarize(table[table["damping"] == table["damping"].min()], ("epoch", "method"))
        shown = summary.pivot(index="epoch", columns="method", values="gamma_over_sgd_geomean")
        print(f"{title}: γ/γ_SGD at the smallest damping\n{shown.to_string(float_format='%.3g')}")
    draw(tables, Path(__file__).parent / "docstrings.png")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
