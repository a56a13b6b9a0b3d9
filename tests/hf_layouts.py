"""Tiny Hugging Face models, tokenizers, adapters and data sets, saved in the layouts of users."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

WORDS = (
    "the film was a quiet joy and everyone left happy",
    "a dull plot ruined by noise",
    "positive negative acceptable unacceptable entailment neutral contradiction duplicate not_ en",
    "sst2 sentence: premise: hypothesis: question: equivalent not_equivalent",
)
FAMILIES = ("t5", "bert", "gpt", "vit", "resnet")
IMAGE_FAMILIES = ("vit", "resnet")
TASK_TYPES = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "gpt": "CAUSAL_LM"}
LORA_TARGETS = {
    "t5": ["q", "v"],
    "bert": ["query", "value"],
    "gpt": ["c_attn"],
    "vit": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
}
WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(kind: str = "t5") -> Any:
    """A byte-level BPE trained on a few sentences: ``</s>`` ends a text of T5, BERT has pairs."""
    model = Tokenizer(models.BPE(unk_token=None))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(WORDS, trainer)
    if kind == "t5":
        model.post_processor = processors.TemplateProcessing(
            "$A </s>", special_tokens=[("</s>", 1)]
        )
    if kind == "bert":
        model.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", "<s> $A </s> $B:1 </s>:1", special_tokens=[("</s>", 1), ("<s>", 2)]
        )
    pad = {} if kind == "gpt" else {"pad_token": "<pad>"}
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", bos_token="<s>", model_input_names=names, **pad
    )


def build(family: str, attention: str = "sdpa", labels: int = 2, vocabulary: int = 320) -> Any:
    """A tiny model of a family, with random weights that are none of them zero."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"attn_implementation": attention}
    if family == "t5":
        config = transformers.T5Config(
            vocab_size=vocabulary, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
            decoder_start_token_id=0, use_cache=False, **options,
        )  # fmt: skip
        model: Any = transformers.T5ForConditionalGeneration(config)
    elif family == "bert":
        config = transformers.BertConfig(
            vocab_size=vocabulary, intermediate_size=32, max_position_embeddings=64,
            num_labels=labels, **WIDTH, **options,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    elif family == "gpt":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=4, n_positions=64, use_cache=False,
            **options,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    elif family == "vit":
        config = transformers.ViTConfig(
            intermediate_size=32, image_size=16, patch_size=4, num_labels=labels, **WIDTH, **options
        )
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
            num_labels=labels,
        )  # fmt: skip
        model = transformers.ResNetForImageClassification(config)
    return stirred(model).eval()


def stirred(model: nn.Module, seed: int = 0) -> Any:
    """The model with noise on all that is trainable: nothing is left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter))
    return model


def adapter_config(family: str, how: str, **options: Any) -> Any:
    """A PEFT configuration."""
    task_type = TASK_TYPES.get(family)
    if how == "lora":
        extra = {"modules_to_save": ["classifier"]} if family in IMAGE_FAMILIES else {}
        return peft.LoraConfig(
            task_type=task_type, r=2, target_modules=LORA_TARGETS[family], **extra | options
        )
    if how == "ia3":
        extra = (
            {"target_modules": LORA_TARGETS[family], "feedforward_modules": []}
            if family in IMAGE_FAMILIES
            else {}
        )
        return peft.IA3Config(task_type=task_type, **extra | options)
    kinds = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    return kinds[how](task_type=task_type, num_virtual_tokens=3, **options)


def adapted(base: nn.Module, config: Any, seed: int = 1) -> Any:
    """The base with a new adapter, away from its initial values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return stirred(peft.get_peft_model(base, config), seed).eval()


def save_base(folder: Path, family: str, **options: Any) -> Path:
    """A model's folder as ``save_pretrained`` leaves it, with its tokenizer or processor."""
    build(family, **options).save_pretrained(folder)
    if family in IMAGE_FAMILIES:
        processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
        processor.save_pretrained(folder)
    else:
        tokenizer(family).save_pretrained(folder)
    return folder


def save_run(folder: Path, base: Path, family: str, config: Any, steps: int = 2) -> Path:
    """A Trainer's run of an adapter: ``checkpoint-10``, ``checkpoint-20``, …."""
    auto = {
        "t5": transformers.AutoModelForSeq2SeqLM,
        "bert": transformers.AutoModelForSequenceClassification,
        "gpt": transformers.AutoModelForCausalLM,
    }.get(family, transformers.AutoModelForImageClassification)
    for step in range(1, steps + 1):
        model = adapted(auto.from_pretrained(base), config, seed=step)
        place = folder / f"checkpoint-{10 * step}"
        model.save_pretrained(place)
        state = {"epoch": step / 2, "global_step": 10 * step}
        (place / "trainer_state.json").write_text(json.dumps(state))
    return folder


def sentences(count: int = 12, seed: int = 0) -> list[str]:
    """Sentences of unequal length."""
    words = " ".join(WORDS[:2]).split()
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(words, size=3 + i % 5)) for i in range(count)]


def picture(seed: int) -> Image.Image:
    """A random image, 32 × 32."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text_batch(family: str) -> tuple[dict[str, Tensor], Tensor]:
    """Five samples of unequal length, by hand and not by ngeval's encoder."""
    generator = torch.Generator().manual_seed(3)
    lengths = [7, 6, 5, 7, 4]
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    ids = torch.randint(3, 50, (5, 7), generator=generator) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "bert":
        return inputs, torch.tensor([0, 1, 1, 0, 1])
    if family == "gpt":
        shifted = torch.cat([ids[:, 1:], torch.zeros(5, 1, dtype=torch.long)], 1)
        following = torch.cat([mask[:, 1:], torch.zeros(5, 1, dtype=torch.long)], 1)
        return inputs, shifted.masked_fill(following == 0, -100)
    targets = torch.randint(3, 50, (5, 3), generator=generator)
    targets[2, 2] = -100
    start = torch.zeros(5, 1, dtype=torch.long)
    return {**inputs, "decoder_input_ids": torch.cat([start, targets[:, :2]], 1)}, targets


def image_batch() -> tuple[dict[str, Tensor], Tensor]:
    """Five images."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(5, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels}, torch.tensor([0, 1, 1, 0, 1])


def pairs(*lists: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The product of some lists of names."""
    return list(itertools.product(*lists))
