"""Findings of *fadam*: the FAdam paper's claims."""

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
"""The corrections by name, with their places in the paper."""

REMARKS = {
    "debiased Fisher": " The two ways to debias are the same number but for rounding.",
    "adaptive epsilon": " It does something only where a gradient's RMS is below 100 ε = 10⁻⁶.",
    "clipping": " Off, it is also off for the weight decay, which is large where f is small.",
}


def findings(rows: pd.DataFrame) -> list[Finding]:
    """One finding for each claim.

    Raises:
        InputError: a part of the study is missing.
    """
    return [
        _better(rows),
        *(_correction(rows, name) for name in CLAIMS if name in set(rows["without"])),
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
        InputError: there is no such training.
    """
    trainings = _trainings(rows, optimizer, without)
    trainings = trainings[
        (trainings["phase"] == "final")
        & (trainings["subject"] == subject)
        & np.isclose(trainings["exponent"].astype(float), exponent)
    ]
    if trainings.empty:
        less = f" without {without}" if without else ""
        raise InputError(
            f"the rows have no final training of {subject} by {optimizer}{less}, ρ = {exponent:g}; "
            "was the run interrupted?"
        )
    return trainings.set_index("seed")["test_loss"].astype(float).sort_index()


def ratio(first: pd.Series[float], second: pd.Series[float]) -> Interval:
    """Geometric mean of the ratios of two contenders' losses at the same seeds.

    Where one of them alone diverged at some seed, it is the worse one: the ratio is ∞ or 0, and so
    are the ends of its interval.
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
    """The subjects that a contender was trained on, in order."""
    return list(dict.fromkeys(_trainings(rows, optimizer, without)["subject"]))


def _trainings(rows: pd.DataFrame, optimizer: str, without: str = "") -> pd.DataFrame:
    return rows[
        (rows["part"] == "training")
        & (rows["optimizer"] == optimizer)
        & (rows["without"].fillna("") == without)
    ]


def _text(ratios: Mapping[str, Interval]) -> str:
    return "; ".join(f"{name}: {ratio.text('.4g')}" for name, ratio in ratios.items())


def _at_edge(rows: pd.DataFrame) -> str:
    """The contenders whose best learning rate was the least or the largest of those tried."""
    edge = rows[(rows["phase"] == "final") & (rows["at_edge"] == True)]  # noqa: E712  (has NaN)
    names = {
        f"{row.subject} by {row.optimizer}{f' without {row.without}' * bool(row.without)}"
        f"{f' ρ = {row.exponent:g}' * (row.exponent != ROOT)} ({row.learning_rate:g})"
        for row in edge.fillna({"without": ""}).itertuples()
    }
    if not names:
        return ""
    return f" At an end of the learning rates that were tried: {', '.join(sorted(names))}."


def _better(rows: pd.DataFrame) -> Finding:
    """FAdam trains better than Adam."""
    ratios = {
        name: ratio(final(rows, name, "fadam"), final(rows, name, "adamw"))
        for name in subjects(rows, "fadam")
    }
    return Finding(
        "FAdam trains to a lower test loss than Adam",
        f"{PAPER}, experiments",
        decide([interval.is_below(1) for interval in ratios.values()]),
        f"Test loss of FAdam over AdamW's, both tuned, same seeds: {_text(ratios)}."
        + _at_edge(rows[(rows["without"].fillna("") == "") & (rows["exponent"] == ROOT)]),
        "a case for each model: the 95 % interval of the geometric mean ratio is below 1",
    )


def _correction(rows: pd.DataFrame, name: str) -> Finding:
    """One correction makes FAdam better."""
    ratios = {
        subject: ratio(final(rows, subject, "fadam", name), final(rows, subject, "fadam"))
        for subject in subjects(rows, "fadam", name)
    }
    return Finding(
        f"FAdam's correction “{name}” lowers the test loss",
        f"{PAPER}, {CLAIMS[name]}",
        decide([interval.is_above(1) for interval in ratios.values()]),
        f"Test loss with it switched off over that of FAdam, both tuned: {_text(ratios)}."
        + REMARKS.get(name, ""),
        "a case for each model: the 95 % interval of the geometric mean ratio is above 1",
    )


def powers(rows: pd.DataFrame) -> dict[float, pd.Series[float]]:
    """FAdam's test losses on the text by ρ."""
    trainings = _trainings(rows, "fadam")
    exponents = trainings.loc[trainings["subject"] == TEXT, "exponent"].astype(float)
    return {
        float(rho): final(rows, TEXT, "fadam", exponent=float(rho))
        for rho in sorted(exponents.unique())
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
        decide([interval.is_above(1) for interval in ratios.values()]),
        f"Test loss of the {TEXT} over that with ρ = ½, each ρ with its own learning rate: "
        f"{_text(ratios)}." + _at_edge(rows[rows["exponent"].astype(float) != ROOT]),
        "a case for each other ρ: the 95 % interval of the geometric mean ratio is above 1",
    )


def graded(rows: pd.DataFrame, subject: str, column: str = "gamma") -> pd.DataFrame:
    """γ of every method by seed and step.

    Raises:
        InputError: the rows have no γ of the subject.
    """
    gammas = rows[(rows["part"] == "gamma") & (rows["subject"] == subject)]
    if gammas.empty:
        raise InputError(f"the rows have no γ of {subject}; was the run interrupted?")
    return gammas.pivot_table(index=["seed", "step"], columns="method", values=column)


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
        f"ρ = {rho:g}": ratio for rho, ratio in power_ratios(rows, family).items() if rho != ROOT
    }
    diagonal = {"fisher": "f of FAdam's own state", "diag-ef": "f = Σₙ gₙ² of the batch"}
    return Finding(
        f"ρ = ½ brings g/f^ρ nearest to the natural gradient, with {diagonal[family]}",
        f"{PAPER}, §3.4.1, put as a prediction on γ",
        decide([interval.is_above(1) for interval in ratios.values()]),
        f"γ over that at ρ = ½, along FAdam's training of the {TEXT}: {_text(ratios)}.",
        "a case for each other ρ: the 95 % interval over seeds of the geometric mean is above 1",
    )


def gains(rows: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """KL that tuned SGD with momentum leaves over that of tuned Adam, by form and seed."""
    return {form: final(rows, form, "momentum") / final(rows, form, "adamw") for form in FORMS}


def _gain(rows: pd.DataFrame) -> Finding:
    """Adam is ahead of SGD by more where outputs are discrete."""
    by_form = gains(rows)
    intervals = {form: geometric_interval(gain) for form, gain in by_form.items()}
    between = geometric_interval(by_form[FORMS[1]] / by_form[FORMS[0]])
    return Finding(
        "Adam gains more over SGD with discrete outputs than with continuous ones",
        f"{PAPER}, §3.3.1, put as a prediction on one regression in two forms",
        decide([between.is_above(1)]),
        "Test KL from the true distribution that tuned SGD with momentum leaves over what tuned "
        f"Adam leaves: {_text(intervals)}; the second over the first: {between.text()}."
        + _at_edge(rows[rows["subject"].isin(FORMS)]),
        "the 95 % interval of the ratio of the two gains is above 1",
    )


def empirical_ratios(rows: pd.DataFrame, form: str, power: str = ":0.5") -> pd.DataFrame:
    """Log γ of the empirical diagonal over γ of the exact one: a row for each seed, by step."""
    table = graded(rows, form)
    logs = (table[f"diag-ef{power}"] / table[f"diag{power}"]).map(math.log).to_frame("log")
    return logs.reset_index().pivot_table(index="seed", columns="step", values="log")


def _empirical(rows: pd.DataFrame) -> Finding:
    """The empirical diagonal approximates the exact one better where outputs are discrete."""
    cases = {
        name: [empirical_ratios(rows, form, power).mean(axis=1) for form in FORMS]
        for name, power in (("ρ = ½", ":0.5"), ("ρ = 1", ""))
    }
    outcomes, evidence = _between_forms(cases)
    return Finding(
        "The empirical Fisher's diagonal stands in for the exact one better with discrete outputs",
        f"{PAPER}, §3.3.1, put as a prediction on γ",
        decide(outcomes),
        "γ of g over the empirical diagonal, over γ of g over the exact diagonal, along Adam's "
        f"training: {evidence}.",
        "a case for each power: the ratio is larger in the continuous form, its 95 % interval "
        "over seeds above 1",
    )


def _nearer(rows: pd.DataFrame) -> Finding:
    """Adam's step is nearer to the natural gradient where outputs are discrete."""
    tables = [graded(rows, form, "gamma_over_ng") for form in FORMS]
    cases = {
        name: [table[method].map(math.log).groupby(level="seed").mean() for table in tables]
        for name, method in (("Adam's step", "step"), ("g over √Σₙ gₙ²", "diag-ef:0.5"))
    }
    outcomes, evidence = _between_forms(cases)
    return Finding(
        "Adam's step is nearer to the natural gradient with discrete outputs",
        f"{PAPER}, §3.3.1, put as a prediction on γ",
        decide(outcomes),
        f"γ/γ_min along Adam's training (1 is the natural gradient itself): {evidence}.",
        "a case for the step with its state, and one for the batch's own diagonal: γ/γ_min is "
        "larger in the continuous form, the ratio's 95 % interval over seeds above 1",
    )


def _between_forms(cases: Mapping[str, list[pd.Series[float]]]) -> tuple[list[bool], str]:
    """Whether logarithms by seed are larger in the continuous form, for each case, and a text."""
    outcomes, evidence = [], []
    for name, logs in cases.items():
        between = mean_interval(logs[0] - logs[1]).exp()
        outcomes.append(between.is_above(1))
        each = {form: mean_interval(log).exp() for form, log in zip(FORMS, logs, strict=True)}
        evidence.append(f"{name}: {_text(each)}; the first over the second {between.text()}")
    return outcomes, ". ".join(evidence)
