"""Optimizers against each other, tuned with equal budgets, on five tasks like those of the paper.

AdamW, Adafactor, SGD, EF, SF and iEF train an MLP from scratch on digits and one on colour images,
and tune a small T5 (LoRA, prompt tuning) and a small ViT (LoRA) that are pre-trained here. Each is
tried with the same number of settings, and the best by validation loss is trained from several
seeds, which give all optimizers the same initial weights and the same order of samples. Source: Wu
et al. (arXiv 2406.06420), the tables of test performance and the curves of training loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from ngeval.tasks import Task, get_task
from ngeval.training import Training
from studies.base import Advance, Size, Study
from studies.images import image_task, vit_lora_task
from studies.optimization_findings import findings
from studies.texts import text_task
from studies.training_picture import performance_figure
from studies.tuning import Tuning

Grid = dict[str, tuple[float, ...]]

DAMPINGS: Grid = {"ef": (1.0, 30.0), "ief": (1e-4, 1.0), "sf": (1.0, 30.0)}
"""EF and SF need larger ones: the part that their gradients or labels do not span is divided by
λ."""

FROM_SCRATCH: Grid = {
    "adamw": (3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    "adafactor": (3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.5, 1.0, 2.0),
    "sgd": (0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    "ef": (0.03, 0.1, 0.3, 1.0),
    "sf": (0.1, 0.3, 1.0, 3.0),
    "ief": (0.3, 1.0, 3.0, 10.0),
}
"""Learning rates for all weights of a network."""

LORA: Grid = FROM_SCRATCH | {
    "adamw": (1e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2),
    "adafactor": (1e-2, 3e-2, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
    "sgd": (0.03, 0.05, 0.1, 0.2, 0.3, 1.0, 2.0, 5.0),
}
PROMPT: Grid = FROM_SCRATCH | {
    "adamw": (1e-2, 3e-2, 5e-2, 0.1, 0.2, 0.3, 0.5, 1.0),
    "adafactor": (1e-2, 3e-2, 5e-2, 0.1, 0.2, 0.3, 1.0, 3.0),
    "sgd": (0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0),
}


@dataclass(frozen=True)
class Part:
    """A task with its budget.

    Attributes:
        build: makes the task.
        rates: learning rates to try, by optimizer; the exact optimizers have half as many and two
            dampings for each, so that all have the same number of trainings.
        epochs: of every training.
        batch_size: samples in a step.
        num_batches: steps in an epoch; None: one pass.
        seeds: number of final trainings.
        is_tuned: False trains with the middle of each grid, without tuning.
    """

    build: Callable[[], Task]
    rates: Grid
    epochs: int
    batch_size: int
    num_batches: int | None = None
    seeds: int = 5
    is_tuned: bool = True

    def tuning(self, seed: int) -> Tuning:
        """The trainings of all optimizers on this task."""
        training = Training(
            self.build(),
            None,
            epochs=self.epochs,
            batch_size=self.batch_size,
            num_batches=self.num_batches,
            seed=seed,
            weight_decay=0.0,
            schedule="linear",
        )
        spaces = {
            name: {"learning_rate": rates}
            | ({"damping": DAMPINGS[name]} if name in DAMPINGS else {})
            for name, rates in self.rates.items()
        }
        if not self.is_tuned:
            spaces = {name: _middle(space) for name, space in spaces.items()}
        return Tuning(training, spaces, seeds=self.seeds)


def _middle(grid: Grid) -> Grid:
    """The middle value of each setting alone."""
    return {name: (values[len(values) // 2],) for name, values in grid.items()}


def parts(size: Size, data_dir: Path | None) -> list[Part]:
    """The tasks of a size."""
    digits = partial(get_task, "digits-mlp")
    images = partial(image_task, data_dir)
    if size == "quick":
        lora, prompt = (partial(text_task, kind, 4, (8, 8, 8)) for kind in ("lora", "prompt"))
        vit = partial(vit_lora_task, 4, (40, 30, 30))
        few = {name: rates[: 1 if name in DAMPINGS else 2] for name, rates in FROM_SCRATCH.items()}
        untuned = ((images, FROM_SCRATCH), (lora, LORA), (prompt, PROMPT), (vit, LORA))
        return [
            Part(digits, few, epochs=1, batch_size=16, num_batches=2, seeds=1),
            *(
                Part(build, rates, 1, 8, num_batches=2, seeds=1, is_tuned=False)
                for build, rates in untuned
            ),
        ]
    return [
        Part(digits, FROM_SCRATCH, epochs=4, batch_size=64),
        Part(images, FROM_SCRATCH, epochs=6, batch_size=64),
        Part(partial(text_task, "lora", PRETRAINING), LORA, epochs=6, batch_size=16),
        Part(partial(text_task, "prompt", PRETRAINING), PROMPT, epochs=6, batch_size=16),
        Part(partial(vit_lora_task, VIT_PRETRAINING), LORA, epochs=6, batch_size=32),
    ]


PRETRAINING, VIT_PRETRAINING = 1000, 400
"""Steps of the T5 and of the ViT."""


def run(
    size: Size, seed: int, progress: Advance, data_dir: Path | None = None
) -> Iterator[pd.DataFrame]:
    """One table for each training: the rows of `studies.tuning.Tuning`.

    Args:
        size: ``"quick"`` or ``"full"``.
        seed: the first of the seeds of trainings.
        progress: called after each training.
        data_dir: folder with CIFAR-10's files, for real images; None: coloured digits.

    Raises:
        DependencyError: transformers or peft are not installed.
        TaskError: ``data_dir`` has no such files, or Python's library has too few docstrings.
    """
    for part in parts(size, data_dir):
        tuning = part.tuning(seed)
        for rows in tuning.run():
            yield rows
            progress(tuning.training.task.name, tuning.num_trainings)


STUDY = Study(
    "optimization",
    "Optimizers tuned with equal budgets: test performance and training loss on five tasks",
    run,
    performance_figure,
    findings,
    minutes=20,
    data="the files of CIFAR-10 (cifar-10-batches-py or -bin), for the colour images",
    needs=("transformers", "peft", "optuna"),
)
