"""The study *fadam*: its models, one quick run through the command, and what makes its verdicts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from ngeval.errors import InputError
from ngeval.fadam.optimizer import CORRECTIONS
from ngeval.optim import FAdam
from studies import fadam_models as models
from studies.__main__ import app
from studies.fadam import (
    ADAM,
    EXPONENTS,
    FISHER,
    MOMENTUM,
    PLANS,
    STUDY,
    Contender,
    entries,
    graded_powers,
    train,
)
from studies.fadam_findings import FORMS, TEXT, final, findings, ratio
from tests.committed_figures import KEPT, make

pytestmark = pytest.mark.second_stage

# Models and data


def test_the_text_is_split_by_paragraph():
    parts = models.text()
    sizes = {name: len(tokens) for name, tokens in parts.items()}
    assert sizes["train"] > 5 * max(sizes["validation"], sizes["test"])
    assert min(sizes.values()) > 5000
    assert int(parts["train"].max()) < models.VOCABULARY
    training = bytes(parts["train"].tolist())
    for kind in ("validation", "test"):
        # Held-out text that also is training text would be a leak.
        pieces = [bytes(piece.tolist()) for piece in parts[kind].split(300)[:-1]]
        assert sum(piece in training for piece in pieces) == 0


def test_sequences_give_the_next_character():
    inputs, targets = models.sequences("train", 5, torch.Generator().manual_seed(3))
    assert inputs.shape == targets.shape == (5, models.CONTEXT)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_gpt_sees_no_later_character():
    torch.manual_seed(0)
    model = models.CharacterGpt().eval()
    inputs, _ = models.sequences("train", 2, torch.Generator().manual_seed(0))
    changed = inputs.clone()
    changed[:, 20] = (changed[:, 20] + 1) % models.VOCABULARY
    first, second = model(inputs), model(changed)
    assert first.shape == (2, models.CONTEXT, models.VOCABULARY)
    torch.testing.assert_close(first[:, :20], second[:, :20])
    assert not torch.allclose(first[:, 20], second[:, 20])


def test_the_teachers_values_have_mean_0_and_variance_1():
    _, values, noisy = models.points(20_000, torch.Generator().manual_seed(1))
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(1, abs=0.05)
    assert float((noisy - values).std()) == pytest.approx(models.NOISE, rel=0.03)


def test_class_probabilities_are_those_of_the_normal_density():
    values = torch.tensor([[-4.0], [0.1], [2.9]])
    result = models.class_probabilities(values)
    normal = stats.norm(values.numpy(), models.NOISE)
    ends = np.concatenate([[-np.inf], np.linspace(-3, 3, models.BINS + 1)[1:-1], [np.inf]])
    expected = np.diff(normal.cdf(ends[None]), axis=1)
    np.testing.assert_allclose(result, expected, atol=1e-7)
    np.testing.assert_allclose(result.sum(1), 1.0, rtol=1e-12)


class Knowing(nn.Module):
    """A network that knows the teacher, in either form, and is off by some ε in the mean."""

    def __init__(self, form, off=0.0):
        super().__init__()
        self.form, self.off = form, off

    def forward(self, inputs):
        values = models.teacher()(inputs) + self.off
        if self.form == "continuous":
            return values
        return models.class_probabilities(values).clamp_min(1e-300).log()


@pytest.mark.parametrize("form", ["continuous", "discrete"])
def test_what_is_held_out_is_a_divergence(form):
    subject = models.regression(form)
    for kind in ("validation", "test"):
        assert subject.held_out(Knowing(form), kind) == pytest.approx(0, abs=1e-6)
    off = subject.held_out(Knowing(form, 0.1), "test")
    exact = 0.1**2 / (2 * models.NOISE**2)
    # Bins lose a part of what there is to be known of the value.
    assert off == pytest.approx(exact, rel=1e-3) if form == "continuous" else 0 < off < exact


@pytest.mark.parametrize("form", ["continuous", "discrete"])
def test_both_forms_have_the_same_points(form):
    inputs, targets = next(models.regression(form).batches(1, 4))
    again, values = next(models.regression("continuous").batches(1, 4))
    assert torch.equal(inputs, again)
    if form == "discrete":
        low = torch.cat([torch.tensor([-math.inf]), models.edges()])[targets]
        high = torch.cat([models.edges(), torch.tensor([math.inf])])[targets]
        assert bool(((low <= values[:, 0]) & (values[:, 0] <= high)).all())


def test_the_vq_vae():
    torch.manual_seed(0)
    model = models.VqVae()
    pixels = models.digits()["train"][:7]
    reconstruction, terms = model(pixels)
    assert reconstruction.shape == (7, 64)
    encoded = model.encoder(pixels).unflatten(1, (4, 8))
    squares = (encoded.unsqueeze(2) - model.book).square().sum(-1)
    nearest = squares.argmin(-1)
    expected = model.decoder(model.book[nearest].flatten(1))
    torch.testing.assert_close(reconstruction, expected)
    distance = squares.gather(-1, nearest.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(terms, (1 + models.COMMITMENT) * distance)
    models.vq_loss(model, (pixels, pixels)).backward()
    # Straight through: the encoder hears of the reconstruction.
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())


def test_the_digits_are_split():
    parts = models.digits()
    assert [len(parts[kind]) for kind in ("train", "validation", "test")] == [1437, 180, 180]


# Training


def test_a_training_is_the_same_for_the_same_seed():
    subject = models.regression("discrete")
    first, again = (train(subject, FISHER, 0.01, 3, 12) for _ in range(2))
    assert first == again
    assert first["status"] == "ok"
    assert train(subject, FISHER, 0.01, 4, 12)["test_loss"] != first["test_loss"]
    assert train(subject, ADAM, 0.01, 3, 12)["test_loss"] != first["test_loss"]


def test_a_training_that_diverges_is_a_row():
    row = train(models.regression("continuous"), MOMENTUM, 1e3, 0, 12)
    assert row["status"] == "diverged"
    assert row["validation_loss"] == row["test_loss"] == math.inf


def test_every_contender_tries_as_many_learning_rates():
    for plan in PLANS.values():
        assert len(plan.rates[0]) == len(plan.rates[1])
        assert plan.seeds > 1


def test_every_correction_and_exponent_has_its_contender():
    [text, *_] = entries(PLANS["full"])
    contenders = text[2]
    assert [c.without for c in contenders if c.without] == list(CORRECTIONS)
    assert sorted(c.exponent for c in contenders if c.optimizer == "fadam" and not c.without) == [
        *EXPONENTS
    ]
    weights = [nn.Parameter(torch.ones(2))]
    for contender in contenders[2 : 2 + len(CORRECTIONS)]:
        options = contender.build(weights, 0.1).param_groups[0]
        plain = FISHER.build(weights, 0.1).param_groups[0]
        changed = {key for key in plain if key != "params" and plain[key] != options[key]}
        assert changed == set(CORRECTIONS[contender.without])


def test_graded_natural_gradients_are_fadams():
    """The graded ḡ at ρ is the first step of an unclipped FAdam without momentum."""
    torch.manual_seed(0)
    weight = nn.Linear(3, 2)
    optimizer = FAdam(weight.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        weight(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    method = next(m for m in graded_powers(optimizer) if m.name == "fisher:0.8")
    [group] = method.optimizer.param_groups
    assert (group["exponent"], group["betas"][0], group["clip"]) == (0.8, 0.0, None)
    for parameter, state in optimizer.state.items():
        copy = method.optimizer.state[parameter]
        assert torch.equal(copy["fisher"], state["fisher"])
        assert copy["fisher"] is not state["fisher"]


# Verdicts


class Rows:
    """Rows of the study; seeds differ by far more than paired ratios do."""

    def __init__(self, spread: float) -> None:
        self.spread, self.generator = spread, np.random.default_rng(0)
        self.records: list[dict[str, object]] = []

    def noise(self) -> float:
        return math.exp(self.spread * self.generator.standard_normal())

    def train(self, subject, optimizer, loss, without="", exponent=0.5):
        self.records.extend(
            {
                **vars(Contender(optimizer, without, exponent)),
                "part": "training",
                "phase": "final",
                "subject": subject,
                "seed": seed,
                "learning_rate": 0.01,
                "at_edge": False,
                "test_loss": loss * (1 + seed) * self.noise(),
            }
            for seed in range(5)
        )

    def grade(self, subject, method, value, over):
        self.records.extend(
            {
                "part": "gamma",
                "subject": subject,
                "seed": seed,
                "step": at,
                "method": method,
                "gamma": value * (1 + seed) * self.noise(),
                "gamma_over_ng": over * self.noise(),
            }
            for seed in range(5)
            for at in (10, 20)
        )


def rows_with(better=1.0, off=1.0, power=1.0, gain=1.0, empirical=1.0, step=1.0, spread=0.01):
    """Rows with these ratios."""
    rows = Rows(spread)
    for subject in (TEXT, "VQ-VAE", *FORMS):
        rows.train(subject, "adamw", 1.0)
        rows.train(subject, "fadam", better)
    for subject in (TEXT, "VQ-VAE"):
        for name in CORRECTIONS:
            rows.train(subject, "fadam", better * off, without=name)
    for form, size in zip(FORMS, (1.0, gain), strict=True):
        rows.train(form, "momentum", 3.0 * size)
    add_powers(rows, better, power)
    for form, value, over in zip(FORMS, (empirical, 1.0), (step, 1.0), strict=True):
        for rho in ("", ":0.5"):
            rows.grade(form, f"diag{rho}", 1.0, 1.0)
            rows.grade(form, f"diag-ef{rho}", value, 2.0 * over)
        rows.grade(form, "step", 1.0, 3.0 * over)
    return pd.DataFrame(rows.records)


def add_powers(rows, better, power):
    """Trainings and γ of the text with every other exponent, over those with ½."""
    for rho in EXPONENTS:
        if rho != 0.5:
            rows.train(TEXT, "fadam", better * power, exponent=rho)
        for family in ("diag-ef", "fisher"):
            rows.grade(TEXT, f"{family}:{rho:g}", 1.0 if rho == 0.5 else power, 1.0)


FULL = len(CORRECTIONS) + 7
"""How many findings there are."""


def test_every_claim_confirmed():
    result = findings(rows_with(better=0.9, off=1.1, power=1.2, gain=2.0, empirical=1.3, step=1.5))
    assert len(result) == FULL
    assert {f.verdict for f in result} == {"confirmed"}
    assert all(f.rule and "2405.12807" in f.source for f in result)
    assert "0.9" in result[0].evidence


def test_every_claim_refuted():
    result = findings(rows_with(better=1.1, off=0.9, power=0.8, gain=0.5, empirical=0.7, step=0.6))
    assert {f.verdict for f in result} == {"not confirmed"}


def test_noise_confirms_nothing():
    result = findings(rows_with(spread=0.3))
    assert {f.verdict for f in result} <= {"not confirmed", "under conditions"}
    assert [f.verdict for f in result].count("not confirmed") >= len(result) - 2


def test_one_model_of_four_is_a_condition():
    rows = rows_with(better=0.9)
    worse = (rows["optimizer"] == "fadam") & (rows["subject"] == "VQ-VAE")
    rows.loc[worse, "test_loss"] *= 2
    assert findings(rows)[0].verdict == "under conditions"


def test_a_contender_that_diverges_has_lost():
    rows = rows_with(better=0.9)
    lost = (rows["optimizer"] == "fadam") & (rows["subject"] == TEXT) & (rows["seed"] == 2)
    rows.loc[lost, "test_loss"] = math.inf
    first, second = (final(rows, TEXT, name) for name in ("fadam", "adamw"))
    assert ratio(first, second).value == math.inf
    assert ratio(second, first).value == 0.0
    assert findings(rows)[0].verdict == "under conditions"


def test_an_interrupted_run():
    rows = rows_with()
    with pytest.raises(InputError, match=r"no final training of discrete regression by momentum"):
        findings(rows[~((rows["optimizer"] == "momentum") & (rows["subject"] == FORMS[1]))])
    with pytest.raises(InputError, match="no γ of character GPT"):
        findings(rows[~((rows["part"] == "gamma") & (rows["subject"] == TEXT))])


# The command


def test_the_quick_size_through_the_command(tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["fadam", "--quick", "-o", str(tmp_path), "--quiet"])
    assert done.exit_code == 0, done.output
    rows = pd.read_parquet(tmp_path / "fadam.parquet")
    assert make.structure(STUDY.figure(rows)) == KEPT["fadam"]
    training, gammas = (rows[rows["part"] == part] for part in ("training", "gamma"))
    assert (gammas["status"] == "ok").all()
    assert (gammas["gamma"] > 0).all()
    assert (gammas["gamma_over_ng"].dropna() >= 1 - 1e-6).all()
    finals = training[training["phase"] == "final"]
    searched = training[training["phase"] == "search"]
    keys = ["subject", "optimizer", "without", "exponent"]
    assert set(finals.groupby(keys).size()) == {PLANS["quick"].seeds}
    assert not set(finals["seed"]) & set(searched["seed"])
    best = searched.loc[searched.groupby(keys)["validation_loss"].idxmin()].set_index(keys)
    for key, each in finals.groupby(keys):
        assert set(each["learning_rate"]) == {best.loc[key, "learning_rate"]}
    (tmp_path / "again").mkdir()
    again = ["fadam", "--from", str(tmp_path / "fadam.parquet"), "--quiet"]
    done = runner.invoke(app, [*again, "-o", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again" / "fadam.png").stat().st_size > 10_000
    page = (tmp_path / "fadam.md").read_text()
    assert page == (tmp_path / "again" / "fadam.md").read_text()
    assert page.count("## ") == len(findings(rows))
    assert STUDY.title in page
