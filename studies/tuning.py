"""Tuning of several optimizers with the same budget, by Optuna.

Every optimizer is trained with the same number of settings, and the best of them from several
seeds. Only these final trainings are compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from ngeval.errors import InputError, NgevalError, OutputError, TaskError
from ngeval.training import DivergedError, EpochReport, Training
from ngeval.training.measure import monitored_column
from ngeval.training.optimizers import resolved

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

COLUMNS = (
    "task",
    "optimizer",
    "phase",
    "trial",
    "learning_rate",
    "damping",
    "momentum",
    "weight_decay",
    "max_norm",
    "schedule",
    "batch_size",
    "monitor",
    "seed",
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "status",
    "reason",
)
"""Columns of the rows that `Tuning` makes, one row for each training and epoch.

``phase`` is ``search`` or ``final``, ``trial`` the number of the settings, ``monitor`` the column
that the best settings are chosen by, and ``status`` how the training ended (``ok``, ``diverged``
or ``failed``, with the ``reason``). A training that did not end well has one more row, without
losses, for the epoch in which it stopped."""

TEXTS = ("task", "optimizer", "phase", "schedule", "monitor", "status", "reason")
WHOLE_NUMBERS = ("trial", "batch_size", "seed", "epoch")

MAX_COUNT = 1000
"""Most trials of an optimizer, and most seeds; a larger number is taken for a typing error."""

Space = Mapping[str, Sequence[float]]
"""Values of an optimizer's settings by name, such as ``learning_rate`` and ``damping``."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """The same number of trials for every optimizer, then final trainings with its best settings.

    The best settings have the best epoch on the validation data by the training's ``monitor``; of
    a task without validation data, the least training loss at the end. Trials use the training's
    own seed, final trainings ``seed, …, seed + seeds − 1``. Where every optimizer has one setting,
    there is nothing to tune, and only the final trainings are run.

    Attributes:
        training: the task, the number of epochs and all else that the trainings have in common.
        spaces: the settings to tune for each optimizer by name; any of
            `ngeval.training.Settings` that are numbers.
        trials: None tries every combination of the values in a space, in their order; a number
            draws that many settings log-uniformly between the least and the largest value of each.
        seeds: number of final trainings of each optimizer.
    """

    training: Training
    spaces: Mapping[str, Space]
    trials: int | None = None
    seeds: int = 5

    @property
    def num_trials(self) -> int:
        """Number of settings that every optimizer is tried with.

        Raises:
            InputError: there is no optimizer, the grids differ in size, or a number is out of
                range.
        """
        sizes = {
            name: len(grid(space)) if self.trials is None else self.trials
            for name, space in self.spaces.items()
        }
        if len(set(sizes.values())) != 1:
            grids = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "no optimizer"
            raise InputError(
                f"every optimizer gets the same number of trials, and the grids have {grids}; give "
                "grids of one size, or a number of trials"
            )
        [size] = set(sizes.values())
        for name, count in (("trials", size), ("seeds", self.seeds)):
            if not 1 <= count <= MAX_COUNT:
                raise InputError(
                    f"the number of {name} must be at least 1 and at most {MAX_COUNT}, not {count}"
                )
        return size

    @property
    def num_trainings(self) -> int:
        """Number of trainings in all, unless all trials of an optimizer diverge."""
        trials = self.num_trials
        return len(self.spaces) * (self.seeds + (trials if trials > 1 else 0))

    def check(self) -> None:
        """Check every setting before the first training starts.

        Raises:
            InputError: a setting is out of range, the optimizer does not have it, or it cannot be
                drawn.
        """
        _ = self.num_trials
        for name, space in self.spaces.items():
            for settings in grid(space):
                self._training(name, settings, self.training.seed).check()
            if self.trials is not None and min(map(min, space.values()), default=1) == 0:
                raise InputError(
                    f"{name}: settings are drawn log-uniformly, which needs positive values, not 0"
                )

    def run(self) -> Iterator[pd.DataFrame]:
        """Train, yielding the rows of each training, with `COLUMNS`, as soon as it has ended.

        Raises:
            InputError: see `check`.
            TaskError: the task's own functions fail.
        """
        self.check()
        for name in self.spaces:
            yield from self._tune(name)

    def _tune(self, name: str) -> Iterator[pd.DataFrame]:
        study, distributions = self._study(name), self._distributions(name)
        best: optuna.Trial | FrozenTrial
        if self.num_trials > 1:
            for _ in range(self.num_trials):
                trial = study.ask(distributions)
                rows = self._rows(name, trial, self.training.seed, "search")
                study.tell(trial, score(rows))
                yield rows
            if not math.isfinite(study.best_value):
                return  # no trial ended well, so no settings are the best
            best = study.best_trial
        else:
            best = study.ask(distributions)
        for seed in range(self.training.seed, self.training.seed + self.seeds):
            yield self._rows(name, best, seed, "final")

    def _study(self, name: str) -> optuna.Study:
        """A study in memory that gives an optimizer's settings, those of a grid in their order."""
        import optuna  # noqa: PLC0415  (takes a second, and only one of the studies needs it)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(self.training.seed))
        for settings in grid(self.spaces[name]) if self.trials is None else ():
            study.enqueue_trial(settings)
        return study

    def _distributions(self, name: str) -> dict[str, BaseDistribution]:
        from optuna.distributions import (  # noqa: PLC0415  (as above)
            CategoricalDistribution,
            FloatDistribution,
        )

        if self.trials is None:
            return {
                key: CategoricalDistribution(values) for key, values in self.spaces[name].items()
            }
        return {
            key: FloatDistribution(min(values), max(values), log=True)
            for key, values in self.spaces[name].items()
        }

    def _training(self, name: str, settings: Settings, seed: int) -> Training:
        return replace(self.training, optimizer=name, seed=seed, **settings)

    def _rows(
        self, name: str, trial: optuna.Trial | FrozenTrial, seed: int, phase: str
    ) -> pd.DataFrame:
        """The rows of one training, however it ended."""
        training = self._training(name, trial.params, seed)
        reports: list[EpochReport] = []
        status, reason = "ok", ""
        try:
            reports.extend(training.run())  # keeps those before an error
        except (TaskError, OutputError):  # these would stop the trainings with other settings too
            raise
        except NgevalError as error:
            status = "diverged" if isinstance(error, DivergedError) else "failed"
            reason = str(error)
        same = asdict(resolved(name, training)) | {
            "task": training.task.name,
            "optimizer": name,
            "phase": phase,
            "trial": trial.number,
            "batch_size": training.batch_size,
            "monitor": monitored_column(training.task, training.monitor),
            "seed": seed,
            "status": status,
            "reason": reason,
        }
        records = [same | asdict(report) for report in reports]
        if status != "ok":
            records.append(same | {"epoch": len(reports)})
        table = pd.DataFrame.from_records(records).reindex(columns=list(COLUMNS))
        # Columns without any number are numbers too, so that tables can be concatenated.
        numbers = [column for column in COLUMNS if column not in (*TEXTS, *WHOLE_NUMBERS)]
        return table.astype(dict.fromkeys(numbers, float))


def grid(space: Space) -> list[Settings]:
    """Every combination of the values of a space, the last setting varying fastest.

    >>> grid({"learning_rate": [0.1, 1.0], "damping": [1e-3]})
    [{'learning_rate': 0.1, 'damping': 0.001}, {'learning_rate': 1.0, 'damping': 0.001}]
    """
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def score(rows: pd.DataFrame) -> float:
    """How good a training is by its ``monitor``: less is better, and ∞ unless it ended well.

    The best epoch on the validation data counts; without such data it is the training loss at the
    end, whose best epoch would differ by noise alone.
    """
    if rows["status"].iloc[0] != "ok":
        return math.inf
    column = str(rows["monitor"].iloc[0])
    values = rows[column].dropna()
    if values.empty:
        return math.inf
    if column == "train_loss":
        return float(values.iloc[-1])
    return float(-values.max() if column.endswith("accuracy") else values.min())
