"""The samples of one problem over the ranks of a process group.

What lives in logit space (outputs, residuals, Θ and its factorisation, coefficients) every rank
has whole, and computes alike. What passes through the model, or holds rows of a Jacobian, a rank
has for its own samples alone: sums over samples are added up over the ranks, and what there is for
each sample is joined in order of samples. All ranks run the same program; what is computed here
holds no other rank's work between two such meetings.

A rank may fail by itself (out of memory). Before anything is exchanged, the ranks tell each other
whether their part went well; if one did not, all raise the same error, so that whoever goes on
after a failure goes on in step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_flatten, tree_unflatten

from ngeval import errors
from ngeval.errors import EngineError, InputError, NgevalError
from ngeval.utils.memory import OUT_OF_MEMORY, is_out_of_memory

T = TypeVar("T")
Kind = TypeVar("Kind")

PIECE = 2**22
"""Entries that are added up in float64, or taken into a fingerprint, together."""

PRIME = 1_000_003
"""Multiplies a fingerprint before the next piece's is added."""


class RankMemoryError(EngineError, MemoryError):
    """A rank is out of memory, and every rank says so."""


class Shards:
    """Of a single process, which has all samples: everything is only called.

    Attributes:
        size: how many ranks there are.
        rank: this one's number.
        group: the process group, None for a process by itself.
        even: every rank needs equally many samples.
    """

    size = 1
    rank = 0
    group: ProcessGroup | None = None
    even = False

    @property
    def alone(self) -> bool:
        """Whether there is a single process."""
        return self.size == 1

    def own(self, count: int) -> slice:
        """This rank's samples of so many: a contiguous part, empty where ranks outnumber them.

        Raises:
            InputError: they cannot be spread evenly, where they have to be.
        """
        base, more = divmod(count, self.size)
        if self.even and more:
            raise InputError(
                f"{count} samples cannot be spread evenly over {self.size} ranks, which the passes "
                "of a model with parameters in parts (fully_shard) need: give a multiple of "
                f"{self.size}, also in each batch of a metric"
            )
        start = self.rank * base + min(self.rank, more)
        return slice(start, start + base + (self.rank < more))

    def part(self, tensor: Tensor) -> Tensor:
        """The rows (first dimension) of this rank's samples."""
        return tensor

    def together(self, action: Callable[[], T]) -> T:
        """Do something that may exchange with other ranks, or may fail on one of them.

        Raises:
            NgevalError: an action failed on some rank; raised on all of them.
        """
        return action()

    def total(self, compute: Callable[[], T]) -> T:
        """The sum over ranks of a tensor (or several in a tuple, list or dict) made afresh.

        Added up in float64, and returned in the tensors' own dtypes, with the same bits on all
        ranks.

        Args:
            compute: this rank's part; it must exchange nothing. What it returns is overwritten.

        Raises:
            NgevalError: it failed on some rank; raised on all of them.
        """
        return compute()

    def joined(self, compute: Callable[[], T]) -> T:
        """The ranks' tensors one after another along the first dimension, in order of samples.

        Args:
            compute: as for `total`; the first dimension may differ between ranks, and be 0.

        Raises:
            NgevalError: it failed on some rank; raised on all of them.
        """
        return compute()

    def gathered(self, value: Kind) -> list[Kind]:
        """A small picklable value of every rank, in their order."""
        return [value]

    def numbers(self, value: int) -> list[int]:
        """A whole number of every rank, in their order."""
        return [value]

    def decided(self, answer: bool) -> bool:
        """The first rank's answer: for a decision that rounding could turn out otherwise."""
        return answer

    def passed(self, tensors: list[Tensor], to: int | None, made: list[Tensor], by: int) -> None:
        """Send tensors to one rank (None: to nobody) and fill others with what one sends."""
        raise EngineError("a single process has nobody to pass anything to")

    def check_same(self, what: dict[str, int]) -> None:
        """Refuse ranks that were given different things.

        Args:
            what: fingerprints, by what they are of.

        Raises:
            InputError: it names a rank and the thing; raised on all ranks.
        """


SINGLE = Shards()
"""Of a process by itself."""


class GroupShards(Shards):
    """Of a rank of a process group."""

    def __init__(self, group: ProcessGroup) -> None:
        """Take one's place in the group."""
        self.group: ProcessGroup = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        config = str(dist.get_backend_config(group))
        self.on_cpu = "cpu:" in config and "cpu:nccl" not in config
        self.on_cuda = "cuda:nccl" in config
        self.out_of_step = False

    def part(self, tensor: Tensor) -> Tensor:
        """The rows (first dimension) of this rank's samples."""
        return tensor[self.own(len(tensor))]

    def together(self, action: Callable[[], T]) -> T:
        """See `Shards.together`."""
        return self._agreed(action, lambda _: "together")[0]

    def total(self, compute: Callable[[], T]) -> T:
        """See `Shards.total`."""
        made, _ = self._agreed(compute, lambda made: ("total", _forms(made, first=0)))
        leaves, spec = tree_flatten(made)
        found: T = tree_unflatten([self._sum(leaf) for leaf in leaves], spec)
        return found

    def joined(self, compute: Callable[[], T]) -> T:
        """See `Shards.joined`."""
        made, lengths = self._agreed(compute, lambda made: ("joined", _forms(made, first=1)))
        leaves, spec = tree_flatten(made)
        found: T = tree_unflatten([self._joined(leaf, lengths) for leaf in leaves], spec)
        return found

    def gathered(self, value: Kind) -> list[Kind]:
        """See `Shards.gathered`."""
        self._agreed(lambda: None, lambda _: "gathered")
        return self._objects(value)

    def numbers(self, value: int) -> list[int]:
        """See `Shards.numbers`."""
        return self._agreed(lambda: None, lambda _: "numbers", value)[1]

    def decided(self, answer: bool) -> bool:
        """See `Shards.decided`."""
        return bool(self.numbers(int(answer))[0])

    def passed(self, tensors: list[Tensor], to: int | None, made: list[Tensor], by: int) -> None:
        """See `Shards.passed`; a rank that is to get nothing gives no tensors to fill."""
        sent = [self._carried(tensor.contiguous()) for tensor in tensors] if to is not None else []
        filled = [self._carried(tensor) for tensor in made]
        moves = [dist.P2POp(dist.isend, t, group=self.group, group_peer=to) for t in sent]
        moves += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=by) for t in filled]
        for work in dist.batch_isend_irecv(moves) if moves else []:
            work.wait()
        for tensor, carried in zip(made, filled, strict=True):
            if carried is not tensor:
                tensor.copy_(carried)

    def check_same(self, what: dict[str, int]) -> None:
        """See `Shards.check_same`."""
        everyone = self.gathered(what)
        for rank, other in enumerate(everyone):
            for name, fingerprint in everyone[0].items():
                if other.get(name) != fingerprint:
                    raise InputError(
                        f"{name} of rank {rank} and of rank 0 differ: every rank of a group makes "
                        "the same Problem, of the whole batch and at the same weights (a loader "
                        "that shuffles? a seed of each rank's own?), and ngeval gives each its part"
                    )

    def _agreed(
        self, action: Callable[[], T], signature: Callable[[T], object], number: int | None = None
    ) -> tuple[T, list[int]]:
        """What an action gives, once it went well on all ranks, and a number of each.

        Args:
            action: what may fail.
            signature: of what it gives, the same on all ranks that do the same.
            number: to tell the others; default: the length of what is given.
        """
        if self.out_of_step:
            raise EngineError(
                "the ranks have lost step earlier (see the first error); start the group anew"
            )
        try:
            made = action()
        except Exception as error:
            if not _is_agreed(error):
                self._meet(error, 0, 0)
            raise
        leaves = tree_flatten(made)[0]
        first = leaves[0] if leaves else None
        length = len(first) if isinstance(first, Tensor) and first.ndim else 0
        sign = zlib.crc32(repr(signature(made)).encode())
        return made, self._meet(None, sign, length if number is None else number)

    def _meet(self, error: Exception | None, sign: int, number: int) -> list[int]:
        """Tell all ranks how it went here, and hear how it went there: their numbers."""
        own = torch.tensor([int(error is not None), sign, number], dtype=torch.int64)
        own = self._carried(own)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        told = torch.stack(found).tolist()
        if any(failed for failed, _, _ in told):
            raise _agreed_error(self._objects(_told(error)), self.size) from error
        if len({sign for _, sign, _ in told}) > 1:
            self.out_of_step = True
            raise _marked(
                EngineError(
                    "the ranks of the group do not compute the same thing: all must ask for the "
                    "same, in the same order, on the same kind of machine"
                )
            )
        return [number for _, _, number in told]

    def _objects(self, value: Kind) -> list[Kind]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def _carried(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it where the group can carry it."""
        if tensor.is_cuda and not self.on_cuda:
            return tensor.cpu()
        if not tensor.is_cuda and not self.on_cpu:
            return tensor.to(torch.device("cuda", torch.cuda.current_device()))
        return tensor

    def _sum(self, tensor: Tensor) -> Tensor:
        """In place where that can be; coarser dtypes piece by piece, for a copy may be large."""
        whole = tensor.contiguous()
        exact = whole.dtype == torch.float64 or not whole.is_floating_point()
        for piece in [whole.view(-1)] if exact else whole.view(-1).split(PIECE):
            wide = piece if exact else piece.to(torch.float64)
            carried = self._carried(wide)
            dist.all_reduce(carried, group=self.group)
            if carried is not piece:
                piece.copy_(carried)
        return whole

    def _joined(self, tensor: Tensor, lengths: list[int]) -> Tensor:
        whole = tensor.new_empty(sum(lengths), *tensor.shape[1:])
        start = 0
        for rank, length in enumerate(lengths):
            place = whole[start : start + length]
            start += length
            if place.numel() == 0:
                continue
            if rank == self.rank:
                place.copy_(tensor)
            carried = self._carried(place)
            dist.broadcast(carried, group=self.group, group_src=rank)
            if carried is not place:
                place.copy_(carried)
        return whole


def shards_of(group: object) -> Shards:
    """A rank's place in a group; that of a process by itself for None, or for a group of one.

    Args:
        group: a ``torch.distributed.ProcessGroup``.

    Raises:
        InputError: it is none, or this process is not in it.
    """
    if group is None:
        return SINGLE
    if dist.is_available() and isinstance(group, ProcessGroup):
        return GroupShards(group) if dist.get_world_size(group) > 1 else SINGLE
    raise InputError(
        f"group is {group!r}; give a torch.distributed process group that this process is in "
        "(torch.distributed.group.WORLD after init_process_group), or None"
    )


def at_least(own: slice, few: int, count: int) -> slice:
    """A rank's samples with others' until there are a few: a model may not run on none."""
    start = max(0, min(own.start, count - few))
    return slice(start, max(own.stop, min(count, start + few)))


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that tells tensors apart by their bits, dtypes and shapes; equal on any device.

    It guards against mistakes, not against anybody who wants two tensors to pass for one.
    """
    found = 0
    for tensor in tensors:
        found = found * PRIME + zlib.crc32(repr((tensor.dtype, tuple(tensor.shape))).encode())
        if not tensor.numel():
            continue
        words = (torch.uint8, torch.int16, torch.int32, torch.int64)
        flat = tensor.detach().contiguous().reshape(-1)
        bits = flat.view(words[min(flat.element_size(), 8).bit_length() - 1])
        for piece in bits.split(PIECE):
            places = torch.arange(1, 2 * len(piece), 2, device=piece.device)
            found = found * PRIME + int((piece.to(torch.int64) * places).sum())
        found %= 2**63
    return found


def _forms(made: object, first: int) -> list[object]:
    """Dtypes and shapes of the tensors in what was made, without some leading dimensions."""
    return [(str(leaf.dtype), tuple(leaf.shape[first:])) for leaf in tree_flatten(made)[0]]


def _told(error: Exception | None) -> tuple[str, str] | None:
    """The kind of an error, by the name of an error of ngeval's or "" or "memory", and its text."""
    if error is None:
        return None
    if is_out_of_memory(error):
        line = str(error).partition("\n")[0][:100]
        return "memory", line if OUT_OF_MEMORY in line else f"{OUT_OF_MEMORY} ({line})"
    if isinstance(error, NgevalError):
        known = (kind.__name__ for kind in type(error).__mro__)
        return next(name for name in known if hasattr(errors, name)), str(error)
    return "", f"{type(error).__name__}: {error}"


def _agreed_error(told: list[tuple[str, str] | None], size: int) -> Exception:
    """One error for all ranks: of the failed ones' common class, in the words of the first."""
    failed = [(rank, *one) for rank, one in enumerate(told) if one is not None]
    kinds, texts = {kind for _, kind, _ in failed}, {text for _, _, text in failed}
    rank, kind, text = failed[0]
    if len(failed) < size or len(texts) > 1:
        text = f"rank {rank} of {size}: {text}"
    if kinds == {"memory"}:
        return _marked(RankMemoryError(text))
    known: type[Exception] = getattr(errors, kind, EngineError) if len(kinds) == 1 else EngineError
    return _marked(known(text))


def _marked(error: Exception) -> Exception:
    """An error that all ranks have, so that none need tell of it again."""
    error.agreed_on = True  # type: ignore[attr-defined]
    return error


def _is_agreed(error: BaseException | None) -> bool:
    """Whether all ranks have this error, or what it was made of."""
    while error is not None:
        if getattr(error, "agreed_on", False):
            return True
        error = error.__cause__
    return False
