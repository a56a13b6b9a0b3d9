"""PEFT adapters on a base model that is loaded once and never changed."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ngeval.checkpoints.finding import read_json
from ngeval.checkpoints.reading import read_state
from ngeval.errors import CheckpointError, foreign_errors
from ngeval.utils.optional import optional_module
from ngeval.utils.text import listed

PROMPTS_BY_ENCODER = ("P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
"""Types whose virtual tokens come from an encoder, which has the trained parameters."""

MEGATRON = "megatron.core"
"""The ``megatron_core`` of every LoRA configuration, a module that PEFT can import."""

SIZES = {"LORA": "r", "PROMPT_TUNING": "num_virtual_tokens", "PREFIX_TUNING": "num_virtual_tokens"}
"""The entry of a configuration that is a dimension of the adapter's tensors, by type."""


OPTIONS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
)
"""The entries of a configuration that scale or shape an adapter's update."""


class AlignedOutputs(nn.Module):
    """A PEFT model with the outputs at the tokens of its input alone.

    Prompt tuning puts virtual tokens before the input's and returns logits for both.
    """

    def __init__(self, model: nn.Module) -> None:
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
    """Read ``adapter_config.json``; a `CheckpointError` unless it is of an adapter to grade."""
    path = folder / "adapter_config.json"
    content = read_json(path)
    if not isinstance(content.get("peft_type"), str):
        raise CheckpointError(f"{path} has no peft_type, so it is not a PEFT configuration")
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
    """Loads adapters, one after the other, on one base model.

    Args:
        base: the base model, whose weights are shared with the adapted one and never changed.

    Attributes:
        remarks: what to know of the last adapter that was loaded, a sentence each.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.remarks: list[str] = []
        self._model: nn.Module | None = None
        self._key: Any = None

    def load(self, folder: Path, *, allow_pickle: bool = False) -> nn.Module:
        """The base model with an adapter, whose parameters alone are trainable.

        Adapters of one configuration (the checkpoints of a run) share one module, so the next call
        changes the model that this one returned.

        Args:
            folder: the folder of PEFT's ``save_pretrained``.
            allow_pickle: unpickle ``adapter_model.bin`` with code; only for files that you trust.

        Raises:
            CheckpointError: the adapter is unreadable, has NaN weights or nothing trainable, or
                does not fit the base.
            DependencyError: peft is not installed.
        """
        state, config = _read(folder, allow_pickle)
        self.remarks = _other_base(folder, config, self.base)
        key = (config, sorted(state))
        failure = f"{folder} does not fit the base model"
        # PEFT warns with advice for training.
        with foreign_errors(CheckpointError, failure), warnings.catch_warnings(action="ignore"):
            if self._model is None or key != self._key:
                self._model, self._key = _adapted(self.base, folder, config, state), key
            _fill(self._model, state, folder)
        if not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise CheckpointError(f"{folder} has nothing trainable: there is no update to grade")
        return AlignedOutputs(self._model) if _is_prompt(self._model) else self._model


def find_peft(model: nn.Module) -> nn.Module | None:
    """The PEFT model that a model is or holds, or None."""
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return None
    return next((part for part in model.modules() if isinstance(part, peft.PeftModel)), None)


def fill_adapter(model: nn.Module, folder: Path, *, allow_pickle: bool = False) -> list[str]:
    """Load an adapter's weights into the PEFT model that a model is or holds.

    Returns:
        What to know of the result, a sentence each.

    Raises:
        CheckpointError: the adapter is unreadable, has NaN weights, or does not fit the model.
    """
    state, config = _read(folder, allow_pickle)
    adapted: Any = find_peft(model)
    present = adapted.active_peft_config.to_dict()
    differing = [
        f"{name} {config[name]!r} instead of {present[name]!r}"
        for name in OPTIONS
        if name in config and name in present and config[name] != present[name]
    ]
    if differing:
        raise CheckpointError(
            f"{folder} does not fit the adapter that the task builds; {listed(differing)}"
        )
    failure = f"{folder} does not fit the adapter that the task builds"
    with foreign_errors(CheckpointError, failure), warnings.catch_warnings(action="ignore"):
        _fill(adapted, state, folder)
    return _other_base(folder, config, adapted.get_base_model())


def _read(folder: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's weights and its configuration, checked."""
    state = read_state(folder, allow_pickle=allow_pickle)
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder}: {name!r} holds NaN or infinite values")
    config = read_adapter_config(folder)
    _check_sizes(folder, config, state)
    return state, config


def _other_base(folder: Path, config: dict[str, Any], base: nn.Module) -> list[str]:
    """A remark if an adapter's configuration names a different base than the one at hand."""
    recorded = config.get("base_model_name_or_path")
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    if not (isinstance(recorded, str) and isinstance(name, str) and recorded and name):
        return []
    if _short_name(recorded) == _short_name(name):
        return []
    return [
        f"{folder} is an adapter of {recorded!r}, by its configuration, but the base is {name!r}: "
        "unless that is the same model under a different name, these numbers mean nothing"
    ]


def _short_name(name: str) -> str:
    """The last part of a model's name, of the hub, of a folder or of the hub's cache."""
    cached = re.search(r"models--(?:.+--)?(.+?)/snapshots/", name)
    return (cached[1] if cached else Path(name).name).lower()


def _check_sizes(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuse a configuration whose tensors would be larger than those in the file.

    PEFT allocates them before it compares them with the file's, and could take all of the memory.
    """
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    name = SIZES.get(config["peft_type"], "")
    ranks = config.get("rank_pattern") if name == "r" else None
    numbers = [config.get(name), *(ranks.values() if isinstance(ranks, dict) else ())]
    for number in numbers:
        if isinstance(number, int | float) and number > largest:
            raise CheckpointError(
                f"{folder}: {name} is {number}, and no tensor of the adapter is as large"
            )


def _adapted(
    base: nn.Module, folder: Path, content: dict[str, Any], state: dict[str, Tensor]
) -> nn.Module:
    """A model of the adapter's configuration over the base's weights."""
    peft = optional_module("peft")
    if content["peft_type"] not in peft.PeftType.__members__:
        raise CheckpointError(
            f"{folder}: this version of peft has no adapters of type {content['peft_type']!r}"
        )
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if hasattr(config, "prompt_tuning_init"):  # any other initialisation needs a tokenizer
        config.prompt_tuning_init = "RANDOM"
    # Initialisations with a name (pissa, olora, …) change the base's weights.
    in_place = isinstance(getattr(config, "init_lora_weights", None), str)
    copied = copy.deepcopy(base) if in_place else _sharing(base)
    model: nn.Module = peft.get_peft_model(copied, config)
    # Biases that are trained and modules that were saved with the adapter must not share memory.
    of_base = {parameter.data_ptr() for parameter in base.parameters()}
    for name, parameter in model.named_parameters():
        if (parameter.requires_grad or name in state) and parameter.data_ptr() in of_base:
            parameter.data = parameter.detach().clone()
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Load an adapter's weights, which every trainable parameter must have."""
    result = optional_module("peft").set_peft_model_state_dict(model, state)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = [] if _is_prompt(model) else [n for n in result.missing_keys if n in trainable]
    # With bias="all" PEFT saves the bias of a saved head a second time, under its inner name.
    unknown = [n for n in result.unexpected_keys if ".modules_to_save." not in n]
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
    """A copy of the modules that shares the memory of parameters and buffers."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in base.parameters()
    }
    memo |= {id(buffer): buffer for buffer in base.buffers()}
    return copy.deepcopy(base, memo)
