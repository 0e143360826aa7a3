"""The plugin: rules whose errors travel through weights that are not the forward ones, and the plot of how far the two agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree import Rule, Run, hookimpl
from bpfree.network.builders import NetworkBuilder
from bpfree_feedback import agreement, burst_plot
from bpfree_feedback.agreement import HasFeedback
from bpfree_feedback.burst_network import CNN
from bpfree_feedback.burstccn import BurstCCN
from bpfree_feedback.drtp import DirectRandomTargetProjection
from bpfree_feedback.fixed import FeedbackAlignment
from bpfree_feedback.kolen_pollack import KolenPollack
from bpfree_feedback.networks import CIFAR_RESNET, LENET
from bpfree_feedback.pepita import PEPITA
from bpfree_feedback.signs import SignSymmetry
from bpfree_feedback.weight_mirror import WeightMirror

bpfree_api = 2


@hookimpl
def bpfree_rules() -> dict[str, type[Rule]]:
    return {
        "feedback-alignment": FeedbackAlignment,
        "sign-symmetry": SignSymmetry,
        "kolen-pollack": KolenPollack,
        "weight-mirror": WeightMirror,
        "burstccn": BurstCCN,
        "direct-random-target-projection": DirectRandomTargetProjection,
        "pepita": PEPITA,
    }


@hookimpl
def bpfree_networks() -> dict[str, NetworkBuilder]:
    return {"burst-cnn": CNN, "cifar-resnet": CIFAR_RESNET, "lenet": LENET}


@hookimpl
def bpfree_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}


@hookimpl
def epoch_end(run: Run, rule: Rule) -> None:
    """Keep how far feedback and forward weights of each layer agree after this epoch."""
    if isinstance(rule, HasFeedback) and run.folder is not None:
        run.artifacts["feedback.json"] = agreement.keep(run.folder, run.epoch, agreement.measure(rule.feedback_pairs()))


@hookimpl(tryfirst=True)
def run_end(run: Run) -> None:
    """Draw the angles and norm ratios of the run, and the bursts of a bursting network."""
    burst_plot.add_plot(run)
    if run.folder is not None and (path := run.folder / "feedback.json").exists():
        agreement.add_plot(run, path)


@hookimpl
def bpfree_presets() -> dict[str, dict[str, Any]]:
    return {
        "quickstart/kolen-pollack": {"rule": "kolen-pollack"},
        "floor/burst-cnn (32x32)": {"rule": "frozen", "network.name": "burst-cnn", "task.size": 32},
        "floor/lenet": {"rule": "frozen", "network.name": "lenet"},
        "floor/cifar-resnet 20": {"rule": "frozen", "network.name": "cifar-resnet"},
    }
