"""Two parameters, two data: what EF, iEF, SGD and the natural gradient do to a least squares fit.

The losses are ℓ_n = ½r_n² with residuals r_n = x_n·θ − y_n, which θ = `MINIMUM` makes 0. Here iEF
is the natural gradient: both multiply every residual by 1 − η. EF takes r_n to r_n − η/r_n, so that
a datum that is nearly fitted throws it furthest; in units of √η this is Boole's map x − 1/x, whose
paths never come to rest. Source of the example: Wu et al. (arXiv 2406.06420), the figure on a
linear least squares problem of two parameters and two data.
"""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from ngeval.methods import get_method
from ngeval.plots.style import styles_of
from ngeval.problem import Problem

INPUTS = ((2.0, 0.0), (0.4, 0.6))
"""The rows x_n."""

MINIMUM = (1.0, 1.0)
RATES = {"sgd": 0.1, "ng": 0.1, "ief": 0.1, "ef": 0.02}
"""Learning rates: of the natural gradient one that shows the path, of EF one that brings the losses
to 0 in about as many steps, of SGD a half of the largest stable one."""

STARTS = ((-1.0, 1.8), (0.85, -1.2), (2.2, -0.2))


def trajectories(steps: int) -> Iterator[pd.DataFrame]:
    """One table for each method and start.

    Returns:
        Columns ``method, learning_rate, start, step, theta_1, theta_2, loss`` (L = Σ_n ℓ_n, in
        nats) and ``cosine_ng``, the cosine between the method's update and the natural gradient.
    """
    inputs = torch.tensor(INPUTS, dtype=torch.float64)
    targets = inputs @ torch.tensor(MINIMUM, dtype=torch.float64)
    for method, rate in RATES.items():
        for start, place in enumerate(STARTS):
            rows = _path(method, rate, torch.tensor([place], dtype=torch.float64), steps, inputs)
            found = pd.DataFrame(rows, columns=["step", "theta_1", "theta_2", "cosine_ng"])
            residuals = found[["theta_1", "theta_2"]].to_numpy() @ inputs.T.numpy()
            loss = 0.5 * np.square(residuals - targets.numpy()).sum(1)
            yield found.assign(method=method, learning_rate=rate, start=start, loss=loss)


def _path(
    method: str, rate: float, theta: Tensor, steps: int, inputs: Tensor
) -> list[tuple[int, float, float, float]]:
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64).eval()
    targets = (inputs @ torch.tensor(MINIMUM, dtype=torch.float64)).unsqueeze(1)
    rows = []
    for step in range(steps + 1):
        with torch.no_grad():
            model.weight.copy_(theta)
        problem = Problem(model, inputs, targets, "gaussian:1", probes=False)
        update, natural = (
            get_method(name).prepare(problem).direction(0.0) for name in (method, "ng")
        )
        cosine = torch.cosine_similarity(update, natural, dim=0)
        rows.append((step, float(theta[0, 0]), float(theta[0, 1]), float(cosine)))
        theta = theta - rate * update.reshape(1, 2)
    return rows


def plot_toy(rows: pd.DataFrame, axes: Axes) -> None:
    """The paths over the contours of the loss."""
    theta = rows[["theta_1", "theta_2"]].to_numpy()
    # A jump of EF may lead anywhere; the picture keeps to where the others are.
    calm = rows[rows["method"] != "ef"][["theta_1", "theta_2"]].to_numpy()
    low, high = calm.min(0) - 0.6, calm.max(0) + 0.6
    grid = [np.linspace(a, b, 120) for a, b in zip(low, high, strict=True)]
    first, second = np.meshgrid(*grid)
    inputs = np.array(INPUTS)
    residuals = np.stack([first - MINIMUM[0], second - MINIMUM[1]], -1) @ inputs.T
    loss = 0.5 * np.square(residuals).sum(-1)
    levels = np.geomspace(0.02, loss.max(), 9)
    axes.contour(first, second, loss, levels=levels, colors="#BBBBBB", linewidths=0.6)
    styles = styles_of(rows)
    for (method, start), path in rows.groupby(["method", "start"], sort=False):
        colour, marker, _ = styles[str(method)]
        label = str(method) if start == 0 else None
        if method == "ng":  # the line of iEF lies on it
            axes.plot(
                path["theta_1"], path["theta_2"], color=colour, linewidth=4, alpha=0.4, label=label
            )
            continue
        axes.plot(
            path["theta_1"],
            path["theta_2"],
            color=colour,
            marker=marker if method == "ef" else "",
            markersize=2,
            linewidth=0.5 if method == "ef" else mpl.rcParams["lines.linewidth"],
            label=label,
        )
    axes.plot(*MINIMUM, "k*", markersize=9, label="minimum")
    outside = int(((theta < low) | (theta > high)).any(1).sum())
    if outside:
        axes.text(
            0.02, 0.02, f"{outside} steps of EF are outside", transform=axes.transAxes, size=7
        )
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_xlabel("θ₁")
    axes.set_ylabel("θ₂")
    axes.set_title("two parameters, two data")
