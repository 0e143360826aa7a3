"""Rules whose step is a pure function.

Oracles: direct feedback alignment as the core's own rule computes it, ``torch.vmap`` against a loop, an eager run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bpfree
from bpfree import Batch, Card, Gradients, Network, Pure, Split, Task, TaskSpec, TrainConfig, Traits, always
from bpfree.baselines import DFA
from bpfree.pure import Tensors
from bpfree.training import compiling
from bpfree.training.config import BudgetConfig
from bpfree.training.stepper import Stepper
from bpfree.training.trainer import Trainer

SPEC = TaskSpec("vectors", (6,), 3)


def network() -> Network:
    torch.manual_seed(0)
    blocks = {"b1": nn.Sequential(nn.Linear(6, 8), nn.Tanh()), "b2": nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "readout": nn.Linear(8, 3)}
    return Network(blocks, input_shape=(6,), readout="readout")


class PureDFA(Pure):
    """Direct feedback alignment in closed form, for blocks of a linear map and a tanh."""

    card = Card("direct feedback alignment as a pure function", equation="delta_l = B_l e f'(a_l)")
    traits_of = always(Traits(dependence="all", downstream_weights=0, reverse_span=0))

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        for name in self.network.hidden:
            self.register_buffer(f"feedback_{name}", torch.randn(spec.outputs, self.network.shapes[name].numel()) / spec.outputs**0.5)

    def gradients(self, parameters: Tensors, buffers: Tensors, batch: Batch, noise: Tensors) -> Gradients:
        inputs, x = {}, batch.inputs
        outputs = {}
        for name in self.network.names:
            inputs[name] = x
            outputs[name] = x = self.run(name, parameters, buffers, x)
        loss, error = self.spec.loss_and_error(x, batch)
        found = {}
        for name in self.network.names:
            hidden = name != self.network.readout
            delta = (error @ buffers[f"feedback_{name}"]) * (1 - outputs[name] ** 2) if hidden else error
            path = f"network.blocks.{name}.0." if hidden else f"network.blocks.{name}."
            found |= {f"{path}weight": delta.T @ inputs[name], f"{path}bias": delta.sum(0)}
        return Gradients(found, metrics={"loss": loss})


class Noisy(PureDFA):
    """The same with noise on the gradient of one weight, and a count of its steps."""

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.register_buffer("steps", torch.zeros(()))

    def noise(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        return {"weight": (3, 8)}

    def gradients(self, parameters: Tensors, buffers: Tensors, batch: Batch, noise: Tensors) -> Gradients:
        made = super().gradients(parameters, buffers, batch, noise)
        found = {**made.parameters, "network.blocks.readout.weight": noise["weight"]}
        return Gradients(found, {"steps": buffers["steps"] + 1}, made.metrics)


def batch(seed: int = 1) -> Batch:
    return Batch(torch.randn(12, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(12) % 3)


def pair() -> tuple[PureDFA, DFA]:
    ours, core = PureDFA(network(), SPEC), DFA(network(), SPEC)
    for name in ("b1", "b2"):
        ours.get_buffer(f"feedback_{name}").copy_(core.get_buffer(f"feedback_{name}"))
    return ours, core


def test_the_gradients_are_those_of_the_core_s_rule() -> None:
    ours, core = pair()
    for rule in (ours, core):
        rule.credit(batch(), bpfree.new_step(rule))
    for mine, theirs in zip(ours.network.parameters(), core.network.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-7)


def test_the_function_changes_nothing() -> None:
    rule = Noisy(network(), SPEC)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    parameters, buffers = dict(rule.named_parameters()), dict(rule.named_buffers())
    noise = {"weight": torch.ones(3, 8)}
    with torch.no_grad():
        first, second = (rule.gradients(parameters, buffers, batch(), noise) for _ in range(2))
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)
    assert all(torch.equal(before[name], value) for name, value in rule.state_dict().items())


def test_it_is_mapped_over_parameters() -> None:
    """Three networks at once by ``vmap`` give what a loop over them gives."""
    rule = pair()[0]
    many = {name: torch.stack([p.detach() * factor for factor in (0.5, 1.0, 2.0)]) for name, p in rule.named_parameters()}
    buffers, data = dict(rule.named_buffers()), batch()
    mapped = torch.vmap(lambda parameters: rule.gradients(parameters, buffers, data, {}).parameters)(many)
    for place in range(3):
        alone = rule.gradients({name: value[place] for name, value in many.items()}, buffers, data, {}).parameters
        assert all(torch.allclose(mapped[name][place], alone[name], atol=1e-6) for name in alone)


def test_noise_is_keyed_by_the_step_and_buffers_are_taken_over() -> None:
    drawn = []
    for _ in range(2):
        rule = Noisy(network(), SPEC)
        stepper = Stepper(rule, bpfree.OptimizerConfig("sgd", lr=1.0))
        before = rule.network.blocks["readout"].weight.detach().clone()  # type: ignore[operator, union-attr]
        stepper.take(batch())
        drawn.append(before - rule.network.blocks["readout"].weight.detach())  # type: ignore[operator]
        stepper.take(batch())
        assert float(rule.get_buffer("steps")) == 2
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].std() > 0.5


def test_gradients_are_accumulated_and_parameters_that_do_not_learn_stay() -> None:
    rule = pair()[0]
    rule.network.blocks["b1"].requires_grad_(False)
    step = bpfree.new_step(rule)
    rule.credit(batch(), step)
    once = rule.network.blocks["readout"].weight.grad.clone()  # type: ignore[operator, union-attr]
    rule.credit(batch(), step)
    assert torch.allclose(rule.network.blocks["readout"].weight.grad, 2 * once)  # type: ignore[arg-type]
    assert all(p.grad is None for p in rule.network.blocks["b1"].parameters())


def test_the_step_is_compiled_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that leaves graphs alone: one graph for the step, and the numbers of an eager run."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "inductor", lambda graph, inputs, mode: graph.forward)
    task = Task(SPEC, *(Split(batch(seed).inputs, batch(seed).targets) for seed in (1, 2, 3)))
    results = []
    for mode in ("none", "default"):
        rule = pair()[0]
        trainer = Trainer(rule, task, TrainConfig(budget=BudgetConfig(epochs=3), batch_size=6, compile=mode))
        run = trainer.fit()
        results.append((run.result["test/loss"], [p.detach().clone() for p in rule.parameters()], run.result.get("train/compile_seconds")))
    (eager, mine, none), (compiled, theirs, seconds) = results
    assert none is None
    assert seconds is not None
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
    torch._dynamo.reset()
