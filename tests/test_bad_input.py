"""Bad input through the command line: exit code 2, one message that helps, nothing lost."""

import json
import pickle
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from ngeval.cli.app import app
from ngeval.tasks import get_task

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

TASKS = '''
import torch
from torch import nn
import ngeval


def batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def linear():
    return nn.Linear(4, 3)


def task(change=lambda x, y: (x, y), model=linear, likelihood="categorical", yields=None):
    """A task whose batches are changed, or replaced by what ``yields`` makes."""

    def load_batches(batch_size, num_batches, seed):
        for index in range(num_batches or 2):
            yield change(*batch(batch_size, seed + index))

    return ngeval.Task("bad", model, yields or load_batches, likelihood)


def at(tensor, index, value):
    tensor[index] = value
    return tensor


good = task()

# Targets.
label_too_large = task(lambda x, y: (x, at(y, 5, 7)))
label_negative = task(lambda x, y: (x, at(y, 2, -1)))
labels_one_hot = task(lambda x, y: (x, nn.functional.one_hot(y, 3)))
labels_float = task(lambda x, y: (x, y.double()))
labels_fewer = task(lambda x, y: (x, y[:-3]))
labels_scalar = task(lambda x, y: (x, y[0]))
labels_list = task(lambda x, y: (x, y.tolist()))
real_shape = task(lambda x, y: (x, x[:, :2]), likelihood="gaussian")
real_nan = task(lambda x, y: (x, at(x[:, :3].clone(), 1, float("nan"))), likelihood="gaussian")
binary_outside = task(lambda x, y: (x, x[:, :3] * 0 + 1.5), likelihood="bernoulli")

# Inputs.
empty = task(lambda x, y: (x[:0], y[:0]))
inputs_nan = task(lambda x, y: (at(x, (4, 2), float("nan")), y))
inputs_inf = task(lambda x, y: (at(x, (0, 1), -float("inf")), y))
inputs_dict_nan = task(lambda x, y: ({"input": at(x, (4, 2), float("nan"))}, y))
inputs_uneven = task(lambda x, y: ((x, x[:-1]), y))
inputs_scalar = task(lambda x, y: (x[0, 0], y))
inputs_none = task(lambda x, y: (None, y))
inputs_text = task(lambda x, y: ("digits", y))
inputs_numpy = task(lambda x, y: (x.numpy(), y))
inputs_dict_of_lists = task(lambda x, y: ({"input": x.tolist()}, y))
second_batch = task(yields=lambda n, count, seed: [batch(n), (batch(n)[0], batch(n)[1] + 9)])

# What load_batches gives.
batch_of_three = task(lambda x, y: (x, y, y))
batch_without_targets = task(lambda x, y: x)
too_few = task(yields=lambda n, count, seed: [batch(n)])
none_at_all = task(yields=lambda n, count, seed: [])
not_iterable = task(yields=lambda n, count, seed: None)


def raising_batches(batch_size, num_batches, seed):
    raise FileNotFoundError("no images under /data/images")


batches_raise = task(yields=raising_batches)


def raising_later(batch_size, num_batches, seed):
    yield batch(batch_size)
    raise OSError("disk went away")


later_batches_raise = task(yields=raising_later)

# Models.


class Stuck(nn.Sequential):
    """Stays in train mode, whatever it is told."""

    def train(self, mode=True):
        return super().train(True)


class Changed(nn.Module):
    """A linear model with another return value, or another fault."""

    def __init__(self, forward):
        super().__init__()
        self.linear = linear()
        self.change = forward

    def forward(self, input):
        return self.change(self.linear(input))


def frozen_model():
    return linear().requires_grad_(False)


def failing(z):
    raise RuntimeError("mat1 and mat2 do not fit")


def model_failing_to_build():
    raise KeyError("hidden_size")


batchnorm = task(model=lambda: Stuck(nn.Linear(4, 3), nn.BatchNorm1d(3)))
dropout = task(model=lambda: Stuck(nn.Linear(4, 3), nn.Dropout(0.5)))
frozen = task(model=frozen_model)
returns_tuple = task(model=lambda: Changed(lambda z: (z, z)))
returns_none = task(model=lambda: Changed(lambda z: None))
returns_vector = task(model=lambda: Changed(lambda z: z[:, 0]))
returns_one_sample = task(model=lambda: Changed(lambda z: z[:1]))
returns_nan = task(model=lambda: Changed(lambda z: at(z.clone(), 3, float("nan"))))
returns_noise = task(model=lambda: Changed(lambda z: z + torch.rand_like(z)))
sees_samples = task(model=lambda: Changed(lambda z: z - z.mean(0)))
raises = task(model=lambda: Changed(failing))
build_raises = task(model=model_failing_to_build)
build_returns_class = task(model=lambda: nn.Linear)

# Likelihoods.
likelihood_typo = task(likelihood="categoricl")
likelihood_variance = task(likelihood="gaussian:-1")
likelihood_text = task(likelihood="gaussian:one")

# Things that are no task.
a_number = 3


def needs_argument(size):
    return good


def raises_when_called():
    raise ValueError("set DATA_ROOT first")


def returns_model():
    return linear()
'''

STATE = {"weight": torch.arange(12.0).reshape(3, 4) / 12, "bias": torch.zeros(3)}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


class RunsCode:
    """A pickle that writes a file when it is loaded, and is a state dict then."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return write_and_return_state, (self.path,)


def write_and_return_state(path):
    Path(path).write_text("the code ran")
    return STATE


def with_entries(**entries):
    return STATE | entries


def prefixed(prefix):
    return {f"{prefix}.{name}": tensor for name, tensor in STATE.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with task files, checkpoints and result files, good ones and bad ones."""
    place = tmp_path_factory.mktemp("bad")
    (place / "tasks.py").write_text(TASKS)
    (place / "raising.py").write_text("import a_package_that_is_not_there\n")
    (place / "syntax.py").write_text("def task(:\n")
    (place / "empty").mkdir()
    (place / "no_checkpoint").mkdir()
    (place / "no_checkpoint" / "notes.txt").write_text("nothing here")
    save = safetensors.torch.save_file
    save(STATE, place / "good.safetensors")
    save(get_task("digits-cnn").model().state_dict(), place / "digits.safetensors")
    save(prefixed("linear"), place / "changed.safetensors")
    layers = {f"0.{name}": tensor for name, tensor in STATE.items()}
    save(layers, place / "dropout.safetensors")
    norm = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    save(norm.state_dict(), place / "batchnorm.safetensors")
    nan, infinite = (with_entries(weight=STATE["weight"].clone()) for _ in range(2))
    nan["weight"][1, 2] = float("nan")
    infinite["weight"][1, 2] = float("inf")
    save(nan, place / "nan.safetensors")
    save(infinite, place / "infinite.safetensors")
    beside = {"criterion.weight": torch.zeros(1)}
    save({"model.weight": STATE["weight"]} | beside, place / "prefixed.safetensors")
    wrong = {"weight": torch.zeros(3, 5), "scale": torch.zeros(2), "shift": torch.zeros(1)}
    save(wrong, place / "wrong.safetensors")
    whole = (place / "good.safetensors").read_bytes()
    (place / "truncated.safetensors").write_bytes(whole[:-20])
    (place / "header.safetensors").write_bytes(whole[:30])
    (place / "nothing.safetensors").write_bytes(b"")
    (place / "text.safetensors").write_text("epoch 3, loss 0.4\n")
    torch.save(STATE, place / "good.pt")
    (place / "truncated.pt").write_bytes((place / "good.pt").read_bytes()[:-200])
    (place / "half.pt").write_bytes((place / "good.pt").read_bytes()[:500])
    (place / "nothing.pt").write_bytes(b"")
    (place / "text.pt").write_text("epoch 3, loss 0.4\n")
    (place / "bytes.pt").write_bytes(bytes(range(256)) * 4)
    torch.save([STATE["weight"], STATE["bias"]], place / "list.pt")
    torch.save({"epoch": 3, "step": 12}, place / "numbers.pt")
    two = {"my_weights": dict(STATE), "your_weights": dict(STATE)}
    torch.save(two | {"epoch": 3}, place / "nested.pt")
    torch.save({}, place / "no_tensors.pt")
    torch.save(STATE["weight"], place / "tensor.pt")
    torch.save(RunsCode(place / "the-code-ran"), place / "code.pt")
    torch.save({"weight": RunsCode(place / "the-code-ran")}, place / "inner_code.pt")
    torch.save(torch.nn.Linear(4, 3), place / "module.pt")
    (place / "plain_pickle.pt").write_bytes(pickle.dumps(RunsCode(place / "the-code-ran")))
    save(STATE, place / "bad_json.safetensors")
    (place / "bad_json.json").write_text('{"epoch": ')
    (place / "a_file").write_text("not a folder")
    (place / "a_folder.csv").mkdir()
    (place / "old.csv").write_text("old results\n")
    (place / "old.png").write_text("old picture\n")
    (place / "old_run").mkdir()
    save(STATE, place / "old_run" / "epoch-000.safetensors")
    table = gamma_table()
    table.to_csv(place / "gammas.csv", index=False)
    norms = table[["checkpoint", "epoch", "batch"]].assign(gradient_norm=1.0)
    norms.to_csv(place / "norms.csv", index=False)
    table.iloc[:0].to_csv(place / "no_rows.csv", index=False)
    for kind in ("csv", "parquet", "jsonl"):
        (place / f"empty.{kind}").write_bytes(b"")
        (place / f"garbage.{kind}").write_bytes(b"\x00\xff\xfe garbage \n\n{[,,,\n")
    table.to_parquet(place / "truncated.parquet")
    parquet = place / "truncated.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-50])
    (place / "results.txt").write_text("a,b\n1,2\n")
    return place


def gamma_table():
    """A small result table such as ``ngeval gamma`` writes."""
    rows = [
        {
            "checkpoint": name,
            "stage": stage,
            "epoch": stage,
            "batch": batch,
            "method": method,
            "damping": 0.001,
            "damping_scale": "absolute",
            "gamma": value,
            "gamma_over_sgd": value,
            "gamma_over_ng": 2 * value,
            "gamma_floor": 0.4,
            "status": "ok",
        }
        for stage, name in enumerate(("a.pt", "b.pt"))
        for batch in range(2)
        for method, value in (("sgd", 1.0), ("ef", 0.5 + batch))
    ]
    return pd.DataFrame(rows)


def run(line):
    return CliRunner().invoke(app, shlex.split(line))


def assert_incomplete(result, *words):
    """Exit code 3: units are missing, which one message says with these words."""
    assert result.exit_code == 3, (result.exit_code, result.output, repr(result.exception))
    assert "Traceback" not in result.output
    assert result.stderr.count("ngeval: ") == 1
    for word in (*words, "could not be graded, the others are done"):
        assert word in result.stderr, (word, result.stderr)


def assert_refused(result, *words):
    """Exit code 2, one message and nothing else on stderr, with these words."""
    shown = result.output
    assert result.exit_code == 2, (result.exit_code, shown, repr(result.exception))
    assert "Traceback" not in shown
    assert result.stdout == ""
    message = result.stderr
    if "Usage:" in message:  # the command line itself could not be read
        assert message.count("Usage:") == 1
        message = " ".join(message.replace("│", " ").split())
    else:
        assert message.startswith("ngeval: ")
        assert message.count("ngeval: ") == 1
        assert message.count("\n") == 1, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def files_under(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def case(name, *words, line):
    return pytest.param(line, words, id=name)


def task_case(name, *words, checkpoint="good.safetensors"):
    line = f"--task {{place}}/tasks.py:{name} --checkpoint {{place}}/{checkpoint}"
    return case(name, *words, line=line)


def model_case(name, *words):
    return task_case(name, *words, checkpoint="changed.safetensors")


def checkpoint_case(name, *words, suffix=".safetensors"):
    file = f"{name}{suffix}"
    line = f"--task {{place}}/tasks.py:good --checkpoint {{place}}/{file}"
    return pytest.param(line, words, id=file)


def option_case(name, options, *words):
    line = f"--task {{place}}/tasks.py:good --checkpoint {{place}}/good.safetensors {options}"
    return case(name, *words, line=line)


# torch without CUDA knows no such device, torch with it no hundredth one.
ABSENT_DEVICE = "cuda:99" if torch.cuda.is_available() else "cuda"

TARGETS = [
    task_case("label_too_large", "target 7 at index (5,)", "0..2"),
    task_case("label_negative", "target -1 at index (2,)", "0..2", "-100 marks padding"),
    task_case("labels_one_hot", "targets have shape (8, 3)", "(8,)"),
    task_case("labels_float", "float64", "targets.long()"),
    task_case("labels_fewer", "targets hold 5 samples", "8"),
    task_case("labels_scalar", "targets hold no samples", "8"),
    task_case("labels_list", "targets are a list", "not a tensor"),
    task_case("real_shape", "targets have shape (8, 2)", "gaussian", "(8, 3)"),
    task_case("real_nan", "targets hold NaN"),
    task_case("binary_outside", "target 1.5 at index (0, 0)", "[0, 1]"),
]
INPUTS = [
    task_case("empty", "batch is empty"),
    task_case("inputs_nan", "inputs hold", "NaN", "(4, 2)"),
    task_case("inputs_inf", "inputs hold", "infinite", "(0, 1)"),
    task_case("inputs_dict_nan", "inputs['input'] hold", "NaN", "(4, 2)"),
    task_case("inputs_uneven", "inputs[0]: 8", "inputs[1]: 7"),
    task_case("inputs_scalar", "inputs", "no batch dimension"),
    task_case("inputs_none", "inputs", "NoneType", "tensor"),
    task_case("inputs_text", "inputs", "str", "tensor"),
    task_case("inputs_numpy", "inputs", "ndarray", "tensor"),
    task_case("inputs_dict_of_lists", "inputs['input']", "list", "tensor"),
]
BATCHES = [
    task_case("batch_of_three", "(inputs, targets)", "'bad'"),
    task_case("batch_without_targets", "(inputs, targets)", "Tensor"),
    task_case("none_at_all", "0 batches of 2", "'bad'"),
    task_case("not_iterable", "load_batches", "NoneType", "'bad'"),
    task_case("batches_raise", "load_batches", "no images under /data/images", "'bad'"),
    task_case("likelihood_typo", "'categoricl'", "did you mean 'categorical'"),
    task_case("likelihood_variance", "gaussian", "-1", "positive"),
    task_case("likelihood_text", "'gaussian:one'", "gaussian:0.5"),
]
MODELS = [
    task_case("batchnorm", "1 (BatchNorm1d)", "eval()", checkpoint="batchnorm.safetensors"),
    task_case("dropout", "1 (Dropout)", "eval()", checkpoint="dropout.safetensors"),
    task_case("frozen", "no trainable parameter", "requires_grad"),
    model_case("returns_tuple", "tuple", ".logits"),
    model_case("returns_none", "NoneType", ".logits"),
    model_case("returns_vector", "shape (8,)", "batch first"),
    model_case("returns_one_sample", "shape (1, 3)", "batch first"),
    model_case("returns_nan", "samples [3]", "NaN"),
    model_case("returns_noise", "two different outputs", "eval()"),
    model_case("sees_samples", "outputs of sample", "see each other", "batch statistics"),
    model_case("raises", "model", "RuntimeError", "mat1 and mat2 do not fit"),
    model_case("build_raises", "build_model", "KeyError", "hidden_size"),
    model_case("build_returns_class", "build_model", "type", "torch.nn.Module"),
]
CHECKPOINTS = [
    checkpoint_case("nan", "'weight'", "NaN", "nan.safetensors"),
    checkpoint_case("infinite", "'weight'", "infinite", "infinite.safetensors"),
    checkpoint_case(
        "prefixed",
        *("missing: bias", "begin with 'model.'", "but for criterion.weight"),
    ),
    checkpoint_case(
        "wrong",
        *("missing: bias", "unexpected: scale, shift", "weight (3, 5) instead of (3, 4)"),
    ),
    checkpoint_case("truncated", "truncated.safetensors", "truncated"),
    checkpoint_case("header", "header.safetensors", "truncated"),
    checkpoint_case("nothing", "nothing.safetensors", "truncated"),
    checkpoint_case("text", "text.safetensors", "format"),
    checkpoint_case("truncated", "truncated.pt", "truncated", suffix=".pt"),
    checkpoint_case("half", "half.pt", "truncated", suffix=".pt"),
    checkpoint_case("nothing", "nothing.pt", "truncated", suffix=".pt"),
    checkpoint_case("text", "text.pt", "format", suffix=".pt"),
    checkpoint_case("bytes", "bytes.pt", "format", suffix=".pt"),
    checkpoint_case("list", "list.pt", "holds a list", "state dict", suffix=".pt"),
    checkpoint_case("tensor", "tensor.pt", "holds a Tensor", "state dict", suffix=".pt"),
    checkpoint_case(
        "numbers", "not plain tensors by name: epoch, step", "state dict", suffix=".pt"
    ),
    checkpoint_case(
        *("nested", "several state dicts", "my_weights, your_weights", "--checkpoint-key"),
        suffix=".pt",
    ),
    checkpoint_case("no_tensors", "holds nothing", "state dict", suffix=".pt"),
    checkpoint_case("module", "module.pt", "run code", "--allow-pickle", suffix=".pt"),
    checkpoint_case("bad_json", "bad_json.json", "JSON"),
    checkpoint_case("not_there", "not_there.safetensors", "no checkpoint"),
    checkpoint_case("empty", "empty", "no checkpoint", ".safetensors", suffix=""),
    checkpoint_case("no_checkpoint", "no_checkpoint", ".safetensors", suffix=""),
    checkpoint_case("nothing-like-*", "nothing-like-*", "glob", suffix=""),
]
OPTIONS = [
    option_case("damping-negative", "--damping 1e-3,-1", "-1.0", "≥ 0"),
    option_case("damping-nan", "--damping nan", "nan", "finite"),
    option_case("damping-inf", "--damping 1,inf", "inf", "finite"),
    option_case("damping-text", "--damping small", "'small'", "1e-8:1e4:50"),
    option_case("damping-empty", "--damping ''", "damping"),
    option_case("damping-range-text", "--damping 1e-3:1:many", "'1e-3:1:many'"),
    option_case("damping-range-from-0", "--damping 0:1:5", "'0:1:5'", "low"),
    option_case("damping-range-reversed", "--damping 1:1e-3:5", "low ≤ high"),
    option_case("damping-range-count", "--damping 1e-3:1:0", "count"),
    option_case("damping-range-nan", "--damping nan:1:3", "'nan:1:3'"),
    option_case("damping-scale", "--damping-scale relativ", "'relativ'", "'relative'?"),
    option_case("method", "--methods sgd,iief", "'iief'", "did you mean 'ief'"),
    option_case("method-parameter", "--methods sf:0", "'sf:0'", "≥ 1"),
    option_case("method-takes-none", "--methods ief:3", "'ief:3'", "no parameter"),
    option_case("method-exponent", "--methods diag-ef:half", "'diag-ef:half'", "diag-ef:0.5"),
    option_case("method-twice", "--methods ef,sgd,ef", "twice", "ef"),
    option_case("method-none", "--methods ''", "method", "known: "),
    option_case("engine", "--engine vmapp", "'vmapp'", "did you mean 'vmap'"),
    option_case("dtype", "--dtype flot64", "'flot64'", "did you mean 'float64'"),
    option_case("device", f"--device {ABSENT_DEVICE}", f"'{ABSENT_DEVICE}'", "not available"),
    option_case("device-unknown", "--device gpu", "'gpu'", "not available"),
    option_case("memory-text", "--memory lots", "'lots'", "8GiB"),
    option_case("memory-unit", "--memory 8GiG", "'8GiG'", "8GiB"),
    option_case("memory-negative", "--memory=-8GiB", "'-8GiB'", "8GiB"),
    option_case("memory-zero", "--memory 0", "memory", "positive"),
    option_case("batch-size-zero", "--batch-size 0", "batch size", "at least 1"),
    option_case("batch-size-text", "--batch-size many", "--batch-size", "integer"),
    option_case("num-batches-zero", "--num-batches 0", "number of batches", "at least 1"),
    option_case("option-unknown", "--bach-size 3", "--bach-size", "--batch-size"),
    option_case("seed-too-large", "--seed 99999999999999999999", "seed"),
]
OTHER_TASKS = [
    case(
        "batch-size-over-data",
        *("5000", "from 1 to 1437"),
        line="--task digits-cnn --checkpoint {place}/digits.safetensors --batch-size 5000",
    ),
    *(
        case(name, *words, line=f"--task {spec} --checkpoint {{place}}/good.safetensors")
        for name, spec, *words in (
            ("task-unknown", "digits-mpl", "'digits-mpl'", "did you mean 'digits-mlp'", ".py:name"),
            ("task-no-name", "{place}/tasks.py", "tasks.py", "file.py:name"),
            ("task-file-missing", "{place}/task.py:good", "task.py", "does not exist"),
            (
                "task-file-raises",
                "{place}/raising.py:t",
                "raising.py",
                "a_package_that_is_not_there",
            ),
            ("task-file-syntax", "{place}/syntax.py:t", "syntax.py", "SyntaxError"),
            ("task-name-unknown", "{place}/tasks.py:goood", "'goood'", "did you mean 'good'"),
            ("task-is-a-number", "{place}/tasks.py:a_number", "a_number is a int", "ngeval.Task"),
            ("task-needs-argument", "{place}/tasks.py:needs_argument", "without arguments"),
            ("task-raises", "{place}/tasks.py:raises_when_called", "set DATA_ROOT first"),
            ("task-returns-model", "{place}/tasks.py:returns_model", "Linear", "ngeval.Task"),
            ("task-module-missing", "no_such_package.tasks:t", "no_such_package", "ModuleNotFound"),
        )
    ),
]


@pytest.mark.parametrize(
    ("line", "words"),
    [*TARGETS, *INPUTS, *BATCHES, *MODELS, *CHECKPOINTS, *OPTIONS, *OTHER_TASKS],
)
def test_gamma_refuses(place, tmp_path, line, words):
    before = files_under(place)
    sizes = "" if "--batch-size" in line else "--batch-size 8 "
    sizes += "" if "--num-batches" in line else "--num-batches 2"
    output = tmp_path / "g.csv"
    result = run(f"gamma {line.format(place=place)} {sizes} --quiet --output {output}")
    assert_refused(result, *words)
    assert list(tmp_path.iterdir()) == []
    # Also the pickles' code has not run.
    assert {path for path in files_under(place) if "__pycache__" not in str(path)} == set(before)


@pytest.mark.parametrize(("line", "words"), [*TARGETS[:1], *CHECKPOINTS[:1], *OPTIONS[:1]])
def test_without_quiet_there_is_still_one_message(place, tmp_path, line, words):
    result = run(f"gamma {line.format(place=place)} --batch-size 8 -o {tmp_path}/g.csv")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert result.stderr.count("ngeval: ") == 1
    message = result.stderr[result.stderr.index("ngeval: ") :]
    assert all(word in message for word in words)
    assert list(tmp_path.iterdir()) == []


def grade(place, checkpoint="good.safetensors", task="good"):
    return (
        f"--task {place}/tasks.py:{task} --checkpoint {place}/{checkpoint} --batch-size 8 "
        "--num-batches 2 --quiet"
    )


class TestPickle:
    @pytest.mark.parametrize("name", ["code.pt", "inner_code.pt", "plain_pickle.pt"])
    def test_code_is_refused_and_not_run(self, place, tmp_path, name):
        result = run(f"gamma {grade(place, name)} -o {tmp_path}/g.csv")
        assert_refused(result, name, "run code", "refused", "state_dict()", "--allow-pickle")
        assert not (place / "the-code-ran").exists()
        assert list(tmp_path.iterdir()) == []

    def test_code_runs_with_the_flag(self, tmp_path, place):
        torch.save(RunsCode(tmp_path / "ran"), tmp_path / "code.pt")
        line = grade(place).replace(f"{place}/good.safetensors", f"{tmp_path}/code.pt")
        result = run(f"gamma {line} --methods sgd,ef --allow-pickle -o {tmp_path}/g.csv")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "ran").read_text() == "the code ran"
        run(f"gamma {grade(place)} --methods sgd,ef -o {tmp_path}/expected.csv")
        actual, expected = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("g", "expected"))
        assert actual["gamma"].tolist() == expected["gamma"].tolist()

    @pytest.mark.parametrize(
        ("name", "words"),
        [("list.pt", ("holds a list", "state dict")), ("text.pt", ("text.pt",))],
        ids=["list", "text"],
    )
    def test_the_flag_does_not_make_a_state_dict_of_anything(self, place, tmp_path, name, words):
        result = run(f"gamma {grade(place, name)} --allow-pickle -o {tmp_path}/g.csv")
        assert_refused(result, *words)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["text.pt", "bytes.pt", "truncated.pt", "nothing.pt"])
    def test_a_broken_file_is_not_taken_for_code(self, place, name):
        result = run(f"gamma {grade(place, name)}")
        assert result.exit_code == 2
        assert "allow-pickle" not in result.stderr


class TestFinishedRowsSurvive:
    def test_a_bad_second_checkpoint(self, place, tmp_path):
        more = f"{place}/wrong.safetensors"
        result = run(f"gamma {grade(place)} {more} --methods sgd,ef -q -o {tmp_path}/g.csv")
        assert_incomplete(result, "wrong.safetensors", "missing: bias")
        table = pd.read_csv(tmp_path / "g.csv")
        good = table["checkpoint"] == f"{place}/good.safetensors"
        assert (good.sum(), len(table)) == (8, 16)
        assert (table.loc[good, "status"] == "ok").all()
        assert (table.loc[~good, "status"] == "failed").all()
        assert table.loc[~good, "reason"].str.contains("missing: bias").all()

    def test_infinite_weights_in_a_second_checkpoint_are_told_by_file(self, place, tmp_path):
        more = f"{place}/infinite.safetensors"
        result = run(f"gamma {grade(place)} {more} --methods sgd -q -o {tmp_path}/g.csv")
        assert_incomplete(result, "'weight'", "infinite.safetensors")
        assert pd.read_csv(tmp_path / "g.csv")["status"].value_counts()["ok"] == 4

    def test_a_bad_second_batch(self, place, tmp_path):
        task = grade(place, task="second_batch")
        result = run(f"gamma {task} --methods sgd,ef -q -o {tmp_path}/g.jsonl")
        assert_incomplete(result, "batch 1: ", "outside the classes 0..2")
        table = pd.read_json(tmp_path / "g.jsonl", lines=True)
        assert table.groupby("batch")["status"].unique().explode().tolist() == ["ok", "failed"]

    @pytest.mark.parametrize(
        ("task", "word"),
        [("later_batches_raise", "disk went away"), ("too_few", "1 batches of 2")],
    )
    def test_a_second_batch_that_is_not_there_is_told_before_the_work(
        self, place, tmp_path, task, word
    ):
        words = f"gamma {grade(place, task=task)} --methods sgd,ef -o"
        assert_refused(run(f"{words} {tmp_path}/g.jsonl"), word)
        assert list(tmp_path.iterdir()) == []


COMMANDS = {
    "gamma": "gamma {grade} --output {output}",
    "sweep": "sweep {grade} --output {output}",
    "imbalance": "imbalance {grade} --output {output}",
    "plot": "plot {place}/gammas.csv --output {output}",
}


def command(name, place, output):
    return COMMANDS[name].format(grade=grade(place), place=place, output=output)


@pytest.mark.parametrize("name", COMMANDS)
class TestOutput:
    def test_exists(self, place, name):
        old = place / ("old.png" if name == "plot" else "old.csv")
        before = old.read_bytes()
        assert_refused(run(command(name, place, old)), old.name, "exists", "--force")
        assert old.read_bytes() == before

    def test_cannot_be_written(self, place, name):
        suffix = ".png" if name == "plot" else ".csv"
        output = place / "a_file" / f"r{suffix}"
        assert_refused(run(command(name, place, output)), "a_file", "cannot write")
        assert (place / "a_file").read_text() == "not a folder"

    def test_name_too_long(self, place, tmp_path, name):
        suffix = ".png" if name == "plot" else ".csv"
        output = tmp_path / ("n" * 300 + suffix)
        assert_refused(run(command(name, place, output)), "nnn", "too long")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("extension", ["xlsx", "txt", "none"])
    def test_unknown_extension(self, place, tmp_path, name, extension):
        output = tmp_path / ("results" if extension == "none" else f"results.{extension}")
        known = ".png, .svg, .pdf" if name == "plot" else ".csv, .parquet, .jsonl"
        assert_refused(run(command(name, place, output)), output.name, known)
        assert list(tmp_path.iterdir()) == []

    def test_is_a_folder(self, place, tmp_path, name):
        output = tmp_path / ("f.png" if name == "plot" else "f.csv")
        output.mkdir()
        assert_refused(run(command(name, place, output) + " --force"), output.name, "folder")
        assert list(output.iterdir()) == []


def test_output_is_checked_before_the_work(place, monkeypatch):
    monkeypatch.setattr("ngeval.runs.execute.Units", lambda *_, **__: pytest.fail("work was begun"))
    assert_refused(run(command("gamma", place, place / "old.csv")), "--force")


def test_a_failed_run_with_force_keeps_the_old_results(place):
    before = (place / "old.csv").read_bytes()
    line = f"gamma {grade(place, task='label_too_large')} --force -o {place}/old.csv"
    assert_refused(run(line), "target 7")
    assert (place / "old.csv").read_bytes() == before


class TestImbalance:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ("--damping=-1", ("-1", "≥ 0")),
            ("--damping nan", ("nan", "finite")),
            ("--damping inf", ("inf", "finite")),
            ("--damping small", ("--damping", "number")),
            ("--methods iief", ("'iief'", "did you mean 'ief'")),
            ("--methods ef,ef", ("twice",)),
        ],
    )
    def test_options(self, place, tmp_path, options, words):
        result = run(f"imbalance {grade(place)} {options} -o {tmp_path}/i.csv")
        assert_refused(result, *words)
        assert list(tmp_path.iterdir()) == []

    def test_task(self, place, tmp_path):
        line = f"imbalance {grade(place, task='inputs_nan')} -o {tmp_path}/i.csv"
        assert_refused(run(line), "inputs", "NaN")
        assert list(tmp_path.iterdir()) == []


class TestTrain:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ("--optimizer adamv", ("'adamv'", "did you mean 'adam")),
            ("--epochs=-1", ("epochs", "≥ 0")),
            ("--batch-size 0", ("batch size", "≥ 1")),
            ("--num-batches 0", ("batches", "1")),
            ("--lr 0", ("learning rate", "positive")),
            ("--lr=-0.1", ("learning rate", "positive", "-0.1")),
            ("--lr nan", ("learning rate", "positive", "nan")),
            ("--lr fast", ("--lr", "number")),
            (f"--device {ABSENT_DEVICE}", (f"'{ABSENT_DEVICE}'", "not available")),
            ("--device gpu", ("'gpu'", "not available")),
            ("--seed 99999999999999999999", ("seed",)),
        ],
    )
    def test_options(self, place, tmp_path, options, words):
        result = run(f"train -t {place}/tasks.py:good {options} -q -o {tmp_path}/run")
        assert_refused(result, *words)
        assert list(tmp_path.rglob("*.*")) == []

    @pytest.mark.parametrize(
        ("task", "words"),
        [
            ("label_too_large", ("target 7", "0..2")),
            ("labels_float", ("float64", "targets.long()")),
            ("empty", ("empty",)),
            ("inputs_nan", ("inputs", "NaN", "(4, 2)")),
            ("inputs_none", ("inputs", "NoneType")),
            ("batch_of_three", ("(inputs, targets)",)),
            ("none_at_all", ("load_batches", "'bad'")),
            ("batches_raise", ("no images under /data/images",)),
            ("frozen", ("no trainable parameter",)),
            ("returns_tuple", ("tuple", ".logits")),
            ("raises", ("RuntimeError", "mat1 and mat2 do not fit")),
            ("build_raises", ("build_model", "hidden_size")),
            ("build_returns_class", ("build_model", "torch.nn.Module")),
            ("likelihood_typo", ("did you mean 'categorical'",)),
        ],
    )
    def test_task(self, place, tmp_path, task, words):
        line = f"train -t {place}/tasks.py:{task} --batch-size 8 --epochs 1 -q -o {tmp_path}/run"
        assert_refused(run(line), *words)
        assert list(tmp_path.rglob("*.*")) == []

    def test_batch_size_over_the_data(self, tmp_path):
        line = f"train -t digits-cnn --batch-size 5000 -q -o {tmp_path}/run"
        assert_refused(run(line), "5000", "from 1 to 1437")

    def test_folder_of_an_earlier_run(self, place):
        before = files_under(place / "old_run")
        line = f"train -t {place}/tasks.py:good --epochs 0 -q -o {place}/old_run"
        assert_refused(run(line), "old_run", "epoch-000", "--force")
        assert files_under(place / "old_run") == before

    def test_a_failed_run_with_force_keeps_the_old_checkpoints(self, place):
        before = files_under(place / "old_run")
        line = f"train -t {place}/tasks.py:label_too_large --force -q -o {place}/old_run"
        assert_refused(run(line), "target 7")
        assert files_under(place / "old_run") == before

    @pytest.mark.parametrize("output", ["a_file", "a_file/run"])
    def test_output_cannot_be_written(self, place, output):
        line = f"train -t {place}/tasks.py:good --epochs 0 -q -o {place}/{output}"
        assert_refused(run(line), "a_file")
        assert (place / "a_file").read_text() == "not a folder"

    def test_divergence_keeps_the_epochs_before(self, place, tmp_path):
        options = "--optimizer sgd --lr 3e38 --epochs 9 --num-batches 5 --batch-size 8"
        result = run(f"train -t {place}/tasks.py:good {options} -q -o {tmp_path}")
        assert_refused(result, "diverged", "lower the learning rate")
        assert (tmp_path / "epoch-000.safetensors").is_file()
        for path in tmp_path.glob("*.json"):
            assert 0 < json.loads(path.read_text())["train_loss"] < float("inf")


class TestDemo:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ("--batch-size 0", ("batch size", "1")),
            ("--num-batches 0", ("number of batches", "1")),
            ("--epochs=-1", ("epochs", "≥ 0")),
            ("--batch-size 5000", ("5000", "from 1 to 1437")),
        ],
    )
    def test_options_are_checked_before_training(self, tmp_path, options, words, monkeypatch):
        monkeypatch.setattr(
            "ngeval.training.Training._train_epoch", lambda *_: pytest.fail("training was begun")
        )
        result = run(f"demo {options} -q -o {tmp_path}/demo")
        assert_refused(result, *words)
        assert list(tmp_path.rglob("*.*")) == []

    def test_output_is_a_file(self, place):
        assert_refused(run(f"demo -q -o {place}/a_file"), "a_file")
        assert (place / "a_file").read_text() == "not a folder"


class TestPlot:
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("gammas.csv --kind stage", ("'stage'", "did you mean 'stages'")),
            (
                "gammas.csv --kind imbalance",
                ("gradient_norm", "gradient norms from ngeval imbalance"),
            ),
            ("norms.csv --kind stages", ("method", "gamma")),
            ("norms.csv --kind damping", ("method", "gamma")),
            ("gammas.csv --damping 5", ("damping 5", "0.001")),
            ("gammas.csv --damping nan", ("damping nan",)),
            ("gammas.csv --damping=-1", ("damping -1",)),
            ("gammas.csv --damping small", ("--damping", "number")),
            ("gammas.csv --kind damping --checkpoint c.pt", ("'c.pt'", "a.pt", "b.pt")),
            ("not_there.csv", ("not_there.csv", "does not exist")),
            ("results.txt", ("results.txt", ".csv, .parquet, .jsonl")),
            ("no_rows.csv", ("no_rows.csv", "no rows")),
            ("empty.csv", ("empty.csv",)),
            ("empty.parquet", ("empty.parquet",)),
            ("empty.jsonl", ("empty.jsonl",)),
            ("garbage.csv", ("garbage.csv",)),
            ("garbage.parquet", ("garbage.parquet",)),
            ("garbage.jsonl", ("garbage.jsonl",)),
            ("truncated.parquet", ("truncated.parquet",)),
            ("a_folder.csv", ("a_folder.csv",)),
        ],
    )
    def test_refuses(self, place, tmp_path, line, words):
        assert_refused(run(f"plot {place}/{line} -o {tmp_path}/figure.png"), *words)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", ["stages", "damping"])
    @pytest.mark.parametrize(
        "column",
        ["checkpoint", "method", "damping", "gamma", "gamma_over_sgd", "gamma_over_ng", "status"],
    )
    def test_a_missing_column_is_named_or_not_needed(self, tmp_path, kind, column):
        gamma_table().drop(columns=column).to_csv(tmp_path / "t.csv", index=False)
        result = run(f"plot {tmp_path}/t.csv --kind {kind} -o {tmp_path}/figure.png")
        if result.exit_code == 0:
            assert (tmp_path / "figure.png").stat().st_size > 4000
        else:
            assert_refused(result, column)
            assert not (tmp_path / "figure.png").exists()

    @pytest.mark.parametrize("kind", ["stages", "damping"])
    def test_nothing_that_could_be_computed(self, tmp_path, kind):
        table = gamma_table().assign(status="failed", gamma=float("nan"), gamma_over_sgd=None)
        table.to_csv(tmp_path / "t.csv", index=False)
        result = run(f"plot {tmp_path}/t.csv --kind {kind} -o {tmp_path}/figure.png")
        assert_refused(result, "ok")
        assert not (tmp_path / "figure.png").exists()

    def test_no_positive_damping_in_the_damping_picture(self, tmp_path):
        gamma_table().assign(damping=0.0).to_csv(tmp_path / "t.csv", index=False)
        result = run(f"plot {tmp_path}/t.csv --kind damping -o {tmp_path}/figure.png")
        assert_refused(result, "damping", "0")
        assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gama", ("gama", "gamma")),
        ("gamma", ("--task",)),
        ("gamma --task digits-cnn", ("--checkpoint",)),
        ("train --task digits-cnn", ("--output",)),
        ("plot", ("results",)),
    ],
)
def test_incomplete_command_lines(line, words):
    assert_refused(run(line), *words)
