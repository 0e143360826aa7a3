"""The plugin: the rule ``sampled``, the task ``hamiltonian``, the network ``hnn``, and pictures of what was learned of a system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree import DataSource, Rule, Run, hookimpl
from bpfree.network.builders import NetworkBuilder
from bpfree_sampled import pictures
from bpfree_sampled.network import HNN
from bpfree_sampled.rule import Sampled
from bpfree_sampled.task import HAMILTONIAN, HamiltonianSpec

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {"sampled": Sampled}


@hookimpl
def bpfree_tasks() -> dict[str, DataSource]:
    return {"hamiltonian": HAMILTONIAN}


@hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {"hnn": HNN}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}


@hookimpl
def epoch_end(run: Run, rule: Rule) -> None:
    """Keep what the pictures of a system show, after the last pass, or after each where it is not known which is the last."""
    if isinstance(rule.spec, HamiltonianSpec) and run.folder is not None and run.epoch >= (run.total_epochs or 0):
        run.artifacts[pictures.FILE] = pictures.keep(run.folder, rule, rule.spec)


@hookimpl(tryfirst=True)
def run_end(run: Run) -> None:
    """Draw the system: phase portrait, energy along trajectories, error over the box."""
    if run.folder is not None and (path := run.folder / pictures.FILE).exists():
        pictures.add_plot(run, path)


@hookimpl
def bpfree_presets() -> dict[str, dict[str, Any]]:
    return {"quickstart/sampled": {"rule": "sampled"}}
