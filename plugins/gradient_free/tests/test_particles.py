"""Swarms. Oracles: the network executed with each candidate, losses that never rise, least squares, swarms that cannot move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_gradient_free import particles
from bpfree_gradient_free.layers import find_layers, run
from bpfree_gradient_free.particles import Particles, ParticlesConfig
from bpfree_gradient_free.swarm import Swarms
from gradient_free_kit import NETWORKS, NUMBERS, VECTORS, batch_for, convolutional, dense, spec_of, weights_of
from torch import Tensor, nn

from bpfree import Batch, BudgetConfig, Network, Stepper, Task, TaskSpec, TrainConfig, Trainer
from bpfree.errors import UsageError
from bpfree.network import MLPConfig, mlp

KINDS: list[dict[str, Any]] = [
    {},
    {"assembly": "together"},
    {"memory": "measured", "rounds": 2},
    {"memory": "kept"},
    {"swarm": "layer", "particles": 9},
    {"swarm": "network", "particles": 9, "memory": "measured"},
]


def rule_of(network: Network, spec: TaskSpec | None = None, **options: Any) -> Particles:
    torch.manual_seed(1)
    return Particles(network, spec or spec_of(network), ParticlesConfig(**{"particles": 4, **options}))


# --- the layers and what is executed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_in_sequence_are_the_network(name: str) -> None:
    """Oracle: the network itself."""
    network = NETWORKS[name]()
    x = batch_for(network).inputs
    expected = network(x)
    layers = find_layers(network)
    x = run(layers[0].before, x)
    for layer in layers:
        u = layer.module(x)
        torch.testing.assert_close(layer.execute(x, layer.rows()), u)
        torch.testing.assert_close(run(layer.behind, u), expected)
        x = run(layer.tail, u)
    torch.testing.assert_close(x, expected)
    assert sum(layer.neurons * layer.numbers for layer in layers) == sum(p.numel() for p in network.parameters())


def test_rows_are_written_as_they_were_read() -> None:
    for layer in find_layers(convolutional()):
        rows = torch.randn_like(layer.rows())
        with torch.no_grad():
            layer.write(rows)
            layer.write(rows[1:2] + 1, 1)
        rows[1] += 1
        assert torch.equal(layer.rows(), rows)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_layers_that_are_not_in_sequence_are_refused() -> None:
    network = Network({"b1": Wrapped(), "readout": nn.Linear(6, 5)}, input_shape=(6,), readout="readout")
    with pytest.raises(UsageError, match=r"b1\.inner"):
        rule_of(network, VECTORS)
    rule_of(network, VECTORS, swarm="network")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("assembly", ["in-turn", "together"])
def test_losses_of_candidates_are_those_of_the_network(name: str, assembly: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: each candidate written into a copy of the network that was there at its turn, which is executed."""
    network = NETWORKS[name]()
    rule, batch = rule_of(network, assembly=assembly), batch_for(network)
    spec, seen = spec_of(network), []
    original = particles._Visit._losses

    def compared(self: Any, neuron: int, candidates: Tensor) -> Any:
        found = original(self, neuron, candidates)
        now = self.layer.rows()
        for place, value in zip(self.places[neuron], found[0], strict=True):
            self.layer.write(place[None], neuron)
            torch.testing.assert_close(spec.loss(network(batch.inputs), batch), value)
            self.layer.write(now)
        seen.append(neuron)
        if assembly == "in-turn":  # so that the next neuron meets what was chosen
            row = particles._choose(found[0], self.places[neuron], now[neuron], self.loss)[0]
            self.layer.write(row[None], neuron)
        return found

    monkeypatch.setattr(particles._Visit, "_losses", compared)
    with torch.no_grad():
        rule.learn(batch, Stepper(rule).step)
    assert len(seen) == sum(layer.neurons for layer in rule.layers)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_chunks_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: everything at once. Sizes of products differ, so rounding does."""
    found = []
    for size in (2**22, 100):
        monkeypatch.setattr(particles, "AT_ONCE", size)
        rule = rule_of(convolutional(), **options)
        stepper = Stepper(rule)
        for _ in range(2):
            stepper.take(batch_for(rule.network))
        found.append(weights_of(rule))
    torch.testing.assert_close(found[0], found[1])


# --- learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_on_a_fixed_batch_the_loss_never_rises(name: str, options: dict[str, Any]) -> None:
    network = NETWORKS[name]()
    rule, batch = rule_of(network, **options), batch_for(network)
    stepper, spec = Stepper(rule), spec_of(network)
    found = [float(spec.loss(network(batch.inputs), batch).detach())]
    for _ in range(6):
        metrics = stepper.take(batch)
        found.append(float(spec.loss(network(batch.inputs), batch).detach()))
        assert float(metrics["loss"]) == pytest.approx(found[-2], rel=1e-9)
        assert float(metrics["loss_after"]) == pytest.approx(found[-1], rel=1e-9)
        assert found[-1] <= found[-2] * (1 + 1e-9)
    assert found[-1] < 0.97 * found[0]


@pytest.mark.parametrize("swarm", ["neuron", "layer", "network"])
def test_without_weights_nothing_moves_and_the_run_says_so(swarm: Any, digits: Task) -> None:
    """Oracle: w = c1 = c2 = 0 keeps each particle on its row."""
    torch.manual_seed(0)
    config = ParticlesConfig(swarm=swarm, particles=2, inertia=0, own=0, common=0)
    rule = Particles(mlp(digits.spec, MLPConfig(widths=[3])), digits.spec, config)
    before = weights_of(rule)
    settings = TrainConfig(budget=BudgetConfig(epochs=1), batch_size=432, device="cpu")
    run = Trainer(rule, digits, settings).fit()
    assert torch.equal(weights_of(rule), before)
    assert [value for key, value in run.history[0].items() if key.endswith("speed")] == [0]
    assert "no particle moves" in rule.plan()
    assert "no particle moves" not in Particles(mlp(digits.spec), digits.spec).plan()


def test_a_linear_neuron_converges_to_least_squares() -> None:
    """Oracle: the normal equations, by torch.linalg.lstsq."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)[:, None] + 0.7
    y += 0.3 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    network = Network({"readout": nn.Linear(5, 1)}, input_shape=(5,), readout="readout").double()
    rule = rule_of(network, NUMBERS, particles=20, memory="kept", rounds=250)
    Stepper(rule).take(Batch(x, y))
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1), y).solution[:, 0]
    torch.testing.assert_close(weights_of(rule), expected, rtol=0, atol=1e-4)


def test_frozen_layers_stay_and_their_neurons_are_not_counted() -> None:
    rule = rule_of(dense())
    everything = rule.traits.passes
    rule.freeze_features()
    before = {name: p.clone() for name, p in rule.network.named_parameters()}
    stepper = Stepper(rule)
    for _ in range(3):
        stepper.take(batch_for(rule.network))
    changed = {name.split(".")[1] for name, p in rule.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"readout"}
    assert (everything, rule.traits.passes) == (1 + 4 * (7 + 6 + 5), 1 + 4 * 5)


def test_the_neurons_swarms_hold_one_particle_per_row() -> None:
    rule = rule_of(convolutional())
    shapes = [tuple(swarms.position.shape) for swarms in rule._swarms()]
    assert shapes == [(3, 4, 2 * 9 + 1), (4, 4, 3 * 9 + 1), (4, 4, 4 * 16 + 1)]
    assert "3 swarm(s) of 4 particles with 19 numbers each" in rule.plan()


# --- swarms ---------------------------------------------------------------------------------------------------------------


def test_particles_move_by_the_published_equation() -> None:
    """Oracle: the equation for each number by itself."""
    torch.manual_seed(0)
    rows = torch.randn(2, 3, dtype=torch.float64)
    swarms = Swarms(rows, 4, 0.5)
    swarms.best.add_(torch.randn_like(swarms.best))
    position, velocity, best = (getattr(swarms, name).clone() for name in ("position", "velocity", "best"))
    swarms.move(rows + 1, 0.7, 1.4, 1.5, torch.Generator().manual_seed(3))
    r1, r2 = torch.rand(2, 2, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    velocity = 0.7 * velocity + 1.4 * r1 * (best - position) + 1.5 * r2 * (rows[:, None] + 1 - position)
    torch.testing.assert_close(swarms.velocity, velocity)
    torch.testing.assert_close(swarms.position, position + velocity)


def test_what_is_remembered() -> None:
    swarms = Swarms(torch.zeros(1, 2), 2, 1.0)
    swarms.position.add_(torch.tensor([[[1.0, 1.0], [2.0, 2.0]]]))
    swarms.remember(torch.tensor([[3.0, float("nan")]]))
    assert swarms.value.tolist() == [[3.0, float("inf")]]
    swarms.age(0.02)
    assert swarms.value.tolist() == [[pytest.approx(3.06), float("inf")]]
    swarms.position.add_(1)
    swarms.remember(torch.tensor([[3.05, -1.0]]))
    assert swarms.best.tolist() == [[[2.0, 2.0], [3.0, 3.0]]]
    swarms.age(0.5)
    assert swarms.value.tolist() == [[pytest.approx(4.575), -0.5]]  # a remembered loss becomes worse, whatever its sign


def test_memories_are_measured_on_each_batch() -> None:
    """Oracle: the losses of the remembered places on this batch, by the network."""
    rule = rule_of(mlp(VECTORS, MLPConfig(widths=[3])).double(), memory="measured", swarm="network")
    stepper = Stepper(rule)
    stepper.take(batch_for(rule.network, seed=1))
    batch = batch_for(rule.network, seed=2)
    stepper.take(batch)
    swarms = next(iter(rule._swarms()))
    for place, value in zip(swarms.best[0], swarms.value[0], strict=True):
        torch.nn.utils.vector_to_parameters(place, rule.network.parameters())
        torch.testing.assert_close(VECTORS.loss(rule.network(batch.inputs), batch), value)
