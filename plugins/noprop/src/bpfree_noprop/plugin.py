"""What the plugin registers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree.hooks import hookimpl
from bpfree.network.builders import NetworkBuilder
from bpfree.rule import Rule
from bpfree.run import Run
from bpfree_noprop import blocks, modern, stems, timed, timed_stems, times_plot
from bpfree_noprop.adjoint import NoPropAdjoint
from bpfree_noprop.backprop import NoPropBackprop
from bpfree_noprop.ct import NoPropCT
from bpfree_noprop.dt import NoPropDT
from bpfree_noprop.fm import NoPropFM

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {
        "noprop-dt": NoPropDT,
        "noprop-ct": NoPropCT,
        "noprop-fm": NoPropFM,
        "noprop-backprop": NoPropBackprop,
        "noprop-adjoint": NoPropAdjoint,
    }


@hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {**blocks.NETWORKS, **modern.NETWORKS, **stems.NETWORKS, **timed.NETWORKS, **timed_stems.NETWORKS}


@hookimpl
def epoch_end(run: Run, rule: Rule) -> None:
    """Keep the schedule of continuous time, and the times it learns at."""
    if isinstance(rule, NoPropCT) and run.folder is not None:
        run.artifacts[times_plot.FILE] = times_plot.keep(run.folder, run.epoch, rule)


@hookimpl(tryfirst=True)
def run_end(run: Run) -> None:
    """Draw the times of the run."""
    if run.folder is not None and (path := run.folder / times_plot.FILE).exists():
        times_plot.add_plot(run, path)


@hookimpl
def bpfree_presets() -> dict[str, dict[str, Any]]:
    of_rule = {"noprop-dt": {**blocks.NETWORKS, **modern.NETWORKS}, "noprop-ct": timed.NETWORKS}
    floors = {
        f"floor/{network}": {"rule": rule, "network.name": network, "twin": True}
        for rule, networks in of_rule.items()
        for network in networks
    }
    floors["floor/noprop-residual"]["task.size"] = 16  # its stages need larger images
    single = {**floors["floor/noprop-mlp"], "rule.T": 1, "network.blocks": 1}
    return {"quickstart/noprop-dt": {"rule": "noprop-dt"}, "floor/noprop-mlp of one block": single, **floors}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {f"noprop/{path.stem}": path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}
