"""Models as people write them: torchvision's style, several outputs, task files, checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ngeval
from ngeval.cli.app import app
from tests.test_hf_models import expected_gammas, sample_gradients


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, with activations in place."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """With the names of torchvision's: conv1, bn1, layer1.0.conv1, …, fc."""

    def __init__(self, num_classes: int = 4, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Outputs(NamedTuple):
    logits: Tensor
    aux_logits: Tensor


class WithAuxiliary(ResNet):
    """As GoogLeNet: a named tuple of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Outputs:
        features = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        pooled = self.avgpool(features).flatten(1)
        return Outputs(self.fc(pooled), self.aux(pooled))


def trained(make: type[nn.Module], seed: int = 0) -> nn.Module:
    """With running statistics that are not those of the start."""
    torch.manual_seed(seed)
    model = make()
    for _ in range(3):
        model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=generator).double(), torch.arange(size) % 4


def test_a_residual_network_against_autograd():
    model, (images, targets) = trained(ResNet).double(), batch()
    problem = ngeval.Problem(model, images, targets, "categorical")
    assert problem.engine == "layers"
    named = {"x": images}
    gradients = sample_gradients(model, named, targets)
    norms = gradients.norm(dim=1).numpy()
    np.testing.assert_allclose(ngeval.gradient_norms(problem)["gradient_norm"], norms, rtol=1e-9)
    expected = expected_gammas(model, named, targets, gradients, 1e-2)
    table = ngeval.evaluate(problem, list(expected), [1e-2]).set_index("method")["gamma"]
    assert table.to_dict() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("output", "head"), [(None, "fc"), ("aux_logits", "aux"), (1, "aux")])
def test_each_of_two_heads(output, head):
    model, (images, targets) = trained(WithAuxiliary).double(), batch()
    problem = ngeval.Problem(model, images, targets, "categorical", output=output)
    gradient = problem.function.unflatten(problem.gradient())
    used = {name for name, part in gradient.items() if bool(part.abs().max() > 0)}
    assert f"{head}.weight" in used
    assert {"fc.weight", "aux.weight"} - used == {"fc.weight", "aux.weight"} - {f"{head}.weight"}


TASK = """
import torch, ngeval
from tests.test_bring_your_own import WithAuxiliary

def batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 4):
        yield torch.randn(batch_size, 3, 32, 32, generator=generator), torch.arange(batch_size) % 4

task = ngeval.Task("two-heads", WithAuxiliary, batches, "categorical", output="aux_logits")
"""


def test_reference_scripts_checkpoints_through_a_task_file(tmp_path: Path):
    (tmp_path / "task.py").write_text(TASK)
    for epoch in range(2):
        model = trained(WithAuxiliary, epoch)
        wrapped = OrderedDict((f"module.{n}", t) for n, t in model.state_dict().items())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        content = {"model": wrapped, "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(content, tmp_path / f"model_{epoch}.pth")
    result = CliRunner().invoke(
        app,
        [
            *("gamma", "--task", f"{tmp_path}/task.py:task", "-c", f"{tmp_path}/model_*.pth"),
            *("--batch-size", "5", "--num-batches", "1", "--methods", "sgd,ief,ng"),
            *("--damping", "1e-3", "--output", str(tmp_path / "g.csv")),
        ],
    )
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "g.csv")
    images, targets = next(iter(ngeval.tasks.get_task(f"{tmp_path}/task.py:task").batches(5, 1, 0)))
    model = trained(WithAuxiliary, 1)
    problem = ngeval.Problem(model, images, targets, "categorical", output="aux_logits")
    expected = ngeval.evaluate(problem, ["sgd", "ief", "ng"], [1e-3])["gamma"].to_numpy()
    assert table[table["stage"] == 1]["gamma"].to_numpy() == pytest.approx(expected, rel=1e-6)
