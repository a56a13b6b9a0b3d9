"""Finding, reading, loading and saving checkpoints."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from ngeval import CheckpointError
from ngeval.checkpoints import (
    Checkpoint,
    CheckpointLoader,
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
        result = find_checkpoints([f"{tmp_path}/*/model.safetensors"])
        assert [c.path.parent.name for c in result] == ["step-3", "step-20", "step-100"]
        assert find_checkpoints([f"{tmp_path}/**"]) == result

    def test_only_checkpoint_files_of_a_folder(self, tmp_path):
        kept = ["a.safetensors", "b.pt", "c.pth", "d.bin", "e.ckpt"]
        touch(tmp_path, *kept, "a.json", "log.txt", "figure.png")
        (tmp_path / "folder.pt").mkdir()
        (tmp_path / "a.json").write_text("{}")
        assert names(find_checkpoints([str(tmp_path)])) == kept

    def test_order_of_arguments_is_kept_and_files_come_once(self, tmp_path):
        touch(tmp_path, "a.pt", "b.pt", "c.pt")
        result = find_checkpoints([f"{tmp_path}/c.pt", f"{tmp_path}/a.pt", str(tmp_path)])
        assert names(result) == ["c.pt", "a.pt", "b.pt"]

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

    @pytest.mark.parametrize("pattern", ["", "ief", "i*"])
    def test_folders_of_checkpoints_below_are_named(self, tmp_path, pattern):
        (tmp_path / "ief" / "seed-0").mkdir(parents=True)
        touch(tmp_path, "ief/seed-0/a.pt")
        result = "no checkpoint at" if pattern == "" else r"there are some in .*ief/seed-0$"
        with pytest.raises(CheckpointError, match=result):
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
        (broken,) = find_checkpoints([str(tmp_path)])
        with pytest.raises(CheckpointError, match=r"a\.json cannot be read as JSON"):
            CheckpointLoader(nn.Linear(2, 2)).load(broken)

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
        for (name, result), expected in zip(
            model.state_dict().items(), source.state_dict().values(), strict=True
        ):
            assert torch.equal(result, expected), name

    def test_metadata_beside(self, tmp_path):
        output = {"epoch": 3, "losses": [1.5, 0.25], "name": "α"}
        save_checkpoint(make_model(), tmp_path / "epoch-003.safetensors", output)
        assert find_checkpoints([str(tmp_path)])[0].metadata == output

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
            result = read_state(tmp_path / f"w.{suffix}")
            assert result.keys() == state.keys()
            assert all(torch.equal(result[key], state[key]) for key in state)


def save_sharded(model, folder, *, shards=2, config=True):
    """Two safetensors shards and their index, as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    places = {}
    for i, name in enumerate(state):
        file = f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        places[name] = file
    for file in set(places.values()):
        part = {name: state[name].clone() for name, place in places.items() if place == file}
        safetensors.torch.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    if config:
        (folder / "config.json").write_text("{}")
    return folder


def loaded(path, **options):
    """A fresh model with the weights of the one checkpoint at a path."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    (checkpoint,) = find_checkpoints([str(path)])
    load_checkpoint(model, checkpoint, **options)
    return model


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class TestFolders:
    def test_a_trainer_run_by_steps(self, tmp_path):
        for step in (1000, 500, 20):
            folder = save_sharded(make_model(), tmp_path / f"checkpoint-{step}")
            state = {"epoch": step / 500, "global_step": step, "log_history": []}
            (folder / "trainer_state.json").write_text(json.dumps(state))
            touch(folder, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
        save_sharded(make_model(), tmp_path)  # the last step's weights again
        result = find_checkpoints([str(tmp_path)])
        assert [(c.path.name, c.step, c.epoch) for c in result] == [
            ("checkpoint-20", 20, 0.04),
            ("checkpoint-500", 500, 1),
            ("checkpoint-1000", 1000, 2),
        ]
        assert all(c.optimizer == c.path / "optimizer.pt" for c in result)
        assert find_checkpoints([f"{tmp_path}/checkpoint-*"]) == result
        assert find_checkpoints([f"{tmp_path}/checkpoint-*/**"]) == result
        assert find_checkpoints([str(tmp_path / "checkpoint-500")]) == result[1:2]

    def test_a_folder_of_adapters(self, tmp_path):
        for epoch in (10, 9):
            folder = tmp_path / f"epoch-{epoch}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
            touch(folder, "adapter_model.safetensors")
        result = find_checkpoints([str(tmp_path)])
        assert names(result) == ["epoch-9", "epoch-10"]
        assert all(c.is_adapter and c.optimizer is None for c in result)
        with pytest.raises(CheckpointError, match="PEFT adapter"):
            load_checkpoint(make_model(), result[0])

    def test_files_of_a_run_that_are_no_weights(self, tmp_path):
        touch(tmp_path, "epoch-1.pt", "optimizer.pt", "scheduler.pt", "rng_state_0.pth")
        assert names(find_checkpoints([str(tmp_path)])) == ["epoch-1.pt"]

    def test_names_tell_epoch_and_step(self, tmp_path):
        touch(tmp_path, "epoch=3-step=400.ckpt")
        (result,) = find_checkpoints([str(tmp_path)])
        assert (result.epoch, result.step) == (3, 400)

    def test_save_pretrained(self, tmp_path):
        model = make_model()
        (tmp_path / "config.json").write_text("{}")
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        assert names(find_checkpoints([str(tmp_path)])) == [tmp_path.name]
        assert same(loaded(tmp_path), model)

    def test_sharded(self, tmp_path):
        model = make_model()
        assert same(loaded(save_sharded(model, tmp_path / "run")), model)
        assert same(loaded(tmp_path / "run" / "model.safetensors.index.json"), model)

    def test_sharded_pickles(self, tmp_path):
        model = make_model()
        state = model.state_dict()
        first = dict(list(state.items())[:3])
        rest = {name: tensor for name, tensor in state.items() if name not in first}
        torch.save(first, tmp_path / "a.bin")
        torch.save(rest, tmp_path / "b.bin")
        places = dict.fromkeys(first, "a.bin") | dict.fromkeys(rest, "b.bin")
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        assert same(loaded(tmp_path), model)

    def test_a_missing_shard(self, tmp_path):
        folder = save_sharded(make_model(), tmp_path / "run")
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"2 shards.*model-00002-of-00002.* is not"):
            loaded(folder)

    def test_a_shard_without_what_the_index_names(self, tmp_path):
        folder = save_sharded(make_model(), tmp_path / "run")
        safetensors.torch.save_file(
            {"other": torch.ones(1)}, folder / "model-00002-of-00002.safetensors"
        )
        with pytest.raises(CheckpointError, match="lack"):
            loaded(folder)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
    def test_a_broken_index(self, tmp_path, content):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match="index of a sharded checkpoint"):
            loaded(tmp_path)


class TestNames:
    @pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
    def test_wrapped_state_dicts(self, tmp_path, wrapper):
        model = make_model()
        torch.save(
            {wrapper: model.state_dict(), "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "a.pt"
        )
        assert same(loaded(tmp_path / "a.pt"), model)

    def test_lightning(self, tmp_path):
        model = make_model()
        content = {
            "epoch": 3,
            "global_step": 400,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        }
        torch.save(content, tmp_path / "epoch=3-step=400.ckpt")
        assert same(loaded(tmp_path / "epoch=3-step=400.ckpt"), model)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.net."])
    def test_prefixes(self, tmp_path, prefix):
        model = make_model()
        state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save(state, tmp_path / "a.pt")
        assert same(loaded(tmp_path / "a.pt"), model)

    def test_compiled_parts_on_either_side(self, tmp_path):
        model = make_model()
        state = {
            name.replace("0.", "0._orig_mod."): tensor
            for name, tensor in model.state_dict().items()
        }
        torch.save(state, tmp_path / "a.pt")
        assert same(loaded(tmp_path / "a.pt"), model)
        compiled = nn.Module()
        compiled._orig_mod = make_model()
        load_checkpoint(compiled, Checkpoint(tmp_path / "a.pt", {}))
        assert same(compiled._orig_mod, model)

    def test_a_model_whose_own_names_begin_so(self, tmp_path):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = make_model()

        model, other = Wrapped(), Wrapped()
        torch.save(model.state_dict(), tmp_path / "a.pt")
        load_checkpoint(other, Checkpoint(tmp_path / "a.pt", {}))
        assert same(other, model)

    def test_one_name_of_tied_weights_is_enough(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
                self.head.weight = self.words.weight

        model, other = Tied(), Tied()
        state = model.state_dict()
        del state["head.weight"]
        safetensors.torch.save_file(state, tmp_path / "a.safetensors")
        load_checkpoint(other, Checkpoint(tmp_path / "a.safetensors", {}))
        assert torch.equal(other.head.weight, model.words.weight)
        assert other.head.weight is other.words.weight

    def test_something_beside_the_model_is_left_out_and_reported(self, tmp_path):
        model, other = make_model(), make_model()
        torch.nn.init.normal_(model[0].weight)
        state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
        path = tmp_path / "a.ckpt"
        torch.save({"state_dict": state | {"metric.total": torch.ones(1)}}, path)
        assert load_checkpoint(other, path) == ["left out of the checkpoint: metric.total"]
        assert same(other, model)
        torch.save({"state_dict": state | {"net.4.weight": torch.ones(1)}}, path)
        with pytest.raises(CheckpointError, match=r"unexpected: 4\.weight"):
            load_checkpoint(other, path)
        del state["net.0.bias"]
        torch.save({"state_dict": state | {"metric.total": torch.ones(1)}}, path)
        with pytest.raises(CheckpointError, match=r"begin with 'net\.', but for metric\.total"):
            load_checkpoint(other, path)


class TestHostile:
    def test_the_index_says_which_shard_a_weight_is_from(self, tmp_path):
        model = make_model()
        folder = save_sharded(model, tmp_path / "run")
        second = folder / "model-00002-of-00002.safetensors"
        kept = safetensors.torch.load_file(second)
        zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        safetensors.torch.save_file(zeros | kept, second)
        assert same(loaded(folder), model)

    @pytest.mark.parametrize(
        "value",
        [torch.ones(2).to_sparse(), torch.ones(2, device="meta")],
    )
    def test_tensors_that_are_no_plain_ones(self, tmp_path, value):
        torch.save({"weight": value}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError):
            read_state(tmp_path / "a.pt")

    def test_names_that_are_no_text(self, tmp_path):
        torch.save({0: torch.zeros(2)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="not plain tensors by name: 0"):
            read_state(tmp_path / "a.pt")

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
    def test_another_kind_of_numbers(self, tmp_path, dtype):
        model = nn.Linear(2, 2)
        torch.save({k: v.to(dtype) for k, v in model.state_dict().items()}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"wrong kind: weight .* instead of floating"):
            load_checkpoint(model, Checkpoint(tmp_path / "a.pt", {}))

    def test_weights_that_overflow_in_the_models_dtype(self, tmp_path):
        model = nn.Linear(2, 2)
        state = {k: v.double() * 1e300 for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            load_checkpoint(model, Checkpoint(tmp_path / "a.pt", {}))
        assert torch.isfinite(model.weight).all()

    def test_deep_json_and_long_names(self, tmp_path):
        touch(tmp_path, "a.pt")
        (tmp_path / "a.json").write_text("[" * 100_000)
        assert "cannot be read as JSON" in find_checkpoints([str(tmp_path)])[0].error
        with pytest.raises(CheckpointError, match="cannot be looked up"):
            find_checkpoints(["x" * 5000])
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
        with pytest.raises(CheckpointError, match="index of a sharded checkpoint"):
            read_state(index)

    @pytest.mark.parametrize("epoch", ["1" * 4000, "NaN", "1e999", "true"])
    def test_numbers_that_are_no_epochs(self, tmp_path, epoch):
        touch(tmp_path, "a.pt")
        (tmp_path / "a.json").write_text(f'{{"epoch": {epoch}}}')
        assert find_checkpoints([str(tmp_path)])[0].epoch is None

    def test_code_in_the_old_format_is_named(self, tmp_path):
        class Call:
            def __reduce__(self):
                return print, ("run",)

        torch.save({"a": Call()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match="asks to run code"):
            read_state(tmp_path / "a.pt")
