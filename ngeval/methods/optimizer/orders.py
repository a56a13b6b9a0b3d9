"""In which orders training programs give a model's parameters to an optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")
"""Names of parameters that transformers' Trainer spares from weight decay."""


def orders_of(optimizer: Optimizer, model: nn.Module, sizes: Sequence[int]) -> Iterator[list[str]]:
    """Orders of parameter names for groups of some sizes that have none, likely ones first.

    Args:
        optimizer: as it is built here.
        model: whose parameters it holds.
        sizes: how many parameters each of the file's groups has.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        [names[id(p)] for p in group["params"] if id(p) in names]
        for group in optimizer.param_groups
    ]
    if [len(group) for group in groups] == list(sizes) and len(sizes) > 1:
        yield [name for group in groups for name in group]
    held = {name for group in groups for name in group}
    trainable = [name for name in names.values() if name in held]
    if len(sizes) == 2:
        for first in (_decayed(model), _matrices(model)):
            decayed = [name for name in trainable if name in first]
            if len(decayed) == sizes[0] and len(trainable) == sum(sizes):
                yield decayed + [name for name in trainable if name not in first]
    if len(sizes) == 1:
        for order in (trainable, list(names.values())):
            if len(order) == sizes[0]:
                yield order


def _decayed(model: nn.Module) -> set[str]:
    """Parameters with weight decay in transformers' Trainer: no biases, nothing of a norm."""
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    names = [name for name, _ in model.named_parameters()]
    return {n for n in names if n not in spared and not UNDECAYED.search(n.lower())}


def _matrices(model: nn.Module) -> set[str]:
    """Parameters with weight decay where a program goes by their dimensions."""
    return {name for name, p in model.named_parameters() if p.ndim >= 2}
