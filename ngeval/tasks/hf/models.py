"""Hugging Face models, tokenizers and image processors, loaded strictly and without their code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ngeval.checkpoints.adapters import read_adapter_config
from ngeval.checkpoints.finding import is_adapter
from ngeval.errors import TaskError, nearest_name
from ngeval.tasks.hf.hub import loading, resolve_name
from ngeval.utils.optional import optional_module
from ngeval.utils.text import first_line, listed

OBJECTIVES = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "image": "AutoModelForImageClassification",
}
"""The objectives of models, and the class of transformers that loads each."""

ENDINGS = {
    "ForSequenceClassification": "classification",
    "ForImageClassification": "image",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
TASK_TYPES = {"SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification", "CAUSAL_LM": "causal"}
MAX_POSITIONS = 2**31
"""The limit of a model without absolute positions."""

HEADS = ("classifier", "score")
"""The modules that PEFT saves with an adapter for sequence classification."""


@dataclass(frozen=True)
class HubModel:
    """A model of transformers that is not loaded yet.

    Attributes:
        objective: a key of `OBJECTIVES`.
        adapters: the content of ``adapter_config.json`` of each adapter that will be put on it.
        attention: ``eager``, ``sdpa``, …; None is the default of transformers.
    """

    name: str
    config: Any
    objective: str
    adapters: Sequence[dict[str, Any]]
    attention: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        adapters: Sequence[str],
        objective: str | None,
        attention: str | None,
        trust_remote_code: bool,
    ) -> HubModel:
        """Read the configurations of a model and of its adapters, and find out its objective."""
        transformers = optional_module("transformers")
        if is_adapter(Path(name)) and not (Path(name) / "config.json").is_file():
            base = read_adapter_config(Path(name)).get("base_model_name_or_path") or "its base"
            raise TaskError(
                f"model {name!r} is a PEFT adapter; give its base with --hf-model (its "
                f"configuration says {base}) and the adapter with --adapter"
            )
        with loading(name, "model"):
            config = transformers.AutoConfig.from_pretrained(
                **resolve_name(name, "model"), trust_remote_code=trust_remote_code
            )
        contents = [read_adapter_config(Path(a)) for a in adapters if is_adapter(Path(a))]
        chosen = objective or _objective(config, contents)
        if chosen is None:
            raise TaskError(
                f"the objective of model {name!r} ({', '.join(config.architectures or ['?'])}) is "
                f"unknown; choose one with --objective (objective=): {', '.join(OBJECTIVES)}"
            )
        if chosen not in OBJECTIVES:
            raise TaskError(f"unknown objective {chosen!r}; {nearest_name(chosen, OBJECTIVES)}")
        auto = getattr(transformers, OBJECTIVES[chosen])
        if type(config) not in auto._model_mapping and not getattr(config, "auto_map", None):
            by = "" if objective or not contents else f", which {adapters[0]} is for"
            raise TaskError(
                f"model {name!r} ({config.model_type}) has no form for {chosen}{by}; give a "
                "different model or a different --objective"
            )
        return cls(name, config, chosen, contents, attention, trust_remote_code)

    @property
    def has_prompt(self) -> bool:
        """Whether an adapter puts virtual tokens before the text."""
        return any(content["peft_type"] == "PROMPT_TUNING" for content in self.adapters)

    @property
    def positions(self) -> int:
        """The number of positions that the model has an embedding for, if it is limited."""
        count = getattr(self.config, "max_position_embeddings", None)
        return count if isinstance(count, int) and count > 0 else MAX_POSITIONS

    @property
    def has_head(self) -> bool:
        """Whether the model's own weights include a classifier."""
        return any(
            name.endswith(("ForSequenceClassification", "ForImageClassification"))
            for name in self.config.architectures or []
        )

    def build(self, num_labels: int | None) -> nn.Module:
        """The model with its weights, all of them trainable, in eval mode.

        ``num_labels`` is the number of classes of a head that an adapter brings; other weights must
        not be missing.
        """
        transformers = optional_module("transformers")
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        if num_labels is not None and not self.has_head:
            options["num_labels"] = num_labels
        with loading(self.name, "model"), warnings.catch_warnings(action="ignore"):
            auto = getattr(transformers, OBJECTIVES[self.objective])
            model, report = auto.from_pretrained(
                **resolve_name(self.name, "model"), output_loading_info=True, **options
            )
        saved = {name for a in self.adapters for name in a.get("modules_to_save") or ()}
        if any(content.get("task_type") == "SEQ_CLS" for content in self.adapters):
            saved.update(HEADS)
        missing = [key for key in report["missing_keys"] if not saved & set(key.split("."))]
        if missing:
            raise TaskError(
                f"model {self.name!r} has no weights for {listed(sorted(missing))}, as "
                f"{type(model).__name__} needs; give a model that was trained for "
                f"{self.objective}, or an adapter that brings them (modules_to_save)"
            )
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False  # only generation needs the cache
        evaluated: nn.Module = model.eval()
        return evaluated

    def processor(self, place: str | None, kind: str) -> Any:
        """The model's ``AutoTokenizer`` or ``AutoImageProcessor``, or that of another place."""
        name = place or self.name
        what = "tokenizer" if kind == "AutoTokenizer" else "image processor"
        folder = Path(name).expanduser()
        if kind == "AutoTokenizer" and folder.is_dir() and not _has_tokenizer(folder):
            # transformers would build a tokenizer without a vocabulary.
            raise TaskError(_no_processor(what, name, "the folder has none of its files"))
        transformers = optional_module("transformers")
        with warnings.catch_warnings(action="ignore"):
            try:
                return getattr(transformers, kind).from_pretrained(
                    **resolve_name(name, what), trust_remote_code=self.trust_remote_code
                )
            except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
                reason = first_line(error, 200)
                raise TaskError(_no_processor(what, name, reason)) from error


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "added_tokens.json")
    return any(next(folder.glob(name), None) is not None for name in names)


def _no_processor(what: str, name: str, why: str) -> str:
    return (
        f"no {what} in {name!r} ({why}); save it there with its save_pretrained, or name its "
        "folder with --processor (processor=)"
    )


def _objective(config: Any, adapters: Sequence[dict[str, Any]]) -> str | None:
    """The objective in the configurations of the adapters and the model, or None."""
    for content in adapters:
        if content.get("task_type") in TASK_TYPES:
            return TASK_TYPES[content["task_type"]]
    for architecture in config.architectures or []:
        for ending, objective in ENDINGS.items():
            if architecture.endswith(ending):
                return objective
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    return "image" if hasattr(config, "image_size") else None
