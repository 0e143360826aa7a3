"""Reads numbers back from charts, as a person would: by the ticks beside them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from statistics import fmean
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
Points = list[tuple[float, float]]


@dataclass
class Drawn:
    """A panel: its texts, and the points of lines and markers by the name that is shown when the pointer rests on them."""

    title: str
    x_label: str
    x_ticks: list[str]
    y_ticks: list[str]
    lines: dict[str, Points] = field(default_factory=dict)
    markers: dict[str, tuple[float, float]] = field(default_factory=dict)
    looks: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each line: class and colour of its own."""


def drawn(text: str) -> list[Drawn]:
    """The panels of an SVG file, in their order."""
    root = ElementTree.fromstring(re.sub(r' xmlns="[^"]+"', "", text))
    return [_read(panel) for panel in root.iter("svg") if panel.get("class") == "panel"]


def texts(text: str, kind: str) -> list[str]:
    """All texts of a class."""
    root = ElementTree.fromstring(re.sub(r' xmlns="[^"]+"', "", text))
    return [node.text or "" for node in root.iter("text") if node.get("class") == kind]


def _read(panel: Element) -> Drawn:
    text = {kind: [node for node in panel.iter("text") if node.get("class") == kind] for kind in ("head", "tick", "name")}
    title, label = (text[kind][0].text or "" for kind in ("head", "name"))
    across = [node for node in text["tick"] if node.get("text-anchor") == "middle"]
    up = [node for node in text["tick"] if node.get("text-anchor") == "end"]
    found = Drawn(title, label, [node.text or "" for node in across], [node.text or "" for node in up])
    x = _Scale([(float(node.get("x", "")), node.text or "") for node in across], log="logarithmic" in label)
    y = _Scale([(float(node.get("y", "")) - 4, node.text or "") for node in up], log="logarithmic" in title)  # 4: half a letter
    for group in panel.iter("g"):
        for node in group.findall("path"):
            if node.get("class") == "line":
                name = node.findtext("title") or ""
                places = [tuple(map(float, pair.split())) for pair in node.get("d", "")[1:].split("L")]
                found.lines[name] = [(x.value(a), y.value(b)) for a, b in places]
                found.looks[name] = (group.get("class", ""), group.get("style", ""))
        if group.get("class") == "dot":
            a, b = _middle(group)
            found.markers[group.findtext("title") or ""] = (x.value(a), y.value(b))
    return found


def _middle(group: Element) -> tuple[float, float]:
    """Of a marker, to a pixel: a triangle's corners have their middle a little below its place."""
    if (circle := group.find("circle")) is not None:
        return float(circle.get("cx", "")), float(circle.get("cy", ""))
    polygon = group.find("polygon")
    assert polygon is not None
    corners = [tuple(map(float, pair.split(","))) for pair in polygon.get("points", "").split()]
    return fmean(a for a, _ in corners), fmean(b for _, b in corners)


class _Scale:
    """From pixels to values, by the first and the last tick."""

    def __init__(self, ticks: list[tuple[float, str]], *, log: bool) -> None:
        self.log = log
        (self.at, first), (end, last) = ticks[0], ticks[-1]
        self.first = self._scaled(first)
        self.slope = (self._scaled(last) - self.first) / (end - self.at) if len(ticks) > 1 else math.nan

    def _scaled(self, text: str) -> float:
        value = float(text[:-1]) * SUFFIXES[text[-1]] if text[-1] in SUFFIXES else float(text)
        return math.log10(value) if self.log else value

    def value(self, pixel: float) -> float:
        place = self.first + self.slope * (pixel - self.at) if pixel != self.at else self.first
        return 10**place if self.log else place
