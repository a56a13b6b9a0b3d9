"""Checkpoint files, and the JSON and optimizer states beside them.

The first byte says what file the others are; see `KINDS`.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from ngeval.checkpoints import CheckpointLoader, find_checkpoints, read_optimizer
from ngeval.errors import NgevalError
from ngeval.tasks.hf.cifar import read_cifar
from tests.fuzz.oracle import canary
from tests.fuzz.targets.base import (
    Target,
    as_json,
    damaged,
    emptied,
    json_values,
    names,
    remembered,
)

KINDS = (
    *("a.safetensors", "a.pt", "a.ckpt", "pytorch_model.bin", "header", "state.pt"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json"),
    *("a.json", "checkpoint-5/trainer_state.json", "a.optimizer.pt", "optimizer.pt", "test_batch"),
    *("config.json", "step-5/.metadata", "a.npz"),
)
"""Which file an input is; ``header`` is the JSON of a safetensors file, ``state.pt`` a pickle's
opcodes in the zip that ``torch.save`` writes."""

STATE = {"weight": torch.arange(12.0).reshape(3, 4) / 7, "bias": torch.zeros(3)}
SHARDS = ("one.safetensors", "two.bin")
OPCODES = (
    b"()0125.FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x93\x94"
)
MOST = 8
"""Checkpoints of one input."""


def attempt(data: bytes, folder: Path) -> None:
    """Find, read and load what the bytes are, as a command would."""
    emptied(folder)
    kind, content = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    _lay_out(folder, kind, content)
    if kind == "test_batch":
        read_cifar("cifar10", folder, "test")
        return
    errors = []
    model = nn.Linear(4, 3)
    for checkpoint in find_checkpoints([str(folder)])[:MOST]:
        _ = checkpoint.name, checkpoint.epoch, checkpoint.step, checkpoint.is_adapter
        for read in (_load(model, checkpoint), _optimizer(checkpoint)):
            try:
                read()
            except NgevalError as error:
                errors.append(error)
    if errors:
        raise errors[0]


def _load(model: nn.Module, checkpoint: Any) -> Callable[[], object]:
    return lambda: CheckpointLoader(model).load(checkpoint)


def _optimizer(checkpoint: Any) -> Callable[[], object]:
    def read() -> None:
        if checkpoint.optimizer is not None:
            read_optimizer(checkpoint.optimizer)

    return read


def _lay_out(folder: Path, kind: str, content: bytes) -> None:
    """The file itself, and what must lie beside it for it to be read."""
    if kind == "header":
        size = struct.pack("<Q", len(content))
        (folder / "a.safetensors").write_bytes(size + content + bytes(64))
        return
    if kind == "state.pt":
        (folder / kind).write_bytes(zipped(content))
        return
    place = folder / kind
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(content)
    if kind in ("a.json", "a.optimizer.pt"):
        (folder / "a.safetensors").write_bytes(_saved()["safetensors"])
    if kind.endswith(".index.json"):
        for name in SHARDS:
            (folder / name).write_bytes(_saved()[name.partition(".")[2]])
    if kind in ("adapter_config.json", "config.json", "optimizer.pt"):
        name = "adapter_model" if kind == "adapter_config.json" else "model"
        (folder / f"{name}.safetensors").write_bytes(_saved()["safetensors"])
    if kind == "optimizer.pt":
        (folder / "config.json").write_text("{}")
    if kind == "step-5/.metadata":
        (place.parent / "__0_0.distcp").write_bytes(_saved()["shards"])
    elif "/" in kind:
        (place.parent / "config.json").write_text("{}")
        (place.parent / "model.safetensors").write_bytes(_saved()["safetensors"])


def zipped(opcodes: bytes) -> bytes:
    """A pickle as ``torch.save`` lays it into a zip."""
    built = io.BytesIO()
    with zipfile.ZipFile(built, "w") as archive:
        parts = {"data.pkl": opcodes, "byteorder": b"little", "data/0": bytes(48), "version": b"3"}
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), content)
    return built.getvalue()


class Hostile:
    """Calls the canary where it is unpickled."""

    def __reduce__(self) -> Any:
        """What to call on loading."""
        return canary, ("unpickled",)


@cache
def _saved() -> dict[str, bytes]:
    """Valid files: a state dict in every format, an optimizer's state, hostile pickles."""
    optimizer = torch.optim.Adam(nn.Linear(4, 3).parameters())
    lightning = {"state_dict": STATE, "optimizer_states": [optimizer.state_dict()], "epoch": 3}
    metadata, shards = _distributed()
    return {
        "metadata": metadata,
        "shards": shards,
        "npz": _arrays(),
        "safetensors": safetensors.torch.save(STATE),
        "bin": _torch(STATE),
        "legacy": _torch(STATE, _use_new_zipfile_serialization=False),
        "ckpt": _torch(lightning),
        "optimizer": _torch(optimizer.state_dict()),
        "hostile": _torch({"state_dict": STATE, "callbacks": Hostile()}),
        "hostile legacy": _torch(Hostile(), _use_new_zipfile_serialization=False),
        "hostile pickle": pickle.dumps(Hostile()),
    }


def _distributed() -> tuple[bytes, bytes]:
    """The ``.metadata`` and the one file of shards of ``torch.distributed.checkpoint``."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        save({"model": STATE, "step": 3}, checkpoint_id=name, no_dist=True)
        (shards,) = Path(name).glob("*.distcp")
        return (Path(name) / ".metadata").read_bytes(), shards.read_bytes()


def _arrays() -> bytes:
    built = io.BytesIO()
    np.savez(built, **{name: tensor.numpy() for name, tensor in STATE.items()})
    return built.getvalue()


def _torch(value: object, **options: Any) -> bytes:
    built = io.BytesIO()
    torch.save(value, built, **options)
    return built.getvalue()


def _of(kind: str, content: bytes) -> bytes:
    return bytes([KINDS.index(kind)]) + content


@remembered
def seeds() -> list[bytes]:
    """Valid files of every kind, and pickles that would run code."""
    saved = _saved()
    header = saved["safetensors"][8 : 8 + struct.unpack("<Q", saved["safetensors"][:8])[0]]
    with zipfile.ZipFile(io.BytesIO(saved["bin"])) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        opcodes = archive.read(name)
    pickles = ("bin", "legacy", "ckpt", "hostile", "hostile legacy", "hostile pickle")
    return [
        _of("a.safetensors", saved["safetensors"]),
        *(_of(kind, saved[name]) for kind in ("a.pt", "a.ckpt") for name in pickles),
        _of("pytorch_model.bin", saved["bin"]),
        _of("header", header),
        _of("state.pt", opcodes),
        _of("model.safetensors.index.json", as_json(_index())),
        _of("pytorch_model.bin.index.json", as_json(_index())),
        _of("adapter_config.json", as_json(_adapter())),
        _of("a.json", b'{"epoch": 3, "step": 400, "train_loss": 0.5}'),
        _of("checkpoint-5/trainer_state.json", b'{"epoch": 1.5, "global_step": 5}'),
        _of("config.json", b'{"architectures": ["X"], "auto_map": {"AutoModel": "evil.X"}}'),
        *(_of(kind, saved["optimizer"]) for kind in ("a.optimizer.pt", "optimizer.pt")),
        _of("test_batch", _cifar()),
        *(_of(kind, saved["hostile pickle"]) for kind in ("test_batch", "step-5/.metadata")),
        *(_of("step-5/.metadata", saved["metadata"]), _of("a.npz", saved["npz"])),
    ]


def _index() -> dict[str, Any]:
    places = {"weight": "one.safetensors", "bias": "two.bin"}
    return {"metadata": {"total_size": 60}, "weight_map": places}


def _adapter() -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["0"],
        "task_type": None,
        "base_model_name_or_path": "../elsewhere",
        "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
    }


def _cifar() -> bytes:
    content = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}
    return pickle.dumps(content, protocol=2)


@st.composite
def _header(draw: st.DrawFn) -> bytes:
    """A safetensors header: tensors with dtypes, shapes and offsets, most of them wrong."""
    number = st.integers(-1, 64) | st.sampled_from([2**31, 2**40, 2**63, 2**64, 1e3])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "I64", "BF16", "BOOL", "F8_E4M3", "X", ""]),
            "shape": st.lists(number, max_size=4),
            "data_offsets": st.lists(number, min_size=2, max_size=3),
        }
    )
    tensors = draw(st.dictionaries(names(), entry | json_values(["dtype"]), max_size=4))
    content = as_json(tensors)
    if draw(st.booleans()) and b"{" in content:  # a key twice
        content = content[:1] + b'"a": 1, "a": 2, '[: 16 if tensors else 14] + content[1:]
    return _of("header", content)


@st.composite
def _opcodes(draw: st.DrawFn) -> bytes:
    """A pickle of opcodes in any order, after a beginning that makes some sense."""
    front = draw(st.sampled_from([b"\x80\x02}", b"\x80\x02}(", b"\x80\x04]", b""]))
    part = st.one_of(
        st.sampled_from([bytes([sign]) for sign in OPCODES]),
        st.sampled_from(
            [
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"ctorch\nFloatStorage\n",
                b"ccollections\nOrderedDict\n",
                b"cfuzz.oracle\ncanary\n",
                b"cbuiltins\nbytearray\n",
                b"cos\nsystem\n",
                b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
                b"ctorch\nSize\n",
                b"X\x06\x00\x00\x00weight",
                b"X\xff\xff\xff\x7fx",
                b"\x8d\xff\xff\xff\xff\xff\xff\xff\x00",
                b"X\x07\x00\x00\x00storage",
                b"J\xff\xff\xff\x7f",
                b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x00",
                b"K\x03",
                b"q\x01",
                b"h\x01",
                b"\x85" * 2000,
            ]
        ),
        st.binary(max_size=3),
    )
    body = b"".join(draw(st.lists(part, max_size=16))) + b"."
    kind = draw(
        st.sampled_from(["state.pt", "a.pt", "optimizer.pt", "test_batch", "step-5/.metadata"])
    )
    return _of(kind, front + body)


def structured() -> st.SearchStrategy[bytes]:
    """Headers, opcodes and JSON of the right form, and valid files that are damaged."""
    keys = {
        "model.safetensors.index.json": ["weight_map", "weight", "bias", *SHARDS],
        "pytorch_model.bin.index.json": ["weight_map", "weight", "bias", *SHARDS],
        "adapter_config.json": [*_adapter(), "LORA", "IA3", "PROMPT_TUNING", "num_virtual_tokens"],
        "a.json": ["epoch", "step"],
        "checkpoint-5/trainer_state.json": ["epoch", "global_step"],
        "config.json": ["architectures", "auto_map"],
    }
    documents = [
        json_values(words).map(lambda value, kind=kind: _of(kind, as_json(value)))
        for kind, words in keys.items()
    ]
    places = st.dictionaries(names(), st.sampled_from(SHARDS) | names(), max_size=3)
    indexes = places.map(lambda told: _of(KINDS[6], as_json({"weight_map": told})))
    adapters = st.dictionaries(st.sampled_from([*_adapter()]), json_values(["0"]), max_size=4).map(
        lambda told: _of("adapter_config.json", as_json(_adapter() | told))
    )
    whole = damaged(st.sampled_from(seeds()))
    return st.one_of(_header(), _opcodes(), indexes, adapters, *documents, whole, whole, whole)


with contextlib.suppress(ImportError):
    import peft  # noqa: F401  (before the audit hook listens: it looks for many a file)

TARGET = Target(
    "checkpoints",
    0.60,
    attempt,
    seeds,
    structured,
    words=(
        *("weight_map", "peft_type", "LORA", "dtype", "shape", "data_offsets", "F32", "epoch"),
        *("__metadata__", "state_dict", "param_groups", "one.safetensors", "two.bin", "../x"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cfuzz.oracle\ncanary\n", b"PK\x03\x04"),
        *(b"\x85\x85\x85\x85", b"(K\x03K\x04\x86", json.dumps([2**63]), "NaN", "Infinity"),
    ),
)
