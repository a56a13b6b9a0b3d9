"""Which samples are whose, and what a single process does instead of meeting other ranks."""

from __future__ import annotations

import pytest
import torch

from ngeval.errors import InputError
from ngeval.model.sharding import SINGLE, Shards, fingerprint, shards_of
from ngeval.utils.memory import free_memory
from ngeval.utils.torchrun import local_world_size


class Part(Shards):
    """One of several ranks, which never meet."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("count", "size"), [(7, 3), (2, 3), (1, 4), (8, 4), (5, 1)])
def test_every_sample_belongs_to_one_rank(count, size):
    parts = [Part(rank, size).local_slice(count) for rank in range(size)]
    assert [n for part in parts for n in range(count)[part]] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1
    for rank, part in enumerate(parts):
        more = Part(rank, size).local_slice(count, at_least=2)
        assert len(range(count)[more]) == more.stop - more.start >= min(2, count)
        assert set(range(count)[part]) <= set(range(count)[more])


def test_fingerprints_tell_bits_dtypes_and_shapes_apart():
    values = torch.arange(6.0)
    swapped = values[[1, 0, 2, 3, 4, 5]]
    tensors = [values, swapped, values.reshape(2, 3), values.double(), values.to(torch.bfloat16)]
    tensors += [-values, values[:5], values.bool(), values.to(torch.int8), torch.zeros(0)]
    assert len({fingerprint([tensor]) for tensor in tensors}) == len(tensors)
    assert fingerprint([values]) == fingerprint([values.clone()])
    wide = torch.arange(12.0).reshape(2, 6)
    assert fingerprint([wide.T]) == fingerprint([wide.T.contiguous()])
    assert fingerprint([values, swapped]) != fingerprint([swapped, values])


def test_free_memory_is_shared_between_local_ranks(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_world_size() == 1
    alone = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_world_size() == 4
    assert free_memory(torch.device("cpu")) < alone / 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert local_world_size() == 1


def test_a_group_is_a_process_group():
    assert shards_of(None) is SINGLE
    with pytest.raises(InputError, match="process group"):
        shards_of("gloo")


def test_a_single_process_has_all_samples_and_calls_plainly():
    assert SINGLE.local_slice(5) == slice(0, 5)
    assert SINGLE.gather("x") == ["x"]
    assert SINGLE.broadcast(True) is True
    summand = torch.ones(2)
    assert SINGLE.sum(lambda: summand) is SINGLE.concatenate(lambda: summand) is summand
    with pytest.raises(ZeroDivisionError):
        SINGLE.synchronized(lambda: 1 / 0)
