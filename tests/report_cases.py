"""Small result tables with planted numbers, for the tests of the report."""

from __future__ import annotations

import base64
import gzip
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pandas as pd

import ngeval.report.charts
from ngeval.report.charts import Chart

RATIOS = {"sgd": 1.0, "ief": 0.5, "ef": 10.0, "diag": 1.0}
"""γ/γ_SGD at the last checkpoint and the smallest λ, but for noise: diag is not told from SGD."""

DAMPINGS = (1e-6, 1e-3, 1.0)
EPOCHS = (0, 5, 10)

HOSTILE = {
    "task": "<script>window.hit=1</script>",
    "checkpoint": "</script><img src=x onerror=window.hit=2>\"'&amp;",
    "method": 'a<b>b</b>%{x}<a href="javascript:window.hit=3">$x$</a>',
    "reason": "]]>--><svg onload=window.hit=4>{{ 7 * 7 }}",
}
"""Names that must be shown and never be run."""

PAYLOADS = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "javascript:alert(4)",
    '<a href="javascript:alert(5)">x</a>',
    "'-alert(6)-'",
    "]]>--><svg/onload=alert(7)>",
    "</title><body onload=alert(8)>",
    "{{ 7 * 7 }}{% raw %}",
    "%{y}\u2028alert(9)\u2029",
    "<b>b</b>&lt;script&gt;$x$",
    "</style><iframe srcdoc='<script>alert(10)</script>'>",
)
"""Names that would run where a page took them for more than text."""


@contextmanager
def few_pictures() -> Iterator[None]:
    """Drawing is most of a page's time: of each chart, draw the first, the last and the shown."""
    with patch.object(ngeval.report.charts, "MAX_OPTIONS", 2):
        yield


@contextmanager
def one_picture() -> Iterator[None]:
    """Of each chart, draw what is shown first."""
    with patch.object(ngeval.report.charts, "evenly", lambda count, most: []):
        yield


@contextmanager
def no_pictures() -> Iterator[None]:
    """Pages with empty pictures, for what does not depend on them."""
    with patch.object(
        Chart, "drawn", lambda chart, key: iter([(chart.title, "<svg></svg>", True)])
    ):
        yield


def unfolded(page: str) -> str:
    """A page in which the pictures that its script unpacks stand as text, as the shown ones do."""
    return re.sub(
        r'data-packed="([^"]*)">',
        lambda found: ">" + gzip.decompress(base64.b64decode(found[1])).decode(),
        page,
    )


def gammas(
    ratios: dict[str, float] | None = None,
    *,
    task: str = "t",
    batches: int = 6,
    dampings: tuple[float, ...] = DAMPINGS,
    epochs: tuple[int, ...] = EPOCHS,
    noise: float = 0.05,
) -> pd.DataFrame:
    """What ``ngeval gamma`` writes: γ/γ_SGD = ratio^((epoch + 1)/(last + 1)) · λ-factor · noise.

    The λ-factor draws every method towards 1 as λ grows, to half of its logarithm a step.
    """
    rows = []
    for stage, epoch in enumerate(epochs):
        for batch in range(batches):
            sgd = 0.2 * (1 + 0.1 * batch)
            for index, (method, ratio) in enumerate((ratios or RATIOS).items()):
                sign = 0 if method == "sgd" else (-1) ** (batch + index)  # of even counts, 0 in all
                factor = math.exp(noise * sign * (1 + batch // 2))
                for place, damping in enumerate(dampings):
                    power = (epoch + 1) / (epochs[-1] + 1) / 2**place
                    value = ratio**power * factor
                    rows.append(
                        {
                            "task": task,
                            "checkpoint": f"runs/epoch-{epoch:03d}.pt",
                            "stage": stage,
                            "epoch": float(epoch),
                            "step": 10.0 * epoch,
                            "batch": batch,
                            "method": method,
                            "damping": damping,
                            "damping_scale": "absolute",
                            "gamma": sgd * value,
                            "gamma_over_sgd": value,
                            "gamma_over_ng": value / 0.25,
                            "gamma_min": 0.25 * sgd,
                            "gamma_floor": 0.2 * sgd,
                            "gamma_ng_lower": 0.25 * sgd * (1 + damping),
                            "gamma_ng_upper": 0.25 * sgd * (1 + damping),
                            "status": "ok",
                            "reason": "",
                            "num_samples": 32,
                            "metric_samples": 32,
                            "num_parameters": 1234,
                            "likelihood": "categorical",
                            "dtype": "float32",
                            "engine": "layers",
                            "seed": 3 + batch,
                        }
                    )
    return pd.DataFrame(rows)


def samples(task: str = "t", growth: float = 10.0) -> pd.DataFrame:
    """What ``ngeval imbalance`` writes: norms from 1 to 2·growth^stage in every batch."""
    frames = []
    for stage, epoch in enumerate(EPOCHS):
        for batch in range(6):
            norms = np.geomspace(1.0, 2.0 * growth**stage * (1 + 0.01 * batch), 16)
            frames.append(
                pd.DataFrame(
                    {
                        "task": task,
                        "checkpoint": f"runs/epoch-{epoch:03d}.pt",
                        "epoch": float(epoch),
                        "batch": batch,
                        "sample": range(16),
                        "gradient_norm": norms,
                        "residual_norm": norms / 2,
                        "loss": norms / 3,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def layers() -> pd.DataFrame:
    """What ``ngeval layers`` writes: ef spends 70 % in layer "out", which buys 30 %."""
    shares = {"sgd": ((0.5, 0.5), (0.5, 0.5)), "ef": ((0.7, 0.3), (0.3, 0.7))}
    rows = [
        {
            "task": "t",
            "checkpoint": f"runs/epoch-{epoch:03d}.pt",
            "epoch": float(epoch),
            "batch": batch,
            "method": method,
            "damping": 1e-3,
            "layer": layer,
            "num_parameters": 10,
            "gamma": 0.1,
            "gamma_over_sgd": 1.0,
            "gamma_over_best": 2.0,
            "gamma_total": 0.1,
            "decrease_share": buys,
            "curvature_share": spends,
            "excess": spends - buys,
            "status": "ok",
            "reason": "",
        }
        for epoch in EPOCHS
        for batch in range(3)
        for method, result in shares.items()
        for layer, buys, spends in zip(("0.1", "out"), *result, strict=True)
    ]
    return pd.DataFrame(rows)


def hostile() -> pd.DataFrame:
    """Names that try to break out of the page, also of a row that failed."""
    names = {"runs/epoch-000.pt": "ok.pt", "runs/epoch-010.pt": HOSTILE["checkpoint"]}
    table = gammas({"sgd": 1.0, HOSTILE["method"]: 2.0}, task=HOSTILE["task"], epochs=(0, 10))
    table = table.drop(columns=["epoch", "step"])
    table["checkpoint"] = table["checkpoint"].map(names)
    lost = (table["method"] != "sgd") & (table["batch"] == 0) & (table["damping"] == 1.0)
    table.loc[lost, ["status", "reason"]] = ["failed", HOSTILE["reason"]]
    return table
