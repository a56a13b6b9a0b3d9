"""From options to a `Run`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from ngeval.checkpoints import Checkpoint, find_checkpoints
from ngeval.errors import CheckpointError, InputError, check_choice
from ngeval.methods.stage import OptimizerOptions
from ngeval.runs.options import SHARDS, HubOptions, RunOptions, parse_bytes, parse_dtype
from ngeval.runs.ranks import own_device
from ngeval.runs.run import Run
from ngeval.tasks import Task, get_task, source_of
from ngeval.utils import torchrun

HUB_NAMES = {"hf_model": "model", "adapter": "adapters"}
"""Options that have a different name in `ngeval.tasks.hf.hub_task`."""


def make_run(options: RunOptions) -> Run:
    """The run that options describe; an error names what does not exist or go together."""
    torch.set_float32_matmul_precision("highest")  # TF32 would cost three digits on a GPU
    torch.backends.cudnn.allow_tf32 = False
    dtype, memory = parse_dtype(options.dtype), parse_bytes(options.memory)
    step = OptimizerOptions(options.reduction, options.weight_decay, options.allow_pickle)
    check_choice("shard", options.shard, SHARDS)
    if (options.task is None) == (options.hf_model is None):
        raise InputError("give either --task or --hf-model (with --dataset)")
    more = list(options.more or [])
    if options.task is not None:
        _refuse_hub_options(options)
        task, patterns = get_task(options.task), [*(options.checkpoint or []), *more]
        if not patterns:
            raise InputError("no checkpoint given; name files, folders or globs with --checkpoint")
        checkpoints = find_checkpoints(patterns)
    else:
        task, checkpoints = _hub_run(options, more)
    _check_loading(options, checkpoints)
    num_units = len(checkpoints) * options.num_batches
    few = options.shard == "auto" and num_units < torchrun.world_size()
    return Run(
        task,
        checkpoints,
        batch_size=options.batch_size,
        num_batches=options.num_batches,
        seed=options.seed,
        device=own_device(options.device),
        dtype=dtype,
        engine=options.engine,
        memory=memory,
        allow_pickle=options.allow_pickle,
        checkpoint_key=options.checkpoint_key,
        strict=options.strict,
        optimizer_states=options.optimizer_state or (),
        optimizer_options=step,
        together=options.shard == "samples" or few,
        source=source_of(options.task) if options.task is not None else None,
    )


def _check_loading(options: RunOptions, checkpoints: list[Checkpoint]) -> None:
    """Refuse options of whole models' files for what is not one."""
    flag = "--checkpoint-key" if options.checkpoint_key is not None else "--no-strict"
    if options.checkpoint_key is None and options.strict:
        return
    for checkpoint in checkpoints:
        if checkpoint.is_adapter or checkpoint.as_built:
            kind = "a PEFT adapter" if checkpoint.is_adapter else "graded as it is"
            raise InputError(f"{flag} is for files of whole models; {checkpoint.name} is {kind}")


def _refuse_hub_options(options: RunOptions) -> None:
    for field in fields(HubOptions):
        if getattr(options, field.name) != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            raise InputError(f"{flag} goes with --hf-model, not with --task")


def _hub_run(options: RunOptions, more: list[str]) -> tuple[Task, list[Checkpoint]]:
    """A Hugging Face task with its adapters, its checkpoints, or the model as it is."""
    # transformers takes seconds to import
    from ngeval.tasks.hf import hub_task  # noqa: PLC0415
    from ngeval.tasks.hf.hub import adapter_folder  # noqa: PLC0415

    if options.dataset is None:
        raise InputError("--hf-model needs a --dataset: glue, cifar10, a name on the hub, a folder")
    if options.adapter and options.checkpoint:
        raise InputError("give --adapter or --checkpoint, not both: grade them in separate runs")
    patterns = [*(options.adapter or options.checkpoint or []), *more]
    if options.adapter:
        patterns = [adapter_folder(name) for name in patterns]
    checkpoints = find_checkpoints(patterns)
    whole = [c.name for c in checkpoints if not c.is_adapter]
    if options.adapter and whole:
        raise CheckpointError(
            f"{whole[0]} is not a PEFT adapter (it has no adapter_config.json); checkpoints of the "
            "whole model go with --checkpoint"
        )
    names = [field.name for field in fields(HubOptions)]
    arguments = {HUB_NAMES.get(name, name): getattr(options, name) for name in names} | {
        "adapters": [c.name for c in checkpoints if c.is_adapter],
        "columns": _parts(options.columns),
        "label_words": _parts(options.label_words),
    }
    task = hub_task(**arguments)
    return task, checkpoints or [Checkpoint(Path(arguments["model"]), {}, as_built=True)]


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []
