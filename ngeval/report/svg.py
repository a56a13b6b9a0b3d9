"""Pictures inside the page: SVG whose inks follow the page, with values beside the mouse."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ngeval.plots.style import in_style

INKS = {"#000000": "currentColor", "#444444": "var(--soft)", "#555555": "var(--soft)"}
"""Colours that would not be visible on a dark page, and what replaces them."""

REACH = 4.0
"""Distance in points from which the mouse shows a value."""

_LINK = "{http://www.w3.org/1999/xlink}href"


class Point(NamedTuple):
    """A value of a picture: where it is drawn, and what is shown beside it, line by line."""

    axes: Axes
    x: float
    y: float
    lines: tuple[str, ...]


def svg_text(figure: Figure, label: str, points: Sequence[Point], salt: str) -> str:
    """A figure as an ``svg`` element for a page, and close it.

    The label is its name for screen readers; the salt makes its ids differ from those of the other
    pictures of the page.
    """
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with in_style({"svg.hashsalt": salt, "figure.constrained_layout.use": False}):
        FigureCanvasSVG(figure)  # by whose sizes of text everything gets its place
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine(None)  # with one, saving draws the figure twice
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    plt.close(figure)
    root = ElementTree.fromstring(file.getvalue())  # noqa: S314  matplotlib wrote it
    for sheet in root.findall("{*}defs"):
        if sheet.find("{*}style") is not None:  # it would apply to the whole page
            root.remove(sheet)
    used = {element.get(_LINK, "")[1:] for element in root.iter()}
    used |= {element.get("clip-path", "")[5:-1] for element in root.iter()}
    for element in root.iter():
        _tidy(element, used)
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.attrib |= {"role": "img", "aria-label": label}
    _add_points(root, figure, points)
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(element: ElementTree.Element, used: set[str]) -> None:
    """Leave out what a page does not need: name spaces, ids, fonts, digits, line breaks."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = element.attrib
    if attributes.get("id") not in used:
        attributes.pop("id", None)
    if _LINK in attributes:
        attributes["href"] = attributes.pop(_LINK)
    if "d" in attributes:
        attributes["d"] = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(attributes["d"].split()))
    if "style" in attributes:
        style = re.sub(r"font-family: [^;]*;? ?", "", attributes["style"])
        for colour, ink in INKS.items():
            style = style.replace(colour, ink)
        attributes["style"] = style
    if not (element.text or "").strip():
        element.text = None
    element.tail = None


def _add_points(root: ElementTree.Element, figure: Figure, points: Sequence[Point]) -> None:
    """Add an invisible circle with a title for each value."""
    height = figure.get_figheight()
    for axes, x, y, lines in points:
        inches = axes.transData.transform((x, y)) / figure.dpi
        if not np.isfinite(inches).all():
            continue
        across, down = 72 * inches[0], 72 * (height - inches[1])
        place = {"cx": f"{across:.1f}", "cy": f"{down:.1f}", "r": f"{REACH:g}"}
        circle = ElementTree.SubElement(root, "circle", place)
        ElementTree.SubElement(circle, "title").text = "\n".join(lines)
