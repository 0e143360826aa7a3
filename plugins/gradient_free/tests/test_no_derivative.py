"""No derivative is taken: nothing is saved for a graph, the engine is not entered, and no dual number is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_gradient_free.evolution import Evolution, EvolutionConfig
from bpfree_gradient_free.particles import Particles, ParticlesConfig
from bpfree_gradient_free.spsa import SPSA, SPSAConfig
from gradient_free_kit import batch_for, convolutional, spec_of
from torch.autograd import forward_ad

from bpfree import Rule, Stepper

CASES: dict[str, tuple[type[Rule], Any]] = {
    "particles": (Particles, ParticlesConfig(particles=2)),
    "particles, layer": (Particles, ParticlesConfig(particles=2, swarm="layer")),
    "particles, network": (Particles, ParticlesConfig(particles=2, swarm="network")),
    "spsa": (SPSA, SPSAConfig(directions=2)),
    "spsa, optimiser": (SPSA, SPSAConfig(directions=2, in_place=False)),
    "spsa, coordinates": (SPSA, SPSAConfig(directions=2, noise="coordinates")),
    "evolution": (Evolution, EvolutionConfig(population=4)),
    "evolution, rank 1": (Evolution, EvolutionConfig(population=4, rank=1)),
    "evolution, separable": (Evolution, EvolutionConfig(population=4, step_size="separable")),
}


def refused(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a derivative")


@pytest.mark.parametrize("name", CASES)
def test_no_graph_and_no_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = CASES[name]
    torch.manual_seed(0)
    network = convolutional()
    rule = kind(network, spec_of(network), config)
    stepper, batch = Stepper(rule), batch_for(network)
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", refused)
    monkeypatch.setattr(forward_ad, "make_dual", refused)
    monkeypatch.setattr(torch.Tensor, "backward", refused)
    with torch.autograd.graph.saved_tensors_hooks(refused, refused):
        metrics = stepper.take(batch)
    assert all(value.grad_fn is None and not value.requires_grad for value in metrics.values())
    assert all(p.requires_grad and p.grad_fn is None for p in network.parameters())
    assert rule.traits.reverse_span == 0
