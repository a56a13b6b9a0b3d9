"""What is wrong with a picture, found from where the renderer puts things.

`overlaps` finds texts that overprint each other or are cut off at the figure's edge, and legends
over data; `bare_axes` and `small_texts` look at ticks and sizes in print; `faults` does all of it.
"""

from __future__ import annotations

import itertools
from unittest.mock import patch

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SLACK = 1.0
"""Points by which boxes may meet: a text's box has room for letters that it does not have."""


def overlaps(figure: Figure) -> list[str]:
    """Texts that overlap or are cut off, and legends that hide data; empty where all is well.

    Only what is really drawn counts: tick labels outside an axis's limits do not.
    """
    return _overlaps(figure, drawn_texts(figure))


def bare_axes(figure: Figure) -> list[str]:
    """Logarithmic axes with fewer than two numbers, of those that have numbers shown at all."""
    return _bare_axes(figure, drawn_texts(figure))


def small_texts(figure: Figure, least: float = 6.0) -> list[str]:
    """Texts below a size in points, at the width that the figure is made for."""
    return _small_texts(drawn_texts(figure), least)


def faults(figure: Figure) -> list[str]:
    """All that the others find."""
    texts = drawn_texts(figure)
    return _overlaps(figure, texts) + _bare_axes(figure, texts) + _small_texts(texts, 6.0)


def _overlaps(figure: Figure, texts: list[Text]) -> list[str]:
    boxes = [(_name(text), text.get_window_extent()) for text in texts]
    slack = SLACK * figure.dpi / 72
    result = [
        f"{one!r} overlaps {other!r}"
        for (one, first), (other, second) in itertools.combinations(boxes, 2)
        if _common(first, second, slack)
    ]
    inside = figure.bbox.padded(slack)
    result += [f"{name!r} is cut off" for name, box in boxes if not _contains(inside, box)]
    return result + _hidden(figure)


def _bare_axes(figure: Figure, texts: list[Text]) -> list[str]:
    drawn = set(texts)
    result = []
    for index, axes in enumerate(figure.axes):
        for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
            labels = [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
            numbers = {text.get_text() for text in labels if text in drawn}
            if scale == "log" and axes.get_visible() and _shown(axis) and len(numbers) < 2:
                result.append(f"panel {index}: the {axis.axis_name} axis has {sorted(numbers)}")
    return result


def _small_texts(texts: list[Text], least: float) -> list[str]:
    return [
        f"{_name(text)!r} has {text.get_fontsize():g} pt"
        for text in texts
        if text.get_fontsize() < least
    ]


def drawn_texts(figure: Figure) -> list[Text]:
    """The texts that a drawing of the figure puts onto the page."""
    # Things first have to be moved to their places: by the layout, or by a drawing without one.
    layout = figure.get_layout_engine()
    figure.draw_without_rendering() if layout is None else layout.execute(figure)
    result: list[Text] = []
    draw = Text.draw

    def record(self: Text, renderer: object, *args: object, **kwargs: object) -> None:
        if self.get_visible() and self.get_text().strip():
            result.append(self)
        draw(self, renderer, *args, **kwargs)

    in_place = patch.object(figure, "get_layout_engine", return_value=None)
    with in_place, patch.object(Text, "draw", record):
        figure.draw_without_rendering()
    return list(dict.fromkeys(result))


def _shown(axis: object) -> bool:
    """Whether the axis has tick labels turned on."""
    output = axis.get_tick_params()
    return output.get("labelbottom", output.get("labelleft", True)) or output.get(
        "labelright", False
    )


def _hidden(figure: Figure) -> list[str]:
    """Legends inside panels with lines, points or bars below them."""
    result = []
    for index, axes in enumerate(figure.axes):
        legend = axes.get_legend()
        if legend is None or not (axes.get_visible() and legend.get_visible()):
            continue
        box = legend.get_window_extent()
        lines = [line.get_transform().transform_path(line.get_path()) for line in axes.get_lines()]
        points = [
            collection.get_offset_transform().transform(collection.get_offsets())
            for collection in axes.collections
            if len(collection.get_paths()) == 1 and len(collection.get_offsets()) > 1
        ]
        bars = [bar.get_window_extent() for bar in axes.patches if isinstance(bar, Rectangle)]
        hidden = (
            any(path.intersects_bbox(box, filled=False) for path in lines)
            or any(_inside(box, places) for places in points)
            or any(_common(box, bar, 0.0) for bar in bars)
        )
        if hidden:
            result.append(f"panel {index}: the legend lies over data")
    return result


def _inside(box: Bbox, places: np.ndarray) -> bool:
    (x0, y0), (x1, y1) = box.min, box.max
    x, y = np.asarray(places, dtype=float).T
    return bool(((x0 < x) & (x < x1) & (y0 < y) & (y < y1)).any())


def _common(first: Bbox, second: Bbox, slack: float) -> bool:
    """Whether two boxes have more than ``slack`` pixels in common both ways."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width > slack and height > slack


def _contains(outer: Bbox, inner: Bbox) -> bool:
    return (
        outer.x0 <= inner.x0
        and outer.y0 <= inner.y0
        and outer.x1 >= inner.x1
        and outer.y1 >= inner.y1
    )


def _name(text: Text) -> str:
    return " ".join(text.get_text().split())
