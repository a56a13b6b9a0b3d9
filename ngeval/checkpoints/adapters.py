"""PEFT adapters on a base model that is loaded once: made trainable, strictly, base untouched."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ngeval.checkpoints.reading import listed, read_state
from ngeval.errors import CheckpointError, NgevalError
from ngeval.utils.optional import optional_module

PROMPTS_BY_ENCODER = ("P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
"""Virtual tokens that are not themselves the trained parameters, or not plainly so."""

MEGATRON = "megatron.core"
"""What every LoRA configuration has as ``megatron_core``, a module that PEFT may import."""

SIZES = {"LORA": "r", "PROMPT_TUNING": "num_virtual_tokens", "PREFIX_TUNING": "num_virtual_tokens"}
"""Under which name a configuration has a dimension of the adapter's tensors, by type."""


class AlignedOutputs(nn.Module):
    """A PEFT model without the outputs at its virtual tokens: one for each token of the input.

    Prompt tuning puts virtual tokens before those that it is given, and returns logits for both.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap a PEFT model."""
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits ``(N, T, C)`` for T tokens, or ``(N, C)``."""
        logits: Tensor = self.model(**inputs).logits
        tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if logits.ndim != 3 or tokens is None:
            return logits
        return logits[:, -tokens.shape[1] :]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        CheckpointError: it cannot be read, or is no PEFT configuration.
    """
    path = folder / "adapter_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise CheckpointError(f"{path} has no peft_type, so it is no PEFT adapter's configuration")
    saved, task_type = content.get("modules_to_save"), content.get("task_type")
    names = isinstance(saved, list) and all(isinstance(name, str) for name in saved)
    if not (saved is None or names) or not isinstance(task_type, str | None):
        raise CheckpointError(f"{path}: modules_to_save or task_type is not what PEFT writes there")
    if reason := _unsupported(content):
        raise CheckpointError(f"{path}: {reason}")
    return content


def _unsupported(content: dict[str, Any]) -> str:
    """Why an adapter of this configuration cannot be graded; empty if it can."""
    kind = content["peft_type"]
    if kind in PROMPTS_BY_ENCODER or content.get("prefix_projection"):
        return (
            f"{kind}{' with prefix_projection' if content.get('prefix_projection') else ''} trains "
            "an encoder of virtual tokens whose weights PEFT does not save, so its update cannot "
            "be graded; prompt tuning and plain prefix tuning can"
        )
    if content.get("megatron_core") not in (None, MEGATRON):
        return (
            f"megatron_core is {str(content['megatron_core'])[:80]!r}, a module that PEFT would "
            "import, which was refused"
        )
    if content.get("target_parameters"):
        return "target_parameters (LoRA on bare parameters) is not supported; use target_modules"
    return ""


class AdapterLoader:
    """Adapters, one after the other, on one base model."""

    def __init__(self, base: nn.Module) -> None:
        """Keep the base model, whose weights are shared and never changed."""
        self.base = base
        self._model: nn.Module | None = None
        self._made_for: Any = None

    def load(self, folder: Path, *, allow_pickle: bool = False) -> nn.Module:
        """The base model with an adapter, whose parameters alone are trainable.

        Adapters of one configuration (the checkpoints of a run) are the same module, filled anew.

        Args:
            folder: what PEFT's ``save_pretrained`` wrote.
            allow_pickle: unpickle ``adapter_model.bin`` with code; only for files that you trust.

        Raises:
            CheckpointError: unreadable, NaN weights, the adapter and the base do not fit, or it
                has nothing trainable.
            DependencyError: peft is not installed.
        """
        state = read_state(folder, allow_pickle=allow_pickle)
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{folder}: {name!r} holds NaN or infinite values")
        told = read_adapter_config(folder)
        _check_sizes(folder, told, state)
        key = (told, sorted(state))
        with _peft_errors(folder):
            if self._model is None or key != self._made_for:
                self._model, self._made_for = _adapted(self.base, folder, told, state), key
            _fill(self._model, state, folder)
        if not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise CheckpointError(f"{folder} has nothing trainable: there is no update to grade")
        return AlignedOutputs(self._model) if _is_prompt(self._model) else self._model


def _check_sizes(folder: Path, told: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuse a configuration whose tensors would be larger than those that there are.

    PEFT makes them before it finds that the file's do not fit, and may take all of the memory.
    """
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    name = SIZES.get(told["peft_type"], "")
    ranks = told.get("rank_pattern") if name == "r" else None
    numbers = [told.get(name), *(ranks.values() if isinstance(ranks, dict) else ())]
    for number in numbers:
        if isinstance(number, int | float) and number > largest:
            raise CheckpointError(
                f"{folder}: {name} is {number}, and no tensor of the adapter is as large"
            )


def _adapted(
    base: nn.Module, folder: Path, told: dict[str, Any], state: dict[str, Tensor]
) -> nn.Module:
    """A model of the adapter's configuration over the base's weights."""
    peft = optional_module("peft")
    if told["peft_type"] not in peft.PeftType.__members__:
        raise CheckpointError(
            f"{folder}: this version of peft knows no adapters of type {told['peft_type']!r}"
        )
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if hasattr(config, "prompt_tuning_init"):  # else it asks for a tokenizer
        config.prompt_tuning_init = "RANDOM"
    # Initialisations with a name (pissa, olora, …) take something off the base's weights.
    in_place = isinstance(getattr(config, "init_lora_weights", None), str)
    copied = copy.deepcopy(base) if in_place else _sharing(base)
    model: nn.Module = peft.get_peft_model(copied, config)
    # Memory of its own for what is trained in place (biases) or was saved with the adapter.
    of_base = {parameter.data_ptr() for parameter in base.parameters()}
    for name, parameter in model.named_parameters():
        if (parameter.requires_grad or name in state) and parameter.data_ptr() in of_base:
            parameter.data = parameter.detach().clone()
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Load an adapter's weights; every trainable parameter must get its own."""
    found = optional_module("peft").set_peft_model_state_dict(model, state)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = [] if _is_prompt(model) else [n for n in found.missing_keys if n in trainable]
    # With bias="all" PEFT saves a saved head's bias once more under its inner name.
    unknown = [n for n in found.unexpected_keys if ".modules_to_save." not in n]
    unexpected = [] if _is_prompt(model) else unknown
    problems = {"missing": missing, "unexpected": unexpected}
    listed_problems = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if listed_problems:
        raise CheckpointError(
            f"{folder} does not fit the base model; " + "; ".join(listed_problems)
        )


def _is_prompt(model: nn.Module) -> bool:
    config: Any = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _sharing(base: nn.Module) -> nn.Module:
    """A copy of the modules that shares the parameters' and buffers' memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in base.parameters()
    }
    memo |= {id(buffer): buffer for buffer in base.buffers()}
    return copy.deepcopy(base, memo)


@contextlib.contextmanager
def _peft_errors(folder: Path) -> Iterator[None]:
    """Say which adapter it was that PEFT could not bring together with the base model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice to those who train
            yield
    except NgevalError:
        raise
    except Exception as error:  # whatever PEFT raises on a configuration or a state
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} does not fit the base model: {type(error).__name__}: {text}"
        ) from error
