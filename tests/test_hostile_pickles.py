"""A pickle that would run code, in every container that is read: refused, and nothing has run.

What the pickles would call makes a file, the canary; after every test it must not be there.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

import ngeval
from ngeval.checkpoints import CheckpointLoader, find_checkpoints, read_optimizer, read_state
from ngeval.checkpoints.adapters import AdapterLoader, read_adapter_config
from ngeval.cli.app import app
from ngeval.errors import CheckpointError, OutputError, TaskError
from ngeval.results.table_files import read_results

STATE = {"weight": torch.arange(12.0).reshape(3, 4) / 7, "bias": torch.zeros(3)}


class RunsCode:
    """Makes a file where it is unpickled, and is a state dict then."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return make_file, (str(self.place),)


def make_file(place):
    Path(place).write_text("the code ran")
    return STATE


@pytest.fixture
def canary(tmp_path):
    """A pickle's call; at the end it has not happened."""
    place = tmp_path / "the-code-ran"
    yield RunsCode(place)
    assert not place.exists()


def as_zip(content, path):
    torch.save(content, path)


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def as_old_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=0))


def as_tar(content, path):
    """The format before torch 0.1.10 had: a tar of pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(content)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def as_deflated_zip(content, path):
    """A zip that was compressed afterwards."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def as_pickle_before_a_zip(content, path):
    """Begins as a pickle, ends as the zip of a harmless one."""
    harmless = io.BytesIO()
    torch.save(STATE, harmless)
    path.write_bytes(pickle.dumps(content) + harmless.getvalue())


CONTAINERS = (
    *(as_zip, as_legacy, as_pickle, as_old_pickle, as_tar, as_deflated_zip),
    as_pickle_before_a_zip,
)
SHAPES = {
    "itself": lambda hostile: hostile,
    "entry": lambda hostile: STATE | {"extra": hostile},
    "key": lambda hostile: {"state_dict": STATE, "callbacks": {"EarlyStopping": [hostile]}},
    "hyperparameters": lambda hostile: {
        "state_dict": STATE,
        "hyper_parameters": {"lr": 0.1, "collate": (hostile,)},
    },
}


def assert_refused(error, name, container):
    """The message says which file, and where the format lets it be read, what would be called."""
    assert name in str(error.value)
    if container is not as_tar:
        assert "asks to run code" in str(error.value)
        assert "make_file" in str(error.value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container(tmp_path, canary, container, suffix, shape):
    path = tmp_path / f"hostile{suffix}"
    container(SHAPES[shape](canary), path)
    checkpoint = find_checkpoints([str(path)])[0]
    _ = checkpoint.optimizer, checkpoint.epoch
    with pytest.raises(CheckpointError) as error:
        CheckpointLoader(nn.Linear(4, 3)).load(checkpoint)
    assert_refused(error, path.name, container)
    with pytest.raises(CheckpointError) as error:
        read_optimizer(path)
    assert_refused(error, path.name, container)


@pytest.mark.parametrize("container", CONTAINERS)
def test_under_the_name_of_safetensors(tmp_path, canary, container):
    path = tmp_path / "hostile.safetensors"
    container(canary, path)
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors cannot be read"):
        read_state(path)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_as_a_shard(tmp_path, canary, container, kind):
    safetensors.torch.save_file({"weight": STATE["weight"]}, tmp_path / "one.safetensors")
    container({"bias": canary}, tmp_path / "pytorch_model-00002.bin")
    places = {"weight": "one.safetensors", "bias": "pytorch_model-00002.bin"}
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError) as error:
        read_state(tmp_path)
    assert_refused(error, "pytorch_model-00002.bin", container)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin"])
def test_as_an_optimizer_state_beside_a_checkpoint(tmp_path, canary, container, name):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file(STATE, folder / "model.safetensors")
    container({"state": {}, "param_groups": [canary]}, folder / name)
    (checkpoint,) = find_checkpoints([str(tmp_path)])
    with pytest.raises(CheckpointError) as error:
        read_optimizer(checkpoint.optimizer)
    assert_refused(error, name, container)


ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["0"], "task_type": None}


class TestAdapter:
    def folder(self, tmp_path, **told):
        text = json.dumps(ADAPTER | told)
        (tmp_path / "adapter_config.json").write_text(text)
        return tmp_path

    def weights(self, tmp_path):
        front = "base_model.model.0.lora_"
        state = {f"{front}A.weight": torch.ones(2, 4), f"{front}B.weight": torch.ones(3, 2)}
        safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")

    @pytest.mark.parametrize("container", CONTAINERS)
    def test_weights(self, tmp_path, canary, container):
        container({"a": canary}, self.folder(tmp_path) / "adapter_model.bin")
        with pytest.raises(CheckpointError) as error:
            AdapterLoader(nn.Sequential(nn.Linear(4, 3))).load(tmp_path)
        assert_refused(error, "adapter_model.bin", container)

    def test_no_module_of_the_configuration_is_imported(self, tmp_path, monkeypatch, canary):
        (tmp_path / "evil_module.py").write_text(f"open({str(canary.place)!r}, 'w')")
        monkeypatch.syspath_prepend(tmp_path)
        mapping = {"base_model_class": "X", "parent_library": "evil_module"}
        places = {"base_model_name_or_path": "../elsewhere", "auto_mapping": mapping}
        self.weights(self.folder(tmp_path, **places))
        loaded = AdapterLoader(nn.Sequential(nn.Linear(4, 3))).load(tmp_path)
        assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == 2 * 4 + 3 * 2
        self.folder(tmp_path, megatron_config={"a": 1}, megatron_core="evil_module")
        with pytest.raises(CheckpointError, match=r"evil_module.*refused"):
            read_adapter_config(tmp_path)

    def test_sizes_that_the_file_does_not_have(self, tmp_path):
        self.weights(tmp_path)
        for output in ({"r": 10**9}, {"rank_pattern": {"0": 10**12}}, {"r": float("inf")}):
            self.folder(tmp_path, **output)
            with pytest.raises(CheckpointError, match="no tensor of the adapter is as large"):
                AdapterLoader(nn.Sequential(nn.Linear(4, 3))).load(tmp_path)


TASK = """
import torch
import ngeval

def load_batches(batch_size, num_batches, seed):
    for _ in range(num_batches or 2):
        yield torch.ones(batch_size, 4), torch.zeros(batch_size, dtype=torch.long)

task = ngeval.Task("tiny", lambda: torch.nn.Linear(4, 3), load_batches, "categorical")
"""


class TestCommandLine:
    @pytest.fixture
    def line(self, tmp_path):
        (tmp_path / "tiny_hostile.py").write_text(TASK)
        safetensors.torch.save_file(STATE, tmp_path / "good.safetensors")
        task = f"{tmp_path / 'tiny_hostile.py'}:task"
        return ["gamma", "--task", task, "--batch-size", "4", "--num-batches", "1", "--quiet"]

    @pytest.mark.parametrize("container", CONTAINERS)
    def test_checkpoint(self, tmp_path, canary, line, container):
        path = tmp_path / "hostile.ckpt"
        container({"state_dict": STATE, "callbacks": canary}, path)
        done = CliRunner().invoke(app, [*line, "--checkpoint", str(path)])
        assert done.exit_code in (2, 3), done.output
        assert "hostile.ckpt" in done.stderr
        assert "Traceback" not in done.output

    def test_optimizer_state(self, tmp_path, canary, line):
        path = tmp_path / "state.pt"
        torch.save({"state": {}, "param_groups": [canary]}, path)
        good = ["--checkpoint", str(tmp_path / "good.safetensors")]
        output = ["--methods", "adamw", "--optimizer-state", str(path)]
        done = CliRunner().invoke(app, [*line, *good, *output])
        assert done.exit_code in (2, 3), done.output
        assert "state.pt" in done.stderr
        assert "make_file" in done.stderr


class TestHubFolder:
    """A model folder with code of its own, which runs with --trust-remote-code alone."""

    @pytest.fixture
    def folder(self, tmp_path, canary):
        place = tmp_path / "model"
        place.mkdir()
        (place / "evil.py").write_text(f"open({str(canary.place)!r}, 'w')\nclass X: pass\n")
        autos = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoImageProcessor")
        output = {"model_type": "evil", "architectures": ["X"]}
        output["auto_map"] = dict.fromkeys(autos, "evil.X")
        (place / "config.json").write_text(json.dumps(output))
        (place / "tokenizer_config.json").write_text(json.dumps(output))
        return place

    @pytest.mark.filterwarnings("ignore")  # of transformers' own imports
    def test_model(self, folder):
        from ngeval.tasks.hf.models import HubModel  # noqa: PLC0415

        with pytest.raises(TaskError, match=r"asks to run Python code.*refused"):
            HubModel.of(str(folder), [], None, None, trust_remote_code=False)

    @pytest.mark.filterwarnings("ignore")
    def test_command(self, folder):
        line = ["gamma", "--hf-model", str(folder), "--dataset", "glue", "--subset", "sst2"]
        done = CliRunner().invoke(app, [*line, "--batch-size", "2"])
        assert done.exit_code == 2, done.output
        assert "asks to run Python code" in done.stderr

    @pytest.mark.parametrize("container", [as_zip, as_legacy])
    @pytest.mark.filterwarnings("ignore")
    def test_weights_of_a_folder_that_transformers_reads(self, tmp_path, canary, container):
        container({"a": canary}, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        with pytest.raises(CheckpointError) as error:
            CheckpointLoader(nn.Linear(4, 3)).load(find_checkpoints([str(tmp_path)])[0])
        assert_refused(error, "pytorch_model.bin", container)


@pytest.mark.parametrize("content", ["pickle", "python"])
def test_a_folder_of_data(tmp_path, canary, content):
    """Neither CIFAR's pickles nor a data set's script run."""
    from ngeval.tasks.hf.sources import load_rows  # noqa: PLC0415

    if content == "pickle":
        (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": canary, b"labels": [0]}))
    else:
        (tmp_path / f"{tmp_path.name}.py").write_text(f"open({str(canary.place)!r}, 'w')")
    with pytest.raises(TaskError):
        load_rows("cifar10", None, "test", tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_results_that_are_a_pickle(tmp_path, canary, suffix):
    path = tmp_path / f"results{suffix}"
    path.write_bytes(pickle.dumps(canary))
    with contextlib.suppress(OutputError):  # bytes may make a table of nonsense, and no more
        read_results(path)


def test_objects_in_a_parquet_file_stay_bytes(tmp_path, canary):
    table = pd.DataFrame({"method": [pickle.dumps(canary)]})
    table.to_parquet(tmp_path / "results.parquet")
    assert isinstance(read_results(tmp_path / "results.parquet")["method"][0], bytes)


LOADERS = {"load", "loads", "Unpickler", "read_pickle", "fromfile", "memmap", "dynamic_module"}
GUARDED = {
    ("checkpoints/reading.py", "np.load"): "np.load(path, allow_pickle=False)",
    ("checkpoints/distributed.py", "import pickle"): "if name not in CLASSES.get(module, ()):",
    ("checkpoints/distributed.py", "pickle.Unpickler"): "class _Unpickler(pickle.Unpickler)",
    ("checkpoints/distributed.py", "pickle.UnpicklingError"): "raise pickle.UnpicklingError",
    ("checkpoints/reading.py", "torch.load"): "weights_only=not allow_pickle",
    ("tasks/hf/cifar.py", "pickle.Unpickler"): "class _ArrayUnpickler(pickle.Unpickler)",
    ("tasks/hf/cifar.py", "np.fromfile"): "np.fromfile(path, np.uint8)",
}
"""Every place where bytes become objects, and what makes it harmless."""
DANGEROUS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}


def readers_of_objects():
    root = Path(ngeval.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, attribute = node.value.id, node.attr
                numpy = module in ("np", "numpy") and attribute in LOADERS
                if (
                    module in DANGEROUS
                    or numpy
                    or f"{module}.{attribute}" in (*("torch.load", "pd.read_pickle", "torch.jit"),)
                ):
                    yield name, f"{module}.{attribute}", path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names}
                module = getattr(node, "module", None)
                if module:
                    names = {module.partition(".")[0]}
                for result in names & DANGEROUS:
                    yield name, f"import {result}", path


def test_every_place_that_could_unpickle_is_known():
    result = {(name, what): path for name, what, path in readers_of_objects()}
    known = {
        key for key in result if key in GUARDED or key == ("tasks/hf/cifar.py", "import pickle")
    }
    assert set(result) == known
    assert set(GUARDED) <= set(result)
    for key, text in GUARDED.items():
        assert text in result[key].read_text(encoding="utf-8")


def test_trust_in_remote_code_is_never_on_by_itself():
    root = Path(ngeval.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                assert not (isinstance(node.value, ast.Constant) and node.value.value), path
