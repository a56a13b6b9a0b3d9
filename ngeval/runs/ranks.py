"""Processes that share a run: started by ``torchrun``, found by its environment variables.

Units (checkpoint × batch) are handed out by counters in the processes' common store, so that a
process which is done early takes from the others' share. Nothing else has to be agreed on, and no
process waits for another before the end: units may take hours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

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
"""Seconds after which it is said that others are waited for."""


class Ranks(Protocol):
    """The processes of a run, seen from one of them.

    Attributes:
        rank: this process's number; the first one, 0, writes the table and talks to the user.
        count: how many processes there are.
        group: over which the samples of every unit are spread; None where a unit is one process's.
    """

    rank: int
    count: int
    group: ProcessGroup | None

    def told(self, make: Callable[[], T]) -> T:
        """What the first process makes (plain values), on every process."""
        ...

    def keys(self, missing: Sequence[Key]) -> Iterator[Key]:
        """The units that this process does."""
        ...

    def count_step(self, steps: int) -> None:
        """So many steps more are done."""
        ...

    def steps(self) -> int:
        """How many steps all processes have done."""
        ...

    def agreed(self, make: Callable[[], T]) -> T:
        """What each process makes for itself; where processes go in step and one fails, all do."""
        ...

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """Say that this process is done; the first one waits for all."""
        ...


class OneProcess:
    """No ``torchrun``: all units in their order."""

    rank, count = 0, 1
    group: ProcessGroup | None = None

    def __init__(self) -> None:
        """Nothing is done yet."""
        self._steps = 0

    def agreed(self, make: Callable[[], T]) -> T:
        """As it is made."""
        return make()

    def told(self, make: Callable[[], T]) -> T:
        """As it is made."""
        return make()

    def keys(self, missing: Sequence[Key]) -> Iterator[Key]:
        """All."""
        return iter(missing)

    def count_step(self, steps: int) -> None:
        """Add them."""
        self._steps += steps

    def steps(self) -> int:
        """Those of this process."""
        return self._steps

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """There is nobody to wait for."""


class ManyProcesses:
    """``torchrun``'s processes, over its key–value store."""

    group: ProcessGroup | None = None

    def __init__(self, store: Store, rank: int, count: int) -> None:
        """Nothing is said yet.

        Args:
            store: the same one for all.
            rank: this process's number.
            count: how many there are.
        """
        self.store, self.rank, self.count = store, rank, count
        self._told = 0

    def told(self, make: Callable[[], T]) -> T:
        """By way of JSON; where the first process fails, torchrun ends the others."""
        self._told += 1
        name = f"told/{self._told}"
        if self.rank == 0:
            text = json.dumps(make())
            with _reachable():
                self.store.set(name, text)
        with _reachable():
            while not self.store.check([name]):  # and not wait(), which no signal ends
                time.sleep(POLL_SECONDS)
            made: T = json.loads(self.store.get(name))
        return made

    def keys(self, missing: Sequence[Key]) -> Iterator[Key]:
        """Those of one checkpoint after the other, so that each is loaded by few processes.

        The processes start at different checkpoints; one that finds no unit left in its own
        goes on with those of others.
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

    def count_step(self, steps: int) -> None:
        """In the store; where that is gone, it is the next claim that fails, and not this unit."""
        with contextlib.suppress(NgevalError):
            self._add("steps", steps)

    def steps(self) -> int:
        """Of all processes."""
        return self._add("steps", 0)

    def agreed(self, make: Callable[[], T]) -> T:
        """As it is made: a unit is one process's."""
        return make()

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """A process that dies never says so: then torchrun ends this one."""
        self._add("finished", 1)
        while self.rank == 0 and self._add("finished", 0) < self.count:
            meanwhile()
            time.sleep(POLL_SECONDS)

    def _add(self, name: str, amount: int) -> int:
        """To a counter; its new value."""
        with _reachable():
            return int(self.store.add(name, amount))


class InStep(ManyProcesses):
    """Processes that do every unit together, each a part of its samples.

    Attributes:
        group: for the sums over samples.
    """

    def __init__(self, store: Store, rank: int, count: int, device: str) -> None:
        """Make the group, which all do at once.

        Args:
            store: the same one for all.
            rank: this process's number.
            count: how many there are.
            device: where it is computed: ``nccl`` on GPUs, ``gloo`` elsewhere.
        """
        super().__init__(store, rank, count)
        dist.init_process_group(
            "nccl" if torch.device(device).type == "cuda" else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.count,
            timeout=timedelta(hours=6),  # a rank may load a checkpoint, or factor, for long
        )
        self.group = dist.group.WORLD

    def keys(self, missing: Sequence[Key]) -> Iterator[Key]:
        """All, in their order."""
        return iter(missing)

    def count_step(self, steps: int) -> None:
        """Once for all."""
        if self.rank == 0:
            super().count_step(steps)

    def agreed(self, make: Callable[[], T]) -> T:
        """What each process makes for itself; where one fails, all do.

        Raises:
            NgevalError: what a process failed by, on all of them.
        """
        return shards_of(self.group).synchronized(make)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """While the store is asked something.

    Raises:
        NgevalError: it is not there any more.
    """
    try:
        yield
    except dist.DistError as error:
        raise NgevalError(
            "torchrun is not there any more, or its other processes are not; the same command "
            f"with --resume goes on ({f'{error}'.partition(chr(10))[0][:200]})"
        ) from error


def own_device(device: str) -> str:
    """``cuda`` is the GPU of this process's number on its machine.

    >>> own_device("cpu")
    'cpu'
    """
    if device == "cuda" and torchrun.world_size() > 1:  # `Run` checks any other text
        return f"cuda:{torchrun.local_rank()}"
    return device


def _met() -> tuple[Store, int, int]:
    """The store of all processes, this one's number, and how many there are.

    Raises:
        InputError: they cannot be reached.
    """
    found: list[tuple[Store, int, int]] = []
    failed: list[Exception] = []

    def meet() -> None:
        try:
            found.append(next(iter(rendezvous("env://"))))
        except Exception as error:  # told by the thread that waits
            failed.append(error)

    # In a thread, since no signal ends it while it waits for others.
    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    started = time.monotonic()
    while meeting.is_alive():
        meeting.join(POLL_SECONDS)
        if time.monotonic() - started > PATIENCE:
            started = math.inf
            print(
                f"waiting for the other {torchrun.world_size() - 1} processes, as the environment "
                "variables RANK and WORLD_SIZE say; unset them for a run by itself",
                file=sys.stderr,
            )
    if failed:
        raise InputError(
            f"the other processes of torchrun cannot be reached: {failed[0]}; start them with "
            "torchrun -m ngeval …"
        ) from failed[0]
    return found[0]


def _attempt() -> str:
    """A name of this start of all processes: after a restart, torchrun's store is the old one.

    What the processes of an earlier start have claimed there, they may never have finished.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"start {count} of {torchrun.world_size()} processes"


@contextlib.contextmanager
def joined(device: str, *, together: bool) -> Iterator[Ranks]:
    """The processes of this run.

    Args:
        device: where it is computed.
        together: every unit is done by all processes, in step.

    Raises:
        InputError: they cannot be reached.
    """
    if torchrun.world_size() == 1:
        yield OneProcess()
        return
    store, rank, count = _met()
    store = PrefixStore(_attempt(), store)
    if not together:
        yield ManyProcesses(store, rank, count)
        return
    yield InStep(store, rank, count, device)
    dist.destroy_process_group()  # after a failure, it might wait for who is not there
