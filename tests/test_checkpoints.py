"""Finding, reading, loading and saving checkpoints."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from ngeval import CheckpointError
from ngeval.checkpoints import (
    Checkpoint,
    find_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
)


def names(checkpoints):
    return [checkpoint.path.name for checkpoint in checkpoints]


def touch(folder, *files):
    for file in files:
        (folder / file).write_bytes(b"")


class TestFind:
    def test_natural_order(self, tmp_path):
        touch(tmp_path, "epoch-10.pt", "epoch-2.pt", "epoch-1.safetensors", "last.pt")
        expected = ["epoch-1.safetensors", "epoch-2.pt", "epoch-10.pt", "last.pt"]
        assert names(find_checkpoints([str(tmp_path)])) == expected
        assert names(find_checkpoints([f"{tmp_path}/*"])) == expected

    def test_natural_order_of_folders(self, tmp_path):
        for step in (100, 20, 3):
            (tmp_path / f"step-{step}").mkdir()
            touch(tmp_path / f"step-{step}", "model.safetensors")
        found = find_checkpoints([f"{tmp_path}/*/model.safetensors"])
        assert [c.path.parent.name for c in found] == ["step-3", "step-20", "step-100"]
        assert find_checkpoints([f"{tmp_path}/**"]) == found

    def test_only_checkpoint_files_of_a_folder(self, tmp_path):
        kept = ["a.safetensors", "b.pt", "c.pth", "d.bin", "e.ckpt"]
        touch(tmp_path, *kept, "a.json", "log.txt", "figure.png")
        (tmp_path / "folder.pt").mkdir()
        (tmp_path / "a.json").write_text("{}")
        assert names(find_checkpoints([str(tmp_path)])) == kept

    def test_order_of_arguments_is_kept_and_files_come_once(self, tmp_path):
        touch(tmp_path, "a.pt", "b.pt", "c.pt")
        found = find_checkpoints([f"{tmp_path}/c.pt", f"{tmp_path}/a.pt", str(tmp_path)])
        assert names(found) == ["c.pt", "a.pt", "b.pt"]

    def test_a_file_named_directly_may_have_any_extension(self, tmp_path):
        touch(tmp_path, "weights")
        assert names(find_checkpoints([f"{tmp_path}/weights"])) == ["weights"]

    def test_a_name_with_brackets_is_no_glob_if_it_is_a_file(self, tmp_path):
        touch(tmp_path, "w[1].pt", "w1.pt")
        assert names(find_checkpoints([f"{tmp_path}/w[1].pt"])) == ["w[1].pt"]

    @pytest.mark.parametrize("pattern", ["", "missing.pt", "*.pt"])
    def test_nothing_found(self, tmp_path, pattern):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(CheckpointError, match=r"no checkpoint at .*\.safetensors"):
            find_checkpoints([f"{tmp_path}/{pattern}"])

    def test_one_missing_of_several(self, tmp_path):
        touch(tmp_path, "a.pt")
        with pytest.raises(CheckpointError, match=r"b\.pt"):
            find_checkpoints([f"{tmp_path}/a.pt", f"{tmp_path}/b.pt"])


class TestMetadata:
    def test_epoch_from_the_json_beside(self, tmp_path):
        touch(tmp_path, "a.pt", "b.pt")
        (tmp_path / "a.json").write_text(json.dumps({"epoch": 7, "task": "digits-cnn"}))
        first, second = find_checkpoints([str(tmp_path)])
        assert first.epoch == 7
        assert first.metadata["task"] == "digits-cnn"
        assert (second.epoch, second.metadata) == (None, {})

    @pytest.mark.parametrize("content", ['{"epoch": "last"}', '{"step": 3}', "[1, 2]", "3"])
    def test_json_without_an_epoch(self, tmp_path, content):
        touch(tmp_path, "a.pt")
        (tmp_path / "a.json").write_text(content)
        assert find_checkpoints([str(tmp_path)])[0].epoch is None

    def test_broken_json_is_told(self, tmp_path):
        touch(tmp_path, "a.pt")
        (tmp_path / "a.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"a\.json cannot be read as JSON"):
            find_checkpoints([str(tmp_path)])

    def test_name_is_the_path_as_found(self, tmp_path, monkeypatch):
        touch(tmp_path, "a.pt")
        monkeypatch.chdir(tmp_path)
        assert find_checkpoints(["a.pt"])[0].name == "a.pt"


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class TestSaveAndLoad:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
    def test_weights_and_buffers_come_back(self, tmp_path, suffix):
        source, path = make_model(), tmp_path / f"w{suffix}"
        source(torch.randn(16, 3))  # moves the running statistics
        if suffix == ".safetensors":
            save_checkpoint(source, path, {})
        else:
            torch.save(source.state_dict(), path)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        load_checkpoint(model, Checkpoint(path, {}))
        for (name, found), expected in zip(
            model.state_dict().items(), source.state_dict().values(), strict=True
        ):
            assert torch.equal(found, expected), name

    def test_metadata_beside(self, tmp_path):
        told = {"epoch": 3, "losses": [1.5, 0.25], "name": "α"}
        save_checkpoint(make_model(), tmp_path / "epoch-003.safetensors", told)
        assert find_checkpoints([str(tmp_path)])[0].metadata == told

    def test_tied_weights_are_saved(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        save_checkpoint(model, tmp_path / "w.safetensors", {})
        state = read_state(tmp_path / "w.safetensors")
        assert torch.equal(state["0.weight"], state["1.weight"])
        load_checkpoint(model, Checkpoint(tmp_path / "w.safetensors", {}))
        assert model[0].weight is model[1].weight

    def test_saving_leaves_the_model_alone(self, tmp_path):
        model = make_model()
        model(torch.randn(5, 3)).sum().backward()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        save_checkpoint(model, tmp_path / "w.safetensors", {})
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert model.training

    def test_a_misfit_lists_everything_and_changes_nothing(self, tmp_path):
        model = make_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {name: tensor + 1 for name, tensor in before.items()}
        del state["0.bias"], state["2.weight"]
        state |= {"head.weight": torch.zeros(1), "2.bias": torch.zeros(5)}
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(model, Checkpoint(tmp_path / "w.pt", {}))
        message = str(caught.value)
        assert "missing: 0.bias, 2.weight" in message
        assert "unexpected: head.weight" in message
        assert "2.bias (5,) instead of (2,)" in message
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)

    def test_a_long_list_is_cut_and_counted(self, tmp_path):
        torch.save({"other": torch.zeros(1)}, tmp_path / "w.pt")
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
        with pytest.raises(CheckpointError, match=r"\(40 in all\)") as caught:
            load_checkpoint(model, Checkpoint(tmp_path / "w.pt", {}))
        assert len(str(caught.value)) < 400 + len(str(tmp_path))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, tmp_path, value):
        model = make_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {name: tensor.clone() for name, tensor in before.items()}
        state["2.weight"][1, 1] = value
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"w\.pt: '2\.weight'"):
            load_checkpoint(model, Checkpoint(tmp_path / "w.pt", {}))
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)

    def test_a_buffer_may_hold_minus_infinity(self, tmp_path):
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
        save_checkpoint(model, tmp_path / "w.safetensors", {})
        load_checkpoint(model, Checkpoint(tmp_path / "w.safetensors", {}))
        assert model.mask[1] == -float("inf")

    def test_state_read_is_what_was_written(self, tmp_path):
        state = {"a": torch.randn(2, 3, dtype=torch.float64), "b": torch.tensor([1, 2])}
        safetensors.torch.save_file(state, tmp_path / "w.safetensors")
        torch.save(state, tmp_path / "w.pt")
        for suffix in ("safetensors", "pt"):
            found = read_state(tmp_path / f"w.{suffix}")
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], state[key]) for key in state)
