"""Pictures of a learned system: phase portrait, energy along a trajectory, and the error of the energy over the box."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bpfree.devices import doubled
from bpfree.document import run_plots
from bpfree.document.axes import fitting, linear
from bpfree.document.charts import Mark, Series, Shade, in_order, panel, shades
from bpfree.document.content import Figure, Key, Panel
from bpfree.document.run_plots import write_figure
from bpfree.files import write_text
from bpfree.network.network import evaluating
from bpfree_sampled import scores
from bpfree_sampled.task import HamiltonianSpec

if TYPE_CHECKING:
    from bpfree import Rule, Run

__all__ = ["FILE", "add_plot", "draw", "keep", "measure"]

FILE = "hamiltonian.json"
CELLS, TRAJECTORIES = 9, 3
LEAST = 1e-12
"""Error, relative to the largest energy, at the light end of the map's scale; 1 is the dark end."""
CAPTION = (
    "Trajectories of the learned field (lines) and of the true one (markers) from the same states, by the same integrator; the change of "
    "the true energy along the learned ones; and the error of the learned energy over a slice of the box, as a power of ten, relative to "
    "the largest energy in it. Other coordinates are 0 there."
)


@torch.no_grad()
def measure(rule: Rule, spec: HamiltonianSpec) -> dict[str, Any]:
    """Return what the pictures show, as plain values: trajectories, energies along them, and errors over a slice of the box."""
    parameter = next(rule.parameters())
    generator = torch.Generator(parameter.device).manual_seed(0)

    def outputs(states: Tensor) -> Tensor:
        return rule.predict(states.to(parameter), generator)

    with evaluating(rule):
        learned, true = scores.trajectories(spec, outputs, parameter.new_empty(0), TRAJECTORIES)
        rows, errors = _errors(spec, outputs)
    energies = spec.system.energy(learned.flatten(0, 1)).view(learned.shape[:2])
    d = spec.system.freedoms
    return {
        "names": [spec.system.names[0], spec.system.names[d]],
        "times": [spec.rollout_step * place for place in range(len(learned))],
        "learned": learned[..., [0, d]].transpose(0, 1).tolist(),
        "true": true[..., [0, d]].transpose(0, 1).tolist(),
        "energies": (energies - energies[0]).abs().T.tolist(),
        "places": rows,
        "errors": errors,
    }


def _errors(spec: HamiltonianSpec, outputs: Any) -> tuple[list[float], list[list[float]]]:
    """Return places (in half widths of the box), and relative errors of the energy there: rows of p, columns of q."""
    d, size = spec.system.freedoms, spec.input_size
    places = torch.linspace(-1, 1, CELLS, dtype=torch.float64)
    low, high = torch.tensor(spec.box, dtype=torch.float64).view(-1, 2).unbind(1)
    states = torch.zeros(CELLS, CELLS, size, dtype=torch.float64)
    middle, half = (low + high) / 2, (high - low) / 2
    states[..., 0] = middle[0] + half[0] * places
    states[..., d] = (middle[d] + half[d] * places)[:, None]
    origin = spec.corrected(doubled(outputs(torch.zeros(1, size, dtype=torch.float64))))[:1].cpu()
    made = spec.corrected(doubled(outputs(states.flatten(0, 1)))).cpu() - origin + spec.origin_energy
    true = spec.system.energy(states.flatten(0, 1))
    apart = (made - true).abs() / true.abs().max()
    return places.tolist(), apart.view(CELLS, CELLS).tolist()


def keep(folder: Path, rule: Rule, spec: HamiltonianSpec) -> Path:
    """Write what the pictures show to ``hamiltonian.json`` in the run's folder."""
    path = folder / FILE
    write_text(path, json.dumps(measure(rule, spec)) + "\n")
    return path


def add_plot(run: Run, path: Path) -> None:
    """Draw ``hamiltonian.json`` and add the plot to the run's artifacts; a failure is a warning."""
    run_plots.add_plot(run, "the system", lambda: draw(path, f"{run.name}: learned (lines) and true (markers)"), path)


def draw(path: Path, title: str) -> Path:
    """Draw ``hamiltonian.json``: three panels, a line for each trajectory."""
    content = json.loads(path.read_text(encoding="utf-8"))
    keys = in_order([f"trajectory {place + 1}" for place in range(len(content["learned"]))])
    panels = [_map(content)]
    if len(content["times"]) > 1:
        panels = [_portrait(content, keys), _energies(content, keys), *panels]
    return write_figure(path.parent / "plots" / "hamiltonian.svg", title, Figure(panels, CAPTION, keys))


def _portrait(content: Mapping[str, Any], keys: list[Key]) -> Panel:
    q, p = content["names"]
    drawn, points = [], []
    for key, learned, true in zip(keys, content["learned"], content["true"], strict=True):
        every = max(1, len(true) // 12)
        marks = [Mark(x, y, f"{key.label}, true: {q} {x:.3g}, {p} {y:.3g}") for x, y in true[::every]]
        drawn.append(Series(key, learned, points=marks))
        points += [*learned, *true]
    x, y = linear([point[0] for point in points], q), linear([point[1] for point in points], p)
    return panel(f"phase portrait: {p} over {q}", x, y, drawn)


def _energies(content: Mapping[str, Any], keys: list[Key]) -> Panel:
    lines = [list(zip(content["times"][1:], energies[1:], strict=True)) for energies in content["energies"]]
    values = [max(value, 1e-16) for one in lines for _, value in one]
    drawn = [Series(key, [(x, max(y, 1e-16)) for x, y in one]) for key, one in zip(keys, lines, strict=True)]
    return panel("change of the true energy", linear(content["times"], "time"), fitting(values, "change of the energy"), drawn)


def _map(content: Mapping[str, Any]) -> Panel:
    names = [f"{place:+.2f}" for place in content["places"]]
    cells = [
        [_shade(value, f"{content['names'][1]} {down}, {content['names'][0]} {across}") for across, value in zip(names, row, strict=True)]
        for down, row in zip(names, content["errors"], strict=True)
    ]
    below = "log10 of the error over the largest energy"
    axes = f"columns: {content['names'][0]}; rows, downwards: {content['names'][1]}; in half widths of the box"
    return shades("error of the energy", below, names, cells, small={}, axes=axes)


def _shade(value: float, place: str) -> Shade:
    if not math.isfinite(value):
        return Shade(None, "?", f"{place}: not finite")
    power = math.log10(max(value, 1e-16))
    share = min(1.0, max(0.02, 1 - power / math.log10(LEAST)))
    return Shade(share, f"{power:.0f}", f"{place}: {value:.2g}")
