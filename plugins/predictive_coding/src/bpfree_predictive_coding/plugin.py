"""The plugin: predictive-coding rules, their networks and studies, and the plot of a relaxation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree import Rule, Run, hookimpl
from bpfree.network.builders import NetworkBuilder
from bpfree_predictive_coding import profile
from bpfree_predictive_coding.networks import RESIDUAL_MLP, VGG
from bpfree_predictive_coding.rules import ZIL, ErrorPC, FixedPrediction, IncrementalPC, PredictiveCoding, Relaxed

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {
        "predictive-coding": PredictiveCoding,
        "ipc": IncrementalPC,
        "fixed-prediction": FixedPrediction,
        "z-il": ZIL,
        "epc": ErrorPC,
    }


@hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {"pc-vgg": VGG, "residual-mlp": RESIDUAL_MLP}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}


@hookimpl
def epoch_end(run: Run, rule: Rule) -> None:
    """Keep the epoch's energies by block and inference step."""
    if isinstance(rule, Relaxed) and run.folder is not None and (table := rule.profile.take()) is not None:
        run.artifacts["relaxation.json"] = profile.keep(run.folder, run.epoch, rule.network.names, table)


@hookimpl(tryfirst=True)
def run_end(run: Run) -> None:
    """Draw the energies of the run."""
    if run.folder is not None and (path := run.folder / "relaxation.json").exists():
        profile.add_plot(run, path)


@hookimpl
def bpfree_presets() -> dict[str, dict[str, Any]]:
    return {
        "quickstart/predictive-coding": {"rule": "predictive-coding"},
        "floor/residual-mlp": {"rule": "frozen", "network.name": "residual-mlp"},
        "floor/pc-vgg (32x32)": {"rule": "frozen", "network.name": "pc-vgg", "task.size": 32},
    }
