"""The four families of rules on the contract, as small as they can be: none needs a special case in the trainer.

Forward gradients (Broadcast with a tangent), Hebbian learning (credit under no_grad, phases, before_update), predictive coding
(relaxation with pull; Z-IL, which is exactly back-propagation; incremental updates through learn), and zeroth order in place.
NoProp is the plugin's own test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from bpfree import (
    Batch,
    Broadcast,
    Budget,
    OptimizerConfig,
    Phase,
    Rule,
    Step,
    Task,
    TaskSpec,
    Trace,
    Traces,
    Traits,
    always,
    new_step,
)
from bpfree.baselines import Backprop, Frozen
from bpfree.network import MLPConfig, mlp
from bpfree.training.config import BudgetConfig, TrainConfig
from bpfree.training.trainer import Trainer

FLAT = TaskSpec("flat", input_shape=(6,), outputs=3)


def batch_of(count: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, 6, generator=generator, dtype=dtype).to(device)
    return Batch(inputs, torch.randint(3, (count,), generator=generator).to(device))


def grads(rule: Rule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


class ForwardGradient(Broadcast):
    """Activity perturbation with one global loss (Ren et al. 2022): s = (error . tangent), signal = s u."""

    def perturb(self, trace: Trace) -> Tensor:  # type: ignore[override]
        noise = torch.randn(trace.output.shape, generator=self.noise, device=trace.output.device, dtype=trace.output.dtype)
        return noise * (trace.output != 0)

    def signals(self, traces: Traces, batch: Batch, error: Tensor, step: Step) -> Sequence[Tensor | None]:
        assert traces.tangent is not None
        scalars = (error * traces.tangent).sum(1, keepdim=True)
        return [u * scalars for u in traces.perturbations[:-1] if u is not None]

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.noise = step.generator
        return super().credit(batch, step)


class Sanger(Rule):
    """Unsupervised hidden blocks, then a supervised readout: two phases with their own optimisers and batch sizes."""

    traits_of = always(Traits(dependence="upstream", downstream_weights=0, reverse_span=1, supervision="readout"))
    normalised = 0

    def phases(self, budget: Budget) -> Iterable[Phase]:
        hidden = tuple(self.network.hidden)
        yield Phase("features", epochs=1, groups=hidden, batch_size=16, optimizer=OptimizerConfig("sgd", lr=1e-3), evaluate=False)
        yield Phase(
            "readout", epochs=(budget.epochs or 2) - 1, groups=("readout",), batch_size=64, optimizer=OptimizerConfig("adam", lr=0.02)
        )

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.phase.name == "readout":
            loss = self.spec.loss(self.network(batch.inputs), batch)
            loss.backward()
            return {"loss": loss.detach()}
        for trace in self.network.stream(batch.inputs, grad=False):
            if trace.name in self.network.hidden:
                weight = trace.block[-2].weight
                x = trace.input.flatten(1)
                y = x @ weight.T
                ascent = (y.T @ x - (y.T @ y).tril() @ weight) / len(x)
                weight.grad = -ascent if weight.grad is None else weight.grad - ascent
        return {}

    def before_update(self, groups: Sequence[str]) -> None:
        self.normalised += 1


class PredictiveCoding(Rule):
    """Relaxation of hidden states with squared-error energies; ``inference`` steps of rate ``gamma``, then one update."""

    inference, gamma = 8, 0.1

    def relax(self, batch: Batch) -> tuple[list[Trace], list[Tensor]]:
        traces = list(self.network.traces(batch.inputs, input_grad=True))
        states = [trace.output.detach() for trace in traces[:-1]]
        for _ in range(self.inference):
            inputs = [batch.inputs, *states]
            traces = [self.network.trace(name, x, input_grad=True) for name, x in zip(self.network.names, inputs, strict=True)]
            errors = [state - trace.output.detach() for state, trace in zip(states, traces, strict=False)]
            top = -len(batch) * self.spec.error(traces[-1].output, batch)
            pulled = [trace.pull(error) for trace, error in zip(traces[1:], [*errors[1:], top], strict=True)]
            states = [state - self.gamma * (error - pull) for state, error, pull in zip(states, errors, pulled, strict=True)]
        return traces, [*errors, top]

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        traces, errors = self.relax(batch)
        for trace, error in zip(traces, errors, strict=True):
            trace.backward(-error / len(batch))
        return {"loss": self.spec.loss(traces[-1].output.detach(), batch)}


class ZIL(PredictiveCoding):
    """Z-IL (Song et al. 2020): forward initialisation, rate 1, layer l updated at step L - l only."""

    traits_of = always(Traits(update="own-steps"))

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        names = self.network.names
        traces = list(self.network.traces(batch.inputs, input_grad=True))
        error = -len(batch) * self.spec.error(traces[-1].output, batch)
        for name, trace in zip(reversed(names), reversed(traces), strict=True):
            pulled = trace.pull(error) if trace.index else error  # before this block's weights move
            trace.backward(-error / len(batch))
            step.apply(name)
            error = pulled
        return {}


class Zeroth(Rule):
    """Two-point zeroth order (MeZO), in place."""

    traits_of = always(Traits(update="in-place", reverse_span=0))

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        raise AssertionError("learn does it all")

    @torch.no_grad()
    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        directions = [torch.randn(p.shape, generator=step.generator, device=p.device, dtype=p.dtype) for p in self.network.parameters()]
        losses = []
        for scale in (1e-3, -2e-3):
            for p, z in zip(self.network.parameters(), directions, strict=True):
                p += scale * z
            losses.append(self.spec.loss(self.network(batch.inputs), batch))
        slope = (losses[0] - losses[1]) / 2e-3
        for p, z, name in zip(self.network.parameters(), directions, [n for n in self.groups() for _ in self.groups()[n]], strict=True):
            p += (1e-3 - step.lr(name) * slope) * z
        return {"loss": losses[0]}


def test_the_mean_forward_gradient_is_the_gradient(device: torch.device) -> None:
    """Oracle: autograd. With one linear layer per block and masked noise the estimator is unbiased."""
    torch.manual_seed(0)
    network = mlp(FLAT, MLPConfig(depth=2, width=5)).to(device, torch.float64)
    rule, batch = ForwardGradient(network, FLAT), batch_of(6, device)
    step = new_step(rule)
    draws = 3000
    for _ in range(draws):
        rule.credit(batch, step)
    mean = {name: grad / draws for name, grad in grads(rule).items()}
    rule.zero_grad()
    FLAT.loss(network(batch.inputs), batch).backward()
    for name, grad in grads(rule).items():
        cosine = torch.nn.functional.cosine_similarity(mean[name].flatten(), grad.flatten(), dim=0)
        assert cosine > 0.97, name


def test_z_il_equals_back_propagation_in_value(device: torch.device) -> None:
    """Oracle: one step of SGD on autograd's gradient, float64."""
    results = []
    for factory in (ZIL, Backprop):
        torch.manual_seed(0)
        rule = factory(mlp(FLAT, MLPConfig(depth=3, width=8, activation="tanh")).to(device, torch.float64), FLAT)
        rule.learn(batch_of(10, device), new_step(rule, OptimizerConfig("sgd", lr=1.0)))
        results.append([p.detach() for p in rule.parameters()])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_relaxation_does_not_depend_on_the_batch(device: torch.device) -> None:
    """State gradients are per example: relaxing two halves gives what relaxing the whole gives."""
    torch.manual_seed(0)
    rule = PredictiveCoding(mlp(FLAT, MLPConfig(depth=2, width=5, activation="tanh")).to(device, torch.float64), FLAT)
    whole = batch_of(8, device)
    _, together = rule.relax(whole)
    _, first = rule.relax(Batch(whole.inputs[:4], whole.targets[:4]))
    for both, half in zip(together, first, strict=True):
        torch.testing.assert_close(both[:4], half)


@pytest.mark.parametrize(
    ("factory", "optimizer", "epochs"),
    [
        (ForwardGradient, None, 6),
        (PredictiveCoding, None, 4),
        (ZIL, OptimizerConfig("sgd", lr=0.5), 6),
        (Zeroth, OptimizerConfig("sgd", lr=0.003), 20),
    ],
)
def test_every_family_learns_in_the_same_trainer(
    factory: type[Rule], optimizer: OptimizerConfig | None, epochs: int, digits: Task, device: torch.device
) -> None:
    """Above the own-prediction twin's accuracy at this budget, or (zeroth order) above chance by ten standard errors."""

    def trained(rule_class: type[Rule], optimizer: OptimizerConfig | None) -> float:
        torch.manual_seed(0)
        config = TrainConfig(budget=BudgetConfig(epochs=epochs), optimizer=optimizer or OptimizerConfig(), device=str(device))
        depth = 0 if rule_class is Zeroth else 2
        rule = rule_class(mlp(digits.spec, MLPConfig(depth=depth, width=64)), digits.spec)
        return Trainer(rule, digits, config).fit().result["test/accuracy"]

    floor = 0.1 + 10 * (0.09 / len(digits.test)) ** 0.5 if factory is Zeroth else trained(Frozen, None)
    assert trained(factory, optimizer) > floor


def test_phases_switch_groups_optimisers_and_batch_sizes(digits: Task, device: torch.device) -> None:
    torch.manual_seed(0)
    rule = Sanger(mlp(digits.spec, MLPConfig(depth=1, width=16)), digits.spec)
    before = {name: p.detach().clone().cpu() for name, p in rule.named_parameters()}
    config = TrainConfig(budget=BudgetConfig(epochs=6), device=str(device))
    run = Trainer(rule, digits, config).fit()
    after = dict(rule.named_parameters())
    steps = [metrics["steps"] for metrics in run.history]
    assert steps[0] == -(-len(digits.train) // 16)  # 1,295 examples leave a last batch of 15
    assert steps[1] - steps[0] == -(-len(digits.train) // 64)
    assert "val/accuracy" not in run.history[0]  # this phase is not evaluated
    assert rule.normalised == steps[-1]
    assert not torch.equal(after["network.blocks.b1.1.weight"].cpu(), before["network.blocks.b1.1.weight"])
    assert all(p.requires_grad for p in rule.parameters())
    assert run.result["test/accuracy"] > 0.6
