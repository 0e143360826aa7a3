"""Alignment with true gradients. Oracles: rules whose credit is known, and identities between runs with and without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from made_time import Time
from torch import Tensor, nn
from training_rules import assert_equal_bits, config_of, noisy, rule_on, weights

from bpfree import (
    Batch,
    Network,
    OptimizerConfig,
    Rule,
    Step,
    Stepper,
    Task,
    TaskSpec,
    Traits,
    UsageError,
    always,
    hookimpl,
    new_step,
)
from bpfree.baselines import DFA, Backprop
from bpfree.config import resolve
from bpfree.network import MLPConfig, mlp
from bpfree.runner import refuse_changes
from bpfree.training.alignment import Alignment, AlignmentConfig
from bpfree.training.config import BudgetConfig
from bpfree.training.snapshot import Snapshot
from bpfree.training.trainer import Trainer

EVERY_STEP = AlignmentConfig(every=1, draws=2)
SPEC = TaskSpec("flat", input_shape=(6,), outputs=3)


def rough(factory: type[Rule], device: torch.device, **sizes: Any) -> Rule:
    """A small rule with dropout and batch norm."""
    torch.manual_seed(0)
    return factory(mlp(SPEC, MLPConfig(**{"depth": 2, "width": 16, "norm": "batch", "dropout": 0.3, **sizes})), SPEC).to(device)


def some_batch(device: torch.device, count: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return Batch(inputs.to(device), torch.randint(3, (count,), generator=generator).to(device))


def measured(rule: Rule, device: torch.device, *, draws: int = 0, parts: int = 1, optimizer: str = "sgd") -> dict[str, float]:
    stepper = Stepper(rule, OptimizerConfig(optimizer, lr=0.1))
    metrics = Alignment(stepper, AlignmentConfig(every=1, draws=draws), parts=parts).measure(some_batch(device))
    assert all(not value.requires_grad and value.shape == () for value in metrics.values())
    return {name.removeprefix("alignment/"): value.item() for name, value in metrics.items()}


class Local(Backprop):
    """Back-propagation of a loss of its own: the readout's, and the square of each hidden output."""

    def objective(self, batch: Batch, step: Step) -> Tensor:
        x, loss = batch.inputs, torch.zeros((), device=batch.inputs.device)
        for name in self.network.hidden:
            x = self.network.blocks[name](x)
            loss, x = loss + x.square().mean(), x.detach()
        return loss + self.spec.loss(self.network.blocks[self.network.readout or ""](x), batch)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.objective(batch, step)
        loss.backward()
        return {"loss": loss.detach()}


class Noised(Backprop):
    """The true gradient and Gaussian noise of a known size, from either stream of the step."""

    sigma = 0.02

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        for name, block in self.network.blocks.items():
            for index, p in enumerate(block.parameters()):
                generator = step.generator if name == "b1" else step.generator_for(f"{name}.{index}")
                p.grad = p.grad + self.sigma * torch.randn(p.shape, generator=generator, device=p.device)
        return metrics


class TopDown(Backprop):
    """Each block moves before the block below gets its signal through the moved weights."""

    traits_of = always(Traits(update="own-steps"))

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        traces = self.network.traces(batch.inputs)
        signal = self.spec.error(traces[-1].output.detach(), batch)
        for trace in reversed(traces):
            trace.backward(signal)
            step.apply(trace.name)
            if trace.index:
                signal = self.network.trace(trace.name, trace.input, input_grad=True).pull(signal)
        return {}


class InPlace(Backprop):
    """Gradient descent written by hand, with a momentum that it keeps outside of its buffers, and a counter."""

    traits_of = always(Traits(update="in-place"))

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.momenta: dict[nn.Parameter, Tensor] = {}
        self.taken = 0

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.spec.loss(self.network(batch.inputs), batch).backward()
        self.taken += 1
        with torch.no_grad():
            for p in self.network.parameters():
                self.momenta.setdefault(p, torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                p -= 0.125 * self.momenta[p]
                p.grad = None
        return {}


class Blocky(Rule):
    """A network that is no chain, without a loss that reverse mode could be taken of: only its noise can be measured."""

    traits_of = always(Traits(chain=False, readout="none"))

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        weight = next(self.network.blocks["t1"].parameters())
        weight.grad = 3 + torch.randn(weight.shape, generator=step.generator, device=weight.device)
        return {}


# --- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
def test_backprop_is_aligned_with_itself(device: torch.device, parts: int) -> None:
    """The same dropout masks and micro-batches, so cosine and ratio are 1."""
    found = measured(rough(Backprop, device), device, parts=parts)
    assert found == pytest.approx(
        {f"{block}/{name}": 1.0 for block in ("b1", "b2", "readout") for name in ("cosine", "norm_ratio")}, abs=1e-5
    )


def test_feedback_alignment_has_the_exact_readout_and_other_hidden_signals(device: torch.device) -> None:
    """Oracle for the hidden block: the two gradients by hand."""
    rule, batch = rough(DFA, device, dropout=0.0, norm="none", depth=1), some_batch(device)
    found = measured(rule, device)
    assert found["readout/cosine"] == pytest.approx(1, abs=1e-5)
    grads = []
    for fill in (lambda: rule.credit(batch, new_step(rule)), lambda: rule.spec.loss(rule.network(batch.inputs), batch).backward()):
        rule.zero_grad()
        fill()
        grads.append(torch.cat([p.grad.flatten() for p in rule.network.blocks["b1"].parameters()]))
    assert found["b1/cosine"] == pytest.approx(torch.cosine_similarity(*grads, dim=0).item(), abs=1e-5)
    assert found["b1/norm_ratio"] == pytest.approx((grads[0].norm() / grads[1].norm()).item(), rel=1e-4)
    assert abs(found["b1/cosine"]) < 0.9


def test_an_objective_of_its_own_is_compared_beside_the_tasks(device: torch.device) -> None:
    found = measured(rough(Local, device), device)
    for block in ("b1", "b2", "readout"):
        assert found[f"{block}/objective_cosine"] == pytest.approx(1, abs=1e-5)
        assert found[f"{block}/objective_norm_ratio"] == pytest.approx(1, abs=1e-5)
    assert found["readout/cosine"] == pytest.approx(1, abs=1e-5)
    assert abs(found["b1/cosine"]) < 0.9


@pytest.mark.parametrize("parts", [1, 3])
def test_known_noise_has_the_predicted_variance(device: torch.device, parts: int) -> None:
    """sigma^2 d / |g|^2 for d parameters, a third of it for three micro-batches with noise of their own.

    The deviation of this variance, taken from M draws, is sqrt(2 / (M - 1) d) of it.
    """
    rule, draws, batch = rough(Noised, device, dropout=0.0, norm="none", width=256), 3, some_batch(device)
    found = measured(rule, device, draws=draws, parts=parts)
    rule.spec.loss(rule.network(batch.inputs), batch).backward()
    for name, block in rule.network.blocks.items():
        size = sum(p.numel() for p in block.parameters())
        square = sum(p.grad.square().sum().item() for p in block.parameters())
        expected = rule.sigma**2 * size / square / parts
        assert found[f"{name}/variance"] == pytest.approx(expected, rel=5 * (2 / ((draws - 1) * size)) ** 0.5)


def test_a_rule_without_a_reference_has_its_variance_alone(device: torch.device) -> None:
    """Noise of unit variance about a mean of 3: 1 / 9, up to the mean's own noise."""
    network = Network({"t1": nn.Linear(6, 50), "t2": nn.Linear(6, 50)}, input_shape=(6,), chain=False)
    found = measured(Blocky(network, SPEC).to(device), device, draws=200)
    assert found == {"t1/variance": pytest.approx(1 / 9, rel=0.1)}  # t2 gets no credit


def test_frozen_blocks_are_left_out(device: torch.device) -> None:
    rule = rough(DFA, device)
    rule.freeze_features()
    assert set(measured(rule, device, draws=2)) == {"readout/cosine", "readout/norm_ratio", "readout/variance"}


def test_a_rule_that_applies_itself_is_measured_by_what_it_applies(device: torch.device) -> None:
    """Oracle: the step taken in earnest. The top block goes first, so it is exact; the signals below have passed moved weights."""
    rule = rough(TopDown, device, dropout=0.0)
    before = weights(rule)
    found = measured(rule, device)
    assert_equal_bits(weights(rule), before)
    assert found["readout/cosine"] == pytest.approx(1, abs=1e-5)
    batch = some_batch(device)
    rule.spec.loss(rule.network(batch.inputs), batch).backward()
    true = {name: torch.cat([p.grad.flatten() for p in block.parameters()]) for name, block in rule.network.blocks.items()}
    rule.zero_grad()
    rule.load_state_dict(before)
    Stepper(rule, OptimizerConfig("sgd", lr=0.1)).take(batch)
    for name, block in rule.network.blocks.items():
        moved = torch.cat([(before[f"network.blocks.{name}.{key}"].to(device) - p).flatten() for key, p in block.named_parameters()]) / 0.1
        assert found[f"{name}/cosine"] == pytest.approx(torch.cosine_similarity(moved, true[name], dim=0).item(), abs=1e-3)
    assert found["b1/cosine"] < 0.9999


def test_a_rule_that_updates_in_place_is_measured_by_its_change(device: torch.device) -> None:
    """Gradient descent at rate 1/8, its momentum still empty."""
    found = measured(rough(InPlace, device), device)
    for block in ("b1", "b2", "readout"):
        assert found[f"{block}/cosine"] == pytest.approx(1, abs=1e-4)
        assert found[f"{block}/norm_ratio"] == pytest.approx(0.125, rel=1e-3)


# --- the run stays as it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noisy", "accumulated", "own-steps", "in-place", "bf16"])
def test_the_run_is_the_same_bit_for_bit(digits: Task, device: torch.device, kind: str) -> None:
    """Dropout, batch norm, both streams, phases, growth, accumulation, momenta inside and outside of the optimiser."""
    options: dict[str, Any] = {"accumulated": {"accumulate": 3}, "bf16": {"precision": "bf16"}}.get(kind, {})
    options["budget"] = BudgetConfig(epochs=4 if kind == "noisy" else 1)
    results = []
    for alignment in (AlignmentConfig(), EVERY_STEP):
        if kind in ("own-steps", "in-place"):
            rule = rule_on(digits, TopDown if kind == "own-steps" else InPlace, norm="batch", dropout=0.2)
        else:
            rule = noisy(digits)
        run = Trainer(rule, digits, config_of(device, deterministic=True, alignment=alignment, **options)).fit()
        reported = [{name: value for name, value in epoch.items() if name.startswith(("rule/", "val/"))} for epoch in run.history]
        results.append((weights(rule), reported, getattr(rule, "taken", 0)))
        assert any(name.startswith("alignment/") for name in run.history[0]) == (alignment.every > 0)
    assert_equal_bits(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_gradients_that_wait_for_a_later_step_stay_and_are_not_counted(device: torch.device) -> None:
    rule = rough(Backprop, device)
    waiting = {p: torch.full_like(p, 3.0) for p in rule.parameters()}
    for p, grad in waiting.items():
        p.grad = grad
    assert measured(rule, device)["b1/cosine"] == pytest.approx(1, abs=1e-5)
    assert all(p.grad is grad and bool((grad == 3).all()) for p, grad in waiting.items())


def test_time_and_memory_are_not_counted(digits: Task, device: torch.device, clock: Time) -> None:
    """Oracle: a clock that a step moves by 1, and the objective of the comparison by 100."""

    class Slow(Backprop):
        def credit(self, batch: Batch, step: Step) -> Any:
            clock.now += 1
            return super().credit(batch, step)

        def objective(self, batch: Batch, step: Step) -> None:
            clock.now += 100

    runs = []
    for alignment in (AlignmentConfig(), AlignmentConfig(every=1)):
        config = config_of(device, alignment=alignment, budget=BudgetConfig(epochs=1))
        runs.append(Trainer(rule_on(digits, Slow), digits, config).fit())
        assert runs[-1].result["train/seconds"] == runs[-1].result["train/steps"] > 0
    assert clock.now >= 100 * runs[1].result["train/steps"]
    assert runs[1].result["train/peak_memory_mb"] == runs[0].result["train/peak_memory_mb"]


def test_metrics_are_means_over_the_sampled_steps(digits: Task, device: torch.device) -> None:
    """Sampled at step 0 alone, an epoch's mean is that step's value; the next epoch has none. Progress sees the same names."""

    class Seen:
        names: set[str] = set()

        @hookimpl
        def progress(self, metrics: Mapping[str, float]) -> None:
            self.names |= {name for name in metrics if name.startswith("alignment/")}

    config = config_of(device, alignment=AlignmentConfig(every=1000, draws=2), budget=BudgetConfig(epochs=2), log_interval=1e-9)
    seen = Seen()
    run = Trainer(rule_on(digits, DFA), digits, config, observers=[seen]).fit()
    first = {name for name in run.history[0] if name.startswith("alignment/")}
    assert first == seen.names == {f"alignment/{b}/{m}" for b in ("b1", "b2", "readout") for m in ("cosine", "norm_ratio", "variance")}
    assert run.history[0]["alignment/readout/cosine"] == pytest.approx(1, abs=1e-5)
    assert run.history[0]["alignment/b1/variance"] == 0  # this rule has no noise
    assert not any(name.startswith("alignment/") for name in run.history[1])


def test_it_may_change_when_a_run_goes_on() -> None:
    saved = resolve({"rule": "dfa"}).flat()
    assert saved["alignment.every"] == 0
    refuse_changes(["alignment.every", "alignment.draws"])
    with pytest.raises(UsageError, match="other settings"):
        refuse_changes(["alignment.every", "seed"])
    with pytest.raises(UsageError, match="out of range"):
        resolve({"alignment": {"every": -1}})


# --- snapshots ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_brings_back_what_a_rule_may_hold(device: torch.device) -> None:
    """Whatever was changed is as it was, twice; the objects are the same ones."""
    module = nn.BatchNorm1d(3).to(device)
    module.register_buffer("overlapping", torch.ones(1, device=device).expand(5))
    module.seen, module.by_name, module.count = [1, 2], {"a": torch.zeros(2, device=device)}, 7
    module.generator = torch.Generator(device).manual_seed(3)
    module.weight.grad = torch.ones(3, device=device)
    grad, weight = module.weight.grad, module.weight
    state = {name: value.clone() for name, value in module.state_dict().items()}
    snapshot = Snapshot(module, device=device)
    expected = torch.rand(2, device=device), torch.rand(2, generator=module.generator, device=device)
    for _ in range(2):
        snapshot.restore()
        drawn = torch.rand(2, device=device), torch.rand(2, generator=module.generator, device=device)
        assert all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))
        module(torch.randn(8, 3, device=device)).sum().backward()
        module.weight = nn.Parameter(torch.zeros(3, device=device))
        module.overlapping[:1].add_(1)
        module.by_name["a"] += 1
        module.by_name["b"], module.count, module.fresh = None, 8, True
        module.seen.append(3)
        module.eval()
    snapshot.restore()
    assert module.weight is weight
    assert module.weight.grad is grad
    assert torch.equal(grad, torch.ones(3, device=device))
    assert list(dict(module.named_parameters())) == ["weight", "bias"]
    assert module.bias.grad is None
    assert_equal_bits(state, module.state_dict())
    assert (module.seen, list(module.by_name), module.count, module.training) == ([1, 2], ["a"], 7, True)
    assert torch.equal(module.by_name["a"], torch.zeros(2, device=device))
    assert not hasattr(module, "fresh")


def test_a_block_whose_true_gradient_is_zero_is_left_out(device: torch.device) -> None:
    """Below a readout of zeros there is no direction to compare with; the readout itself has one."""
    rule = rough(Backprop, device, norm="none", dropout=0.0)
    nn.init.zeros_(rule.network.blocks["readout"].weight)  # type: ignore[arg-type]
    found = measured(rule, device, draws=2)
    assert set(found) == {"readout/cosine", "readout/norm_ratio", "readout/variance"}
    assert found["readout/cosine"] == pytest.approx(1)
