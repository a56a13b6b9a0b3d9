"""Findings of *optimization*: iEF as an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ngeval.errors import InputError
from studies.base import Finding, decide
from studies.statistics import Interval, mean_interval
from studies.training_results import average_ranks, outcomes, performance

PAPER = "Wu et al., arXiv 2406.06420, experiment on optimisation performance"

TASKS = 5
"""Number of tasks of a run that was not interrupted."""

EXACT, TUNED = ("ef", "sf"), ("adamw", "adafactor", "sgd")
NAMES = {"ef": "EF", "sf": "SF", "adamw": "AdamW", "adafactor": "Adafactor", "sgd": "SGD"}


def findings(rows: pd.DataFrame) -> list[Finding]:
    """Compare iEF with EF and SF, and with the usual optimizers: test accuracy, training loss.

    Raises:
        InputError: iEF or all others are missing.
    """
    present = set(rows["optimizer"])
    if "ief" not in present or not present & set(NAMES):
        raise InputError("the rows lack iEF or what to compare it with; was the run interrupted?")
    ended = outcomes(rows)
    return [
        _compared(ended, others, what)
        for what in ("test_accuracy", "train_loss")
        for others in (EXACT, TUNED)
    ] + [_ranked(rows)]


def paired(ended: pd.DataFrame, task: str, other: str, what: str) -> Interval:
    """Mean difference of iEF and another optimizer on a task, over the seeds that both ended with.

    A seed gives both the same initial weights and order of samples, so differences are paired; of
    training losses it is the difference of logarithms.

    Args:
        ended: the table of `studies.training_results.outcomes`.
        task: name of the task.
        other: name of the other optimizer.
        what: ``"test_accuracy"`` or ``"train_loss"``.
    """
    rows = ended[ended["task"] == task].set_index("seed")
    ief, others = (rows.loc[rows["optimizer"] == name, what] for name in ("ief", other))
    if what == "train_loss":
        ief, others = np.log(ief), np.log(others)
    return mean_interval((ief - others).dropna())


def _compared(ended: pd.DataFrame, others: Sequence[str], what: str) -> Finding:
    """Test accuracy or final training loss, a case for each task and other optimizer."""
    is_loss = what == "train_loss"
    held, evidence = [], []
    for task in dict.fromkeys(ended["task"]):
        for other in others:
            gap = paired(ended, task, other, what)
            held.append(gap.is_below(0) if is_loss else gap.is_above(0))
            text = gap.exp().text() if is_loss else Interval(*(100 * x for x in gap)).text(".1f")
            evidence.append(f"{task}, {NAMES[other]}: {text}{' *' * held[-1]}")
    names = " and ".join([", ".join(NAMES[other] for other in others[:-1]), NAMES[others[-1]]])
    claim = "ends with less training loss" if is_loss else "has better test accuracy"
    measure = (
        "Training loss of iEF after the last epoch over that of the other, geometric means"
        if is_loss
        else "Test accuracy of iEF less that of the other at the best epoch by validation, in "
        "points, means"
    )
    return Finding(
        f"iEF {claim} than {names}, all tuned with equal budgets",
        PAPER,
        decide(held),
        f"{measure} of pairs with the same seed (*: it holds): " + "; ".join(evidence) + ".",
        f"the 95 % interval of the {'ratio lies below 1' if is_loss else 'difference is above 0'}; "
        "a case for each task and other optimizer",
    )


def _ranked(rows: pd.DataFrame) -> Finding:
    """The mean rank by test performance."""
    table = performance(rows)
    ranks = average_ranks(table).sort_values()
    edges = table[table["edge"] != ""]
    at_edge = ", ".join(f"{t} {o}" for t, o in zip(edges["task"], edges["optimizer"], strict=True))
    tasks = table["task"].nunique()
    return Finding(
        "iEF ranks first over all tasks",
        f"{PAPER}, table of average test performance",
        decide([bool(ranks.index[0] == "ief" and ranks.iloc[0] < ranks.iloc[1])]),
        f"Average rank by test accuracy over {tasks} of the study's {TASKS} tasks: "
        + ", ".join(f"{name} {rank:.2g}" for name, rank in ranks.items())
        + f". Tuned to an end of what was tried: {at_edge or 'none'}.",
        "iEF's average rank is the least",
    )
