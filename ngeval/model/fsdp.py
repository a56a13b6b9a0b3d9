"""Models whose frozen layers are too large for one device: parameters kept in parts by FSDP2.

``torch.distributed.fsdp.fully_shard`` keeps a part of a module's parameters on each rank, and
gathers them for the duration of a pass. All ranks take part in every pass and must therefore run
the same number of passes, which they do if all have the same number of samples and rows come from
the layer engine. Trainable parameters have to be whole on every rank, as vectors of length P are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ngeval.errors import ModelError
from ngeval.model.sharding import Shards


def split_parameters(model: nn.Module, shards: Shards) -> frozenset[str]:
    """The names of parameters that FSDP2 keeps in parts, after putting them into that state.

    Args:
        model: any model.
        shards: this process's samples; marked as `Shards.even` if there are such parameters.

    Raises:
        ModelError: this model cannot be treated in this group.
    """
    if not isinstance(model, nn.Module):  # an error that `check_model` raises
        return frozenset()
    reshard(model)
    split = {n: p for n, p in model.named_parameters() if _is_distributed(p)}
    if not split:
        return frozenset()
    by_fsdp = {id(p) for module in sharded_modules(model) for p in module.parameters()}
    for name, parameter in split.items():
        where = f"parameter {name!r} is a DTensor, spread over ranks"
        if shards.group is None:
            raise ModelError(f"{where}: give Problem the group of these ranks, group=…")
        if parameter.requires_grad:
            raise ModelError(
                f"{where}, and trainable; ngeval needs trainable parameters whole on every rank: "
                "name them in fully_shard(module, ignored_params=…), or freeze them"
            )
        if id(parameter) not in by_fsdp:
            raise ModelError(
                f"{where}, but by no fully_shard (tensor parallelism?), which ngeval does not "
                "treat: use torch.distributed.fsdp.fully_shard, or whole parameters"
            )
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]  # of a DTensor
        if mesh.size() != shards.size:
            raise ModelError(
                f"{where}, of which there are {mesh.size()}, and {shards.size} in the Problem's "
                "group: both must have the same"
            )
    shards.even = True
    return frozenset(split)


def reshard(model: nn.Module) -> None:
    """Reduce each rank's parameters to its part, as before a pass."""
    for module in sharded_modules(model):
        module.reshard()


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that `fully_shard` was called on; none if it was never imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def _is_distributed(parameter: nn.Parameter) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(parameter, tensor.DTensor)
