"""What the rows of *fadam* say of the FAdam paper's claims."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from ngeval.errors import InputError
from studies.base import Finding, decide
from studies.statistics import Interval, geometric_interval, mean_interval

PAPER = "Hwang, arXiv 2405.12807"
ROOT = 0.5
TEXT = "character GPT"
FORMS = ("continuous regression", "discrete regression")

CLAIMS = {
    "debiased Fisher": "Algorithm 1",
    "adaptive epsilon": "§3.4.3",
    "clipping": "§3.4.3 and B.3",
    "natural momentum": "§3.4.2",
    "natural weight decay": "Algorithm 1",
}
"""The corrections by name, and where the paper has them."""


def findings(rows: pd.DataFrame) -> list[Finding]:
    """One for each claim.

    Raises:
        InputError: a part of the study is missing.
    """
    found = [_better(rows)]
    found += [_correction(rows, name) for name in CLAIMS if name in set(rows["without"])]
    return [
        *found,
        _best_power(rows),
        _power_graded(rows, "fisher"),
        _power_graded(rows, "diag-ef"),
        _gain(rows),
        _empirical(rows),
        _nearer(rows),
    ]


def final(
    rows: pd.DataFrame, subject: str, optimizer: str, without: str = "", exponent: float = ROOT
) -> pd.Series[float]:
    """Test losses of a contender at its best learning rate, by seed; ∞ where it diverged.

    Raises:
        InputError: there are none.
    """
    chosen = rows[
        (rows["part"] == "training")
        & (rows["phase"] == "final")
        & (rows["subject"] == subject)
        & (rows["optimizer"] == optimizer)
        & (rows["without"].fillna("") == without)
        & np.isclose(rows["exponent"].astype(float), exponent)
    ]
    if chosen.empty:
        less = f" without {without}" if without else ""
        raise InputError(
            f"the rows have no final training of {subject} by {optimizer}{less}, ρ = {exponent:g}; "
            "was the run interrupted?"
        )
    return chosen.set_index("seed")["test_loss"].astype(float).sort_index()


def ratio(first: pd.Series[float], second: pd.Series[float]) -> Interval:
    """Geometric mean of the ratios of two contenders' losses at the same seeds.

    Where one diverged at a seed at which the other did not, it has lost: the ratio is ∞ or 0, with
    no interval to doubt it.
    """
    first, second = first.align(second, join="inner")
    lost = [bool(np.isinf(each).any()) for each in (first, second)]
    if lost[0] != lost[1]:
        worst = np.inf if lost[0] else 0.0
        return Interval(worst, worst, worst)
    if all(lost):
        return Interval(1.0, np.nan, np.nan)
    return geometric_interval(first / second)


def subjects(rows: pd.DataFrame, optimizer: str, without: str = "") -> list[str]:
    """What a contender was trained on, in order."""
    chosen = rows[(rows["optimizer"] == optimizer) & (rows["without"].fillna("") == without)]
    return list(dict.fromkeys(chosen["subject"]))


def _told(ratios: Mapping[str, Interval]) -> str:
    return "; ".join(f"{name}: {found.text('.4g')}" for name, found in ratios.items())


def _at_edge(rows: pd.DataFrame) -> str:
    """Which contenders' best learning rate was the least or the largest that was tried."""
    edge = rows[(rows["phase"] == "final") & (rows["at_edge"] == True)]  # noqa: E712  (has NaN)
    names = {
        f"{row.subject} by {row.optimizer}{f' without {row.without}' * bool(row.without)}"
        f"{f' ρ = {row.exponent:g}' * (row.exponent != ROOT)} ({row.learning_rate:g})"
        for row in edge.fillna({"without": ""}).itertuples()
    }
    return f" At an end of the learning rates that were tried: {', '.join(sorted(names))}." * bool(
        names
    )


def _better(rows: pd.DataFrame) -> Finding:
    """FAdam trains better than Adam."""
    ratios = {
        name: ratio(final(rows, name, "fadam"), final(rows, name, "adamw"))
        for name in subjects(rows, "fadam")
    }
    return Finding(
        "FAdam trains to a lower test loss than Adam",
        f"{PAPER}, experiments",
        decide([found.is_below(1) for found in ratios.values()]),
        f"Test loss of FAdam over AdamW's, both tuned, same seeds: {_told(ratios)}."
        + _at_edge(rows[(rows["without"].fillna("") == "") & (rows["exponent"] == ROOT)]),
        "a case for each model: the 95 % interval of the geometric mean ratio is below 1",
    )


def _correction(rows: pd.DataFrame, name: str) -> Finding:
    """One correction makes FAdam better."""
    ratios = {
        subject: ratio(final(rows, subject, "fadam", name), final(rows, subject, "fadam"))
        for subject in subjects(rows, "fadam", name)
    }
    extra = ""
    if name == "debiased Fisher":
        extra = " The two ways to debias are the same number but for rounding."
    elif name == "adaptive epsilon":
        extra = " It does something only where a gradient's RMS is below 100 ε = 10⁻⁶."
    elif name == "clipping":
        extra = " Off, it is also off for the weight decay, which is large where f is small."
    return Finding(
        f"FAdam's correction “{name}” lowers the test loss",
        f"{PAPER}, {CLAIMS[name]}",
        decide([found.is_above(1) for found in ratios.values()]),
        f"Test loss with it switched off over that of FAdam, both tuned: {_told(ratios)}.{extra}",
        "a case for each model: the 95 % interval of the geometric mean ratio is above 1",
    )


def powers(rows: pd.DataFrame) -> dict[float, pd.Series[float]]:
    """FAdam's test losses on the text by ρ."""
    chosen = rows[
        (rows["part"] == "training")
        & (rows["subject"] == TEXT)
        & (rows["optimizer"] == "fadam")
        & (rows["without"].fillna("") == "")
    ]
    return {
        float(rho): final(rows, TEXT, "fadam", exponent=float(rho))
        for rho in sorted(chosen["exponent"].astype(float).unique())
    }


def _best_power(rows: pd.DataFrame) -> Finding:
    """No other exponent trains better than ½, with a learning rate for each."""
    by_power = powers(rows)
    ratios = {
        f"ρ = {rho:g}": ratio(losses, by_power[ROOT])
        for rho, losses in by_power.items()
        if rho != ROOT
    }
    return Finding(
        "The square root, ρ = ½, is the best exponent of the Fisher",
        f"{PAPER}, §3.4.1",
        decide([found.is_above(1) for found in ratios.values()]),
        f"Test loss of the {TEXT} over that with ρ = ½, each ρ with its own learning rate: "
        f"{_told(ratios)}." + _at_edge(rows[rows["exponent"].astype(float) != ROOT]),
        "a case for each other ρ: the 95 % interval of the geometric mean ratio is above 1",
    )


def graded(rows: pd.DataFrame, subject: str, column: str = "gamma") -> pd.DataFrame:
    """γ of every method by seed and step.

    Raises:
        InputError: there are none.
    """
    chosen = rows[(rows["part"] == "gamma") & (rows["subject"] == subject)]
    if chosen.empty:
        raise InputError(f"the rows have no γ of {subject}; was the run interrupted?")
    return chosen.pivot_table(index=["seed", "step"], columns="method", values=column)


def power_ratios(rows: pd.DataFrame, family: str) -> dict[float, Interval]:
    """γ of g / f^ρ over that at ρ = ½, by ρ: geometric means over steps, and then over seeds."""
    table = graded(rows, TEXT)
    columns = [name for name in table.columns if name.partition(":")[0] == family]
    logs = table[columns].div(table[f"{family}:{ROOT:g}"], axis=0).map(math.log)
    means = logs.groupby(level="seed").mean()
    return {
        float(name.partition(":")[2]): mean_interval(means[name]).exp() for name in sorted(columns)
    }


def _power_graded(rows: pd.DataFrame, family: str) -> Finding:
    """ρ = ½ comes nearest to the natural gradient."""
    ratios = {
        f"ρ = {rho:g}": found for rho, found in power_ratios(rows, family).items() if rho != ROOT
    }
    what = {"fisher": "f of FAdam's own state", "diag-ef": "f = Σₙ gₙ² of the batch"}
    return Finding(
        f"ρ = ½ brings g/f^ρ nearest to the natural gradient, with {what[family]}",
        f"{PAPER}, §3.4.1, put as a prediction on γ",
        decide([found.is_above(1) for found in ratios.values()]),
        f"γ over that at ρ = ½, along FAdam's training of the {TEXT}: {_told(ratios)}.",
        "a case for each other ρ: the 95 % interval over seeds of the geometric mean is above 1",
    )


def gains(rows: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """KL that tuned SGD with momentum leaves over what tuned Adam leaves, by form and seed."""
    return {form: final(rows, form, "momentum") / final(rows, form, "adamw") for form in FORMS}


def _gain(rows: pd.DataFrame) -> Finding:
    """Adam is ahead of SGD by more where outputs are discrete."""
    by_form = gains(rows)
    intervals = {form: geometric_interval(found) for form, found in by_form.items()}
    apart = geometric_interval(by_form[FORMS[1]] / by_form[FORMS[0]])
    return Finding(
        "Adam gains more over SGD with discrete outputs than with continuous ones",
        f"{PAPER}, §3.3.1, put as a prediction on one regression in two forms",
        decide([apart.is_above(1)]),
        "Test KL from the true distribution that tuned SGD with momentum leaves over what tuned "
        f"Adam leaves: {_told(intervals)}; the second over the first: {apart.text()}."
        + _at_edge(rows[rows["subject"].isin(FORMS)]),
        "the 95 % interval of the ratio of the two gains is above 1",
    )


def empirical_ratios(rows: pd.DataFrame, form: str, power: str = ":0.5") -> pd.DataFrame:
    """Log γ of the empirical diagonal over γ of the exact one: a row for each seed, by step."""
    table = graded(rows, form)
    logs = (table[f"diag-ef{power}"] / table[f"diag{power}"]).map(math.log).to_frame("log")
    return logs.reset_index().pivot_table(index="seed", columns="step", values="log")


def _empirical(rows: pd.DataFrame) -> Finding:
    """The empirical diagonal stands in for the exact one better where outputs are discrete."""
    told, outcomes = [], []
    for power, name in ((":0.5", "ρ = ½"), ("", "ρ = 1")):
        means = [empirical_ratios(rows, form, power).mean(axis=1) for form in FORMS]
        apart = mean_interval(means[0] - means[1]).exp()
        outcomes.append(apart.is_above(1))
        each = {f: mean_interval(m).exp() for f, m in zip(FORMS, means, strict=True)}
        told.append(f"{name}: {_told(each)}; the first over the second {apart.text()}")
    return Finding(
        "The empirical Fisher's diagonal stands in for the exact one better with discrete outputs",
        f"{PAPER}, §3.3.1, put as a prediction on γ",
        decide(outcomes),
        "γ of g over the empirical diagonal, over γ of g over the exact diagonal, along Adam's "
        f"training: {'. '.join(told)}.",
        "a case for each power: the ratio is larger in the continuous form, its 95 % interval "
        "over seeds above 1",
    )


def _nearer(rows: pd.DataFrame) -> Finding:
    """Adam's step is nearer to the natural gradient where outputs are discrete."""
    told, outcomes = [], []
    for method, name in (("step", "Adam's step"), ("diag-ef:0.5", "g over √Σₙ gₙ²")):
        logs = [graded(rows, form, "gamma_over_ng")[method].map(math.log) for form in FORMS]
        means = [each.groupby(level="seed").mean() for each in logs]
        apart = mean_interval(means[0] - means[1]).exp()
        outcomes.append(apart.is_above(1))
        each = {f: mean_interval(m).exp() for f, m in zip(FORMS, means, strict=True)}
        told.append(f"{name}: {_told(each)}; the first over the second {apart.text()}")
    return Finding(
        "Adam's step is nearer to the natural gradient with discrete outputs",
        f"{PAPER}, §3.3.1, put as a prediction on γ",
        decide(outcomes),
        f"γ/γ_min along Adam's training (1 is the natural gradient itself): {'. '.join(told)}.",
        "a case for the step with its state, and one for the batch's own diagonal: γ/γ_min is "
        "larger in the continuous form, the ratio's 95 % interval over seeds above 1",
    )
