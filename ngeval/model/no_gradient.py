"""Why a model's outputs have no gradient: which module's code cuts it off."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ngeval.model.autograd import autograd_enabled, leaves_of
from ngeval.model.function import ModelFunction

CURE = "remove it from forward, or freeze those parameters"


def why_no_gradient(function: ModelFunction) -> str | None:
    """The reason why no output depends on a trainable parameter, run on one sample.

    None where the outputs have a gradient, or where the model fails to run.
    """
    watch = _Watch(function.model)
    single = function.on(slice(0, 1))
    try:
        with watch, autograd_enabled():
            outputs = single(leaves_of(single.parameters), fused=True)
    except Exception:  # the caller has the error
        return None
    if outputs.requires_grad:
        return None
    if watch.disabled is not None:
        outer, inner = watch.disabled
        return (
            f"the outputs have no gradient: {outer} calls {inner} under torch.no_grad() or "
            f"torch.inference_mode(); {CURE}"
        )
    if watch.cut is not None:
        return (
            f"the outputs have no gradient: {watch.cut} returns tensors that are cut off from its "
            f"parameters or inputs (.detach(), .data, torch.no_grad(), NumPy); {CURE}"
        )
    listed = ", ".join(list(function.parameters)[:3]) + ", …" * (len(function.parameters) > 3)
    return (
        f"the outputs depend on no trainable parameter ({listed}): forward uses none of them; set "
        "requires_grad_(True) on parameters that it uses"
    )


class _Watch(contextlib.ExitStack):
    """Watches the calls of all modules.

    Attributes:
        disabled: the first module that disabled gradients, and the one that it called.
        cut: the first module to return that has a gradient at its inputs or parameters, or inside,
            and none at its outputs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.disabled: tuple[str, str] | None = None
        self.cut: str | None = None
        self._seen = False  # a gradient at the outputs of any module
        self._calls: list[tuple[str, bool]] = []
        for name, module in model.named_modules():
            described = f"{name or 'the model'} ({type(module).__name__})"

            def enter(_module: nn.Module, _args: Any, described: str = described) -> None:
                enabled = torch.is_grad_enabled()
                if not enabled and self.disabled is None and self._calls and self._calls[-1][1]:
                    self.disabled = (self._calls[-1][0], described)
                self._calls.append((described, enabled))

            def leave(
                module: nn.Module, args: Any, kwargs: Any, output: Any, described: str = described
            ) -> None:
                self._calls.pop()
                own = module.parameters(recurse=False)
                entered = self._seen or _any_tracked((args, kwargs, list(own)))
                self._seen = self._seen or _any_tracked(output)
                if self.cut is None and entered and not _any_tracked(output):
                    self.cut = described

            self.enter_context(module.register_forward_pre_hook(enter))
            self.enter_context(module.register_forward_hook(leave, with_kwargs=True))


def _any_tracked(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(tree))
