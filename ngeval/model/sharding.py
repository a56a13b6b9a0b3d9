"""The samples of one problem, in a single process or spread over the ranks of a process group.

In a single process, every method of `Shards` is a plain call.

What has one entry per output (outputs, residuals, the logit kernel, coefficients) is computed by
every rank in full. What passes through the model or holds rows of a Jacobian is computed by each
rank for its own samples: sums over samples are summed over the ranks, and per-sample results are
concatenated in order of samples. All ranks run the same program and meet only in these methods.

A rank may fail alone, out of memory for instance. The ranks therefore report success or failure to
each other before they exchange anything; if one failed, all of them raise the same error, so that a
caller who catches it and continues does so on all ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves, tree_map

from ngeval import errors
from ngeval.errors import EngineError, InputError, NgevalError
from ngeval.utils.memory import OUT_OF_MEMORY, is_out_of_memory

T = TypeVar("T")
V = TypeVar("V")

PIECE_ENTRIES = 2**22
"""Entries that are summed in float64, or hashed, at a time."""

PRIME = 1_000_003
"""The multiplier of the fingerprint's polynomial hash."""


class RankMemoryError(EngineError, MemoryError):
    """A rank is out of memory; raised on every rank."""


class Shards:
    """The samples of one rank of a process group, or of a single process, which has all of them.

    Attributes:
        group: the process group, None for a single process.
        size: the number of ranks.
        rank: the number of this one.
        even: every rank needs the same number of samples.
    """

    size = 1
    rank = 0
    even = False

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.out_of_step = False
        if group is not None:
            self.size = dist.get_world_size(group)
            self.rank = dist.get_rank(group)
            config = str(dist.get_backend_config(group))
            self.on_cpu = "cpu:" in config and "cpu:nccl" not in config
            self.on_cuda = "cuda:nccl" in config

    @property
    def alone(self) -> bool:
        """Whether there is a single process."""
        return self.size == 1

    def local_slice(self, count: int, at_least: int = 0) -> slice:
        """Which of ``count`` samples are this rank's: a contiguous slice, possibly empty.

        Args:
            count: N.
            at_least: extend the slice to this many samples with those of other ranks, for a model
                that cannot run on none.

        Raises:
            InputError: the model needs the same number on each rank, and N is not a multiple.
        """
        base, more = divmod(count, self.size)
        if self.even and more:
            raise InputError(
                f"{count} samples cannot be spread evenly over {self.size} ranks, which the passes "
                "of a model with parameters in parts (fully_shard) need: give a multiple of "
                f"{self.size}, also in each batch of a metric"
            )
        start = self.rank * base + min(self.rank, more)
        stop = start + base + (self.rank < more)
        first = max(0, min(start, count - at_least))
        return slice(first, max(stop, min(count, first + at_least)))

    def local(self, tensor: Tensor) -> Tensor:
        """The entries of this rank's samples along the first dimension."""
        return tensor[self.local_slice(len(tensor))]

    def synchronized(self, action: Callable[[], T]) -> T:
        """Call something that may communicate with other ranks, or may fail on one of them.

        Raises:
            NgevalError: it failed on some rank; raised on all of them.
        """
        return self._agree("synchronized", action)[0]

    def sum(self, compute: Callable[[], T]) -> T:
        """The sum over ranks of a newly computed tensor (or of several in a tuple, list or dict).

        Accumulated in float64 and returned in the tensors' own dtypes, with the same bits on all
        ranks.

        Args:
            compute: this rank's summand, computed without communication. It is overwritten.

        Raises:
            NgevalError: it failed on some rank; raised on all of them.
        """
        if self.alone:
            return compute()
        result, _ = self._agree("sum", compute, lambda result: (_dtypes_and_shapes(result, 0), 0))
        return cast(T, tree_map(self._sum, result))

    def concatenate(self, compute: Callable[[], T]) -> T:
        """The ranks' tensors concatenated along the first dimension, in order of samples.

        Args:
            compute: as for `sum`; lengths may differ between ranks, and be 0.

        Raises:
            NgevalError: it failed on some rank; raised on all of them.
        """
        if self.alone:
            return compute()
        result, lengths = self._agree(
            "concatenate",
            compute,
            lambda result: (_dtypes_and_shapes(result, 1), len(tree_leaves(result)[0])),
        )
        return cast(T, tree_map(lambda tensor: self._concatenate(tensor, lengths), result))

    def gather(self, value: V) -> list[V]:
        """A small picklable value of every rank, in their order."""
        return self._agree("gather", lambda: value, lambda shared: (None, shared))[1]

    def broadcast(self, value: V) -> V:
        """The first rank's value, for a decision that rounding could make differ between ranks."""
        return self.gather(value)[0]

    def exchange(
        self,
        pack: Callable[[], tuple[V, list[Tensor]]],
        destination: int,
        source: int,
        device: torch.device,
    ) -> tuple[V, list[Tensor]]:
        """Send a picklable value and tensors to one rank, and receive those of a different one."""
        (_, tensors), packed = self._agree(
            "exchange",
            pack,
            lambda packed: (None, (packed[0], [(t.shape, t.dtype) for t in packed[1]])),
        )
        value, kinds = packed[source]
        outgoing = [self._transferable(tensor.contiguous()) for tensor in tensors]
        incoming = [
            self._transferable(torch.empty(shape, dtype=dtype, device=device))
            for shape, dtype in kinds
        ]
        moves = [
            dist.P2POp(dist.isend, t, group=self.group, group_peer=destination) for t in outgoing
        ]
        moves += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=source) for t in incoming]
        for work in dist.batch_isend_irecv(moves) if moves else []:
            work.wait()
        return value, [tensor.to(device) for tensor in incoming]

    def check_same(self, fingerprints: dict[str, int]) -> None:
        """Check that all ranks were given the same things, with a fingerprint of each by name.

        Raises:
            InputError: two ranks differ; raised on all ranks.
        """
        first, *others = self.gather(fingerprints)
        for rank, other in enumerate(others, 1):
            for name, fingerprint in first.items():
                if other.get(name) != fingerprint:
                    raise InputError(
                        f"{name} of rank {rank} and of rank 0 differ: every rank of a group makes "
                        "the same Problem, of the whole batch and at the same weights (a loader "
                        "that shuffles? a different seed on each rank?), and ngeval gives each its "
                        "part"
                    )

    def _agree(
        self,
        name: str,
        action: Callable[[], T],
        describe: Callable[[T], tuple[object, Any]] = lambda _: (None, None),
    ) -> tuple[T, list[Any]]:
        """The result of an action that succeeded on all ranks, and what each of them shares.

        ``describe`` gives what must be equal on all ranks that compute the same thing, and what to
        share with the other ranks.
        """
        if self.alone:
            result = action()
            return result, [describe(result)[1]]
        if self.out_of_step:
            raise EngineError(
                "the ranks have lost step earlier (see the first error); start the group again"
            )
        try:
            result = action()
        except Exception as error:  # any failure has to reach the other ranks
            if not _is_agreed(error):
                self._report(error)
            raise
        signature, shared = describe(result)
        return result, self._report(None, (name, signature), shared)

    def _report(
        self, error: Exception | None, signature: object = None, shared: object = None
    ) -> list[Any]:
        """Report this rank's outcome to all ranks; return what all share if none failed."""
        reports: list[Any] = [None] * self.size
        report = (_described(error), signature, shared)
        dist.all_gather_object(reports, report, group=self.group)
        failed, signatures, values = zip(*reports, strict=True)
        if any(failed):
            raise _agreed_error(failed, self.size) from error
        if any(other != signatures[0] for other in signatures):
            self.out_of_step = True
            raise _marked(
                EngineError(
                    "the ranks of the group do not compute the same thing: all must ask for the "
                    "same, in the same order, on the same kind of machine"
                )
            )
        return list(values)

    def _transferable(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it on a device from which the group's backend can send."""
        if tensor.is_cuda and not self.on_cuda:
            return tensor.cpu()
        if not tensor.is_cuda and not self.on_cpu:
            return tensor.to(torch.device("cuda", torch.cuda.current_device()))
        return tensor

    def _sum(self, tensor: Tensor) -> Tensor:
        """In place where possible; coarser dtypes in pieces, since a float64 copy may be large."""
        total = tensor.contiguous()
        exact = total.dtype == torch.float64 or not total.is_floating_point()
        for piece in [total.view(-1)] if exact else total.view(-1).split(PIECE_ENTRIES):
            buffer = self._transferable(piece if exact else piece.to(torch.float64))
            dist.all_reduce(buffer, group=self.group)
            if buffer is not piece:
                piece.copy_(buffer)
        return total

    def _concatenate(self, tensor: Tensor, lengths: list[int]) -> Tensor:
        whole = tensor.new_empty(sum(lengths), *tensor.shape[1:])
        whole[sum(lengths[: self.rank]) :][: len(tensor)] = tensor
        for rank, part in enumerate(whole.split(lengths)):
            if part.numel():
                buffer = self._transferable(part)
                dist.broadcast(buffer, group=self.group, group_src=rank)
                if buffer is not part:
                    part.copy_(buffer)
        return whole


SINGLE = Shards()
"""A single process."""


def shards_of(group: object) -> Shards:
    """This process's part of a group's samples; None, or a group of one, is a single process.

    Args:
        group: a ``torch.distributed.ProcessGroup``.

    Raises:
        InputError: it is not a process group, or this process is not in it.
    """
    if group is None:
        return SINGLE
    if dist.is_available() and isinstance(group, ProcessGroup):
        return Shards(group) if dist.get_world_size(group) > 1 else SINGLE
    raise InputError(
        f"group is {group!r}; give a torch.distributed process group that this process is in "
        "(torch.distributed.group.WORLD after init_process_group), or None"
    )


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A hash of tensors' bits, dtypes and shapes, equal on any device.

    It detects mistakes; it is not secure against deliberate collisions.
    """
    value = 0
    for tensor in tensors:
        value = value * PRIME + zlib.crc32(repr((tensor.dtype, tuple(tensor.shape))).encode())
        if not tensor.numel():
            continue
        words = (torch.uint8, torch.int16, torch.int32, torch.int64)
        flat = tensor.detach().contiguous().reshape(-1)
        bits = flat.view(words[min(flat.element_size(), 8).bit_length() - 1])
        for piece in bits.split(PIECE_ENTRIES):
            odd = torch.arange(1, 2 * len(piece), 2, device=piece.device)
            value = value * PRIME + int((piece.to(torch.int64) * odd).sum())
        value %= 2**63
    return value


def _dtypes_and_shapes(result: object, leading: int) -> list[object]:
    """Of the tensors in a result, without their leading dimensions."""
    return [(str(leaf.dtype), tuple(leaf.shape[leading:])) for leaf in tree_leaves(result)]


def _described(error: Exception | None) -> tuple[type[Exception], str] | None:
    """An error's class, one that every rank can make from a message, and its message."""
    if error is None:
        return None
    if is_out_of_memory(error):
        line = str(error).partition("\n")[0][:100]
        text = line if OUT_OF_MEMORY in line else f"{OUT_OF_MEMORY} ({line})"
        return RankMemoryError, text
    if isinstance(error, NgevalError):
        return next(k for k in type(error).__mro__ if hasattr(errors, k.__name__)), str(error)
    return EngineError, f"{type(error).__name__}: {error}"


def _agreed_error(described: Sequence[tuple[type[Exception], str] | None], size: int) -> Exception:
    """One error for all ranks: of the common class of those raised, with the first message."""
    failed = [(rank, *error) for rank, error in enumerate(described) if error is not None]
    kinds, texts = {kind for _, kind, _ in failed}, {text for _, _, text in failed}
    rank, kind, text = failed[0]
    if len(failed) < size or len(texts) > 1:
        text = f"rank {rank} of {size}: {text}"
    return _marked(kind(text) if len(kinds) == 1 else EngineError(text))


def _marked(error: Exception) -> Exception:
    """Mark an error that is raised on all ranks, so that no rank reports it again."""
    error.agreed_on = True  # type: ignore[attr-defined]  # our own mark, on errors of any class
    return error


def _is_agreed(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is raised on all ranks."""
    while error is not None:
        if getattr(error, "agreed_on", False):
            return True
        error = error.__cause__
    return False
