"""Files as training programs leave them: what torch loads is loaded, nothing is loaded wrongly."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.utils
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from ngeval import CheckpointError
from ngeval.checkpoints import (
    CheckpointLoader,
    find_checkpoints,
    load_checkpoint,
    read_optimizer,
    read_state,
)
from ngeval.results.hashes import hash_checkpoint
from ngeval.results.manifest import read_run_manifest
from ngeval.results.table_files import read_results
from tests.small_runs import Small, run


def make_model(seed=0):
    torch.manual_seed(seed)
    layers = {
        "conv": nn.Conv1d(1, 2, 3),
        "norm": nn.BatchNorm1d(2),
        "flat": nn.Flatten(),
        "head": nn.Linear(8, 3),
    }
    return nn.Sequential(collections.OrderedDict(layers))


def trained(seed=1):
    model = make_model(seed)
    model(torch.randn(16, 1, 6))  # moves the running statistics
    return model.eval()


MODEL = trained()
STATE = MODEL.state_dict()
AVERAGE = {name: tensor * 3 for name, tensor in STATE.items()}
INPUTS = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(0))


def prefixed(prefix, state=STATE):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def check(model, remarks=(), *, expected=None):
    with torch.no_grad():
        outputs = model.eval()(INPUTS)
        torch.testing.assert_close(outputs, MODEL(INPUTS) if expected is None else expected)


class Options(dict):
    """A dict of a class of its own, as Lightning's hyperparameters are."""


@dataclasses.dataclass
class Settings:
    rate: float = 0.1


class Loud:
    """An object that must not be made."""

    made: list[str] = []  # noqa: RUF012

    def __new__(cls):
        cls.made.append("new")
        return super().__new__(cls)

    def __setstate__(self, state):
        self.made.append("state")


BESIDE = {
    "args": argparse.Namespace(lr=0.1, folder=Path("runs")),
    "best": np.float64(0.9),
    "curve": np.arange(3.0),
    "counts": collections.defaultdict(int, {"a": 1}),
    "lists": collections.defaultdict(list),
    "hyper_parameters": Options(lr=0.1, settings=Settings(), loss=nn.CrossEntropyLoss()),
    "when": datetime.datetime(2026, 1, 2),
    "loud": Loud(),
    "kind": torch.optim.Adam,
}

WRITTEN = {
    **{
        key: {key: STATE, "epoch": 3}
        for key in (
            *("net", "network", "params", "weights", "model_state", "network_weights"),
            *("state_dict_ema", "my_own_key"),
        )
    },
    "the key of the optimizer's state": {
        "model_state": STATE,
        "optimizer_state": torch.optim.Adam(MODEL.parameters()).state_dict(),
    },
    "two levels": {"model": {"state_dict": STATE}, "epoch": 1},
    "three levels": {"state": {"model": {"module": STATE}}, "rng": [(3, (1, 2))]},
    "trained before average": {"state_dict_ema": AVERAGE, "state_dict": STATE},
    "an average of torch": AveragedModel(MODEL).state_dict(),
    "a network and another": {"generator": STATE, "discriminator": nn.Linear(2, 2).state_dict()},
    "a criterion": {"state_dict": prefixed("model.") | {"criterion.weight": torch.ones(3)}},
    "metrics": {"state_dict": prefixed("net.") | {"accuracy.tp": torch.tensor(3)}},
    "data parallel, compiled": {"model": prefixed("module._orig_mod.")},
    "FSDP": prefixed("_fsdp_wrapped_module."),
    "without counts of batches": {k: v for k, v in STATE.items() if "num_batches" not in k},
    "extra state": STATE | {"head._extra_state": None},
    "a list": [STATE, 3],
    "parameters": collections.OrderedDict(MODEL.named_parameters()) | dict(MODEL.named_buffers()),
    "other things": {"state_dict": STATE, **BESIDE},
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_layouts(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    model = make_model()
    load_checkpoint(model, path)
    check(model)


@pytest.mark.parametrize("old", [False, True])
def test_nothing_foreign_is_made(tmp_path, old):
    path = tmp_path / "a.pt"
    beside = dict(BESIDE)
    if old:  # modules have their source code with them, which torch refuses
        del beside["hyper_parameters"]
    torch.save({"model": STATE} | beside, path, _use_new_zipfile_serialization=not old)
    Loud.made.clear()
    assert read_state(path).keys() == STATE.keys()
    assert Loud.made == []


def test_remarks(tmp_path):
    path = tmp_path / "a.pt"
    for content, remarks in (
        ({"model": STATE}, []),
        ({"critic": STATE}, ["the weights are those under critic"]),
        (
            {"state_dict": STATE, "state_dict_ema": AVERAGE},
            ["the weights are those under state_dict; state_dict_ema would fit, too"],
        ),
        (
            prefixed("model.") | {"loss.weight": torch.ones(3)},
            ["left out of the checkpoint: loss.weight"],
        ),
    ):
        torch.save(content, path)
        assert load_checkpoint(make_model(), path) == remarks


class TestKey:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"nets": {"student": STATE, "teacher": AVERAGE}, "epoch": 1}, path)
        return path

    def test_two_that_fit_are_offered(self, path):
        with pytest.raises(CheckpointError, match=r"under nets\.student, nets\.teacher; .*-key"):
            load_checkpoint(make_model(), path)
        with pytest.raises(CheckpointError, match=r"several state dicts"):
            read_state(path)

    def test_one_is_chosen(self, path):
        model = make_model()
        assert load_checkpoint(model, path, key="nets.student") == []
        check(model)
        CheckpointLoader(model, key="nets.teacher").load(find_checkpoints([str(path)])[0])
        torch.testing.assert_close(model.head.weight, AVERAGE["head.weight"])

    @pytest.mark.parametrize("key", ["students", "nets.pupil", "epoch", "nets.student.tail"])
    def test_there_is_none(self, path, key):
        with pytest.raises(CheckpointError, match=rf"{key}'; .*nets\.student \(9 entries\)"):
            load_checkpoint(make_model(), path, key=key)

    def test_a_prefix_of_names(self, tmp_path):
        path = tmp_path / "a.ckpt"
        torch.save({"state_dict": prefixed("student.") | prefixed("teacher.", AVERAGE)}, path)
        with pytest.raises(CheckpointError, match=r"state_dict\.student, state_dict\.teacher"):
            load_checkpoint(make_model(), path)
        model = make_model()
        load_checkpoint(model, path, key="state_dict.student")
        check(model)


class TestWholeModels:
    @pytest.mark.parametrize("content", [MODEL, {"model": MODEL, "epoch": 1}], ids=["itself", "in"])
    def test_pickled(self, tmp_path, content):
        path = tmp_path / "a.pt"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"asks to run code .*Sequential.*--allow-pickle"):
            load_checkpoint(make_model(), path)
        model = make_model()
        load_checkpoint(model, path, allow_pickle=True)
        check(model)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.jit.script(MODEL).save(str(path))
        with pytest.raises(CheckpointError, match=r"TorchScript.*--allow-pickle"):
            load_checkpoint(make_model(), path)
        model = make_model()
        load_checkpoint(model, path, allow_pickle=True)
        check(model)


class Renamed(nn.Module):
    """A layer that had a different name before version 2."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(4, 3)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if (local_metadata.get("version") or 1) < 2:
            for name in ("weight", "bias"):
                if (old := f"{prefix}fc.{name}") in state_dict:
                    state_dict[f"{prefix}projection.{name}"] = -state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, inputs):
        return self.projection(inputs)


class Positions(nn.Module):
    def __init__(self, count, persistent):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("positions", torch.arange(count), persistent=persistent)


class Scaled(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, 2.0))


class TestTorchDecides:
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize("prefix", ["", "module.", "model."])
    def test_weight_norm_of_before(self, tmp_path, prefix):
        torch.manual_seed(3)
        old = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        new = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        torch.save(prefixed(prefix, old.state_dict()), tmp_path / "a.pt")
        load_checkpoint(new, tmp_path / "a.pt")
        x = torch.randn(5, 4)
        torch.testing.assert_close(new(x), old(x))

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_versions_are_kept(self, tmp_path, prefix):
        model, other = nn.Sequential(Renamed()), nn.Sequential(Renamed())
        state = model.state_dict()
        old = {f"0.fc.{name}": -state[f"0.projection.{name}"] for name in ("weight", "bias")}
        torch.save(prefixed(prefix, old), tmp_path / "old.pt")
        load_checkpoint(other, tmp_path / "old.pt")
        assert torch.equal(other[0].projection.weight, model[0].projection.weight)
        wrapped = nn.ModuleDict({"module": model}) if prefix else model
        state = wrapped.state_dict()  # has versions
        for name in ("weight", "bias"):
            state[f"{prefix}0.fc.{name}"] = state.pop(f"{prefix}0.projection.{name}")
        torch.save(state, tmp_path / "new.pt")
        before = other[0].projection.weight.clone()
        with pytest.raises(CheckpointError, match=r"missing: 0\.projection\.weight"):
            load_checkpoint(other, tmp_path / "new.pt")
        assert torch.equal(other[0].projection.weight, before)

    def test_a_buffer_that_is_not_saved_any_more(self, tmp_path):
        torch.save(Positions(9, True).state_dict(), tmp_path / "a.pt")
        assert load_checkpoint(Positions(9, False), tmp_path / "a.pt") == []
        for other in (Positions(8, False), nn.ModuleDict({"layer": nn.Linear(4, 3)})):
            with pytest.raises(CheckpointError, match="unexpected: positions"):
                load_checkpoint(other, tmp_path / "a.pt")

    def test_single_numbers(self, tmp_path):
        torch.save(Scaled((1,)).state_dict(), tmp_path / "a.pt")
        model = Scaled(())
        nn.init.zeros_(model.scale)
        load_checkpoint(model, tmp_path / "a.pt")
        assert model.scale == 2
        torch.save(Scaled((3,)).state_dict(), tmp_path / "a.pt")  # torch takes the first
        with pytest.raises(CheckpointError, match=r"scale \(3,\) instead of \(\)"):
            load_checkpoint(model, tmp_path / "a.pt")

    def test_a_refused_file_changes_nothing(self, tmp_path):
        model = make_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.save({k: v for k, v in STATE.items() if k != "head.bias"}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"missing: head\.bias"):
            load_checkpoint(model, tmp_path / "a.pt")
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight


@pytest.mark.parametrize("strict", [True, False])
def test_tied_weights_with_different_values(tmp_path, strict):
    model = Tied()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    load_checkpoint(model, tmp_path / "a.pt", strict=strict)
    state["head.weight"][1, 2] += 1
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"different values for 'words.weight' and 'head"):
        load_checkpoint(model, tmp_path / "a.pt", strict=strict)


class Merging(nn.Linear):
    """LoRA that adds its product to the weights in eval mode, and subtracts it in train mode."""

    def __init__(self):
        super().__init__(4, 3)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if self.merged else outputs + inputs @ self.a.T @ self.b.T


def test_layers_that_merge_in_eval_mode(tmp_path):
    torch.manual_seed(0)
    loader, x, expected = CheckpointLoader(nn.Sequential(Merging()).eval()), torch.randn(5, 4), []
    for index in range(3):
        source = nn.Sequential(Merging())
        nn.init.normal_(source[0].b)
        torch.save(source.state_dict(), tmp_path / f"{index}.pt")
        expected.append(source(x))
    for checkpoint, outputs in zip(find_checkpoints([str(tmp_path)]), expected, strict=True):
        model = loader.load(checkpoint)
        assert not model.training
        torch.testing.assert_close(model(x), outputs)


def test_modes_are_left_as_they_were(tmp_path):
    model = make_model()
    model.norm.eval()
    torch.save(STATE, tmp_path / "a.pt")
    load_checkpoint(model, tmp_path / "a.pt")
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


class TestPrefixes:
    @pytest.mark.parametrize("prefix", ["", "module.", "model."])
    def test_of_the_model(self, tmp_path, prefix):
        torch.save(prefixed(prefix), tmp_path / "a.pt")
        model = nn.Sequential(collections.OrderedDict(network=make_model()))
        load_checkpoint(model, tmp_path / "a.pt")
        check(model)

    def test_a_part_is_not_the_whole(self, tmp_path):
        torch.save(STATE, tmp_path / "a.pt")
        model = nn.ModuleDict({"body": make_model(), "tail": nn.Linear(3, 2)})
        with pytest.raises(CheckpointError, match=r"missing: tail\.weight, tail\.bias"):
            load_checkpoint(model, tmp_path / "a.pt")

    def test_a_layer_is_not_taken_for_a_different_one(self, tmp_path):
        torch.save(nn.ModuleDict({"fc": nn.Linear(4, 3)}).state_dict(), tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"missing: head\.weight.*unexpected: fc\.weight"):
            load_checkpoint(nn.ModuleDict({"head": nn.Linear(4, 3)}), tmp_path / "a.pt")

    def test_parts_in_state_dicts_of_their_own(self, tmp_path):
        parts = nn.ModuleDict({"encoder": nn.Linear(4, 3), "decoder": nn.Linear(3, 4)})
        torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "a.pt")
        other = nn.ModuleDict({"encoder": nn.Linear(4, 3), "decoder": nn.Linear(3, 4)})
        load_checkpoint(other, tmp_path / "a.pt")
        assert torch.equal(other["decoder"].weight, parts["decoder"].weight)


class TestNotStrict:
    def test_what_is_left_out_and_what_is_missing(self, tmp_path):
        state = {name: tensor for name, tensor in STATE.items() if not name.startswith("head")}
        torch.save(state | {"epoch": 3, "tail.bias": torch.ones(1)}, tmp_path / "a.pt")
        model = make_model()
        with pytest.raises(CheckpointError, match=r"unexpected: epoch, tail\.bias"):
            load_checkpoint(model, tmp_path / "a.pt")
        assert load_checkpoint(model, tmp_path / "a.pt", strict=False) == [
            "left out of the checkpoint: epoch, tail.bias",
            "not in the checkpoint, as the task builds them: head.weight, head.bias",
        ]
        assert torch.equal(model.conv.weight, MODEL.conv.weight)

    def test_each_begins_as_the_model_was_built(self, tmp_path):
        torch.save(STATE, tmp_path / "1.pt")
        torch.save({"conv.bias": torch.ones(2)}, tmp_path / "2.pt")
        first, second = find_checkpoints([str(tmp_path)])
        loader = CheckpointLoader(make_model().eval(), strict=False)
        loader.load(first)
        model = loader.load(second)
        assert torch.equal(model.head.weight, make_model().head.weight)
        assert loader.remarks[0].startswith("not in the checkpoint")

    def test_shapes_must_agree_and_something_must_fit(self, tmp_path):
        for state in (STATE | {"head.bias": torch.ones(4)}, {"other": torch.ones(3)}):
            torch.save(state, tmp_path / "a.pt")
            with pytest.raises(CheckpointError, match="does not fit"):
                load_checkpoint(make_model(), tmp_path / "a.pt", strict=False)


class TestFiles:
    @pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
    def test_arrays(self, tmp_path, write):
        write(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in STATE.items()})
        (checkpoint,) = find_checkpoints([str(tmp_path)])
        model = make_model()
        load_checkpoint(model, checkpoint)
        check(model)

    def test_arrays_of_objects(self, tmp_path):
        np.savez(tmp_path / "a.npz", a=np.array([Loud()], dtype=object))
        with pytest.raises(CheckpointError, match=r"a\.npz cannot be read"):
            load_checkpoint(make_model(), tmp_path / "a.npz")

    def test_suffixes_in_folders_and_globs(self, tmp_path):
        kept = ("best.th", "checkpoint-3.pth.tar", "last.tar", "model.pkl", "old.t7")
        for name in kept:
            old = name == "old.t7"
            torch.save({"net": STATE}, tmp_path / name, _use_new_zipfile_serialization=not old)
        (tmp_path / "history.pkl").write_bytes(pickle.dumps({"loss": [1.0]}))
        (tmp_path / "data.tar").write_bytes(bytes(600))
        np.savez(tmp_path / "data.npz", a=np.ones(3))
        beside = ("sampler.bin", "sampler_1.bin", "random_states_0.pkl", "dl_state_dict.bin")
        for name in (*beside, "optimizer_3.pt", "lr_scheduler.pth", "custom_checkpoint_0.pkl"):
            torch.save({}, tmp_path / name)
        assert [c.path.name for c in find_checkpoints([str(tmp_path)])] == sorted(kept)
        assert [c.path.name for c in find_checkpoints([f"{tmp_path}/*"])][-2:] == list(kept[-2:])
        assert [c.path.name for c in find_checkpoints([f"{tmp_path}/*.pth.tar"])] == [kept[1]]
        for name in kept:
            load_checkpoint(make_model(), tmp_path / name)

    @pytest.mark.parametrize("name", ["checkpoint-5", "checkpoint_5", "epoch_5"])
    def test_folders_of_runs_of_plain_modules(self, tmp_path, name):
        (tmp_path / name).mkdir()
        torch.save(STATE, tmp_path / name / "pytorch_model.bin")
        for beside in ("optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl"):
            torch.save({}, tmp_path / name / beside)
        for pattern in (tmp_path, tmp_path / name, f"{tmp_path}/*"):
            (checkpoint,) = find_checkpoints([str(pattern)])
            assert checkpoint.path == tmp_path / name
            assert checkpoint.optimizer == tmp_path / name / "optimizer.bin"
        model = make_model()
        load_checkpoint(model, tmp_path / name)
        check(model)

    def test_a_folder_of_folders_with_weights_alone(self, tmp_path):
        for name in ("e2", "e10"):
            (tmp_path / name).mkdir()
            torch.save(STATE, tmp_path / name / "pytorch_model.bin")
        assert [c.path.name for c in find_checkpoints([str(tmp_path)])] == ["e2", "e10"]

    def test_paths_of_every_kind(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        torch.save(STATE, tmp_path / "a.pt")
        for path in (tmp_path / "a.pt", str(tmp_path / "a.pt"), tmp_path, "~/a.pt"):
            load_checkpoint(make_model(), path)
        with pytest.raises(CheckpointError, match=r"did you mean .*a\.pt\?"):
            load_checkpoint(make_model(), tmp_path / "b.pt")
        torch.save(STATE, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match=r"has 2 checkpoints \(a\.pt"):
            load_checkpoint(make_model(), tmp_path)

    def test_a_pointer_of_git_lfs(self, tmp_path):
        for name in ("a.safetensors", "a.pt"):
            (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
            with pytest.raises(CheckpointError, match="Git LFS"):
                load_checkpoint(make_model(), tmp_path / name)

    def test_an_optimizer_beside_the_model_state(self, tmp_path):
        adam = torch.optim.Adam(MODEL.parameters())
        torch.save({"model_state": STATE, "optimizer_state": adam.state_dict()}, tmp_path / "a.pt")
        (checkpoint,) = find_checkpoints([str(tmp_path)])
        assert len(read_optimizer(checkpoint.optimizer).states) == 1


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint", "ignore:torch.distributed")
class TestDistributed:
    def save(self, folder, content):
        save_distributed(content, checkpoint_id=str(folder), no_dist=True)

    @pytest.mark.parametrize("place", ["step-3", "checkpoint-3/pytorch_model_fsdp_0"])
    def test_shards(self, tmp_path, place):
        adam = torch.optim.Adam(MODEL.parameters())
        content = {"model": STATE, "optimizer": adam.state_dict(), "step": 3}
        self.save(tmp_path / place, content)
        (checkpoint,) = find_checkpoints([str(tmp_path)])
        model = make_model()
        assert load_checkpoint(model, checkpoint) == []
        check(model)
        before = hash_checkpoint(checkpoint)
        self.save(tmp_path / place, content | {"model": AVERAGE})
        assert hash_checkpoint(checkpoint) != before

    def test_code_is_refused(self, tmp_path):
        self.save(tmp_path, STATE)

        class Call:
            def __reduce__(self):
                return print, ("run",)

        (tmp_path / ".metadata").write_bytes(pickle.dumps(Call()))
        with pytest.raises(CheckpointError, match=r"asks to run code on loading \(builtins\.print"):
            load_checkpoint(make_model(), tmp_path)

    @pytest.mark.parametrize("size", [0, 1000])
    def test_damaged(self, tmp_path, size):
        self.save(tmp_path, STATE)
        (shard,) = tmp_path.glob("*.distcp")
        shard.write_bytes(shard.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            load_checkpoint(make_model(), tmp_path)


class TestRuns:
    """What the files are is reported once, and stays with the results."""

    @pytest.fixture
    def small(self, tmp_path):
        small = Small.of(tmp_path)
        for stage in range(3):
            state = nn.Linear(4, 3).state_dict()
            torch.save({"student": state, "teacher": state.copy()}, tmp_path / f"pair-{stage}.pt")
            torch.save(
                {"weight": state["weight"], "scale": state["bias"]}, tmp_path / f"{stage}.th"
            )
        return small

    def pairs(self, small, *more, code=0, kind="pair-*.pt"):
        words = small.args("gamma", small.folder / "r.csv", *more)
        words[words.index("epoch=*.safetensors")] = kind
        with contextlib.chdir(small.folder):
            return run(*words, code=code)

    @pytest.mark.parametrize(
        ("kind", "words"),
        [("pair-*.pt", "under student, teacher"), ("*.th", "missing: bias; unexpected: scale")],
    )
    def test_one_message(self, small, kind, words):
        result = self.pairs(small, code=2, kind=kind)
        assert result.stderr.count(words) == 1
        assert "(and likewise 2 other checkpoints)" in result.stderr
        assert not (small.folder / "r.csv").exists()

    def test_a_key(self, small):
        self.pairs(small, "--checkpoint-key", "teacher")
        path = small.folder / "r.csv"
        settings = read_run_manifest(path).identity.settings
        assert settings["checkpoint_key"] == "teacher"
        with contextlib.chdir(small.folder):
            run("verify", path, "--task", "mine.py:task")
        other = self.pairs(small, "--checkpoint-key", "student", "--resume", code=2)
        assert "settings.checkpoint_key" in other.stderr

    def test_what_is_left_out(self, small):
        result = self.pairs(small, "--no-strict", kind="*.th")
        left_out = "left out of the checkpoint: scale"
        assert result.stderr.count(left_out) == 1
        assert read_results(small.folder / "r.csv")["note"].str.contains(left_out).all()
