"""Processes that share a run, which ``torchrun`` starts and its environment variables describe.

Units (checkpoint × batch) are handed out by counters in the processes' common store, so that a
process that is early takes from the others' share. Nothing else has to be agreed on, and no
process waits for another one before the end: units may take hours.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ngeval.errors import InputError, NgevalError
from ngeval.model.sharding import shards_of
from ngeval.results.journal import Key
from ngeval.utils import torchrun

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

T = TypeVar("T")

POLL_SECONDS = 0.2

PATIENCE = 20.0
"""Seconds after which the user learns that the other processes are being waited for."""


class Ranks:
    """The processes of a run, ``count`` of them, seen from one; here a run of one process.

    Attributes:
        rank: this process's number; the first, 0, writes the table and reports to the user.
        group: over which the samples of each unit are spread; None where a unit belongs to one
            process.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self.group: ProcessGroup | None = None
        self._steps = 0

    def broadcast(self, compute: Callable[[], T]) -> T:
        """The result (plain values) of the first process, on every process."""
        return compute()

    def agree(self, compute: Callable[[], T]) -> T:
        """The result of each process; if processes go in step and one fails, all fail."""
        return compute()

    def share(self, missing: Sequence[Key]) -> Iterator[Key]:
        """The units that this process computes."""
        return iter(missing)

    def count_steps(self, steps: int) -> None:
        """Add completed steps."""
        self._steps += steps

    def steps(self) -> int:
        """The steps that all processes have completed."""
        return self._steps

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """Report that this process is done; the first one waits for all."""


class ManyProcesses(Ranks):
    """The processes of ``torchrun``, which talk over its key–value store."""

    def __init__(self, store: Store, rank: int, count: int) -> None:
        super().__init__()
        self.store, self.rank, self.count = store, rank, count
        self._broadcasts = 0

    def broadcast(self, compute: Callable[[], T]) -> T:
        """As JSON through the store; if the first process fails, torchrun ends the others."""
        self._broadcasts += 1
        name = f"broadcast/{self._broadcasts}"
        if self.rank == 0:
            text = json.dumps(compute())
            with _reachable():
                self.store.set(name, text)
        with _reachable():
            while not self.store.check([name]):  # not wait(), which no signal can interrupt
                time.sleep(POLL_SECONDS)
            result: T = json.loads(self.store.get(name))
        return result

    def share(self, missing: Sequence[Key]) -> Iterator[Key]:
        """The units of one checkpoint after the other, so that few processes load each.

        The processes start at different checkpoints; one that has no unit left of its
        checkpoints continues with those of others.
        """
        stages: dict[int, list[Key]] = {}
        for stage, batch in missing:
            stages.setdefault(stage, []).append((stage, batch))
        order = list(stages)
        first = self.rank * len(order) // self.count
        for stage in order[first:] + order[:first]:
            units = stages[stage]
            while (claimed := self._add(f"claimed/{stage}", 1)) <= len(units):
                yield units[claimed - 1]

    def count_steps(self, steps: int) -> None:
        """In the store; if it is gone, the next claim fails, and not this unit."""
        with contextlib.suppress(NgevalError):
            self._add("steps", steps)

    def steps(self) -> int:
        return self._add("steps", 0)

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """Wait; if a process dies and never reports, torchrun ends this one."""
        self._add("finished", 1)
        while self.rank == 0 and self._add("finished", 0) < self.count:
            meanwhile()
            time.sleep(POLL_SECONDS)

    def _add(self, name: str, amount: int) -> int:
        """Add to a counter; returns its new value."""
        with _reachable():
            return int(self.store.add(name, amount))


class InStep(ManyProcesses):
    """Processes that compute every unit together, each on a part of its samples."""

    def __init__(self, store: Store, rank: int, count: int, device: str) -> None:
        """Create the group, which all processes do at once."""
        super().__init__(store, rank, count)
        dist.init_process_group(
            "nccl" if torch.device(device).type == "cuda" else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.count,
            timeout=timedelta(hours=6),  # loading a checkpoint, or a factorisation, may take long
        )
        self.group = dist.group.WORLD

    def share(self, missing: Sequence[Key]) -> Iterator[Key]:
        return iter(missing)

    def count_steps(self, steps: int) -> None:
        if self.rank == 0:  # the steps are the same on all
            super().count_steps(steps)

    def agree(self, compute: Callable[[], T]) -> T:
        return shards_of(self.group).synchronized(compute)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Report a store that is gone."""
    try:
        yield
    except dist.DistError as error:
        raise NgevalError(
            "torchrun or its other processes have ended; the same command with --resume continues "
            f"({f'{error}'.partition(chr(10))[0][:200]})"
        ) from error


def own_device(device: str) -> str:
    """``cuda`` is the GPU of this process's number on its machine.

    >>> own_device("cpu")
    'cpu'
    """
    if device == "cuda" and torchrun.world_size() > 1:  # `Run` checks any other text
        return f"cuda:{torchrun.local_rank()}"
    return device


def _meet(warn: Callable[[str], None]) -> tuple[Store, int, int]:
    """The store of all processes, this one's number, and their number."""
    meeting: Future[tuple[Store, int, int]] = Future()

    def meet() -> None:
        try:
            meeting.set_result(next(iter(rendezvous("env://"))))
        except Exception as error:  # whatever it is, the process that waits raises it
            meeting.set_exception(error)

    # In a thread, since no signal can interrupt it while it waits for others.
    threading.Thread(target=meet, daemon=True).start()
    if not wait([meeting], PATIENCE).done:
        warn(
            f"waiting for the other {torchrun.world_size() - 1} processes, as the environment "
            "variables RANK and WORLD_SIZE say; unset them for a run of one process"
        )
    try:
        return meeting.result()
    except Exception as error:
        raise InputError(
            f"the other processes of torchrun cannot be reached: {error}; start them with "
            "torchrun -m ngeval …"
        ) from error


@contextlib.contextmanager
def joined(device: str, *, together: bool, warn: Callable[[str], None]) -> Iterator[Ranks]:
    """The processes of this run; ``together``: all compute every unit, in step.

    ``warn`` is called with a line for the user if the others do not come.
    """
    if torchrun.world_size() == 1:
        yield Ranks()
        return
    store, rank, count = _meet(warn)
    # torchrun keeps its store when it restarts the processes, and units that were claimed before
    # may not be finished: each start has different names.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"start {start} of {count} processes", store)
    if not together:
        yield ManyProcesses(store, rank, count)
        return
    yield InStep(store, rank, count, device)
    dist.destroy_process_group()  # not after a failure: it might wait for a process that is gone
