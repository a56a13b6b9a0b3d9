"""Samples spread over ranks: the numbers of a single process, and failures that all share.

What needs no other process is in `tests.test_shards`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks_problems
from tests.ranks_problems import CASES

pytestmark = pytest.mark.second_stage

RANKS = 3
VECTORS = ("jvp", "product", "combinations", "products", "captured gram", "diagonal")
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of three ranks answered."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(ranks_problems.__file__)
    started = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(RANKS), str(folder / "store"), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    output = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * RANKS, "\n\n".join(output)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_a_single_process(ranks, name):
    expected = ranks_problems.answers(CASES[name])
    for group in ("all ranks", "two ranks"):
        result = ranks[0][group].get(name, expected)
        assert result.keys() == expected.keys()
        off = {key: gap(result[key], value, key in VECTORS) for key, value in expected.items()}
        assert {key: value for key, value in off.items() if value > 1e-10} == {}, group


def test_all_ranks_have_the_same_bits(ranks):
    for other in ranks[1:]:
        for group in ("all ranks", "two ranks"):
            for name, answers in other.get(group, {}).items():
                for key, value in answers.items():
                    first = ranks[0][group][name][key]
                    assert torch.equal(first.nan_to_num(), value.nan_to_num()), (group, name, key)


def troubles(ranks: Ranks, name: str) -> dict[str, Any]:
    """What happened on the first rank, and on all others alike."""
    first = ranks[0]["troubles"][name]
    texts = {key: value for key, value in first.items() if isinstance(value, str)}
    for other in ranks[1:]:
        assert other["troubles"][name].items() >= texts.items()
    assert first.get("gap", 0.0) < 1e-10
    return texts


def test_a_rank_without_memory_is_told_of_by_all(ranks):
    output = troubles(ranks, "out_of_memory")["told"]
    assert output.startswith("RankMemoryError: rank 1 of 3: out of memory; use a smaller batch")
    assert "no room" in output


def test_all_ranks_try_a_gram_matrix_again_with_half_the_memory(ranks):
    troubles(ranks, "memory_that_half_of_is_enough")


def test_a_method_that_fails_on_one_rank_fails_on_all_and_the_others_go_on(ranks):
    output = troubles(ranks, "failing_method")["told"]
    assert output == "rank 1 of 3: ValueError: a bug of mine"


def test_the_errors_of_one_rank_keep_their_class(ranks):
    output = troubles(ranks, "poor_sample")["told"]
    assert output == "ModelError: the outputs of samples [5] are NaN or infinite"


def test_ranks_that_were_given_different_things_are_told_so(ranks):
    output = troubles(ranks, "other_things")
    assert "the inputs of rank 2 and of rank 0 differ" in output["inputs"]
    assert "the metric's batches of rank 1 and of rank 0 differ" in output["metric"]
    assert "the weights of rank 1 and of rank 0 differ" in output["weights"]


@pytest.mark.parametrize("kernels", ["free explicit", "gram"])
def test_frozen_layers_may_be_kept_in_parts(ranks, kernels):
    expected = ranks_problems.adapted_answers(kernels)
    for rank in ranks:
        result = rank["troubles"]["parts"][kernels]
        assert result.keys() == expected.keys()
        off = {key: gap(result[key], value, value.ndim == 1) for key, value in expected.items()}
        assert {key: value for key, value in off.items() if value > 1e-10} == {}


def test_models_in_parts_that_cannot_be_treated_are_refused(ranks):
    output = troubles(ranks, "parts")
    assert "7 samples cannot be spread evenly over 3 ranks" in output["uneven"]
    assert "parameter 'down.weight' is a DTensor" in output["trainable"]
    assert "ignored_params" in output["trainable"]


def test_ranks_out_of_step_are_stopped(ranks):
    output = troubles(ranks, "out_of_step")
    assert "do not compute the same thing" in output["told"]
    assert "lost step" in output["later"]


def gap(found: torch.Tensor, expected: torch.Tensor, together: bool) -> float:
    """The largest relative difference; of a vector, relative to its largest entry."""
    assert found.shape == expected.shape
    size = expected.abs().max() if together else expected.abs()
    apart = (found - expected).abs() / size.clamp_min(1e-300)
    same = (found == expected) | (found.isnan() & expected.isnan())
    return float(torch.where(same, 0.0, apart.double()).max())
